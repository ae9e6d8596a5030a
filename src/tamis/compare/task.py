"""A task that methods are compared on: its files, and what its labels say of a method's run.

Every run lives in `OUTPUT_DIR/runs/NAME/`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tamis.refinements import REFINEMENTS


@dataclass(frozen=True)
class Task:
    """Files that the methods are compared on.

    Attributes:
        model_dir: the base model.
        train_file: JSONL rows. Columns that no method reads: ``is_right``, and ``right_answer`` where it is known.
        clean_file: the right rows of ``train_file`` alone; or, where whole kinds of prompts have none, all prompts
            with their right responses.
        validation_file, eval_file: trusted and held-out rows.
        fingerprint: changes when any of them does.
    """

    model_dir: Path
    train_file: Path
    clean_file: Path
    validation_file: Path
    eval_file: Path
    fingerprint: str

    @classmethod
    def in_folder(cls, folder: Path, fingerprint: str) -> "Task":
        """The task whose files have their usual names in ``folder``."""
        return cls(
            model_dir=folder / "model",
            train_file=folder / "train.jsonl",
            clean_file=folder / "clean.jsonl",
            validation_file=folder / "validation.jsonl",
            eval_file=folder / "eval.jsonl",
            fingerprint=fingerprint,
        )


def run_dir(output_dir: Path, method_name: str) -> Path:
    """Where the run of a method is."""
    return output_dir / "runs" / slug(method_name)


def slug(name: str) -> str:
    """A name as that of a file."""
    return re.sub(r"[^a-z0-9.]+", "_", name.lower()).strip("_")


def is_right(task: Task) -> np.ndarray:
    """Whether each training row is right, by its label, which no method sees."""
    with open(task.train_file, encoding="utf-8") as file:
        return np.array([json.loads(line)["is_right"] for line in file])


def learned_weights(output_dir: Path, method_name: str, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the training rows of a method's run, and whether each row is right."""
    table = pq.read_table(run_dir(output_dir, method_name) / "weights.parquet", columns=["weight"])
    return table["weight"].to_numpy(), is_right(task)


def right_responses(output_dir: Path, method_name: str, task: Task) -> list[dict[str, float]]:
    """Of each refresh of a method's run: its step, and the share of right ones among the generated responses.

    ``share`` counts all responses alike, ``weighted_share`` each as much as it is trained on. ``length`` is the mean
    length of a response in letters, ``length_of_top`` that of the tenth of the rows with the highest weights.
    """
    path = run_dir(output_dir, method_name) / REFINEMENTS
    if not path.is_file():
        return []  # its scout was not believed, so no row was refined
    table = pq.read_table(path).to_pylist()
    with open(task.train_file, encoding="utf-8") as file:
        truth = [json.loads(line)["right_answer"] for line in file]
    refreshes = []
    for step in sorted({record["step"] for record in table}):
        records = [record for record in table if record["step"] == step]
        right = np.array([[text == truth[r["example_id"]] for text in r["responses"]] for r in records])
        weights = np.array([np.array(r["response_weights"]) * r["weight"] for r in records])
        share, weighted = right.mean(), (right * weights).sum() / max(weights.sum(), 1e-12)
        lengths = np.array([np.mean([len(text) for text in r["responses"]]) for r in records])
        top = np.argsort([-r["weight"] for r in records])[: max(len(records) // 10, 1)]
        refreshes.append(
            {
                "step": step,
                "share": float(share),
                "weighted_share": float(weighted),
                "length": float(lengths.mean()),
                "length_of_top": float(lengths[top].mean()),
            }
        )
    return refreshes
