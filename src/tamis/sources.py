"""Training rows of several sources: files, patterns, folders and hub names, each with a weight of its own."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from tamis.data import RowReader, joined, origins_of


@dataclass(frozen=True)
class Part:
    """One file of a source, or a data set that is no file.

    Attributes:
        source: what the user has named it by, patterns resolved.
        name, origin: see `tamis.data.origins_of`.
        title: what its rows have in the column `source`.
        weight: of its rows, beside what they weigh themselves; None where sources have no weights.
    """

    source: str
    name: str
    origin: Path | Dataset
    title: str
    weight: float | None

    def of_source(self, table: pa.Table) -> pa.Table:
        """Rows of the file, with the weight and the title of their source."""
        if self.weight is not None:
            table = _weighted(table, self.weight)
        return table if self.title == self.name else _replace(table, "source", pa.repeat(self.title, len(table)))


def load_sources(
    sources: Sequence[str],
    *,
    role: str,
    source_weights: Sequence[float] | None = None,
    split: str = "train",
    **options: Any,
) -> Dataset:
    """Load and check the rows of all sources, in their order; see `parts_of`.

    Args:
        options: see `tamis.data.load_rows`.
    """
    parts = parts_of(sources, role=role, source_weights=source_weights, split=split)
    files = (map(part.of_source, RowReader(part.origin, part.name, role=role, **options)) for part in parts)
    return joined(files, role)


def parts_of(
    sources: Sequence[str], *, role: str, source_weights: Sequence[float] | None = None, split: str = "train"
) -> list[Part]:
    """The files of all sources, in their order.

    Args:
        sources: each as in `tamis.data.load_rows`, or a pattern of files, such as ``data/*.parquet`` or ``**/*.jsonl``.
        role, split: see there.
        source_weights: one for each source, which all of its rows get in the column `weight`; a weight of the row's own
            is multiplied by it.

    Raises:
        ValueError: see there; or a pattern matches nothing, a file is named twice, or the weights are not as many.
    """
    if source_weights is not None:
        if len(source_weights) != len(sources):
            raise ValueError(
                f"{len(source_weights)} `source_weights` for {len(sources)} sources of {role}: give one for each"
            )
        for source, given in zip(sources, source_weights, strict=True):
            if not 0 <= given < math.inf:
                raise ValueError(f"{source}: the weight {given} is not a finite number >= 0. Correct `source_weights`")
    paths = [(path, k) for k, source in enumerate(sources) for path in matches(source, role)]
    _refuse_twice([path for path, _ in paths], role)
    file_names = [Path(path).name for path, _ in paths]
    parts = []
    for (path, k), file_name in zip(paths, file_names, strict=True):
        is_only_one = file_names.count(file_name) == 1  # or the name would not tell which file it is
        for name, origin in origins_of(path, role, split):
            weight = None if source_weights is None else source_weights[k]
            parts.append(Part(path, name, origin, name if is_only_one else path, weight))
    return parts


def _refuse_twice(paths: list[str], role: str) -> None:
    seen = set[str]()
    for path in paths:
        same = os.path.realpath(path) if os.path.exists(path) else path
        if same in seen:
            raise ValueError(f"{path}: named twice in {role}. Name it once")
        seen.add(same)


def matches(source: str, role: str) -> list[str]:
    """The files that a pattern matches; the source itself where it is no pattern.

    Raises:
        ValueError: none does.
    """
    path = Path(source).expanduser()
    if path.exists() or not has_magic(source):
        return [source]
    found = sorted(glob(str(path), recursive=True))
    if not found:
        raise ValueError(f"{source}: no file matches. Check `{role}`")
    return found


def _weighted(table: pa.Table, weight: float) -> pa.Table:
    own = table["weight"].to_numpy() if "weight" in table.column_names else 1.0
    values = pa.array([weight] * len(table), pa.float64()).to_numpy() * own
    return _replace(table, "weight", pa.array(values))


def _replace(table: pa.Table, name: str, values: pa.Array) -> pa.Table:
    if name not in table.column_names:
        return table.append_column(name, values)
    return table.set_column(table.column_names.index(name), name, values)
