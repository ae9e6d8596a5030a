"""Rows in: what a user names becomes a checked `datasets.Dataset` before any model is loaded.

Every error is one line that names the file, the row and the column, and says what to do. Rows are counted from 0.
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
# What is read without naming columns, first fit first: TRL's own formats, then the customary names of pairs.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    *(("prompt", "completion"), ("messages",), ("conversations",)),
    *(("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("instruction", "input", "output"), ("instruction", "output"), ("text",)),
)
KINDS = {1: ("messages",), 2: ("prompt", "completion"), 3: ("prompt", "input", "completion")}
MIXED = "text and lists of messages are mixed. Give all prompts and responses one form"
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
Rows: TypeAlias = list[dict[str, Any]] | Dataset


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
        ValueError: nothing is there, it cannot be read, no layout is recognised, or a row fails `check_rows`.
    """
    named = tuple(column for column in (prompt_column, response_column) if column is not None)
    if len(set(named)) == 1:
        raise ValueError(f"{role}: --prompt_column and --response_column go together and name two columns.")
    parts = [_canonical(rows, name, named, weight_column) for name, rows in _read_source(str(source), role, split)]
    for part in parts:
        if part.keys() != parts[0].keys():
            raise ValueError(
                f"{part['source'][0]}: not the layout of {parts[0]['source'][0]}. Give all files the same."
            )
    columns = {column: list(chain.from_iterable(part[column] for part in parts)) for column in parts[0]}
    with _one_line(f"{source}: the rows do not fit into one table"):
        return Dataset(pa.table(columns))


def check_rows(dataset: Dataset, role: str) -> None:
    """Check that every row can be trained on.

    Args:
        dataset: in one of TRL's formats; `row` and `source`, as `load_rows` writes them, are used in messages.
        role: `train_dataset`, `validation_dataset` or `eval_dataset`; stands for the file where there is no `source`.

    Raises:
        ValueError: no rows, no known format, a null prompt, a response without text, a value of the wrong type,
            messages without an answer, or a `weight` that is null, NaN, infinite or negative.
    """
    if len(dataset) == 0:
        raise ValueError(f"{role}: there are no rows. Give a data set with at least one row.")
    place = partial(row_name, dataset, role)
    columns = {column: _values(dataset, column) for column in content_columns(dataset, role)}
    _check_content(columns, {column: column for column in columns}, place)
    if "weight" in dataset.column_names:
        _weights(_values(dataset, "weight"), "weight", place)


def content_hashes(dataset: Dataset) -> list[str]:
    """Hash what each row says: 16 hex digits of BLAKE2b over prompt and completion, messages or text as JSON.

    Other columns and the order of rows do not enter, nor do fields of a message that are null.
    """
    columns = content_columns(dataset, "dataset")
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*(_values(dataset, c) for c in columns), strict=True))
    texts = (json.dumps(_without_nulls(row), ensure_ascii=False, sort_keys=True) for row in rows)
    return [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]


def fingerprint(dataset: Dataset) -> str:
    """Hash a data set: 16 hex digits over the content of its rows, in order."""
    return hashlib.blake2b("".join(content_hashes(dataset)).encode(), digest_size=8).hexdigest()


def check_overlap(train: Dataset, validation: Dataset, held_out: Mapping[str, Dataset] | None = None) -> list[str]:
    """Look for the same row (prompt and response) in two of the data sets; those held out are given by role.

    Returns:
        The warnings, also logged: rows of the validation or a held-out set that are trained on as well.

    Raises:
        ValueError: validation and a held-out set share a row, so that the result could not be trusted.
    """
    held_out = held_out or {}
    datasets = {"train_dataset": train, "validation_dataset": validation, **held_out}
    hashes = {role: content_hashes(dataset) for role, dataset in datasets.items()}

    def shared(first: str, second: str, consequence: str) -> list[str]:
        index = {digest: j for j, digest in reversed(list(enumerate(hashes[second])))}
        found = [(i, index[digest]) for i, digest in enumerate(hashes[first]) if digest in index]
        shown = [
            f"{row_name(datasets[first], first, i)} = {row_name(datasets[second], second, j)}" for i, j in found[:3]
        ]
        return [f"{first} and {second} share {len(found)} row(s), first {'; '.join(shown)}. {consequence}"][
            : len(found)
        ]

    for role in held_out:
        for message in shared("validation_dataset", role, "Remove them from one of the two."):
            raise ValueError(message)
    messages = shared("validation_dataset", "train_dataset", "The choice of rows will favour them.")
    for role in held_out:
        messages += shared(role, "train_dataset", "The result on them says nothing about new rows.")
    for message in messages:
        logger.warning(message)
    return messages


def attach_example_ids(dataset: Dataset) -> Dataset:
    """Add `example_id` (int64), 0 .. N-1 in order; keep a column of that name, or raise ValueError if not unique."""
    if "example_id" not in dataset.column_names:
        return dataset.add_column("example_id", np.arange(len(dataset), dtype=np.int64))  # type: ignore[arg-type]
    ids = _values(dataset, "example_id")
    if dataset.features["example_id"].dtype != "int64" or None in ids or len(set(ids)) != len(ids):
        raise ValueError('column "example_id": the ids must be unique int64 numbers. Remove it to get new ones.')
    return dataset


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
    with _one_line(f"{name}: cannot be read as {'Parquet' if kind == '.parquet' else 'UTF-8 text'}"):
        if kind == ".parquet":
            return Dataset(pq.read_table(path, partitioning=None))
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            text = file.read().decode("utf-8-sig")
    if not text.strip():
        return []
    if kind in (".csv", ".tsv"):
        return _parse_csv(text, name, "," if kind == ".csv" else "\t")
    return _parse_json(text, name, is_list=kind == ".json" and text.lstrip().startswith("["))


def _parse_json(text: str, name: str, is_list: bool) -> list[dict[str, Any]]:
    rows: list[Any] = []
    # Split at \n alone: U+2028 and its like may stand inside a JSON string.
    for i, piece in enumerate([text] if is_list else text.rstrip().split("\n")):
        try:
            value = json.loads(piece)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}" if is_list else f"row {i} (line {i + 1}), which must be one whole object"
            problem = f"not valid JSON ({error.msg} at character {error.colno})"
            raise ValueError(f"{name}, {where}: {problem}. Correct it.") from error
        rows.extend(value if is_list else [value])
    may_break = re.search(r"\\u[dD][89a-fA-F]", text) is not None
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{_at(name, i)}: {reprlib.repr(row)} is not an object with named values. Correct it.")
        if may_break:  # JSON may escape half of a surrogate pair, which no UTF-8 text can hold
            with _one_line(f"{_at(name, i)}: half of a surrogate pair"):
                json.dumps(row, ensure_ascii=False).encode()
    return rows


def _parse_csv(text: str, name: str, delimiter: str) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # Python's own limit, 128 KiB, is less than a long answer
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[dict[str, Any]] = []
    try:
        header = next(reader)
        if len(set(header)) < len(header):
            raise csv.Error(f"a column is named twice in the header {', '.join(header)}")
        for values in reader:
            if values and len(values) != len(header):
                raise csv.Error(f"{len(values)} values for {len(header)} columns")
            if values:
                rows.append(dict(zip(header, values, strict=True)))
    except csv.Error as error:
        where = f"{name}, row {len(rows)} (line {reader.line_num})"
        raise ValueError(f"{where}: {error}. Check the separators and the quotes.") from error
    return rows


def _canonical(rows: Rows, name: str, named: tuple[str, ...], weight_column: str | None) -> dict[str, list[Any]]:
    """Check the rows of one file under its own column names, then bring them into the columns of `load_rows`."""
    if len(rows) == 0:
        raise ValueError(f"{name}: there are no rows. Give a file with at least one row.")
    found = list(dict.fromkeys(key for row in rows for key in row)) if isinstance(rows, list) else rows.column_names
    used = named or next((layout for layout in LAYOUTS if set(layout) <= set(found)), ())
    if not used:
        unknown = f"no known layout fits the columns {', '.join(found)}"
        raise ValueError(f"{name}: {unknown}. Name two by --prompt_column and --response_column.")
    for column in (*used, weight_column or used[0]):
        if column not in found:
            raise ValueError(f'{name}: there is no column "{column}"; there is {", ".join(found)}.')
    logger.info("%s: %d rows from the columns %s of %s", name, len(rows), ", ".join(used), ", ".join(found))
    kinds = KINDS[len(used)] if used != ("text",) else used
    place = partial(_at, name)
    columns = {kind: _values(rows, column) for kind, column in zip(kinds, used, strict=True)}
    if "messages" in columns:
        columns["messages"] = [_chatml(messages) for messages in columns["messages"]]
    _check_content(columns, dict(zip(kinds, used, strict=True)), place)
    prompts, inputs = columns.get("prompt", []), columns.pop("input", None)
    if inputs:
        prompts = [f"{a}\n\n{b}" if b and b.strip() else a for a, b in zip(prompts, inputs, strict=True)]
    if prompts:
        is_verbatim = used == ("prompt", "completion") or isinstance(prompts[0], list)
        columns["prompt"] = [p if is_verbatim or p.endswith("\n") else p + "\n" for p in prompts]
    if weight_column is not None:
        columns["weight"] = _weights(_values(rows, weight_column), weight_column, place)
    return {**columns, "row": list(range(len(rows))), "source": [name] * len(rows)}


def _values(rows: Rows, column: str) -> list[Any]:
    return [row.get(column) for row in rows] if isinstance(rows, list) else rows.with_format(None)[column][:]


def _chatml(messages: Any) -> Any:
    """Turn ShareGPT's from and value into role and content; what has neither is left to the checks."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages
    return [
        {"role": SHAREGPT_ROLES.get(str(m.get("from")), m.get("from")), "content": m["value"]} if "value" in m else m
        for m in messages
    ]


def content_columns(dataset: Dataset, role: str) -> list[str]:
    """The columns that TRL reads of the rows; raises ValueError where none of its text formats fits."""
    for names in (["prompt", "completion"], ["messages"], ["text"]):
        if set(names) <= set(dataset.column_names):
            return names
    raise ValueError(f"{role}: neither prompt and completion, messages nor text in {', '.join(dataset.column_names)}.")


def _check_content(columns: dict[str, list[Any]], names: dict[str, str], place: Callable[[int], str]) -> None:
    """Raise on the first bad value; `names` gives the columns as the file calls them."""
    are_lists = isinstance(next(iter(columns.values()))[0], list)
    for kind, values in columns.items():
        bad = [(i, problem) for i, value in enumerate(values) if (problem := _problem(value, kind, are_lists))]
        if bad:
            rows = ", ".join(str(i) for i, _ in bad[:9])
            more = f" {len(bad)} rows of the column are bad, first {rows}." if bad[1:] else ""
            raise ValueError(f'{place(bad[0][0])}, column "{names[kind]}": {bad[0][1]}.{more}')


def _problem(value: Any, kind: str, are_lists: bool) -> str | None:
    noun = {"completion": "response", "messages": "list of messages"}.get(kind, kind)
    if isinstance(value, list) and kind in ("prompt", "completion", "messages"):
        return _problem_of_messages(value, kind) if are_lists else MIXED
    if value is None:
        return None if kind == "input" else f"the {noun} is missing. Remove the row or fill it in"
    if kind == "messages":
        return f"{reprlib.repr(value)} is not a list of messages. Give a list of objects with role and content"
    if not isinstance(value, str):
        return f"the {noun} {reprlib.repr(value)} is not text. Put it in quotes, or convert the column to text"
    if kind in ("completion", "text") and not value.strip():
        return f"the {noun} is empty. Remove the row or fill it in"
    return MIXED if are_lists else None


def _problem_of_messages(messages: list[Any], kind: str) -> str | None:
    if not messages:
        return "there are no messages. Remove the row or fill it in"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return f"message {i} has no role. Give every message a role and a content"
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            return f"the content of message {i} is {reprlib.repr(content)}, not text. Correct it"
    answered = any(message["role"] == "assistant" and (message.get("content") or "").strip() for message in messages)
    return None if answered or kind == "prompt" else "no message of the assistant has content. Remove the row"


def _weights(values: list[Any], column: str, place: Callable[[int], str]) -> list[float]:
    weights = []
    for i, value in enumerate(values):
        try:
            weights.append(float(value))
        except (TypeError, ValueError, OverflowError):
            weights.append(math.nan)
        if not 0 <= weights[-1] < math.inf:
            raise ValueError(f'{place(i)}, column "{column}": the weight {value!r:.40} is not a finite number >= 0.')
    return weights


def row_name(dataset: Dataset, role: str, i: int) -> str:
    """Name row `i` by its file, or by its role in a data set that `load_rows` did not make."""
    row = dataset.with_format(None)[i]
    is_ours = isinstance(row.get("row"), int) and isinstance(row.get("source"), str)
    return _at(row["source"], row["row"]) if is_ours else f"{role}, row {i}"


def _at(name: str, row: int) -> str:
    # Only where each object has a line of its own does the row tell the line.
    return f"{name}, row {row}" + (f" (line {row + 1})" if name.lower().endswith((".jsonl", ".jsonl.gz")) else "")


def _without_nulls(value: Any) -> Any:
    """Drop null fields: Arrow gives every message the fields that any message of the column has."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def report_dropped(role: str, rows: Dataset, prepared: Dataset, max_length: int | None) -> None:
    """Say how many rows TRL left out: those whose prompt alone fills ``max_length``.

    Raises:
        ValueError: those are all rows.
    """
    num_dropped = len(rows) - len(prepared)
    too_long = f"their prompt alone is longer than max_length={max_length}"
    if num_dropped == len(rows):
        raise ValueError(f"{role}: all {len(rows)} rows are left out, {too_long}. Raise --max_length")
    if num_dropped:
        shown = ""
        if "example_id" in prepared.column_names:
            kept = set(prepared["example_id"])
            lost = [i for i, example_id in enumerate(rows["example_id"]) if example_id not in kept]
            shown = f" (first: {row_name(rows, role, lost[0])})"
        logger.warning(f"{role}: {num_dropped} of {len(rows)} rows dropped, {too_long}{shown}. Raise --max_length")
