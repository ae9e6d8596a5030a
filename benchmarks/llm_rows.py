"""Rows of `benchmarks/llm.py`: four data sets with right and wrong answers, as conversations with a known truth.

Every data set is a list of `Question`; what is wrong with an answer differs:

| name            | a wrong answer is                                       | who made it wrong         |
|-----------------|---------------------------------------------------------|---------------------------|
| `mismatched`    | the answer to another row of Alpaca                     | this module               |
| `rated`         | an answer of Alpaca rated below 4.5 of 5 (AlpaGasus)    | a strong model's judgment |
| `hh_rlhf`       | the last answer of a conversation that people rejected  | people's choice           |
| `gsm8k`         | a language model's solution that is not correct         | the models themselves     |
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from common import DATA

Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A prompt with the answers that there are to it.

    Attributes:
        prompt: messages, the last one of the user.
        right, wrong: an answer of each kind, or None.
    """

    prompt: list[Message]
    right: str | None
    wrong: str | None


@dataclass(frozen=True)
class Sizes:
    """How many rows, and how long they may be.

    Attributes:
        num_train: half of them right, half wrong.
        num_validation, num_eval: trusted and held-out rows, all right.
        max_prompt_tokens, max_answer_tokens: of the text alone, without the chat template.
    """

    num_train: int
    num_validation: int
    num_eval: int
    max_prompt_tokens: int
    max_answer_tokens: int


def read_alpaca() -> Iterator[Row]:
    """The uncleaned Alpaca, with its ratings."""
    with gzip.open(DATA / "alpaca/alpaca_52k.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def alpaca_prompt(row: Row) -> list[Message]:
    """Instruction and input as one message."""
    return [{"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["input"])))}]


def mismatched_questions() -> list[Question]:
    """Alpaca; half of the training rows get another's answer later, see `mismatch`."""
    return [Question(alpaca_prompt(row), row["output"], None) for row in read_alpaca()]


def rated_questions() -> list[Question]:
    """Alpaca: right where it is rated 4.5 or more."""
    return [
        Question(alpaca_prompt(row), *((row["output"], None) if row["rated_4.5"] else (None, row["output"])))
        for row in read_alpaca()
    ]


def conversation(text: str) -> list[Message]:
    """The messages of a conversation of hh_rlhf."""
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = []
    for part in text.split("\n\nHuman: ")[1:]:
        for role, content in zip(roles, part.split("\n\nAssistant:"), strict=False):
            messages.append({"role": roles[role], "content": content.strip()})
    return messages


def hh_questions() -> list[Question]:
    """Conversations whose last answer has an accepted and a rejected version."""
    with gzip.open(DATA / "hh_rlhf/harmless-base-test.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    questions = []
    for pair in pairs:
        chosen, rejected = conversation(pair["chosen"]), conversation(pair["rejected"])
        if chosen[:-1] == rejected[:-1] and chosen[-1]["role"] == "assistant":
            questions.append(Question(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]))
    return questions


def gsm8k_questions() -> list[Question]:
    """Questions with a correct and a wrong solution of a language model: the first there is of each kind."""
    questions = []
    for line in (DATA / "gsm8k/model_solutions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found: dict[bool, str] = {}
        for name, solution in row.items():
            if name not in ("question", "ground_truth"):
                found.setdefault(solution["is_correct"], solution["solution"])
        questions.append(Question([{"role": "user", "content": row["question"]}], found.get(True), found.get(False)))
    return questions


def mismatch(rows: list[Row], rng: random.Random) -> list[Row]:
    """Half of the rows, drawn at random, get the answer of the next of them; none keeps its own.

    Raises:
        AssertionError: so many answers are the same that this cannot be had.
    """
    places = sorted(rng.sample(range(len(rows)), len(rows) // 2))
    for _ in range(100):
        rng.shuffle(places)
        following = places[1:] + places[:1]
        if all(rows[i]["completion"] != rows[j]["completion"] for i, j in zip(places, following, strict=True)):
            break
    else:
        raise AssertionError("no order of the answers gives each row another one")
    mixed = list(rows)
    for i, j in zip(places, following, strict=True):
        mixed[i] = rows[i] | {"completion": rows[j]["completion"], "is_right": False}
    return mixed


def split(
    questions: list[Question], sizes: Sizes, count_tokens: Callable[[str], int], rng: random.Random
) -> dict[str, list[Row]]:
    """Rows of the parts ``eval``, ``validation`` and ``train``; no prompt is in two of them, or twice in one.

    Half of the training rows are wrong where there are wrong answers; else all are right.

    Args:
        count_tokens: of a text.

    Raises:
        ValueError: too few questions are short enough.
    """
    has_wrong = any(question.wrong for question in questions)
    num_wrong = sizes.num_train // 2 if has_wrong else 0
    quotas = [
        ("eval", True, sizes.num_eval),
        ("validation", True, sizes.num_validation),
        ("train", True, sizes.num_train - num_wrong),
        ("train", False, num_wrong),
    ]
    parts: dict[str, list[Row]] = {"eval": [], "validation": [], "train": []}
    order, taken = rng.sample(questions, len(questions)), set[str]()
    for part, is_right, num_rows in quotas:
        wanted = len(parts[part]) + num_rows
        for question in order:
            if len(parts[part]) == wanted:
                break
            answer = ((question.right if is_right else question.wrong) or "").strip()
            text = "\n".join(message["content"] for message in question.prompt)
            is_new = bool(answer) and text not in taken
            if (
                is_new
                and count_tokens(text) <= sizes.max_prompt_tokens
                and count_tokens(answer) <= sizes.max_answer_tokens
            ):
                taken.add(text)
                completion = [{"role": "assistant", "content": answer}]
                parts[part].append({"prompt": question.prompt, "completion": completion, "is_right": is_right})
        if len(parts[part]) < wanted:
            raise ValueError(f"{part}: only {len(parts[part])} of {wanted} rows are short enough. Ask for fewer")
    rng.shuffle(parts["train"])
    return parts


QUESTIONS: dict[str, Callable[[], list[Question]]] = {
    "mismatched": mismatched_questions,
    "rated": rated_questions,
    "hh_rlhf": hh_questions,
    "gsm8k": gsm8k_questions,
}
FOLDERS = {"mismatched": "alpaca", "rated": "alpaca", "hh_rlhf": "hh_rlhf", "gsm8k": "gsm8k"}  # of their data


def make_parts(name: str, sizes: Sizes, count_tokens: Callable[[str], int], seed: int) -> dict[str, list[Row]]:
    """The parts of a data set; see `split`."""
    rng = random.Random(seed)
    parts = split(QUESTIONS[name](), sizes, count_tokens, rng)
    if name == "mismatched":
        parts["train"] = mismatch(parts["train"], rng)
    return parts
