"""Runs of `tamis train` beside each other: the same rows and steps, another method each.

A run that is there already, with the same settings, is not made again.
"""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ModelConfig

from tamis.compare import seal
from tamis.compare.table import MIXING, TRUSTED_ALONE, add_gap_closures, best_variants
from tamis.compare.task import Task, learned_weights, run_dir
from tamis.config import BilevelConfig
from tamis.files import write_atomically
from tamis.metrics import auroc
from tamis.run import DataArguments, train
from tamis.trainer import BilevelTrainer

logger = logging.getLogger(__name__)

REFINING = "tamis, refining"
SEAL = "SEAL, one stage"
_STATIC = {"selector": "none"}


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
    rows = hashlib.sha256(method.train_file.read_bytes()).hexdigest()
    identity = {"method": method.name, "task": task.fingerprint, "settings": settings, "resolved": resolved}
    identity |= {"rows": rows, "trainer": method.trainer.__name__}
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


def run_seal(task: Task, output_dir: Path, common: dict[str, Any], shares: Sequence[float]) -> list[dict[str, Any]]:
    """Rows of SEAL: its first stage, and retraining on the given shares of the training rows.

    As published the retraining sees the kept rows alone. Since all other methods see the trusted rows too, it is also
    run with both, at the default rho; the two are variants, of which the better one is shown.
    """
    rows = [run_method(Method(SEAL, task.train_file, seal.ONE_STAGE, None, seal.SealTrainer), task, output_dir, common)]
    for share in shares:
        name, kept = f"SEAL, top {share:.0%}", seal.keep_top(task, output_dir, SEAL, share)
        for method in (
            Method(name, kept, _STATIC | {"rho": 0.0}, group=name),
            Method(f"{name}, mixed", kept, _STATIC, group=name),
        ):
            row = run_method(method, task, output_dir, common)
            rows.append(row | {"seconds": rows[0]["seconds"] + row["seconds"]})  # of both stages
    return rows


def compare_methods(
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    rhos: Sequence[float],
    refining: dict[str, Any] | None = None,
    seal_shares: Sequence[float] = (seal.PUBLISHED_SHARE,),
) -> list[dict[str, Any]]:
    """Run all methods on a task; returns their rows in the order of the table, the oracle last.

    Plain SFT, the trusted rows alone, direct mixing for every rho; SEAL; tamis, without and with refining, at the
    default rho; and the oracle, which mixes trusted and right rows at the rho at which mixing did best on the held-out
    rows.

    Args:
        refining: its settings; None leaves the method out.
        seal_shares: of the training rows that SEAL keeps for its second stage.
    """
    first = [
        Method("plain SFT", task.train_file, _STATIC | {"rho": 0.0}),
        Method(TRUSTED_ALONE, task.validation_file, _STATIC | {"rho": 0.0}),
        *(Method(f"mixing rho={rho}", task.train_file, _STATIC | {"rho": rho}, group=MIXING) for rho in rhos),
    ]
    rows = [run_method(method, task, output_dir, common) for method in first]
    best = best_variants(rows)[-1]["method"]
    best_rho = next(method.settings for method in first if method.name == best)
    rows += run_seal(task, output_dir, common, seal_shares)
    second = [
        Method("tamis", task.train_file, {}),
        *([Method(REFINING, task.train_file, refining)] if refining else []),
        Method("oracle (right rows)", task.clean_file, best_rho),
    ]
    rows += [run_method(method, task, output_dir, common) for method in second]
    add_gap_closures(rows)
    return rows
