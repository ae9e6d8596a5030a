"""The user's own rows, as they stand in their files: the chosen ones go into files of the same format, unchanged.

JSON lines and CSV keep every kept row as it is written, to the byte. Files that are one JSON list are written anew,
value by value; Parquet files and saved data sets keep their columns and types. A row whose response is replaced keeps
all its other values.
"""

import csv
import gzip
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tamis.curation.choice import Mask
from tamis.curation.refined import NewResponse, with_response
from tamis.readers import csv_records, has_byte_order_mark, kind_of, lines_of, one_line
from tamis.rows import place_in_file

Columns = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Wanted:
    """What is written of a file of R rows; of text files there may be more rows, of which nothing is.

    Attributes:
        chosen_R: the rows that are written as they are.
        columns: more columns, by name: a value for each row.
        names: what the file calls its columns, see `tamis.layouts.names_by_kind`.
        responses: by row, those that take the place of its own; it is written once with each.
    """

    chosen_R: Mask
    columns: Columns = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    responses: Mapping[int, list[NewResponse]] = field(default_factory=dict)

    def versions(self, i: int) -> list[NewResponse | None]:
        """How often a row is written, and with which response each time; None for its own."""
        return [None] if self.chosen_R[i] else [*self.responses.get(i, ())]

    def of_records(self, records: Iterable[Any]) -> Iterator[tuple[int, Any, NewResponse | None]]:
        """The records that are written, in their order, with their places."""
        for i, record in zip(range(len(self.chosen_R)), records, strict=False):
            for response in self.versions(i):
                yield i, record, response

    def of_range(self, start: int, stop: int) -> list[tuple[int, NewResponse | None]]:
        """The same for the rows from ``start`` to ``stop``, without records; places are counted from ``start``."""
        places = set(np.flatnonzero(self.chosen_R[start:stop]).tolist())
        places |= {i - start for i in self.responses if start <= i < stop}
        return [(i, response) for i in sorted(places) for response in self.versions(start + i)]

    def values(self, i: int, response: NewResponse | None) -> dict[str, Any]:
        """What is added to a row; None for what is not known."""
        values = {name: values_R[i].item() for name, values_R in self.columns.items()}
        if response and values:
            values |= {"tamis_weight": response.weight, "tamis_p_right": response.p_right, "tamis_refined": True}
            values |= {name: 0 for name in values if name == "tamis_rank"}
        return {name: _rounded(value) if isinstance(value, float) else value for name, value in values.items()}


def _rounded(value: float) -> float | None:
    """To six digits, since it goes into text; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.6g}")


def write_rows(origin: Path | Dataset, name: str, wanted: Wanted, target: Path) -> None:
    """Write rows of a file, or of a data set that is no file, in its own format.

    Args:
        origin: see `tamis.data.origins_of`.
        target: the file; for a data set the folder. Its own folder is there, and it is not.

    Raises:
        ValueError: a column of that name is there already, or rows cannot be written.
    """
    if isinstance(origin, Dataset):
        _write_dataset(origin, name, wanted, target)
    elif kind_of(origin) == ".parquet":
        _write_parquet(origin, name, wanted, target)
    else:
        _text_writer(origin)(origin, name, wanted, target)


# --- text -------------------------------------------------------------------------------------------------------------


def _text_writer(origin: Path) -> Callable[[Path, str, Wanted, Path], None]:
    if kind_of(origin) in (".csv", ".tsv"):
        return _write_csv
    return _write_json_list if kind_of(origin) == ".json" and _is_list(origin) else _write_json_lines


def _is_list(origin: Path) -> bool:
    return next((line.lstrip()[0] for line in lines_of(origin, origin.name) if line.strip()), "") == "["


@contextmanager
def _opened(origin: Path, path: Path) -> Iterator[TextIO]:
    """A text file for rows of ``origin``, packed where that is; the same rows give the same bytes."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("wb"))
        if origin.suffix.lower() == ".gz":
            file = stack.enter_context(gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0))
        encoding = "utf-8-sig" if has_byte_order_mark(origin) else "utf-8"
        yield stack.enter_context(io.TextIOWrapper(file, encoding=encoding, newline=""))


def _write_json_lines(origin: Path, name: str, wanted: Wanted, path: Path) -> None:
    records = (line for line in lines_of(origin, name) if line.strip())
    with _opened(origin, path) as file:
        for i, line, response in wanted.of_records(records):
            text, end = _without_end(line)
            if response:
                text = _as_json(with_response(json.loads(text), wanted.names, response.text))
            if wanted.columns:
                _refuse_present(json.loads(text), wanted.columns, place_in_file(name, i))
                added = _as_json(wanted.values(i, response))
                text = f"{text.rstrip().removesuffix('}').rstrip()}, {added[1:]}"
            file.write(text + (end or "\n"))


def _as_json(row: Any) -> str:
    return json.dumps(row, ensure_ascii=False)


def _write_json_list(origin: Path, name: str, wanted: Wanted, path: Path) -> None:
    text = "".join(lines_of(origin, name))
    rows = []
    for i, row, response in wanted.of_records(json.loads(text)):
        _refuse_present(row, wanted.columns, place_in_file(name, i))
        new = with_response(row, wanted.names, response.text) if response else row
        rows.append(new | wanted.values(i, response))
    with _opened(origin, path) as file:
        json.dump(rows, file, ensure_ascii=False, indent=2 if "\n" in text.strip() else None)
        file.write("\n")


def _write_csv(origin: Path, name: str, wanted: Wanted, path: Path) -> None:
    delimiter = "," if kind_of(origin) == ".csv" else "\t"
    records = ((values, text) for _, values, text in csv_records(lines_of(origin, name), name, delimiter) if values)
    header, text = next(records)
    _refuse_present(header, wanted.columns, name)
    text, end = _without_end(text)
    with _opened(origin, path) as file:
        file.write(delimiter.join([text, *wanted.columns]) + end)
        for i, (values, text), response in wanted.of_records(records):
            text, own_end = _without_end(text)
            if response:
                new = with_response(dict(zip(header, values, strict=True)), wanted.names, response.text)
                text = _as_csv(list(new.values()), delimiter)
            added = ("" if value is None else str(value) for value in wanted.values(i, response).values())
            file.write(delimiter.join([text, *added]) + (own_end or end))


def _as_csv(values: list[str], delimiter: str) -> str:
    record = io.StringIO()
    csv.writer(record, delimiter=delimiter, lineterminator="").writerow(values)
    return record.getvalue()


def _without_end(line: str) -> tuple[str, str]:
    """A line, and its line end."""
    text = line.rstrip("\r\n")
    return text, line[len(text) :]


# --- tables -----------------------------------------------------------------------------------------------------------


def _write_parquet(origin: Path, name: str, wanted: Wanted, path: Path) -> None:
    with pq.ParquetFile(origin) as file, one_line(f"{name}: its rows cannot be written"):
        schema, first = file.schema_arrow, 0
        _refuse_present(schema.names, wanted.columns, name)
        for column, values_R in wanted.columns.items():
            schema = schema.append(pa.field(column, _type_of(values_R)))
        with pq.ParquetWriter(path, schema, compression=_compression(file)) as writer:
            for k in range(file.num_row_groups):
                table = file.read_row_group(k)
                picked = wanted.of_range(first, first + len(table))
                first, start = first + len(table), first
                table = _with_responses(table.take(pa.array([i for i, _ in picked], pa.int64())), picked, wanted)
                for column, values in _added(wanted, start, picked).items():
                    table = table.append_column(column, values)
                writer.write_table(table.cast(schema))


def _with_responses(table: pa.Table, picked: list[tuple[int, NewResponse | None]], wanted: Wanted) -> pa.Table:
    """The picked rows with the responses that take the place of their own; their columns keep their types."""
    places = [k for k, (_, response) in enumerate(picked) if response]
    if not places:
        return table
    named = wanted.names.get("completion") or wanted.names["messages"]
    column = named if named in table.column_names else named.partition(".")[0]
    values = table[column].to_pylist()
    for k in places:
        response = picked[k][1]
        assert response is not None
        values[k] = with_response({column: values[k]}, wanted.names, response.text)[column]
    place = table.column_names.index(column)
    return table.set_column(place, table.schema.field(column), pa.array(values, table.schema.field(column).type))


def _added(wanted: Wanted, start: int, picked: list[tuple[int, NewResponse | None]]) -> dict[str, pa.Array]:
    """The added columns of picked rows, whose places are counted from ``start``."""
    rows = [wanted.values(start + i, response) for i, response in picked]
    return {
        column: pa.array([row[column] for row in rows], _type_of(values_R))
        for column, values_R in wanted.columns.items()
    }


def _type_of(values: np.ndarray[Any, Any]) -> pa.DataType:
    """Of a column: the widest of its kind, whatever the numbers take in memory."""
    return {"f": pa.float64(), "i": pa.int64()}.get(values.dtype.kind, pa.from_numpy_dtype(values.dtype))


def _compression(file: pq.ParquetFile) -> str:
    """That of the first column; pyarrow's own where there is none to see."""
    has_rows = file.num_row_groups and file.metadata.num_columns
    return str(file.metadata.row_group(0).column(0).compression) if has_rows else "snappy"


def _write_dataset(origin: Dataset, name: str, wanted: Wanted, target: Path) -> None:
    _refuse_present(origin.column_names, wanted.columns, name)
    picked = wanted.of_range(0, len(origin))
    chosen = origin.select([i for i, _ in picked])
    if wanted.responses:
        table = _with_responses(chosen.with_format("arrow")[:], picked, wanted)
        chosen = Dataset(table, info=origin.info, fingerprint=chosen._fingerprint)
    elif wanted.columns:
        chosen = chosen.flatten_indices(keep_in_memory=True)  # `add_column` would leave a file beside the user's own
    for column, values in _added(wanted, 0, picked).items():
        chosen = chosen.add_column(column, values)
    chosen.save_to_disk(target, num_shards=1 if len(chosen) == 0 else None)


# --- rows -------------------------------------------------------------------------------------------------------------


def _refuse_present(names: Iterable[str], columns: Columns, where: str) -> None:
    if found := [name for name in names if name in columns]:
        raise ValueError(f'{where}: there is a column "{found[0]}" already. Leave `add_columns` out, or rename it')
