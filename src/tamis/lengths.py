"""Rows that are too long: how many were cut or left out, in which files, and whether the model can read the rest."""

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from tamis.rows import arrow_column

logger = logging.getLogger(__name__)


def with_num_tokens(dataset: Dataset) -> Dataset:
    """Add `num_tokens`, the length of `input_ids`; a column of that name is replaced."""
    num_tokens = pc.list_value_length(arrow_column(dataset, "input_ids")).to_numpy().astype(np.int64)
    kept = [column for column in dataset.column_names if column != "num_tokens"]
    return dataset.select_columns(kept).add_column("num_tokens", num_tokens)


def check_lengths(role: str, rows: Dataset, prepared: Dataset, max_length: int | None, config: Any) -> None:
    """Say what ``max_length`` has done to the rows of a data set, and that the model can read what is left.

    Args:
        rows: with `example_id`.
        prepared: those that TRL has kept, with `num_tokens` as they were before they were cut.
        config: of the model.

    Raises:
        ValueError: no row is left, or one is longer than the model can read.
    """
    report_dropped(role, rows, prepared, max_length)
    report_truncated(role, rows, prepared, max_length)
    refuse_beyond_positions(role, prepared, max_length, config)


def report_dropped(role: str, rows: Dataset, prepared: Dataset, max_length: int | None) -> None:
    """Say how many rows TRL left out: those whose prompt alone fills ``max_length``.

    Raises:
        ValueError: those are all rows.
    """
    num_dropped = len(rows) - len(prepared)
    too_long = f"their prompt alone is longer than max_length={max_length}"
    if num_dropped == len(rows):
        raise ValueError(f"{role}: all {len(rows)} rows are left out, {too_long}. Raise `max_length`")
    if num_dropped:
        shown = ""
        if "example_id" in prepared.column_names:
            kept = arrow_column(prepared, "example_id").combine_chunks()
            is_kept = pc.is_in(arrow_column(rows, "example_id"), value_set=kept).to_numpy()
            shown = f": {_by_file(rows, role, np.flatnonzero(~is_kept))}"
        logger.warning(f"{role}: {num_dropped} of {len(rows)} rows dropped, {too_long}{shown}. Raise `max_length`")


def report_truncated(role: str, rows: Dataset, prepared: Dataset, max_length: int | None) -> None:
    """Say how many rows lost tokens to ``max_length``, in which files.

    Args:
        prepared: with `example_id`, and `num_tokens` as they were before.
    """
    if max_length is None:
        return
    num_tokens = arrow_column(prepared, "num_tokens").to_numpy()
    is_cut = num_tokens > max_length
    if is_cut.any():
        ids = arrow_column(prepared, "example_id").filter(pa.array(is_cut)).combine_chunks()
        places = np.flatnonzero(pc.is_in(arrow_column(rows, "example_id"), value_set=ids).to_numpy())
        logger.warning(
            f"{role}: {is_cut.sum()} of {len(rows)} rows cut to max_length={max_length} tokens: "
            f"{_by_file(rows, role, places)}. The longest has {num_tokens.max()} tokens. Raise `max_length`"
        )


def refuse_beyond_positions(role: str, prepared: Dataset, max_length: int | None, config: Any) -> None:
    """Refuse rows that are longer than a model with learned positions can read; warn where positions are rotary.

    Args:
        prepared: with `num_tokens` as they were before rows were cut to ``max_length``.
        config: of the model.

    Raises:
        ValueError: a row has more tokens than the model has positions.
    """
    num_positions = getattr(config, "max_position_embeddings", None)
    longest = arrow_column(prepared, "num_tokens").to_numpy().max(initial=0)
    longest = longest if max_length is None else min(longest, max_length)
    if num_positions is None or longest <= num_positions:
        return
    problem = f"{role}: the longest row has {longest} tokens, and the model {num_positions} positions"
    if getattr(config, "rope_parameters", None) is None:
        raise ValueError(f"{problem}: set `max_length={num_positions}`")
    logger.warning(f"{problem}: it was not trained for more. Set `max_length={num_positions}`, or shorten the rows")


def _by_file(rows: Dataset, role: str, places: np.ndarray[Any, Any]) -> str:
    """Rows at these places, counted by file, with the first of each: ``a.jsonl 12 (rows 0, 4, 9, ...)``."""
    by_file: dict[str, list[Any]] = {}
    found = rows.with_format(None)[places.tolist()]
    is_ours = "source" in found and "row" in found and all(isinstance(name, str) for name in found["source"])
    for place, i in enumerate(places.tolist()):
        name, row = (found["source"][place], found["row"][place]) if is_ours else (role, i)
        by_file.setdefault(name, []).append(row)
    shown = []
    for name, numbers in by_file.items():
        first = ", ".join(map(str, numbers[:3])) + (", ..." if numbers[3:] else "")
        first = f"row{'s' if numbers[1:] else ''} {first}"
        shown.append(f"{name} {len(numbers)} ({first})" if is_ours else first)
    return "; ".join(shown)
