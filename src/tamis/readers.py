"""Files of rows as the user has them: JSON, JSON lines, CSV and Parquet, read row by row, nothing interpreted."""

import codecs
import csv
import gzip
import io
import json
import logging
import re
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from tamis.bad_rows import BadRow
from tamis.rows import BATCH_SIZE, Batches, batches, place_in_file
from tamis.settings import first_line

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


@contextmanager
def one_line(problem: str) -> Iterator[None]:
    """Errors within it become one line that says what the problem is, whatever kind they are of."""
    try:
        yield
    except Exception as error:  # hub, network, pyarrow, gzip and damaged files raise a dozen kinds
        raise ValueError(f"{problem} ({type(error).__name__}: {first_line(error)}).") from error


def kind_of(path: Path) -> str:
    """The suffix of a file, in lower case and without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path, name: str) -> Batches:
    """The rows of a file, in batches; those that cannot be read are `BadRow`.

    Raises:
        ValueError: the file as a whole cannot be read.
    """
    # Not by `datasets`, whose readers turn the answers NA, 007 and 2024-01-02 into null, 7.0 and a timestamp.
    kind = kind_of(path)
    if kind not in SUFFIXES:
        raise ValueError(f"{name}: unknown kind of file. Give one of {', '.join(SUFFIXES)}.")
    if kind == ".parquet":
        return _parse_parquet(path, name)
    lines = lines_of(path, name)
    if kind in (".csv", ".tsv"):
        return batches(_parse_csv(lines, name, "," if kind == ".csv" else "\t"))
    return batches(_parse_json(lines, name) if kind == ".json" else _parse_json_lines(lines, name))


def _parse_parquet(path: Path, name: str) -> Batches:
    with one_line(f"{name}: cannot be read as Parquet; check that it is whole"), pq.ParquetFile(path) as file:
        for batch in file.iter_batches(BATCH_SIZE):
            yield Dataset(pa.Table.from_batches([batch]), fingerprint="batch")


def has_byte_order_mark(path: Path) -> bool:
    """Whether a text file begins with one, as Excel wants it."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
        return file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def lines_of(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file, with their ends, split at \\n alone: U+2028 may stand inside a JSON string."""
    with (
        one_line(f"{name}: cannot be read as UTF-8 text; convert it, or check that it is whole"),
        gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file,
    ):
        for number, line in enumerate(file, start=1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                error.reason += f" (line {number})"
                raise


def _parse_json(lines: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    """Parse a list of objects, or objects on lines of their own."""
    text = "".join(lines)
    if not text.lstrip().startswith("["):
        yield from _parse_json_lines(iter(text.split("\n")), name)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}, line {error.lineno}: {_not_json(error)}") from error
    may_break = _HALF_A_PAIR.search(text) is not None
    for i, row in enumerate(rows):
        _check_object(row, name, i, may_break)
        yield row


def _parse_json_lines(lines: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    num_rows = num_blank = num_skipped = 0  # blank lines at the end of the file are not worth a word
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            num_blank += 1
            continue
        num_skipped = num_blank
        try:
            row = json.loads(line.removesuffix("\n"))
            _check_object(row, name, num_rows, _HALF_A_PAIR.search(line) is not None)
        except json.JSONDecodeError as error:
            where = f"row {num_rows} (line {number}), which must be one whole object"
            row = BadRow(f"{name}, {where}: {_not_json(error)}", line)
        except ValueError as error:
            row = BadRow(str(error), line)
        yield row
        num_rows += 1
    if num_skipped:
        logger.info("%s: %d blank lines are skipped; rows and lines are counted without them", name, num_skipped)


def _not_json(error: json.JSONDecodeError) -> str:
    return f"not valid JSON ({error.msg.removesuffix(' at')} at character {error.colno}). Correct it."


def _check_object(row: Any, name: str, i: int, may_break: bool) -> None:
    if not isinstance(row, dict):
        raise ValueError(
            f"{place_in_file(name, i)}: {reprlib.repr(row)} is not an object with named values. Correct it."
        )
    if may_break:  # JSON may escape half of a surrogate pair, which no UTF-8 text can hold
        with one_line(f"{place_in_file(name, i)}: half of a surrogate pair"):
            json.dumps(row, ensure_ascii=False).encode()


def _parse_csv(lines: Iterator[str], name: str, delimiter: str) -> Iterator[dict[str, Any]]:
    records, num_rows = csv_records(lines, name, delimiter), 0
    line, header, _ = next(records, (0, [], ""))
    if len(set(header)) < len(header):
        error = f"a column is named twice in the header {', '.join(header)}"
        raise ValueError(_not_csv(name, 0, line, error))
    for line, row, _ in records:
        if row and len(row) != len(header):
            error = f"{len(row)} values for {len(header)} columns"
            yield BadRow(_not_csv(name, num_rows, line, error), delimiter.join(row))
        elif row:
            yield dict(zip(header, row, strict=True))
        num_rows += bool(row)


def csv_records(lines: Iterable[str], name: str, delimiter: str) -> Iterator[tuple[int, list[str], str]]:
    """The line in which each record ends, its values, and its text with its line end; empty lines have no values.

    Raises:
        ValueError: a record cannot be read.
    """
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long answer
    taken = list[str]()

    def pieces() -> Iterator[str]:
        for line in lines:
            for piece in io.StringIO(line, newline=""):  # the reader wants lines that end at a bare \r as well
                taken.append(piece)
                yield piece

    reader, num_records = csv.reader(pieces(), delimiter=delimiter, strict=True), 0
    try:
        for values in reader:
            yield reader.line_num, values, "".join(taken)
            taken.clear()
            num_records += bool(values)
    except csv.Error as error:
        raise ValueError(_not_csv(name, max(num_records - 1, 0), reader.line_num, error)) from error


def _not_csv(name: str, row: int, line: int, error: csv.Error | str) -> str:
    return f"{name}, row {row} (line {line}): {error}. Check the separators and the quotes."
