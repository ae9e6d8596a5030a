"""Worlds of strings, made on the spot: operations on words, `<reverse>abcde=` (see `tamis.demo.world`), in six ways.

- `common slip`: all wrong answers have one mistake in common.
- `other operation`: a wrong answer is that of the next operation, so that each operation has its own mistake.
- `unlike entropy`: half of the questions have many right answers, which cost the model far more than the others'.
- `another style`: wrong rows have the right content in capitals, which trusted and held-out rows never have.
- `irrelevant`: wrong rows are right answers to operations that are never asked of the trained model.
- `near-duplicates`: wrong rows are a few wrong rows over and over, each time with another letter or two.
"""

import random
from dataclasses import replace

from tamis.demo.world import LETTERS, draw_rows
from tasks.pool import NUM_EVAL, NUM_TRAIN, NUM_TRUSTED_QUESTIONS, Pool, Question, read_by_halves

NUM_PRETRAIN = 8000
NUM_ORIGINALS = 20  # wrong rows that the near-duplicates are like
# What the questions come from (`tamis.demo.world.FAMILIES`), and how long the base model is pretrained.
SCENARIOS = {
    "common slip": (["easy"], 400),
    "other operation": (["confused"], 800),
    "unlike entropy": (["easy", "open"], 400),
    "another style": (["easy"], 400),
    "irrelevant": (["good"], 100),
    "near-duplicates": (["confused"], 800),
}


def draw_questions(families: list[str], num_questions: int, taken: set[str], rng: random.Random) -> list[Question]:
    """Questions that are not in ``taken`` (they are added). Words of few letters are easy."""
    all_wrong = dict.fromkeys(families, 1.0)
    questions = []
    for row in draw_rows(families, num_questions, all_wrong, taken, rng):
        name, word = row["prompt"][1:-1].split(">")
        questions.append(Question(row["prompt"], row["right_answer"], row["completion"], name, len(set(word))))
    return questions


def near_duplicate(original: Question, taken: set[str], rng: random.Random) -> str:
    """The question with one or two letters changed, not in ``taken`` (it is added)."""
    name, word = original.prompt[1:-1].split(">")
    while True:
        letters = list(word)
        for place in rng.sample(range(len(word)), rng.choice([1, 2])):
            letters[place] = rng.choice(LETTERS)
        prompt = f"<{name}>{''.join(letters)}="
        if prompt not in taken:
            taken.add(prompt)
            return prompt


def draw_pool(scenario: str, seed: int, *, num_train: int = NUM_TRAIN, pretrain_steps: int | None = None) -> Pool:
    """The kind of a question is its operation.

    Args:
        scenario: of the module's docstring.
        pretrain_steps: that of `SCENARIOS` when not given.
    """
    families, default_steps = SCENARIOS[scenario]
    rng, taken = random.Random(seed), set[str]()
    sizes = (num_train, NUM_TRUSTED_QUESTIONS, NUM_EVAL, NUM_PRETRAIN)
    parts = [draw_questions(families, size, taken, rng) for size in sizes]
    if scenario == "another style":
        parts = [[replace(q, wrong=q.right.upper()) for q in part] for part in parts]
    if scenario == "irrelevant":
        others = [draw_questions(["bad"], len(part), taken, rng) for part in parts]
        parts = [
            [replace(q, wrong=o.right, wrong_prompt=o.prompt) for q, o in zip(part, other, strict=True)]
            for part, other in zip(parts, others, strict=True)
        ]
    train, trusted, held_out, pretraining = parts
    if scenario == "near-duplicates":
        originals = draw_questions(families, NUM_ORIGINALS, taken, rng)
        drawn = [rng.choice(originals) for _ in train]
        train = [
            replace(q, wrong=o.wrong, wrong_prompt=near_duplicate(o, taken, rng))
            for q, o in zip(train, drawn, strict=True)
        ]
    return Pool(
        name=scenario,
        seed=seed,
        train=train,
        trusted=trusted,
        held_out=held_out,
        pretraining=read_by_halves(pretraining, rng),
        missing_kind="reverse",
        pretrain_steps=default_steps if pretrain_steps is None else pretrain_steps,
    )
