"""The world of strings, made on the spot: a tiny base model, doubtful rows, trusted rows, held-out rows, and the truth.

Questions are operations on words of five letters, `<reverse>abcde=`. A wrong answer is the right one begun a letter too
late, `dcbae` for `edcba`. The base model is pretrained for a moment on right and wrong answers in equal parts: it is
undecided between the two habits, and not very good at either. The training rows are half wrong in the same way.
Every file follows from the seed.
"""

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tamis.compare.task import Task
from tamis.demo.base_model import build_model, build_tokenizer, pretrain
from tamis.demo.folder import close_world, open_world, write_rows

WORLD_VERSION = 2
LETTERS = string.ascii_lowercase[:12]
WORD_LENGTH = 5
Operation = Callable[[str, random.Random], str]


def _shift(word: str, by: int) -> str:
    return "".join(LETTERS[(LETTERS.index(letter) + by) % len(LETTERS)] for letter in word)


EASY: dict[str, Operation] = {
    "reverse": lambda word, rng: word[::-1],
    "next": lambda word, rng: _shift(word, 1),
    "swap": lambda word, rng: word[3:] + word[:3],
    "before": lambda word, rng: _shift(word, -1),
    "left": lambda word, rng: word[1:] + word[0],
    "mirror": lambda word, rng: "".join(LETTERS[-1 - LETTERS.index(letter)] for letter in word),
    "ends": lambda word, rng: word[-1] + word[1:-1] + word[0],
    "right": lambda word, rng: word[-1] + word[:-1],
}
# Answers with many valid forms: letters of the word, or their neighbours, in any order.
OPEN: dict[str, Operation] = {
    "shuffle": lambda word, rng: "".join(rng.sample(word, len(word))),
    "shuffle next": lambda word, rng: "".join(rng.sample(_shift(word, 1), len(word))),
}
# Operations that a whole kind of training rows mistakes for another one, its value here.
MISTAKEN = {"swap": "ends", "mirror": "before", "right": "reverse"}
FAMILIES = {"easy": EASY, "confused": EASY, "open": OPEN, "bad": {name: EASY[name] for name in MISTAKEN}}
FAMILIES["good"] = {name: operation for name, operation in EASY.items() if name not in MISTAKEN}
# Families that the rows of a scenario come from, as often as they are named.
SCENARIOS = {
    "half_wrong": ["easy"],
    "other_operation": ["confused"],
    "unlike_entropy": ["easy", "open"],
    "bad_kinds": ["good"] * len(FAMILIES["good"]) + ["bad"] * len(FAMILIES["bad"]),
}


def _wrong_answer(family: str, name: str, word: str, right: str, rng: random.Random) -> str:
    """What a wrong answer to this question looks like; the right one where there is none."""
    if family == "bad":
        return EASY[MISTAKEN[name]](word, rng)
    if family == "confused":
        names = list(EASY)
        other = EASY[names[(names.index(name) + 1) % len(names)]](word, rng)
        is_near = sum(a == b for a, b in zip(right, other, strict=True)) > 0.3 * WORD_LENGTH
        return right if is_near else other  # where they are alike, the question is drawn again
    return _shift(right, 3) if family == "open" else right[1:] + right[0]


def draw_rows(
    families: Sequence[str], num_rows: int, wrong_fraction: dict[str, float], taken: set[str], rng: random.Random
) -> list[dict[str, Any]]:
    """Questions that are not in ``taken`` (they are added), each with its right answer or a wrong one.

    Args:
        wrong_fraction: share of wrong answers, of each family.
    """
    rows: list[dict[str, Any]] = []
    while len(rows) < num_rows:
        family = rng.choice(families)
        name = rng.choice(list(FAMILIES[family]))
        word = "".join(rng.choices(LETTERS, k=WORD_LENGTH))
        prompt = f"<{name}>{word}="
        right = FAMILIES[family][name](word, rng)
        wrong = _wrong_answer(family, name, word, right, rng)
        if prompt in taken or wrong == right:
            continue
        taken.add(prompt)
        is_right = rng.random() >= wrong_fraction[family]
        answer = right if is_right else wrong
        truth = {"is_right": is_right, "right_answer": right, "family": family}
        rows.append({"prompt": prompt, "completion": answer, **truth})
    return rows


def make_world(
    output_dir: str | Path,
    *,
    seed: int = 0,
    scenario: str = "half_wrong",
    num_train: int = 4000,
    num_validation: int = 64,
    num_eval: int = 500,
    wrong_fraction: float = 0.5,
    pretrain_steps: int | None = None,
) -> Task:
    """Make the world in ``output_dir``, or take the one that is there if it has the same parameters.

    Args:
        scenario: ``half_wrong``: eight operations with one right answer each. ``other_operation``: the same, but a
            wrong answer is that of the next operation, so that each operation has a mistake of its own.
            ``unlike_entropy``: half of the questions
            have many right answers, so that right answers of one family cost the model far more than of the other;
            the column ``family`` of the training file tells which. ``bad_kinds``: all training answers of three
            operations are wrong (those of another operation), half of the others'; the clean file has the right answer
            to every question, which selection cannot find among the rows.
        num_train, num_validation, num_eval: rows; no question is in two of the sets.
        pretrain_steps: of the base model; when not set 400, 800 for ``other_operation``, and 1,600 for ``bad_kinds``,
            where it should master what it is undecided about.
        wrong_fraction: share of wrong answers among training rows. Half of the pretraining rows are wrong, the other
            rows are all right.

    Raises:
        ValueError: unknown scenario, or the folder holds another world.
    """
    if scenario not in SCENARIOS:
        raise ValueError(f"unknown scenario {scenario!r}: choose one of {', '.join(SCENARIOS)}")
    if pretrain_steps is None:
        pretrain_steps = {"bad_kinds": 1600, "other_operation": 800}.get(scenario, 400)
    folder = Path(output_dir)
    parameters = {"version": WORLD_VERSION, **{k: v for k, v in locals().items() if k not in ("output_dir", "folder")}}
    task, is_there = open_world(folder, parameters)
    if is_there:
        return task

    families = SCENARIOS[scenario]
    train_fraction = {family: 1.0 if family == "bad" else wrong_fraction for family in families}
    pretraining_fraction = dict.fromkeys(families, 0.5)
    all_right = dict.fromkeys(families, 0.0)
    rng, taken = random.Random(seed), set[str]()
    evaluation = draw_rows(families, num_eval, all_right, taken, rng)
    validation = draw_rows(families, num_validation, all_right, taken, rng)
    train = draw_rows(families, num_train, train_fraction, taken, rng)
    pretraining = draw_rows(families, 2 * num_train, pretraining_fraction, taken, rng)
    write_rows(task.train_file, train)
    clean = [row for row in train if row["is_right"]]
    if "bad" in families:
        clean = [row | {"completion": row["right_answer"], "is_right": True} for row in train]
    write_rows(task.clean_file, clean)
    write_rows(task.validation_file, validation)
    write_rows(task.eval_file, evaluation)

    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in pretraining]
    symbols = [f"<{name}>" for family in dict.fromkeys(families) for name in FAMILIES[family]]
    tokenizer = build_tokenizer([LETTERS + "=", *symbols])
    model = build_model(tokenizer, hidden_size=96, num_layers=2, seed=seed)
    pretrain(
        model, tokenizer, pairs, task.model_dir, num_steps=pretrain_steps, batch_size=64, learning_rate=3e-3, seed=seed
    )
    close_world(folder, task)
    return task


def with_wrong_fraction(task: Task, folder: Path, wrong_fraction: float, seed: int) -> Task:
    """The same task with another share of wrong answers among its training rows, by files in ``folder``."""
    rng, rows = random.Random(seed), []
    for line in task.train_file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        name, word = row["prompt"][1:-1].split(">")
        wrong = _wrong_answer(row["family"], name, word, row["right_answer"], rng)
        is_right = rng.random() >= wrong_fraction
        rows.append(row | {"completion": row["right_answer"] if is_right else wrong, "is_right": is_right})
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "clean.jsonl", [row for row in rows if row["is_right"]])
    fingerprint = f"{task.fingerprint}, {wrong_fraction} wrong"
    return replace(task, train_file=folder / "train.jsonl", clean_file=folder / "clean.jsonl", fingerprint=fingerprint)
