"""What was weighed: the weights of a run, and the files whose rows they belong to.

A run may have ten million rows: their weights are held as numbers, their hashes and what they say are read in batches.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from tamis.data import RowReader
from tamis.hashes import hex_digits
from tamis.output_dir import CONFIG_FILES, config_path
from tamis.readers import kind_of
from tamis.rows import check_rows, place_in_file
from tamis.sources import Part, parts_of
from tamis.weights_file import require_columns, weight_batches

_AT_ONCE = 100_000
_NUMBERS = ("source", "row", "weight", "p_right", "score", "kept")


@dataclass
class Source:
    """One file of the run, or a data set that is no file: the rows of it that were weighed.

    Attributes:
        name: what the run calls it.
        origin: see `tamis.data.origins_of`.
        path: of the file or of the saved data set; None where it is from the hub.
        names: what it calls the columns of prompt and response, see `tamis.layouts.names_by_kind`.
        rows: its rows of `weights.parquet`.
        place_R: where each of them stands in the file.
    """

    name: str
    origin: Path | Dataset
    path: Path | None
    names: dict[str, str]
    rows: slice
    place_R: np.ndarray[Any, Any]

    @property
    def num_rows(self) -> int:
        """Of the file; of text files up to the last row that was weighed, for they need not be counted."""
        if isinstance(self.origin, Dataset):
            return len(self.origin)
        if kind_of(self.origin) == ".parquet":
            return int(pq.read_metadata(self.origin).num_rows)
        return int(self.place_R.max(initial=-1)) + 1


def read_weights(path: Path) -> pa.Table:
    """One row per training row, see `tamis.recorder.Recorder.write_weights`; without the hashes.

    Raises:
        ValueError: it cannot be read, or has not the columns.
    """
    try:
        require_columns(path, (*_NUMBERS, "content_hash"))
        batches = weight_batches(path, list(_NUMBERS), _AT_ONCE, read_dictionary=["source"])
        tables = [_narrow(pa.Table.from_batches([batch])) for batch in batches]
        empty = _narrow(pq.read_schema(path).empty_table().select(_NUMBERS))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}). Check that it is whole") from error
    # permissive: a place beyond 31 bits makes that column of all rows a wider one
    table = pa.concat_tables(tables or [empty], promote_options="permissive").unify_dictionaries()
    pa.default_memory_pool().release_unused()
    return table


def _narrow(table: pa.Table) -> pa.Table:
    """Places in files by half of their bits, where that is enough."""
    if (pc.max(table["row"]).as_py() or 0) >= 2**31:
        return table
    return table.set_column(table.column_names.index("row"), "row", table["row"].cast(pa.int32()))


def find_sources(path: Path, given: dict[str, Any], weights: pa.Table) -> tuple[list[Source], list[Path]]:
    """The files of a run, in order, and which of them are folders.

    Args:
        path: of its `weights.parquet`; the configuration beside it says how its rows were read.
        given: settings that take the place of those of the run, where they are not empty.
        weights: see `read_weights`.

    Raises:
        ValueError: a row no longer says what it said when it was weighed, or a file is missing.
    """
    config = config_of(path.parent) | {name: value for name, value in given.items() if value}
    if not config.get("train_dataset"):
        raise ValueError(f"{path.parent} does not say which rows were weighed: give `train_dataset`")
    known, row_N = known_rows(path), weights["row"]
    sources, parts, first = list[Source](), list[Part](), 0
    for part, reader, tables in rows_again(config):
        parts.append(part)
        num_rows = sum(_compare(table, hashes, known) for table, hashes in tables)
        file = part.origin if isinstance(part.origin, Path) else Path(part.source).expanduser()
        places = slice(first, first + num_rows)
        place_R = row_N.slice(first, num_rows).to_numpy()
        resolved = file.resolve() if file.exists() else None
        sources.append(Source(part.name, part.origin, resolved, reader.names, places, place_R))
        first = places.stop
    if first < len(weights):
        raise ValueError(f"{len(weights)} rows were weighed, and there are {first}. Give the rows of the run")
    folders = {Path(part.source).expanduser() for part in parts}
    return sources, [folder.resolve() for folder in folders if folder.is_dir()]


def config_of(run_dir: Path) -> dict[str, Any]:
    """The settings of the run; nothing where there are none that can be read."""
    for path in (config_path(run_dir), run_dir / CONFIG_FILES[0]):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(config, dict):
                return config
    return {}


def rows_again(config: dict[str, Any]) -> Iterator[tuple[Part, RowReader, Iterator[tuple[pa.Table, list[str]]]]]:
    """The training rows of a run, file by file, read as it has read them: in batches, with the hashes of their rows.

    Args:
        config: its settings.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    named, role = config.get("train_dataset") or [], "train_dataset"
    columns = {name: config.get(name) for name in ("prompt_column", "response_column", "weight_column")}
    sources = [named] if isinstance(named, str) else named
    for part in parts_of(sources, role=role, split=config.get("train_split", "train")):
        skipped: list[dict[str, Any]] | None = [] if config.get("skip_bad_rows") else None
        reader = RowReader(part.origin, part.name, role=role, skipped=skipped, **columns)
        yield part, reader, _with_hashes(part, reader)


def _with_hashes(part: Part, reader: RowReader) -> Iterator[tuple[pa.Table, list[str]]]:
    for table in reader:
        yield part.of_source(table), hex_digits(check_rows(Dataset(table, fingerprint="batch"), "train_dataset"))


def known_rows(path: Path) -> Iterator[tuple[int, str]]:
    """Of every row that was weighed, in order: where it stood in its file, and the hash of what it said."""
    for batch in weight_batches(path, ["row", "content_hash"]):
        yield from zip(batch["row"].to_pylist(), batch["content_hash"].to_pylist(), strict=True)


def _compare(table: pa.Table, hashes: list[str], known: Iterator[tuple[int, str]]) -> int:
    """Compare the next rows of a file with the next that were weighed; returns how many they are."""
    rows = zip(table["source"].to_pylist(), table["row"].to_pylist(), hashes, strict=True)
    for name, row, content_hash in rows:
        before = next(known, None)
        if before is None:
            raise ValueError(f"{name}: rows were added since they were weighed. Give the rows of the run")
        if before != (row, content_hash):
            raise ValueError(
                f"{place_in_file(name, row)} does not say what it said when it was weighed. Give the rows of the run, "
                "or weigh them anew"
            )
    return len(table)
