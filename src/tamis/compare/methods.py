"""Runs of `tamis train` beside each other: the same rows and steps, another method each.

A run that is there already, with the same settings, is not made again.
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ModelConfig

from tamis.compare.table import add_gap_closures
from tamis.compare.task import Task, learned_weights, run_dir
from tamis.config import BilevelConfig
from tamis.files import write_atomically
from tamis.metrics import auroc
from tamis.run import DataArguments, train

logger = logging.getLogger(__name__)

REFINING = "tamis, refining"


@dataclass(frozen=True)
class Method:
    """One row of the comparison: a name, the rows it trains on, and the settings of `tamis train` that make it."""

    name: str
    train_file: Path
    settings: dict[str, Any]


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
            return dict(result["row"])
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
        "test_accuracy": metrics["eval_teacher_forced_match"],
        "selection_auroc": None,
        "seconds": time.perf_counter() - started,
    }
    if args.selector not in ("column", "none"):
        row["selection_auroc"] = auroc(*learned_weights(output_dir, method.name, task))
    text = json.dumps({"identity": identity, "row": row}, indent=1)
    write_atomically(result_file, lambda path: path.write_text(text))
    return row


def compare_methods(
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    rhos: Sequence[float],
    refining: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Run all methods on a task; returns their rows in the order of the table, the oracle last.

    Plain SFT, validation rows only, direct mixing for every rho, then with the rho at which mixing did best on the
    held-out rows: lazy Adam on softmax logits, tamis, tamis with refining, and the oracle that trains on right
    responses only.

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
        Method("softmax, lazy Adam", task.train_file, rho | {"selector": "softmax", "reference": "zero"}),
        Method("tamis", task.train_file, rho),
        *([Method(REFINING, task.train_file, rho | refining)] if refining else []),
        Method("oracle (right rows)", task.clean_file, rho | static),
    ]
    rows += [run_method(method, task, output_dir, common) for method in second]
    add_gap_closures(rows)
    return rows
