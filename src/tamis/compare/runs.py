"""Runs of `tamis train` for a comparison: the same steps for every method, other rows or settings.

A run that is there already, with the same settings and rows, is not made again.
"""

import hashlib
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from trl import ModelConfig

from tamis.compare.task import Task, learned_weights, run_dir
from tamis.config import BilevelConfig
from tamis.files import write_atomically
from tamis.metrics import auroc
from tamis.run import DataArguments, train
from tamis.trainer import BilevelTrainer
from tamis.weights_file import weights_path

logger = logging.getLogger(__name__)

TAMIS = "tamis"
# A share of the rows that is not a number: as many as tamis takes for right on this task.
TAMIS_SHARE = "tamis's share"
Share = float | str
STATIC: dict[str, Any] = {"selector": "none"}


@dataclass(frozen=True)
class Method:
    """One row of the comparison: a name, the rows it trains on, and the settings of `tamis train` that make it.

    Attributes:
        group: of variants, of which a reader is shown the best; its own name when not given.
        trainer: where settings do not suffice.
    """

    name: str
    train_file: Path
    settings: dict[str, Any]
    group: str | None = None
    trainer: type[BilevelTrainer] = BilevelTrainer


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
    identity |= {"rows": file_digest(method.train_file), "trainer": method.trainer.__name__}
    if args.scores is not None:
        identity["scores"] = file_digest(weights_path(args.scores, "scores"))
    if result_file.is_file():
        result = json.loads(result_file.read_text())
        if result["identity"] == identity:
            return dict(result["row"])
    shutil.rmtree(folder, ignore_errors=True)
    data = DataArguments(train_dataset=[str(method.train_file)], eval_dataset=str(task.eval_file))
    if method.settings.get("rho") != 0.0:
        data.validation_dataset = str(task.validation_file)
    if args.selector == "column":
        data.weight_column = "weight"
    logger.info(f"--- {method.name}")
    started = time.perf_counter()
    metrics = train(data, args, ModelConfig(model_name_or_path=str(task.model_dir)), method.trainer)
    row = {
        "method": method.name,
        "group": method.group or method.name,
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


def file_digest(path: Path) -> str:
    """By which rows are known again."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_alone_and_mixed(
    name: str,
    train_file: Path,
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    group: str,
    settings: dict[str, Any] = STATIC,
) -> list[dict[str, Any]]:
    """Train on selected or weighted rows alone, as is published, and mixed with the trusted rows at the default rho.

    All other methods see the trusted rows too, so the second variant is only fair. The better one is shown.
    """
    methods = (
        Method(name, train_file, settings | {"rho": 0.0}, group),
        Method(f"{name}, mixed", train_file, settings, group),
    )
    return [run_method(method, task, output_dir, common) for method in methods]


def keep_top(task: Task, score_N: ArrayLike, share: float, path: Path) -> Path:
    """Write the training rows with the highest scores to a file, in their old order.

    Args:
        score_N: one for each training row.
        share: of all rows that are kept; the last one is not rounded up, as SEAL has it. At least one row is.
    """
    lines = task.train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(lines[i] for i in top_rows(score_N, share))
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def top_rows(score_N: ArrayLike, share: float) -> list[int]:
    """Places of the rows with the highest scores, in their old order; see `keep_top`."""
    order = np.asarray(score_N).argsort(kind="stable")[::-1]
    return sorted(order[: max(int(share * len(order)), 1)].tolist())


def share_name(share: Share) -> str:
    """What a share is called in the name of a method."""
    return share if isinstance(share, str) else f"top {share:.0%}"


def share_value(share: Share, output_dir: Path) -> float:
    """A share as a number; `TAMIS_SHARE` is read from the run of tamis, and is 1 where its scout is not believed.

    Raises:
        ValueError: there is no run of tamis, or another text.
    """
    if not isinstance(share, str):
        return share
    path = run_dir(output_dir, TAMIS) / "scout.json"
    if share != TAMIS_SHARE or not path.is_file():
        raise ValueError(f"share {share!r}: give a number, or {TAMIS_SHARE!r} once tamis has run in {output_dir}")
    found = json.loads(path.read_text(encoding="utf-8"))
    return float(found["share_right"]) if found["is_believed"] else 1.0
