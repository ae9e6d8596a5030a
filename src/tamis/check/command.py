"""`tamis check`: goes the way of `tamis train` up to its first steps, and tells everything that it meets.

What `tamis train` refuses is an error here and what it warns of a warning, by the same code and in the same words. It
writes nothing to the output directory.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datasets import Dataset
from trl import ModelConfig

from tamis.check import advice, overlap
from tamis.check.bad_files import find_problems
from tamis.check.cost import Cost, Need, disk_need, least_memory, parameters_of
from tamis.check.measure import available_memory, measure
from tamis.check.report import DataSet, Overlap, Report
from tamis.checks import check_settings
from tamis.config import BilevelConfig
from tamis.errors import explain
from tamis.hashes import num_distinct, num_repeats
from tamis.inference import first_row
from tamis.inputs import check_datasets
from tamis.prerequisites import check_prerequisites, find_model
from tamis.rows import arrow_column
from tamis.run import DataArguments, make_trainer, refuse_occupied, without_unread_weights
from tamis.settings import as_flags
from tamis.trainer import BilevelTrainer

# Each data set is compared with those before it.
_ORDER: tuple[str, ...] = ("eval_dataset", "validation_dataset", "train_dataset")


class UnloadedTrainer(BilevelTrainer):
    """Knows its rows and the shape of its model, whose parameters are not loaded."""

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """There is nothing to move."""

    def _make_weighting(self, selector: Any) -> None:
        """It would copy parameters."""


def check(data: DataArguments, args: BilevelConfig, model_args: ModelConfig, *, measures: bool = True) -> Report:
    """What a run of `tamis train` with these settings would meet.

    Without a model the rows are checked, and nothing that needs a tokenizer.

    Args:
        measures: train a few steps. If not, the model is not loaded.
    """
    report, has_model = Report(), model_args.model_name_or_path is not None
    with _collected(report), TemporaryDirectory() as folder:
        datasets = _load(report, data, args, model_args)
        if datasets and has_model:
            with _explained(report):
                check_settings(args, datasets)
            if not args.uses_validation():
                datasets.pop("validation_dataset", None)
        keys = _check_rows(report, datasets, args)
        if keys is None:
            return report
        if not has_model:
            report.notes.append("no --model_name_or_path: the rows alone are checked")
        trainer = None
        if has_model and not report.errors:
            trainer = _make_trainer(report, data, args, model_args, datasets, folder, measures)
        if trainer is not None:
            report.example = first_row(trainer)
            report.settings = _settings(trainer, args)
            report.cost = _cost(report, trainer, args, measures)
            report.errors += map(as_flags, advice.on_disk(str(args.output_dir), report.cost))
            report.warnings += map(as_flags, advice.on_settings(args, report.cost, model_args.use_peft))
        _describe(report, datasets, args, keys, trainer)
    return report


@contextmanager
def _collected(report: Report) -> Iterator[None]:
    """Within it the log of tamis goes into the report: warnings, and what is said of the files."""
    logger, handler = logging.getLogger("tamis"), logging.Handler(logging.INFO)

    def keep(record: logging.LogRecord) -> None:
        text = as_flags(record.getMessage())
        lines = report.warnings if record.levelno >= logging.WARNING else report.notes
        is_of_steps = record.name in ("tamis.trainer", "tamis.training_progress") and record.levelno < logging.WARNING
        if text not in lines and not is_of_steps:
            lines.append(text)

    handler.emit = keep  # type: ignore[method-assign]
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


@contextmanager
def _explained(report: Report) -> Iterator[None]:
    """Within it an error of the user becomes one of the report."""
    try:
        yield
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        if explained[1] not in report.errors:
            report.errors.append(explained[1])


def _load(report: Report, data: DataArguments, args: BilevelConfig, model_args: ModelConfig) -> dict[str, Dataset]:
    """The rows, where they can be read; else all problems of all files are in the report."""
    if model_args.model_name_or_path is not None:
        for refuse in (
            lambda: check_prerequisites(args, model_args),
            lambda: find_model(str(model_args.model_name_or_path)),
            lambda: refuse_occupied(args, args.resume_from_checkpoint),
        ):
            with _explained(report):
                refuse()
    skipped: list[dict[str, Any]] | None = [] if data.skip_bad_rows else None
    datasets: dict[str, Dataset] = {}
    num_errors = len(report.errors)
    with _explained(report):
        datasets = without_unread_weights(data.load(skipped), args)
    if len(report.errors) > num_errors:
        messages, report.bad_rows = find_problems(data)
        # They are of files that were read twice, and of rows that were left out only to read on.
        report.warnings.clear()
        report.notes.clear()
        report.errors += [text for message in messages if (text := as_flags(message)) not in report.errors]
    else:
        report.bad_rows = skipped or []
    return datasets


def _check_rows(report: Report, datasets: dict[str, Dataset], args: BilevelConfig) -> dict[str, overlap.Keys] | None:
    """What the rows say, as hashes; None where they cannot work."""
    if not datasets:
        return None
    with _explained(report):
        hashes = check_datasets(datasets, args)
        return {role: overlap.keys_of(dataset, role, hashes[role]) for role, dataset in datasets.items()}
    return None


def _make_trainer(
    report: Report,
    data: DataArguments,
    args: BilevelConfig,
    model_args: ModelConfig,
    datasets: dict[str, Dataset],
    folder: str,
    is_loaded: bool,
) -> BilevelTrainer | None:
    """The trainer of the run, but in a folder that is thrown away; None where the run could not work."""
    args = copy(args)
    args.output_dir, args.report_to, args.push_to_hub = folder, [], False
    if not is_loaded:
        args.model_init_kwargs = {**(args.model_init_kwargs or {}), "device_map": "meta"}  # type: ignore[dict-item]
    kind = BilevelTrainer if is_loaded else UnloadedTrainer
    with _explained(report):
        return make_trainer(data, args, model_args, kind, datasets)
    return None


def _settings(trainer: BilevelTrainer, args: BilevelConfig) -> list[str]:
    """What was resolved, each with its reason."""
    resolved, num_rows = trainer.resolved, len(trainer.train_dataset)

    def origin(name: str) -> str:
        return "as given" if name in args.given_settings else "default"

    num_training = args.per_device_train_batch_size
    trains_on_validation = args.trains_on_validation and trainer.validation_dataset is not None
    num_validation = resolved.validation_rows_per_step if trains_on_validation else 0
    several = {"micro-batches": args.gradient_accumulation_steps, "processes": args.world_size}
    listed = "".join(f", times {number} {name}" for name, number in several.items() if number > 1)
    num_steps, times = trainer.num_steps(), args.micro_batches_per_step
    why = "max_steps, as given" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs of {num_rows:,} rows"
    lines = [
        f"learning_rate = {args.learning_rate:g} ({origin('learning_rate')})",
        f"rows of a step = {num_training * times + num_validation} ({num_training} training rows{listed}, and "
        f"{num_validation} validation rows)",
        f"steps = {num_steps} ({why})",
        f"max_length = {args.max_length} ({origin('max_length')})",
    ]
    if resolved.rho is None:
        found_by = "from the scores" if trainer.args.scores else "after scouting"
        lines.append(f"rho = {found_by} (a validation row counts as much as a training row that is surely right)")
    return [*lines, *resolved.announcements]


def _cost(report: Report, trainer: BilevelTrainer, args: BilevelConfig, measures: bool) -> Cost | None:
    num_steps, parameters = trainer.num_steps(), parameters_of(trainer.model)
    disk = disk_need(trainer.model, args, num_steps, len(trainer.train_dataset))
    time = None
    if measures:
        memory = None
        with _explained(report):
            time, memory = measure(trainer, args, num_steps)
        if memory is None:
            return None
    else:
        memory = Need(least_memory(trainer.model), *available_memory(args.device), is_measured=False)
    return Cost(parameters, num_steps, time, memory, disk, leaves_out_generation=args.refines)


def _describe(
    report: Report,
    datasets: dict[str, Dataset],
    args: BilevelConfig,
    keys: dict[str, overlap.Keys],
    trainer: BilevelTrainer | None,
) -> None:
    """The figures of the data sets, and what to do about all that was found."""
    order = [role for role in _ORDER if role in datasets]
    near = overlap.near_duplicates({role: datasets[role] for role in order}, keys, show_progress=not args.disable_tqdm)
    for i, role in enumerate(order):
        shared = {}
        for other in order[:i]:
            same = overlap.shared(keys[role], keys[other])
            shared[other] = Overlap(same.rows, same.prompts, near[role, other].num_rows)
        sources = set(datasets[role].unique("source"))
        bad_rows = sum(row["source"] in sources for row in report.bad_rows)
        report.data_sets[role] = DataSet(
            rows=len(datasets[role]),
            bad_rows=bad_rows,
            **_lengths(trainer, role, num_distinct(keys[role].row_N), len(datasets[role])),
            repeated_rows=num_repeats(keys[role].row_N),
            other_answers=overlap.num_other_answers(keys[role]),
            near_duplicates=near[role, role].num_rows,
            searched=near[role, role].num_searched,
            shared=shared,
        )
    report.data_sets = {role: report.data_sets[role] for role in reversed(order)}
    lines = advice.on_rows(datasets, report.data_sets, near)
    if "validation_dataset" in datasets and args.sends_scout():
        lines += advice.on_number(len(datasets["validation_dataset"]))
    report.warnings += map(as_flags, lines)


def _lengths(trainer: BilevelTrainer | None, role: str, num_distinct: int, num_rows: int) -> dict[str, Any]:
    """Figures of the rows in tokens; None without a tokenizer."""
    prepared = None
    if trainer is not None:
        prepared = {
            "train_dataset": trainer.train_dataset,
            "validation_dataset": trainer.validation_dataset,
            "eval_dataset": trainer.eval_dataset,
        }[role]
    if trainer is None or prepared is None:
        return dict.fromkeys(("tokens", "median_length", "longest", "truncated", "dropped"))
    num_tokens, limit = arrow_column(prepared, "num_tokens").to_numpy(), trainer.args.max_length
    num_given = num_distinct if role == "validation_dataset" else num_rows  # a trainer takes each of these once
    return {
        "tokens": int(num_tokens.sum()),
        "median_length": float(np.median(num_tokens)),
        "longest": int(num_tokens.max()),
        "truncated": 0 if limit is None else int((num_tokens > limit).sum()),
        "dropped": num_given - len(prepared),
    }
