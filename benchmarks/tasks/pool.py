"""From questions with a right and a wrong answer each to a task: which rows are wrong, and which are trusted.

A scenario draws a `Pool`; `make_task` takes rows out of it. Tasks of one pool share base model, questions and held-out
rows, and a wider trusted set contains the narrower ones.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tamis.compare.task import Task
from tamis.demo.base_model import build_model, build_tokenizer, pretrain
from tamis.demo.folder import write_rows
from tamis.demo.run import SETTINGS

# How trusted rows may be chosen: like the held-out rows; without one kind of them; the easiest; a tenth of them wrong.
TRUSTED = ("fair", "one kind missing", "easier", "a tenth wrong")
NUM_TRAIN, NUM_EVAL, MAX_VALIDATION = 4000, 1000, 200
NUM_TRUSTED_QUESTIONS = 4 * MAX_VALIDATION  # enough to choose from


@dataclass(frozen=True)
class Question:
    """A question with a right and a wrong answer.

    Attributes:
        kind: of the question; a trusted set may lack one.
        difficulty: larger is harder, on a scale of the scenario's own.
        wrong_prompt: asked in the wrong row, where what is wrong is the question.
    """

    prompt: str
    right: str
    wrong: str
    kind: str
    difficulty: int
    wrong_prompt: str | None = None

    def row(self, is_right: bool) -> dict[str, Any]:
        """The right or the wrong row, with what no method reads."""
        truth = {"is_right": is_right, "right_answer": self.right, "kind": self.kind}
        if is_right or self.wrong_prompt is None:
            return {"prompt": self.prompt, "completion": self.right if is_right else self.wrong} | truth
        return {"prompt": self.wrong_prompt, "completion": self.wrong} | truth | {"right_answer": self.wrong}


@dataclass(frozen=True)
class Pool:
    """What a scenario's tasks of one seed are made of.

    Attributes:
        train, trusted, held_out: questions; no prompt is in two of them. Of ``trusted`` few are taken.
        pretraining: prompt and completion pairs that the base model reads, in most scenarios half of them wrong.
        missing_kind: what a trusted set with one kind missing lacks.
        pretrain_steps, num_layers: of the base model.
        settings: of all runs.
    """

    name: str
    seed: int
    train: list[Question]
    trusted: list[Question]
    held_out: list[Question]
    pretraining: list[dict[str, str]]
    missing_kind: str
    pretrain_steps: int
    num_layers: int = 2
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))


def read_by_halves(questions: Sequence[Question], rng: random.Random) -> list[dict[str, str]]:
    """Pairs for pretraining: each question's right or wrong row, as a coin says."""
    rows = [question.row(rng.random() < 0.5) for question in questions]
    return [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]


def choose_trusted(pool: Pool, num_validation: int, trusted: str) -> list[dict[str, Any]]:
    """Trusted rows, in one of the ways of `TRUSTED`.

    Raises:
        ValueError: there is no such way.
    """
    if trusted not in TRUSTED:
        raise ValueError(f"unknown trusted rows {trusted!r}: choose one of {', '.join(TRUSTED)}")
    questions = pool.trusted
    if trusted == "one kind missing":
        questions = [question for question in questions if question.kind != pool.missing_kind]
    if trusted == "easier":
        questions = sorted(questions[: 4 * num_validation], key=lambda question: question.difficulty)
    rng = random.Random(pool.seed)
    num_wrong = round(0.1 * num_validation) if trusted == "a tenth wrong" else 0
    wrong = set(rng.sample(range(num_validation), num_wrong))
    return [question.row(i not in wrong) for i, question in enumerate(questions[:num_validation])]


def make_task(
    folder: Path, pool: Pool, *, wrong_share: float = 0.5, num_validation: int = 64, trusted: str = "fair"
) -> Task:
    """Files of a task in ``folder``; its base model is beside it, made once for all tasks of the pool.

    Args:
        wrong_share: probability of a training row to be wrong.
        num_validation: trusted rows, at most `MAX_VALIDATION`.
        trusted: one of `TRUSTED`.
    """
    rng = random.Random(pool.seed)
    train = [question.row(rng.random() >= wrong_share) for question in pool.train]
    rows = {
        "train": train,
        "clean": [row for row in train if row["is_right"]],
        "validation": choose_trusted(pool, num_validation, trusted),
        "eval": [question.row(True) for question in pool.held_out],
    }
    model_dir = make_base_model(folder.parent, pool)
    fingerprint = f"{pool.name} {pool.seed} {model_dir.name} {_digest(rows)}"
    task = replace(Task.in_folder(folder, fingerprint), model_dir=model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        write_rows(folder / f"{name}.jsonl", part)
    return task


def make_base_model(folder: Path, pool: Pool) -> Path:
    """A character-level Llama pretrained for a moment; taken from ``folder`` where it is there."""
    model_dir = folder / f"model_{pool.pretrain_steps}_{_digest(pool.pretraining)}"
    if model_dir.is_dir():
        return model_dir
    questions = chain(pool.train, pool.trusted, pool.held_out)
    texts = (text for q in questions for text in (q.prompt + q.right, (q.wrong_prompt or "") + q.wrong))
    tokenizer = build_tokenizer(chain(texts, (pair["prompt"] + pair["completion"] for pair in pool.pretraining)))
    model = build_model(tokenizer, hidden_size=96, num_layers=pool.num_layers, seed=pool.seed)
    pretrain(
        model, tokenizer, pool.pretraining, model_dir, num_steps=pool.pretrain_steps, batch_size=64,
        learning_rate=2e-3, seed=pool.seed,
    )  # fmt: skip
    return model_dir


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
