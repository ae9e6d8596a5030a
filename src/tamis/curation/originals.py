"""The user's own rows, as they stand in their files: the chosen ones go into files of the same format, unchanged.

JSON lines and CSV keep every kept row as it is written, to the byte. Files that are one JSON list are written anew,
value by value; Parquet files and saved data sets keep their columns and types.
"""

import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tamis.curation.choice import Mask
from tamis.readers import csv_records, has_byte_order_mark, kind_of, lines_of, one_line
from tamis.rows import place_in_file

Columns = Mapping[str, np.ndarray[Any, Any]]


def write_rows(origin: Path | Dataset, name: str, chosen_R: Mask, columns: Columns, target: Path) -> None:
    """Write the chosen rows of a file, or of a data set that is no file, with more columns if there are any.

    Args:
        origin: see `tamis.data.origins_of`.
        chosen_R: for each of its R rows; of text files there may be more rows, which are not chosen.
        columns: values for each of its rows, by name.
        target: the file; for a data set the folder. Its own folder is there, and it is not.

    Raises:
        ValueError: a column of that name is there already, or rows cannot be written.
    """
    if isinstance(origin, Dataset):
        _write_dataset(origin, name, chosen_R, columns, target)
    elif kind_of(origin) == ".parquet":
        _write_parquet(origin, name, chosen_R, columns, target)
    else:
        _text_writer(origin)(origin, name, chosen_R, columns, target)


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
        encoding = "utf-8-sig" if has_byte_order_mark(origin) else "utf-8"
        yield stack.enter_context(io.TextIOWrapper(file, encoding=encoding, newline=""))


def _write_json_lines(origin: Path, name: str, chosen_R: Mask, columns: Columns, path: Path) -> None:
    records = (line for line in lines_of(origin, name) if line.strip())
    with _opened(origin, path) as file:
        for i, line in _chosen(records, chosen_R):
            text, end = _without_end(line)
            if columns:
                _refuse_present(json.loads(text), columns, place_in_file(name, i))
                added = json.dumps(_values(columns, i), ensure_ascii=False)
                text = f"{text.rstrip().removesuffix('}').rstrip()}, {added[1:]}"
            file.write(text + (end or "\n"))


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
    records = ((values, text) for _, values, text in csv_records(lines_of(origin, name), name, delimiter) if values)
    header, text = next(records)
    _refuse_present(header, columns, name)
    text, end = _without_end(text)
    with _opened(origin, path) as file:
        file.write(delimiter.join([text, *columns]) + end)
        for i, (_, text) in _chosen(records, chosen_R):
            text, own_end = _without_end(text)
            added = ("" if value is None else str(value) for value in _values(columns, i).values())
            file.write(delimiter.join([text, *added]) + (own_end or end))


def _without_end(line: str) -> tuple[str, str]:
    """A line, and its line end."""
    text = line.rstrip("\r\n")
    return text, line[len(text) :]


# --- tables -----------------------------------------------------------------------------------------------------------


def _write_parquet(origin: Path, name: str, chosen_R: Mask, columns: Columns, path: Path) -> None:
    with pq.ParquetFile(origin) as file, one_line(f"{name}: its rows cannot be written"):
        schema, first = file.schema_arrow, 0
        _refuse_present(schema.names, columns, name)
        for column, values_R in columns.items():
            schema = schema.append(pa.field(column, pa.array(values_R[:0]).type))
        with pq.ParquetWriter(path, schema, compression=_compression(file)) as writer:
            for k in range(file.num_row_groups):
                table = file.read_row_group(k)
                places = slice(first, first + len(table))
                for column, values_R in columns.items():
                    table = table.append_column(column, pa.array(values_R[places], from_pandas=True))
                writer.write_table(table.filter(pa.array(chosen_R[places])))
                first = places.stop


def _compression(file: pq.ParquetFile) -> str:
    """That of the first column; pyarrow's own where there is none to see."""
    has_rows = file.num_row_groups and file.metadata.num_columns
    return str(file.metadata.row_group(0).column(0).compression) if has_rows else "snappy"


def _write_dataset(origin: Dataset, name: str, chosen_R: Mask, columns: Columns, target: Path) -> None:
    _refuse_present(origin.column_names, columns, name)
    places = np.flatnonzero(chosen_R)
    chosen = origin.select(places)
    if columns:
        chosen = chosen.flatten_indices(keep_in_memory=True)  # `add_column` would leave a file beside the user's own
    for column, values_R in columns.items():
        chosen = chosen.add_column(column, pa.array(values_R[places], from_pandas=True))
    chosen.save_to_disk(target, num_shards=1 if len(chosen) == 0 else None)


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
