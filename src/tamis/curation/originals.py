"""The user's own rows, as they stand in their files: the chosen ones go into files of the same format, unchanged.

JSON lines and CSV keep every kept row as it is written; the ends of JSON lines become \\n, and no byte order mark is
written. Files that are one JSON list are written anew, value by value; Parquet files and saved data sets keep their
columns and types.
"""

import csv
import gzip
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tamis.curation.choice import Mask
from tamis.files import write_atomically
from tamis.readers import kind_of, lines_of
from tamis.rows import place_in_file

Columns = Mapping[str, np.ndarray[Any, Any]]


def write_rows(origin: Path | Dataset, name: str, chosen_R: Mask, columns: Columns, target: Path) -> None:
    """Write the chosen rows of a file, or of a data set that is no file, with more columns if there are any.

    Args:
        origin: as `tamis.data.origins_of` gives it.
        chosen_R: for each of its rows.
        columns: values for each of its rows, by name.
        target: the file; for a data set the folder. It is there as a whole or not at all.

    Raises:
        ValueError: a column of that name is there already.
    """
    if isinstance(origin, Dataset):
        _write_dataset(origin, name, chosen_R, columns, target)
    elif kind_of(origin) == ".parquet":
        write_atomically(target, lambda path: _write_parquet(origin, name, chosen_R, columns, path))
    else:
        write = _text_writer(origin)
        write_atomically(target, lambda path: write(origin, name, chosen_R, columns, path))


# --- text -------------------------------------------------------------------------------------------------------------


def _text_writer(origin: Path) -> Callable[[Path, str, Mask, Columns, Path], None]:
    if kind_of(origin) in (".csv", ".tsv"):
        return _write_csv
    return _write_json_list if kind_of(origin) == ".json" and _is_list(origin) else _write_json_lines


def _is_list(origin: Path) -> bool:
    return next((line.lstrip()[0] for line in lines_of(origin, origin.name) if line.strip()), "") == "["


@contextmanager
def _opened(origin: Path, path: Path) -> Iterator[TextIO]:
    """A text file for the chosen rows of ``origin``, packed where that is; the same rows give the same bytes."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if origin.suffix.lower() == ".gz":
            file = stack.enter_context(gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0))
        yield stack.enter_context(io.TextIOWrapper(file, encoding="utf-8", newline=""))


def _write_json_lines(origin: Path, name: str, chosen_R: Mask, columns: Columns, path: Path) -> None:
    records = (line for line in lines_of(origin, name) if line.strip())
    with _opened(origin, path) as file:
        for i, line in _chosen(records, chosen_R):
            text = line.rstrip("\r\n")
            if columns:
                _refuse_present(json.loads(text), columns, place_in_file(name, i))
                added = json.dumps(_values(columns, i), ensure_ascii=False)
                text = f"{text.rstrip().removesuffix('}').rstrip()}, {added[1:]}"
            file.write(text + "\n")


def _write_json_list(origin: Path, name: str, chosen_R: Mask, columns: Columns, path: Path) -> None:
    text = "".join(lines_of(origin, name))
    rows = []
    for i, row in _chosen(json.loads(text), chosen_R):
        _refuse_present(row, columns, place_in_file(name, i))
        rows.append(row | _values(columns, i))
    with _opened(origin, path) as file:
        json.dump(rows, file, ensure_ascii=False, indent=2 if "\n" in text.strip() else None)
        file.write("\n")


def _write_csv(origin: Path, name: str, chosen_R: Mask, columns: Columns, path: Path) -> None:
    delimiter = "," if kind_of(origin) == ".csv" else "\t"
    records = _csv_records(lines_of(origin, name), delimiter)
    header, text = next(records)
    _refuse_present(header, columns, name)
    with _opened(origin, path) as file:
        file.write(_extended(text, columns, delimiter))
        for i, (_, text) in _chosen(records, chosen_R):
            file.write(_extended(text, _values(columns, i).values(), delimiter))


def _extended(text: str, values: Iterable[Any], delimiter: str) -> str:
    """A record of CSV with more values, and its own line end."""
    body = text.rstrip("\r\n")
    return delimiter.join([body, *("" if value is None else str(value) for value in values)]) + (
        text[len(body) :] or "\n"
    )


def _csv_records(lines: Iterable[str], delimiter: str) -> Iterator[tuple[list[str], str]]:
    """Values and text of each record; empty lines are none."""
    taken: list[str] = []

    def pieces() -> Iterator[str]:
        for line in lines:
            for piece in io.StringIO(line, newline=""):  # the reader wants lines that end at a bare \r as well
                taken.append(piece)
                yield piece

    csv.field_size_limit(2**31 - 1)
    for values in csv.reader(pieces(), delimiter=delimiter, strict=True):
        text = "".join(taken)
        taken.clear()
        if values:
            yield values, text


# --- tables -----------------------------------------------------------------------------------------------------------


def _write_parquet(origin: Path, name: str, chosen_R: Mask, columns: Columns, path: Path) -> None:
    with pq.ParquetFile(origin) as file:
        schema, first = file.schema_arrow, 0
        _refuse_present(schema.names, columns, name)
        for column, values in columns.items():
            schema = schema.append(pa.field(column, pa.array(values[:0]).type))
        with pq.ParquetWriter(path, schema) as writer:
            for batch in file.iter_batches():
                places = slice(first, first + len(batch))
                for column, values in columns.items():
                    batch = batch.append_column(column, pa.array(values[places], from_pandas=True))
                writer.write_batch(batch.filter(pa.array(chosen_R[places])).cast(schema))
                first += len(chosen_R[places])


def _write_dataset(origin: Dataset, name: str, chosen_R: Mask, columns: Columns, target: Path) -> None:
    _refuse_present(origin.column_names, columns, name)
    places = np.flatnonzero(chosen_R)
    chosen = origin.select(places)
    for column, values in columns.items():
        chosen = chosen.add_column(column, pa.array(values[places], from_pandas=True))
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
        chosen.save_to_disk(Path(folder) / "rows", num_shards=1 if len(chosen) == 0 else None)
        shutil.rmtree(target, ignore_errors=True)
        (Path(folder) / "rows").rename(target)


# --- rows -------------------------------------------------------------------------------------------------------------


def _chosen(records: Iterable[Any], chosen_R: Mask) -> Iterator[tuple[int, Any]]:
    """The chosen records, with their places; there may be more records than rows that were weighed."""
    return ((i, record) for i, (record, is_chosen) in enumerate(zip(records, chosen_R, strict=False)) if is_chosen)


def _values(columns: Columns, i: int) -> dict[str, Any]:
    """What is added to a row; None for what is not known."""
    values = {name: values_R[i].item() for name, values_R in columns.items()}
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in values.items()}


def _refuse_present(names: Iterable[str], columns: Columns, where: str) -> None:
    if found := [name for name in names if name in columns]:
        raise ValueError(f'{where}: there is a column "{found[0]}" already. Leave `add_columns` out, or rename it')
