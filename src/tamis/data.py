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
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

from tamis.rows import ContentCheck, Rows, batches, check_weights, column_values, place_in_file

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# What is read without naming columns, first fit first: TRL's own formats, then the customary names of pairs.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    *(("prompt", "completion"), ("messages",), ("conversations",)),
    *(("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("instruction", "input", "output"), ("instruction", "output"), ("text",)),
)
KINDS = {1: ("messages",), 2: ("prompt", "completion"), 3: ("prompt", "input", "completion")}
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def load_rows(
    source: str | Path,
    *,
    role: str,
    split: str = "train",
    prompt_column: str | None = None,
    response_column: str | None = None,
    weight_column: str | None = None,
) -> Dataset:
    """Load and check the rows that `source` names, in order, in one of TRL's formats.

    Columns of the result: `prompt` and `completion` (text, or lists of messages), or `messages`, or `text`; `row`
    (int64, index in its file, from 0); `source` (name of the file or hub data set); with `weight_column`, `weight`
    (float64). All other columns are dropped. Values stay as they are written, NA and 007 in CSV too, except that:

    - a text prompt gets a newline at its end where it has none, unless its columns are called `prompt` and
      `completion`: TRL joins the two without a separator. One newline is a boundary in the common byte-level
      tokenizers; a space, and in GPT-2's a second newline, merges with the start of the response;
    - instruction and input (Alpaca) become the prompt "{instruction}\\n\\n{input}\\n", or "{instruction}\\n";
    - ShareGPT messages (from, value) become role and content, with user for human and assistant for gpt.

    Args:
        source: a .json (list of objects, or one a line), .jsonl, .csv, .tsv or .parquet file (text also with .gz), a
            folder of them, a folder written by `Dataset.save_to_disk`, or a hub name, NAME or NAME:CONFIG.
        role: the flag it came from, `train_dataset`, `validation_dataset` or `eval_dataset`; used in messages.
        split: the split of a folder or a hub data set; a single file has none and is read whole.
        prompt_column, response_column: the columns of a pair where their names are not customary.
        weight_column: a column of finite weights >= 0, one for each row.

    Raises:
        ValueError: nothing is there, it cannot be read, no layout is recognised, or a row fails a check of
            `tamis.rows`.
    """
    named = tuple(column for column in (prompt_column, response_column) if column is not None)
    if len(set(named)) == 1:
        raise ValueError(f"{role}: --prompt_column and --response_column go together and name two columns.")
    parts = [_canonical(rows, name, named, weight_column) for name, rows in _read_source(str(source), role, split)]
    for part in parts:
        if set(part.column_names) != set(parts[0].column_names):
            raise ValueError(
                f"{part['source'][0]}: not the layout of {parts[0]['source'][0]}. Give all files the same."
            )
    table = _one_table(parts, str(source))
    return Dataset(table, fingerprint=_digest(table))


def _read_source(source: str, role: str, split: str) -> Iterator[tuple[str, Rows]]:
    """Yield (name, rows) for each file of `source`."""
    path = Path(source).expanduser()
    if path.is_file():
        yield path.name, _read_file(path, path.name)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        with _one_line(f"{source}: cannot be read as a saved data set"):
            saved = load_from_disk(str(path))
        yield path.name, _pick(saved, split, source) if isinstance(saved, DatasetDict) else saved
    elif source and path.is_dir():
        path = path.resolve()
        for file in _files_of_folder(path, source, split):
            name = (path.name / file.relative_to(path)).as_posix()
            yield name, _read_file(file, name)
    elif _looks_like_path(source):
        raise ValueError(f"{source}: no such file or folder. Check --{role}.")
    else:
        name, _, config = source.partition(":")
        with _one_line(f"{source}: no such file or folder, nor a hub data set with split {split!r}; check --{role}"):
            dataset = load_dataset(name, config or None, split=split)
        yield source, dataset


@contextmanager
def _one_line(problem: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # hub, network, pyarrow, gzip and damaged files raise a dozen kinds
        first_line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
        raise ValueError(f"{problem} ({type(error).__name__}: {first_line}).") from error


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
        with _one_line(f"{name}: cannot be read as Parquet"):
            return Dataset(pq.read_table(path, partitioning=None))
    lines = _lines(path, name)
    if kind in (".csv", ".tsv"):
        return _parse_csv(lines, name, "," if kind == ".csv" else "\t")
    return _parse_json(lines, name) if kind == ".json" else _parse_json_lines(lines, name)


def _lines(path: Path, name: str) -> Iterator[str]:
    """Yield the lines of a text file, with their ends, split at \\n alone: U+2028 may stand inside a JSON string."""
    with (
        _one_line(f"{name}: cannot be read as UTF-8 text"),
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
        except json.JSONDecodeError as error:
            where = f"row {num_rows} (line {number}), which must be one whole object"
            raise ValueError(f"{name}, {where}: {_not_json(error)}") from error
        _check_object(row, name, num_rows, _HALF_A_PAIR.search(line) is not None)
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
                raise csv.Error(f"{len(row)} values for {len(header)} columns")
            if row:
                yield dict(zip(header, row, strict=True))
                num_rows += 1
    except csv.Error as error:
        where = f"{name}, row {num_rows} (line {reader.line_num})"
        raise ValueError(f"{where}: {error}. Check the separators and the quotes.") from error


def _canonical(rows: Rows, name: str, named: tuple[str, ...], weight_column: str | None) -> pa.Table:
    """Check the rows of one file under its own column names, then bring them into the columns of `load_rows`."""
    place = partial(place_in_file, name)
    check, tables, weights = ContentCheck(place), list[pa.Table](), list[Any]()
    found, used = dict[str, None](), tuple[str, ...]()
    for batch in batches(rows):
        found |= dict.fromkeys(chain.from_iterable(batch) if isinstance(batch, list) else batch.column_names)
        used = _layout(list(found), named, weight_column, name, before=used)
        names = dict(zip(used if used == ("text",) else KINDS[len(used)], used, strict=True))
        columns = {kind: column_values(batch, column) for kind, column in names.items()}
        if "messages" in columns:
            columns["messages"] = [_chatml(messages) for messages in columns["messages"]]
        if weight_column is not None:
            weights += column_values(batch, weight_column)
        if check.add(columns, names):
            with _one_line(f"{name}: the rows do not fit into one table"):
                tables.append(pa.table(_with_whole_prompts(columns, is_verbatim=used == LAYOUTS[0])))
    if check.num_rows == 0:
        raise ValueError(f"{name}: there are no rows. Give a file with at least one row.")
    logger.info("%s: %d rows from the columns %s of %s", name, check.num_rows, ", ".join(used), ", ".join(found))
    check.finish()
    table = _one_table(tables, name)
    if weight_column is not None:
        table = table.append_column("weight", pa.array(check_weights(weights, weight_column, place)))
    table = table.append_column("row", pa.array(np.arange(len(table))))
    return table.append_column("source", pa.repeat(name, len(table)))


def _layout(
    found: list[str], named: tuple[str, ...], weight_column: str | None, name: str, before: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the columns to read of those found so far; `before`: those that were read of the rows above."""
    used = named or next((layout for layout in LAYOUTS if set(layout) <= set(found)), ())
    if not used:
        unknown = f"no known layout fits the columns {', '.join(found)}"
        raise ValueError(f"{name}: {unknown}. Name two by --prompt_column and --response_column.")
    for column in (*used, weight_column or used[0]):
        if column not in found:
            raise ValueError(f'{name}: there is no column "{column}"; there is {", ".join(found)}.')
    if before and set(used) - set(before) - {"input"}:  # rows without an input may come first
        change = f"the first rows have the columns {', '.join(before)}, later ones {', '.join(used)}"
        raise ValueError(f"{name}: {change}. Give all rows the same.")
    return used


def _with_whole_prompts(columns: dict[str, list[Any]], is_verbatim: bool) -> dict[str, list[Any]]:
    """Join instruction and input, and end text prompts with a newline."""
    prompts, inputs = columns.get("prompt", []), columns.get("input")
    if inputs:
        prompts = [f"{a}\n\n{b}" if b and b.strip() else a for a, b in zip(prompts, inputs, strict=True)]
    if prompts and isinstance(prompts[0], str) and not is_verbatim:
        prompts = [prompt if prompt.endswith("\n") else prompt + "\n" for prompt in prompts]
    joined = {"prompt": prompts} if prompts else {}
    return joined | {kind: column for kind, column in columns.items() if kind not in ("prompt", "input")}


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


def _chatml(messages: Any) -> Any:
    """Turn ShareGPT's from and value into role and content; what has neither is left to the checks."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages
    return [
        {"role": SHAREGPT_ROLES.get(str(m.get("from")), m.get("from")), "content": m["value"]} if "value" in m else m
        for m in messages
    ]
