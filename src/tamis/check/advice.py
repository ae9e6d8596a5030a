"""What to do about the figures of a run: each line names the flag to change.

What `tamis train` warns of itself is not said here again.
"""

from collections.abc import Mapping

from datasets import Dataset

from tamis.check.cost import Cost, size
from tamis.check.overlap import MAX_SEARCHED, Near
from tamis.check.report import DataSet
from tamis.config import BilevelConfig
from tamis.rows import row_name
from tamis.selection.trials import MIN_VALIDATION_ROWS

FEW_VALIDATION_ROWS = 32
# Learning rates out of these are rarely meant: of an adapter, of a whole language model, and of a small model.
_USUAL_OF_ADAPTER, _USUAL_OF_MODEL, _USUAL_OF_SMALL_MODEL = (3e-5, 2e-3), (5e-7, 2e-4), (1e-5, 1e-2)
_SMALL_MODEL = 50_000_000  # parameters
_TOO_GOOD = "The result on `eval_dataset` will look better than on new rows: leave them out of"
# By the data set that has such rows, and the one that they are like.
_CONSEQUENCES = {
    ("train_dataset", "train_dataset"): "They count again: leave them out of `train_dataset`",
    ("train_dataset", "validation_dataset"): "The choice of rows will favour them: leave them out of `train_dataset`",
    ("train_dataset", "eval_dataset"): f"{_TOO_GOOD} `train_dataset`",
    ("validation_dataset", "validation_dataset"): "A scout that has seen the one has nearly seen the other: leave them "
    "out of `validation_dataset`",
    ("validation_dataset", "eval_dataset"): f"{_TOO_GOOD} `validation_dataset`",
}
_PROMPTS = {
    ("train_dataset", "eval_dataset"): f"{_TOO_GOOD} `train_dataset`",
    ("validation_dataset", "eval_dataset"): f"{_TOO_GOOD} `validation_dataset`",
}


def on_rows(
    datasets: Mapping[str, Dataset], found: Mapping[str, DataSet], near: Mapping[tuple[str, str], Near]
) -> list[str]:
    """On near-duplicates, and on prompts that two data sets have."""
    lines = []
    for role, one in found.items():
        for other, overlap in one.shared.items():
            num_rows = 0 if overlap.prompts is None else overlap.prompts - overlap.rows
            if num_rows and (consequence := _PROMPTS.get((role, other))):
                lines.append(
                    f"{role}: {num_rows} of {one.rows} rows have the prompt of a row of {other}, and another response. "
                    f"{consequence}"
                )
    lines += [
        _on_near(datasets, role, other, near[role, other])
        for role, one in found.items()
        for other in (role, *one.shared)
        if near[role, other].num_rows and (role, other) in _CONSEQUENCES
    ]
    return lines


def _on_near(datasets: Mapping[str, Dataset], role: str, other: str, near: Near) -> str:
    where = "another row" if other == role else f"a row of {other}"
    pairs = [f"{row_name(datasets[role], role, i)} ~ {row_name(datasets[other], other, j)}" for i, j in near.pairs]
    which = "searched" if near.num_searched == MAX_SEARCHED else "distinct"
    return (
        f"{role}: {near.num_rows} of {near.num_searched} {which} rows nearly repeat {where}, first "
        f"{'; '.join(pairs)}. {_CONSEQUENCES[role, other]}"
    )


def on_number(num_validation: int) -> list[str]:
    """On few trusted rows, where a scout is sent."""
    if num_validation < MIN_VALIDATION_ROWS:
        return [
            f"validation_dataset: {num_validation} rows are too few to score the others, all weights will be one. Give "
            "50 or more to `validation_dataset`"
        ]
    if num_validation < FEW_VALIDATION_ROWS:
        return [
            f"validation_dataset: with {num_validation} rows a small share of wrong rows is not found, and then all "
            "weights are one. Give 50 or more to `validation_dataset`"
        ]
    return []


def on_settings(args: BilevelConfig, cost: Cost | None, is_adapter: bool) -> list[str]:
    """On an unusual learning rate, and on memory."""
    if cost is None:
        return []
    lines, kind = [], "an adapter" if is_adapter else "a model of this size"
    usual = _USUAL_OF_ADAPTER if is_adapter else _USUAL_OF_MODEL
    if not is_adapter and cost.parameters.num < _SMALL_MODEL:
        usual = _USUAL_OF_SMALL_MODEL
    if not usual[0] <= args.learning_rate <= usual[1]:
        what = "low" if args.learning_rate < usual[0] else "high"
        lines.append(
            f"learning_rate {args.learning_rate:g} is {what} for {kind}, where {usual[0]:g} to {usual[1]:g} is usual. "
            "Set `learning_rate`, unless you mean it"
        )
    if not cost.memory.fits:
        lines.append(
            f"the run needs {size(cost.memory.needed)} of memory, and the {cost.memory.device} has "
            f"{size(cost.memory.available)} free. Lower `per_device_train_batch_size` and raise "
            "`gradient_accumulation_steps`, lower `max_length`, or set `use_peft`"
        )
    return lines


def on_disk(output_dir: str, cost: Cost | None) -> list[str]:
    """The error where the disk is too small for the run."""
    if cost is None or cost.disk.fits:
        return []
    return [
        f"the run writes {size(cost.disk.needed)}, and the disk of {output_dir} has {size(cost.disk.available)} free. "
        "Set `save_total_limit` or `save_only_model`, or choose another `output_dir`"
    ]
