"""The forms in which `BilevelTrainer` takes rows, which are those of `SFTTrainer`, as rows that can be numbered."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset

from tamis.data import rows_of
from tamis.hashes import Hashes, content_hashes
from tamis.layouts import LAYOUTS
from tamis.rows import TEXT_FORMATS, iter_rows, row_name

logger = logging.getLogger(__name__)

# The split that a role takes of a `DatasetDict` with several.
_SPLITS = {"train_dataset": "train", "validation_dataset": "validation"}
# What says which tokens of a row in tokens are trained on, as TRL reads it.
_MASKS = ("labels", "completion_mask", "assistant_masks")
_KEPT = ("weight", "row", "source")


def as_rows(given: Any, role: str, formatting_func: Callable[[dict[str, Any]], str] | None = None) -> Dataset:
    """A data set in one of TRL's text formats, or of rows in tokens (`input_ids`).

    Args:
        given: a `Dataset` in such a format or with customary columns, such as Alpaca's (see `tamis.data.load_rows`); or
            a `DatasetDict`, of which the split of the role is taken.
        role: `train_dataset`, `validation_dataset`, or the name of held-out rows.
        formatting_func: makes the text of a row, as in [`~trl.SFTTrainer`].

    Raises:
        ValueError: it is something else, or streamed.
    """
    if isinstance(given, DatasetDict):
        given = _split_of(given, role)
    if not isinstance(given, Dataset):
        streamed = ": rows are counted and numbered, so load it without streaming"
        raise ValueError(
            f"{role} must be a datasets.Dataset, got {type(given).__name__}"
            f"{streamed if isinstance(given, IterableDataset) else ''}"
        )
    if is_in_tokens(given):
        if formatting_func is not None:
            logger.warning(f"formatting_func has no effect on {role}: its rows are input_ids already")
        return given
    if formatting_func is not None:
        if {"prompt", "completion"} <= set(given.column_names):  # as in TRL
            raise ValueError(
                f"formatting_func would make one text of prompt and completion in {role}: the loss would cover both, "
                "leave it out, or rename the columns"
            )
        removed = [column for column in given.column_names if column not in _KEPT]
        return given.map(lambda row: {"text": formatting_func(row)}, remove_columns=removed)
    if not has_customary_columns(given):
        return given
    rows = rows_of(given, role)
    if {"row", "source"} <= set(given.column_names):
        rows = rows.remove_columns(["row", "source"])
        for name in ("row", "source"):
            rows = rows.add_column(name, given.with_format(None)[name][:])
    return rows


def has_customary_columns(given: Any) -> bool:
    """Whether a data set has columns that are not TRL's but customary, such as Alpaca's."""
    if isinstance(given, DatasetDict):
        given = given.get("train", next(iter(given.values()), None))
    found = set(given.column_names) if isinstance(given, Dataset) else set()
    is_of_trl = "input_ids" in found or any(set(names) <= found for names in TEXT_FORMATS)
    return not is_of_trl and any(set(layout) <= found for layout in LAYOUTS)


def _split_of(splits: DatasetDict, role: str) -> Dataset:
    split = _SPLITS.get(role, "")
    if split not in splits:
        if len(splits) != 1:
            raise ValueError(f"{role} has the splits {', '.join(splits)}: give one of them, as {role}[NAME]")
        (split,) = splits
    logger.info(f"{role}: split {split!r} of {', '.join(splits)}")
    return splits[split]


# --- rows in tokens ---------------------------------------------------------------------------------------------------


def is_in_tokens(dataset: Dataset) -> bool:
    """Whether TRL takes the rows as they are, without tokenizing them."""
    return "input_ids" in dataset.column_names


def token_columns(dataset: Dataset) -> list[str]:
    """The columns that TRL reads of rows in tokens."""
    return ["input_ids", *(name for name in _MASKS if name in dataset.column_names)]


def check_token_rows(dataset: Dataset, role: str) -> Hashes:
    """Check rows in tokens, and hash what they say: `tamis.rows.check_rows` for these.

    Raises:
        ValueError: no rows; a row without tokens, with a mask of another length, or with no token to train on.
    """
    if len(dataset) == 0:
        raise ValueError(f"{role}: there are no rows. Give a data set with at least one row.")
    names = token_columns(dataset)

    def checked() -> Iterator[dict[str, Any]]:
        for i, row in enumerate(iter_rows(dataset, names)):
            if problem := _problem(row):
                raise ValueError(f"{row_name(dataset, role, i)}: {problem}")
            yield row

    return content_hashes(checked())


def _problem(row: dict[str, Any]) -> str | None:
    input_ids = row["input_ids"]
    if not input_ids:
        return "input_ids has no tokens. Remove the row"
    for name in row:
        if row[name] is None or len(row[name]) != len(input_ids):
            return f"{name} and input_ids differ in length. Give one entry for each token"
    if all(label == -100 for label in row.get("labels", (0,))):
        return "labels are -100 everywhere, so that no token is trained on. Remove the row"
    return None
