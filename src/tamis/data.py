"""Rows in: what a user names becomes a checked `datasets.Dataset` before any model is loaded.

Every error is one line that names the file, the row and the column, and says what to do. Rows are counted from 0.
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.config import HF_DATASETS_CACHE, HF_HUB_OFFLINE
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tamis.bad_rows import BadRow, RowSieve
from tamis.layouts import EXTRAS, chatml, choose_columns, names_by_kind, normalized
from tamis.rows import ContentCheck, Rows, batches, check_weights, column_values, place_in_file
from tamis.settings import first_line, warn_without_effect

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
_TIMEOUT = 10.0  # seconds, for one question to the hub
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def load_rows(
    source: str | Path,
    *,
    role: str,
    split: str = "train",
    prompt_column: str | None = None,
    response_column: str | None = None,
    weight_column: str | None = None,
    skipped: list[dict[str, Any]] | None = None,
) -> Dataset:
    """Load and check the rows that `source` names, in order.

    Columns of the result: `prompt` and `completion` (text, or lists of messages), or `messages`, or `text`; `row`
    (int64, index in its file, from 0); `source` (name of the file or hub data set); with `weight_column`, `weight`
    (float64). What belongs to a prompt beside these keeps a column of its own, null where a row has none:
    `prompt_input` (Alpaca's input), `system`, `history` (list of [user, assistant]) and `tools` (JSON). The
    `prompt_template` of `BilevelTrainer` joins them. All other columns are dropped. Values stay as they are written,
    NA and 007 in CSV too, except that ShareGPT messages (from, value) become role and content, with user for human
    and assistant for gpt.

    Args:
        source: a .json (list of objects, or one a line), .jsonl, .csv, .tsv or .parquet file (text also with .gz), a
            folder of them, a folder written by `Dataset.save_to_disk`, or a hub name, NAME or NAME:CONFIG.
        role: the flag it came from, `train_dataset`, `validation_dataset` or `eval_dataset`; used in messages.
        split: the split of a folder or a hub data set; a single file has none and is read whole.
        prompt_column, response_column: the columns of a pair where their names are not customary. A dot leads into
            an object: `meta.answer`.
        weight_column: a column of finite weights >= 0, one for each row; as there.
        skipped: a list that gets the bad rows, see `tamis.bad_rows.RowSieve`, instead of an error on the first. They
            are left out, and the others keep their `row`. A file that cannot be read at all stays an error.

    Raises:
        ValueError: nothing is there, it cannot be read, no layout is recognised, or a row fails a check of
            `tamis.rows`.
    """
    named = tuple(column for column in (prompt_column, response_column) if column is not None)
    if len(set(named)) == 1:
        raise ValueError(f"{role}: `prompt_column` and `response_column` go together and name two columns.")
    return joined(
        [
            _canonical(rows, name, named, weight_column, skipped)
            for name, rows in _read_source(str(source), role, split)
        ],
        str(source),
    )


def joined(parts: list[pa.Table], name: str) -> Dataset:
    """One data set of the rows of several files.

    Raises:
        ValueError: their layouts differ.
    """
    for part in parts:
        if _layout(part) != _layout(parts[0]):
            raise ValueError(
                f"{part['source'][0]}: not the layout of {parts[0]['source'][0]}. Give all files the same."
            )
    table = _one_table(parts, name)
    return Dataset(table, fingerprint=_digest(table))


def rows_of(dataset: Dataset, role: str) -> Dataset:
    """The rows of a data set in memory, as `load_rows` gives those of a file; a column `weight` is kept.

    Raises:
        ValueError: see `load_rows`.
    """
    table = _canonical(dataset, role, (), "weight" if "weight" in dataset.column_names else None)
    return Dataset(table, fingerprint=_digest(table))


def _read_source(source: str, role: str, split: str) -> Iterator[tuple[str, Rows]]:
    """Yield (name, rows) for each file of `source`."""
    path = Path(source).expanduser()
    if path.is_file():
        name = f"{role.removesuffix('_dataset')}_split"
        warn_without_effect([name] if split != "train" else [], {f"{path.name} is a file": [name]})
        yield path.name, _read_file(path, path.name)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        with _one_line(f"{source}: cannot be read as a saved data set; check that it is whole"):
            saved = load_from_disk(str(path))
        yield path.name, _pick(saved, split, source) if isinstance(saved, DatasetDict) else saved
    elif source and path.is_dir():
        path = path.resolve()
        for file in _files_of_folder(path, source, split):
            name = (path.name / file.relative_to(path)).as_posix()
            yield name, _read_file(file, name)
    elif _looks_like_path(source):
        raise ValueError(f"{source}: no such file or folder. Check `{role}`.")
    else:
        name, _, config = source.partition(":")
        with _one_line(f"{source}: no such file or folder, nor a hub data set with split {split!r}; check `{role}`"):
            _ask_hub(name)
            dataset = load_dataset(name, config or None, split=split)
        yield source, dataset


def _ask_hub(name: str) -> None:
    """Raise where the hub has no such data set or is not reached; `load_dataset` would ask for half a minute."""
    if HF_HUB_OFFLINE or (Path(HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    with suppress(HfHubHTTPError):  # whatever that is, loading will tell
        HfApi().dataset_info(name, timeout=_TIMEOUT)


@contextmanager
def _one_line(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub, network, pyarrow, gzip and damaged files raise a dozen kinds
        raise ValueError(f"{problem} ({type(error).__name__}: {first_line(error)}).") from error


def _looks_like_path(source: str) -> bool:
    may_be_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:.+)?", source) and _kind(Path(source)) not in SUFFIXES
    return not may_be_hub_name or ("/" in source and Path(source).parent.is_dir())


def _pick(splits: Mapping[Any, Any], split: str, source: str) -> Any:
    if split not in splits:
        raise ValueError(f"{source}: no split {split!r}, only {', '.join(map(str, splits))}. Name a file instead.")
    return splits[split]


def _files_of_folder(path: Path, source: str, split: str) -> list[Path]:
    """Return the files of one split by the rules of `datasets`: by names of files and folders."""
    present = {file for file in path.rglob("*") if file.is_file() and _kind(file) in SUFFIXES}
    if not present:
        raise ValueError(f"{source}: the folder has no files of rows. Give it some, of {', '.join(SUFFIXES)}.")
    with _one_line(f"{source}: the folder cannot be read"):
        splits = load_dataset_builder(str(path)).config.data_files or {}
    for file in sorted(present - {Path(file) for files in splits.values() for file in files}):
        logger.warning("%s: %s is left out: by its name or its kind it belongs to no split", source, file.name)
    return [Path(file) for file in _pick(splits, split, source)]


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _read_file(path: Path, name: str) -> Rows:
    # Not by `datasets`, whose readers turn the answers NA, 007 and 2024-01-02 into null, 7.0 and a timestamp.
    kind = _kind(path)
    if kind not in SUFFIXES:
        raise ValueError(f"{name}: unknown kind of file. Give one of {', '.join(SUFFIXES)}.")
    if kind == ".parquet":
        with _one_line(f"{name}: cannot be read as Parquet; check that it is whole"):
            return Dataset(pq.read_table(path, partitioning=None))
    lines = _lines(path, name)
    if kind in (".csv", ".tsv"):
        return _parse_csv(lines, name, "," if kind == ".csv" else "\t")
    return _parse_json(lines, name) if kind == ".json" else _parse_json_lines(lines, name)


def _lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file, with their ends, split at \\n alone: U+2028 may stand inside a JSON string."""
    with (
        _one_line(f"{name}: cannot be read as UTF-8 text; convert it, or check that it is whole"),
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
    return f"not valid JSON ({error.msg} at character {error.colno}). Correct it."


def _check_object(row: Any, name: str, i: int, may_break: bool) -> None:
    if not isinstance(row, dict):
        raise ValueError(
            f"{place_in_file(name, i)}: {reprlib.repr(row)} is not an object with named values. Correct it."
        )
    if may_break:  # JSON may escape half of a surrogate pair, which no UTF-8 text can hold
        with _one_line(f"{place_in_file(name, i)}: half of a surrogate pair"):
            json.dumps(row, ensure_ascii=False).encode()


def _parse_csv(lines: Iterator[str], name: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long answer
    # The reader wants lines that end at a bare \r as well.
    lines = chain.from_iterable(io.StringIO(line, newline="") for line in lines)
    reader, num_rows = csv.reader(lines, delimiter=delimiter, strict=True), 0
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise csv.Error(f"a column is named twice in the header {', '.join(header)}")
        for row in reader:
            if row and len(row) != len(header):
                error = f"{len(row)} values for {len(header)} columns"
                yield BadRow(_not_csv(name, num_rows, reader.line_num, error), delimiter.join(row))
            elif row:
                yield dict(zip(header, row, strict=True))
            num_rows += bool(row)
    except csv.Error as error:
        raise ValueError(_not_csv(name, num_rows, reader.line_num, error)) from error


def _not_csv(name: str, row: int, line: int, error: csv.Error | str) -> str:
    return f"{name}, row {row} (line {line}): {error}. Check the separators and the quotes."


def _canonical(
    rows: Rows,
    name: str,
    named: tuple[str, ...],
    weight_column: str | None,
    skipped: list[dict[str, Any]] | None = None,
) -> pa.Table:
    """Check the rows of one file under its own column names, then bring them into the columns of `load_rows`."""
    place = partial(place_in_file, name)
    check, sieve = ContentCheck(place), RowSieve(name, place, skipped, weight_column)
    tables, weights, row_numbers = list[pa.Table](), list[Any](), list[int]()
    found, used, names = dict[str, None](), tuple[str, ...](), dict[str, str]()
    for batch in batches(rows):
        found |= dict.fromkeys(chain.from_iterable(batch) if isinstance(batch, list) else batch.column_names)
        if not found:  # rows that could not be read have no columns
            sieve.good_places(batch, {"": [None] * len(batch)}, None, {"": ""}, check)
            continue
        used = choose_columns(list(found), named, weight_column, name, before=used)
        names = names_by_kind(used, list(found), weight_column)
        columns = {kind: column_values(batch, column) for kind, column in names.items()}
        if "messages" in columns:
            columns["messages"] = [chatml(messages) for messages in columns["messages"]]
        batch_weights = None if weight_column is None else column_values(batch, weight_column)
        first = check.num_rows
        kept = sieve.good_places(batch, columns, batch_weights, names, check)
        if batch_weights is not None:
            weights += [batch_weights[i] for i in kept]
        row_numbers += [first + i for i in kept]
        if kept and check.is_good:
            columns = {kind: [values[i] for i in kept] for kind, values in columns.items()}
            with _one_line(f"{name}: the rows do not fit into one table"):
                tables.append(pa.table(normalized(columns)))
    if check.num_rows == 0:
        raise ValueError(f"{name}: there are no rows. Give a file with at least one row.")
    sieve.report(check.num_rows)
    read = [*names.values(), *filter(None, [weight_column])]
    left = [column for column in found if not any(column in (one, one.partition(".")[0]) for one in read)]
    unread = f"; not read: {', '.join(left)}" if left else ""
    logger.info("%s: %d rows, from the columns %s%s", name, len(row_numbers), ", ".join(read), unread)
    check.finish()
    table = _one_table(tables, name)
    table = table.select([column for column in table.column_names if not pa.types.is_null(table[column].type)])
    if weight_column is not None:
        table = table.append_column("weight", pa.array(check_weights(weights, weight_column, place)))
    table = table.append_column("row", pa.array(row_numbers, pa.int64()))
    return table.append_column("source", pa.repeat(name, len(table)))


def _layout(table: pa.Table) -> set[str]:
    return set(table.column_names) - {"prompt_input", *EXTRAS}


def _one_table(tables: list[pa.Table], name: str) -> pa.Table:
    with _one_line(f"{name}: the rows do not fit into one table"):
        # permissive: some messages have fields that others have not
        return pa.concat_tables(tables, promote_options="permissive")


def _digest(table: pa.Table) -> str:
    """Hash all bytes of a table. `datasets` would pickle it for that, in four times its memory."""
    digest = hashlib.blake2b(str(table.schema).encode(), digest_size=8)
    for column in table.columns:
        for buffer in chain.from_iterable(chunk.buffers() for chunk in column.chunks):
            digest.update(buffer or b"")
    return digest.hexdigest()
