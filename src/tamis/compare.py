"""Runs of `tamis train` beside each other: the same rows and steps, another method each, and one table.

Every run lives in `OUTPUT_DIR/runs/NAME/`; one that is there already, with the same settings, is not made again.
"""

import json
import logging
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from trl import ModelConfig

from tamis.config import BilevelConfig
from tamis.metrics import auroc, gap_closure
from tamis.recorder import write_atomically
from tamis.run import DataArguments, train
from tamis.selectors import STATIC_SELECTORS

logger = logging.getLogger(__name__)

REFINING = "tamis, refining"


@dataclass(frozen=True)
class Task:
    """Files that the methods are compared on.

    Attributes:
        model_dir: the base model.
        train_file: JSONL rows. Columns that no method reads: ``is_right``, and ``right_answer`` where it is known.
        clean_file: the right rows of ``train_file`` alone; or, where kinds of questions have none, all questions with
            their right answers.
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


@dataclass(frozen=True)
class Method:
    """One row of the comparison: a name, the rows it trains on, and the settings of `tamis train` that make it."""

    name: str
    train_file: Path
    settings: dict[str, Any]


def run_dir(output_dir: Path, method_name: str) -> Path:
    """Where the run of a method is."""
    return output_dir / "runs" / re.sub(r"[^a-z0-9.]+", "_", method_name.lower()).strip("_")


def run_method(method: Method, task: Task, output_dir: Path, common: dict[str, Any]) -> dict[str, Any]:
    """Train one method and return its row of the table, without the gap closures.

    A finished run with the same settings is read from its directory.

    Args:
        common: settings of `tamis train` that all methods share; those of the method win.
    """
    folder = run_dir(output_dir, method.name)
    result_file = folder / "result.json"
    settings = common | method.settings
    args = BilevelConfig(output_dir=str(folder), **settings)
    resolved = args.resolve().announcements  # so that a run made with other defaults is made again
    identity = {"method": method.name, "task": task.fingerprint, "settings": settings, "resolved": resolved}
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result["identity"] == identity:
            return result["row"]
    shutil.rmtree(folder, ignore_errors=True)
    data = DataArguments(train_dataset=str(method.train_file), eval_dataset=str(task.eval_file))
    if method.settings.get("rho") != 0.0:
        data.validation_dataset = str(task.validation_file)
    logger.info(f"--- {method.name}")
    started = time.perf_counter()
    metrics = train(data, args, ModelConfig(model_name_or_path=str(task.model_dir)))
    row = {
        "method": method.name,
        "test_loss": metrics["eval_loss"],
        "test_accuracy": metrics["eval_exact_match"],
        "selection_auroc": None,
        "seconds": time.perf_counter() - started,
    }
    if args.selector not in STATIC_SELECTORS:
        row["selection_auroc"] = auroc(*learned_weights(output_dir, method.name, task))
    text = json.dumps({"identity": identity, "row": row}, indent=1)
    write_atomically(result_file, lambda path: path.write_text(text))
    return row


def learned_weights(output_dir: Path, method_name: str, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the training rows of a method's run, and whether each row is right."""
    table = pq.read_table(run_dir(output_dir, method_name) / "weights.parquet", columns=["weight"])
    weights = table["weight"].to_numpy()
    with open(task.train_file, encoding="utf-8") as file:
        is_right = np.array([json.loads(line)["is_right"] for line in file])
    return weights, is_right


def right_answers(output_dir: Path, method_name: str, task: Task) -> list[dict[str, float]]:
    """Of each refresh of a method's run: its step, and the share of right ones among the generated answers.

    ``share`` counts all answers alike, ``weighted_share`` each as much as it is trained on. ``length`` is the mean
    length of an answer in letters, ``length_of_top`` that of the tenth of the questions with the highest weights.
    """
    table = pq.read_table(run_dir(output_dir, method_name) / "refinements.parquet").to_pylist()
    with open(task.train_file, encoding="utf-8") as file:
        truth = [json.loads(line)["right_answer"] for line in file]
    refreshes = []
    for step in sorted({record["step"] for record in table}):
        records = [record for record in table if record["step"] == step]
        right = np.array([[text == truth[r["example_id"]] for text in r["responses"]] for r in records])
        weights = np.array([np.array(r["response_weights"]) * r["question_weight"] for r in records])
        share, weighted = right.mean(), (right * weights).sum() / max(weights.sum(), 1e-12)
        lengths = np.array([np.mean([len(text) for text in r["responses"]]) for r in records])
        top = np.argsort([-r["question_weight"] for r in records])[: max(len(records) // 10, 1)]
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


def compare_methods(
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    rhos: Sequence[float],
    refining: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run all methods on a task; returns their rows in the order of the table, the oracle last.

    Plain SFT, validation rows only, direct mixing for every rho, then with the rho at which mixing did best on the
    held-out rows: the published rule, tamis, tamis with refining, and the oracle that trains on right answers only.

    Args:
        refining: its settings; None leaves the method out.
    """
    static = {"selector": "none"}
    first = [
        Method("plain SFT", task.train_file, static | {"rho": 0.0}),
        Method("validation only", task.validation_file, static | {"rho": 0.0}),
        *(Method(f"mixing rho={rho}", task.train_file, static | {"rho": rho}) for rho in rhos),
    ]
    rows = [run_method(method, task, output_dir, common) for method in first]
    best = max(range(len(rhos)), key=lambda i: rows[2 + i]["test_accuracy"])
    rho = {"rho": rhos[best]}
    second = [
        Method("softmax (published)", task.train_file, rho | {"selector": "softmax", "reference": "zero"}),
        Method("tamis", task.train_file, rho),
        *([Method(REFINING, task.train_file, rho | refining)] if refining else []),
        Method("oracle (right rows)", task.clean_file, rho | static),
    ]
    rows += [run_method(method, task, output_dir, common) for method in second]
    add_gap_closures(rows)
    return rows


def add_gap_closures(rows: list[dict[str, Any]]) -> None:
    """Add ``gap_closure`` (accuracy) and ``gap_closure_loss`` to every row.

    0 is the best rho of direct mixing (of all of them, chosen by the same figure on the held-out rows: as strong a
    rival as there can be), 1 is the oracle.
    """
    mixing = [row for row in rows if row["method"].startswith("mixing")]
    oracle = rows[-1]
    best_accuracy = max(row["test_accuracy"] for row in mixing)
    best_loss = min(row["test_loss"] for row in mixing)
    for row in rows:
        row["gap_closure"] = gap_closure(best_accuracy, row["test_accuracy"], oracle["test_accuracy"])
        row["gap_closure_loss"] = gap_closure(best_loss, row["test_loss"], oracle["test_loss"])


def format_table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text, one method a line."""
    lines = [f"{'method':22} {'test acc':>8} {'test loss':>9} {'gap closed':>10} {'AUROC':>6} {'seconds':>7}"]
    for row in rows:
        selection = "" if row["selection_auroc"] is None else f"{row['selection_auroc']:.3f}"
        closed = "" if row["gap_closure"] is None else f"{row['gap_closure']:.2f}"
        lines.append(
            f"{row['method']:22} {row['test_accuracy']:8.3f} {row['test_loss']:9.3f} {closed:>10} "
            f"{selection:>6} {row['seconds']:7.0f}"
        )
    return "\n".join(lines)
