"""Everything that is wrong with the files of a run: `tamis train` stops at the first mistake."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from datasets import Dataset

from tamis.data import RowReader, origins_of
from tamis.run import DataArguments
from tamis.sources import matches

MAX_SHOWN = 10  # bad rows of a file


def find_problems(data: DataArguments) -> tuple[list[str], list[dict[str, Any]]]:
    """Read every file that is named, on its own.

    Returns:
        For each file that cannot be trained on the message of `tamis train`; and all bad rows of these files, as
        `tamis.bad_rows.RowSieve` has them.
    """
    messages, bad_rows = list[str](), list[dict[str, Any]]()
    for role, sources, split, weight_column in _named(data):
        options: dict[str, Any] = {
            "role": role,
            "prompt_column": data.prompt_column,
            "response_column": data.response_column,
            "weight_column": weight_column,
        }
        for source in sources:
            try:
                origins = list(_origins(source, role, split))
            except ValueError as error:
                messages.append(str(error))
                continue
            for name, origin in origins:
                try:
                    _read(RowReader(origin, name, **options))
                except ValueError as error:
                    messages.append(str(error))
                    with suppress(ValueError):  # the same one, where it is not about single rows
                        _read(RowReader(origin, name, skipped=bad_rows, **options))
    return messages, bad_rows


def _read(rows: RowReader) -> None:
    for _ in rows:  # checks a batch, and keeps none
        pass


def _named(data: DataArguments) -> Iterator[tuple[str, list[str], str, str | None]]:
    yield "train_dataset", data.train_dataset, data.train_split, data.weight_column
    for role, source, split in (
        ("validation_dataset", data.validation_dataset, data.validation_split),
        ("eval_dataset", data.eval_dataset, data.eval_split),
    ):
        if source is not None:
            yield role, [source], split, None


def _origins(source: str, role: str, split: str) -> Iterator[tuple[str, Path | Dataset]]:
    for path in matches(source, role) if role == "train_dataset" else [source]:
        yield from origins_of(path, role, split)


def by_file(bad_rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The bad rows of each file."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in bad_rows:
        found.setdefault(row["source"], []).append(row)
    return found
