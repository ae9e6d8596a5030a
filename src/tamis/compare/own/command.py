"""`tamis compare`: tamis beside plain SFT, the trusted rows alone, mixing and rivals, on the user's own data.

Leaves in the output directory `comparison.json`, `comparison.html`, and the runs, without their models. What is
finished is not made again, so a comparison that was stopped goes on where it was.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trl import ModelConfig

from tamis.checks import check_settings
from tamis.compare.own.arguments import CompareArguments
from tamis.compare.own.budget import Budget
from tamis.compare.own.contenders import contenders
from tamis.compare.own.metrics import Metric, find_metrics
from tamis.compare.own.page import render
from tamis.compare.own.runner import Arena, measure_base, run_all
from tamis.compare.own.verdict import Line, format_lines, table, verdict
from tamis.config import BilevelConfig
from tamis.files import write_atomically
from tamis.inputs import check_datasets
from tamis.output_dir import claimed
from tamis.prerequisites import check_prerequisites, find_model
from tamis.run import DataArguments, refuse_occupied
from tamis.settings import given_fields

logger = logging.getLogger(__name__)

TABLE, PAGE = "comparison.json", "comparison.html"


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        lines: a method each, the best first.
        sentence: the result in a few sentences.
        folder: where the files are.
    """

    lines: list[Line]
    metrics: list[Metric]
    sentence: str
    budget: Budget
    folder: Path

    @property
    def errors(self) -> list[str]:
        """Of the runs that failed."""
        return [error for line in self.lines for error in line.errors]

    def text(self) -> str:
        """The table and the sentence."""
        note = f"Each run sees about {self.budget.num_tokens:,.0f} tokens ({self.budget.reason})."
        return f"{format_lines(self.lines, self.metrics)}\n\n{self.sentence}\n{note}\n"


def compare(data: DataArguments, args: BilevelConfig, model_args: ModelConfig, asked: CompareArguments) -> Comparison:
    """Run all methods with all seeds, and write the table and the page.

    Args:
        data, args, model_args: as for `tamis train`. What tells how to select goes to tamis alone, what tells how to
            refine to its refining variant, everything else to all methods.

    Raises:
        ValueError: an input cannot work; said before a model is loaded.
    """
    asked.check(args.given_settings)
    if data.validation_dataset is None or data.eval_dataset is None:
        missing = "validation_dataset" if data.validation_dataset is None else "eval_dataset"
        raise ValueError(f"a comparison needs trusted and held-out rows: give `{missing}`")
    if model_args.model_name_or_path is None:
        raise ValueError("no model: give `model_name_or_path`")
    if args.scores is not None:
        raise ValueError("a comparison scores the rows for each of its seeds: leave out `scores`")
    if args.world_size > 1:
        raise ValueError("tamis compare runs in one process: start it without a launcher")
    refuse_occupied(args)
    check_prerequisites(args, model_args)
    find_model(model_args.model_name_or_path)
    metrics = find_metrics(asked.metric)
    datasets = data.load([] if data.skip_bad_rows else None)
    arena = Arena(data, args, model_args, datasets, metrics, asked.keep_share)
    check_settings(_as_used(arena, asked.methods), datasets)
    check_datasets(datasets, args)
    with claimed(arena.output_dir):
        base, shape = measure_base(arena, asked.seeds[0], asked.max_tokens, asked.max_minutes)
        logger.info(f"each run sees about {shape.budget.num_tokens:,.0f} tokens ({shape.budget.reason})")
        results = run_all(arena, contenders(asked.methods, asked.rhos), asked.seeds, shape)
        bases = [base.with_seed(seed) for seed in asked.seeds]
        lines = table([*bases, *results], metrics)
        found = Comparison(lines, metrics, verdict(lines, metrics[0]), shape.budget, arena.output_dir)
        settings = given_fields(data) | args.given_settings | given_fields(model_args) | given_fields(asked)
        _write(found, settings)
    return found


def _as_used(arena: Arena, methods: Sequence[str]) -> BilevelConfig:
    """The settings of the run that uses most of them."""
    given = dict(arena.args.given_settings)
    if "tamis_refining" in methods:
        given.setdefault("refine_fraction", "auto")
    elif arena.asks_answers:
        given.pop("max_new_tokens", None)
    return BilevelConfig(**given)


def _write(found: Comparison, settings: dict[str, Any]) -> None:
    versions = {name: version(name) for name in ("tamis", "torch", "transformers", "trl")}
    content = {
        "version": 1,
        "verdict": found.sentence,
        "metrics": [metric.name for metric in found.metrics],
        "budget": vars(found.budget),
        "methods": [vars(line) | {"behind": line.behind and vars(line.behind)} for line in found.lines],
        "settings": settings,
        "versions": versions,
    }
    text = json.dumps(content, indent=1, default=str)
    write_atomically(found.folder / TABLE, lambda path: path.write_text(text, encoding="utf-8"))
    page = render(found.lines, found.metrics, found.sentence, found.budget, settings, versions)
    write_atomically(found.folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
