"""The runs of `tamis compare`. One that is there already, with the same settings and rows, is not made again.

The runs of a seed are in `OUTPUT_DIR/seed_S/runs/NAME/`: what `tamis train` leaves but the model, and `result.json`
with a number for each held-out row.
"""

import gc
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from trl import ModelConfig

from tamis.compare.own.budget import Budget, Shape, find_budget, lengths_of, with_trusted_rows
from tamis.compare.own.contenders import ALONE, BASE, Contender, Rows
from tamis.compare.own.metrics import Metric, Values, evaluate
from tamis.compare.rivals import Scorer, Scores
from tamis.compare.runs import STATIC
from tamis.compare.task import run_dir
from tamis.config import OWN_FIELDS, REFINING_FIELDS, BilevelConfig
from tamis.errors import explain
from tamis.files import write_atomically
from tamis.output_dir import remove_earlier_run
from tamis.run import DataArguments, make_trainer
from tamis.settings import given_fields
from tamis.trainer import BilevelTrainer
from tamis.training_progress import ProgressCallback, use_progress

logger = logging.getLogger(__name__)

_OF_TRAINING = (
    "activation_checkpointing", "gradient_checkpointing", "assistant_only_loss", "per_device_validation_batch_size",
    "loss_reduction", "overwrite_output_dir",
)  # fmt: skip
_SELECTION = [f.name for f in OWN_FIELDS if f.name not in (*_OF_TRAINING, *REFINING_FIELDS)]
RESULT = "result.json"
_PER_RUN = ("seed", "output_dir", "max_steps", "num_train_epochs", "save_strategy", "overwrite_output_dir")


@dataclass(frozen=True)
class Result:
    """A run and what it came to.

    Attributes:
        values: by metric a number for each held-out row.
        seconds: of scouting and training.
        num_tokens: expected to be seen, prompts included.
        error: why there are no values.
    """

    method: str
    group: str
    seed: int
    values: dict[str, list[float]]
    seconds: float = 0.0
    num_steps: int = 0
    num_tokens: int = 0
    error: str | None = None

    def with_seed(self, seed: int) -> "Result":
        """The same with another seed, where the seed makes no difference."""
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Arena:
    """What all runs share.

    Attributes:
        data, args, model_args: as for `tamis.run.train`.
        datasets: the rows by role, loaded and checked.
        keep_share: see `CompareArguments`.
    """

    data: DataArguments
    args: BilevelConfig
    model_args: ModelConfig
    datasets: dict[str, Dataset]
    metrics: Sequence[Metric]
    keep_share: float | None

    @property
    def output_dir(self) -> Path:
        """Where everything is."""
        return Path(str(self.args.output_dir))

    def settings(self, seed: int, takes: Sequence[str] = ()) -> dict[str, Any]:
        """What the user has set, for a run that is not saved.

        Args:
            takes: ``selection`` and ``refining``, where the run is to have these settings too.
        """
        left_out = {*_PER_RUN, *(() if "selection" in takes else _SELECTION)}
        left_out |= {*(() if "refining" in takes else REFINING_FIELDS)}
        given = {name: value for name, value in self.args.given_settings.items() if name not in left_out}
        return {"eval_strategy": "no"} | given | {"seed": seed, "save_strategy": "no"}

    def identity(self, name: str, settings: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """By which a run is known again."""
        return {
            "method": name,
            "settings": settings,
            "model": given_fields(self.model_args),
            "prompt_template": self.data.prompt_template,
            "data": [dataset._fingerprint for dataset in self.datasets.values()],
            "rows": rows.digest(),
            "metrics": [metric.name for metric in self.metrics],
            "max_new_tokens": self.args.max_new_tokens if self.asks_answers else None,
        }

    @property
    def asks_answers(self) -> bool:
        """Whether a metric judges what the model writes."""
        return any(metric.judge is not None for metric in self.metrics)

    def evaluate(self, trainer: BilevelTrainer) -> dict[str, Values]:
        """See `tamis.compare.own.metrics.evaluate`."""
        return evaluate(trainer, self.metrics, self.datasets["eval_dataset"], self.args.max_new_tokens)

    def trainer(
        self,
        folder: Path,
        settings: dict[str, Any],
        rows: Dataset,
        sees_validation: bool = True,
        kind: type[BilevelTrainer] = BilevelTrainer,
    ) -> BilevelTrainer:
        """A fresh one, on the base model."""
        datasets = {"train_dataset": rows, "eval_dataset": self.datasets["eval_dataset"]}
        if sees_validation:
            datasets["validation_dataset"] = self.datasets["validation_dataset"]
        args = BilevelConfig(output_dir=str(folder), overwrite_output_dir=True, **settings)
        data = replace(self.data, weight_column=None, source_weights=None)
        return make_trainer(data, args, self.model_args, kind, datasets)


class SeedRuns:
    """All runs with one seed."""

    def __init__(self, arena: Arena, seed: int):
        self.arena, self.seed = arena, seed
        self.output_dir, self.keep_share = arena.output_dir / f"seed_{seed}", arena.keep_share
        self.train, self.validation = arena.datasets["train_dataset"], arena.datasets["validation_dataset"]

    def run_dir(self, name: str) -> Path:
        """See `tamis.compare.own.contenders.Seed`."""
        return run_dir(self.output_dir, name)

    def scores(self, rival: str) -> Scores:
        """See `tamis.compare.own.contenders.Seed`."""
        return self._scorer.scores(rival)

    @cached_property
    def _scorer(self) -> Scorer:
        settings = self.arena.settings(self.seed) | STATIC

        def make() -> BilevelTrainer:
            return self.arena.trainer(self.run_dir("scoring"), settings, self.train)

        return Scorer(make, self.output_dir, self.arena.identity("scores", settings, _all_rows(self.train)))

    def run(self, contender: Contender, shape: Shape) -> Result:
        """Make one run, or read it."""
        started = time.perf_counter()
        rows = contender.rows(self)
        folder, own = self.run_dir(contender.name), contender.settings
        settings = self.arena.settings(self.seed, contender.takes) | own | {"max_steps": 1}
        args = BilevelConfig(output_dir=str(folder), **settings)
        if contender.sees_validation and args.trains_on_validation:
            settings |= with_trusted_rows(args, len(rows.ids_K), len(self.validation))
            args = BilevelConfig(output_dir=str(folder), **settings)
        per_step = shape.tokens_per_step(rows, args, contender.sees_validation)
        settings["max_steps"] = num_steps = shape.budget.num_steps(per_step)
        identity = self.arena.identity(contender.name, settings, rows) | {"resolved": args.resolve().announcements}
        if (found := read_result(folder, identity)) is not None:
            return found
        trainer = self.arena.trainer(
            folder, settings, rows.of(self.train, self.validation), contender.sees_validation, contender.trainer
        )
        use_progress(trainer, ProgressCallback(f"{contender.name}, seed {self.seed}"))
        trainer.train()
        seconds = time.perf_counter() - started
        values = self.arena.evaluate(trainer)
        result = Result(
            contender.name,
            contender.group,
            self.seed,
            as_lists(values),
            seconds,
            num_steps,
            round(num_steps * per_step),
        )
        write_result(folder, identity, result)
        return result


def measure_base(arena: Arena, seed: int, max_tokens: int | None, max_minutes: float | None) -> tuple[Result, Shape]:
    """What the model is worth before training, how long the rows are, and what each run may see.

    Args:
        seed: of the seconds that are measured, if any are.
        max_tokens, max_minutes: see `CompareArguments`.
    """
    folder, train = run_dir(arena.output_dir, BASE), arena.datasets["train_dataset"]
    given = {n: v for n, v in arena.args.given_settings.items() if n in ("max_steps", "num_train_epochs")}
    settings = arena.settings(seed) | ALONE | given
    asked = {"max_tokens": max_tokens, "max_minutes": max_minutes}
    identity = arena.identity(BASE, settings, _all_rows(train)) | asked
    if (base := read_result(folder, identity)) is None:
        remove_earlier_run(folder, keeps_trials=False)
        trainer = arena.trainer(folder, settings | {"rho": 0.5}, train)
        use_progress(trainer, ProgressCallback(BASE))
        values = arena.evaluate(trainer)
        base = Result(BASE, BASE, seed, as_lists(values))
        lengths = {role: lengths_of(trainer, role).tolist() for role in ("train_dataset", "validation_dataset")}
        del trainer
        budget = find_budget(arena.trainer(folder, settings, train, sees_validation=False), max_tokens, max_minutes)
        write_result(folder, identity, base, lengths=lengths, budget=asdict(budget))
    found = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    lengths_of_roles = [np.array(found["lengths"][role]) for role in ("train_dataset", "validation_dataset")]
    return base, Shape(Budget(**found["budget"]), *lengths_of_roles)


def run_all(arena: Arena, contenders: Sequence[Contender], seeds: Sequence[int], shape: Shape) -> list[Result]:
    """All runs, seed by seed. One that fails does not end the others: its result says why."""
    results = []
    for seed in seeds:
        runs = SeedRuns(arena, seed)
        for contender in contenders:
            logger.info(f"--- {contender.name}, seed {seed}")
            try:
                results.append(runs.run(contender, shape))
            except Exception as error:
                explained = explain(error)
                text = explained[1] if explained else f"{type(error).__name__}: {error}"
                logger.warning(f"{contender.name}, seed {seed} failed: {text}")
                if explained is None:
                    logger.info("traceback", exc_info=True)
                results.append(Result(contender.name, contender.group, seed, {}, error=text))
            gc.collect()
            torch.accelerator.empty_cache() if torch.accelerator.is_available() else None
    return results


# --- results on disk --------------------------------------------------------------------------------------------------


def read_result(folder: Path, identity: dict[str, Any]) -> Result | None:
    """A run that is there already; None if it is not, or was another one."""
    path = folder / RESULT
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    return Result(**found["result"]) if found["identity"] == _as_read(identity) else None


def write_result(folder: Path, identity: dict[str, Any], result: Result, **others: Any) -> None:
    """Keep a run."""
    text = json.dumps({"identity": _as_read(identity), "result": asdict(result), **others})
    write_atomically(folder / RESULT, lambda path: path.write_text(text, encoding="utf-8"))


def as_lists(values: dict[str, Values]) -> dict[str, list[float]]:
    """Arrays as JSON has them."""
    return {name: array.tolist() for name, array in values.items()}


def _as_read(identity: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(identity, default=str)))


def _all_rows(train: Dataset) -> Rows:
    return Rows(np.arange(len(train)))
