"""What is checked and known of rows: that they can be trained on, what they say, where they came from.

Every error is one line that names the file, the row and the column, and says what to do. Rows are counted from 0.
A data set may have a million rows: Python objects are made of a batch of them at a time.
"""

import hashlib
import json
import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from json.encoder import encode_basestring
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

logger = logging.getLogger(__name__)

MIXED = "text and lists of messages are mixed. Give all prompts and responses one form"
BATCH_SIZE = 10_000
Rows: TypeAlias = Iterator[dict[str, Any]] | Dataset


def check_rows(dataset: Dataset, role: str) -> list[str]:
    """Check that every row can be trained on, and hash what it says.

    Both are done once for each data set: `fingerprint`, `check_overlap` and `row_table` take the hashes.

    Args:
        dataset: in one of TRL's formats; `row` and `source`, as `load_rows` writes them, are used in messages.
        role: `train_dataset`, `validation_dataset` or `eval_dataset`; stands for the file where there is no `source`.

    Returns:
        For each row 16 hex digits: BLAKE2b over prompt and completion, messages or text as JSON. Other columns and the
        order of rows do not enter, nor do fields of a message that are null.

    Raises:
        ValueError: no rows, no known format, a null prompt, a response without text, a value of the wrong type,
            messages without a response, or a `weight` that is null, NaN, infinite or negative.
    """
    if len(dataset) == 0:
        raise ValueError(f"{role}: there are no rows. Give a data set with at least one row.")
    place = partial(row_name, dataset, role)
    names = {name: name for name in content_columns(dataset, role)}
    check, hashes = ContentCheck(place), list[str]()
    for batch in batches(dataset):
        columns = {name: column_values(batch, name) for name in names}
        if check.add(columns, names):
            hashes += [
                _digest(_as_json(dict(zip(names, row, strict=True)))) for row in zip(*columns.values(), strict=True)
            ]
    check.finish()
    if "weight" in dataset.column_names:
        check_weights(column_values(dataset, "weight"), "weight", place)
    return hashes


def batches(rows: Rows) -> Iterator[list[dict[str, Any]] | Dataset]:
    """Split rows into batches: as Python objects, a million rows would take ten times the memory of an Arrow table."""
    if isinstance(rows, Dataset):
        for start in range(0, len(rows), BATCH_SIZE):
            yield rows.select(range(start, min(start + BATCH_SIZE, len(rows))))
    else:
        while batch := list(islice(rows, BATCH_SIZE)):
            yield batch


def column_values(batch: list[dict[str, Any]] | Dataset, column: str) -> list[Any]:
    """Return the values of one column as Python objects."""
    return [row.get(column) for row in batch] if isinstance(batch, list) else batch.with_format(None)[column][:]


class ContentCheck:
    """Looks for values that cannot be trained on, in batches of rows.

    Args:
        place: what names a row, from its index.
    """

    def __init__(self, place: Callable[[int], str]):
        self.place = place
        self.num_rows = 0
        self._are_lists = False  # what all prompts and responses have to be: told by the very first value
        self._bad: dict[str, list[tuple[int, str]]] = {}

    def add(self, columns: Mapping[str, list[Any]], names: Mapping[str, str]) -> bool:
        """Check the next rows, and return whether all is well so far.

        Args:
            columns: their prompt (input) and completion, messages or text.
            names: what the file calls each of these columns.
        """
        first = next(iter(columns.values()))
        if self.num_rows == 0:
            self._are_lists = isinstance(first[0], list)
        for kind, column in columns.items():
            bad = self._bad.setdefault(names[kind], [])
            for i, value in enumerate(column, start=self.num_rows):
                if problem := _problem(value, kind, self._are_lists):
                    bad.append((i, problem))
        self.num_rows += len(first)
        return not any(self._bad.values())

    def finish(self) -> None:
        """Raise ValueError on the first bad value."""
        for name, bad in self._bad.items():
            if not bad:
                continue
            rows = ", ".join(str(i) for i, _ in bad[:9])
            more = f" {len(bad)} rows of the column are bad, first {rows}." if bad[1:] else ""
            raise ValueError(f'{self.place(bad[0][0])}, column "{name}": {bad[0][1]}.{more}')


def check_weights(weights: list[Any], column: str, place: Callable[[int], str]) -> list[float]:
    """Return the weights as floats; raise ValueError on the first that is not finite and >= 0."""
    floats = []
    for i, value in enumerate(weights):
        try:
            floats.append(float(value))
        except (TypeError, ValueError, OverflowError):
            floats.append(math.nan)
        if not 0 <= floats[-1] < math.inf:
            raise ValueError(f'{place(i)}, column "{column}": the weight {value!r:.40} is not a finite number >= 0.')
    return floats


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


def _as_json(value: Any) -> str:
    """JSON with sorted keys and no null fields: Arrow gives a message the fields that any message of the column has."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, list):
        return f"[{', '.join([_as_json(item) for item in value])}]"
    if isinstance(value, dict):
        fields = [
            f"{encode_basestring(key)}: {_as_json(item)}" for key, item in sorted(value.items()) if item is not None
        ]
        return f"{{{', '.join(fields)}}}"
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def fingerprint(hashes: Sequence[str]) -> str:
    """Hash a data set by the hashes of its rows, in order: 16 hex digits."""
    return _digest("".join(hashes))


def check_overlap(datasets: Mapping[str, Dataset], hashes: Mapping[str, Sequence[str]]) -> None:
    """Warn of the same row (prompt and response) in two of the data sets: validation or held-out rows trained on.

    Args:
        datasets: by role: `train_dataset`, `validation_dataset`, and all that are held out.
        hashes: by role, of every row, from `check_rows`.

    Raises:
        ValueError: validation and evaluation share a row, so that the result could not be trusted.
    """

    def shared(first: str, second: str, consequence: str) -> list[str]:
        wanted = set(hashes.get(first, ()))  # the smaller of the two in any sensible run
        index: dict[str, int] = {}
        for j, digest in enumerate(hashes.get(second, ())):
            if digest in wanted:
                index.setdefault(digest, j)
        found = [(i, index[digest]) for i, digest in enumerate(hashes.get(first, ())) if digest in index]
        shown = [
            f"{row_name(datasets[first], first, i)} = {row_name(datasets[second], second, j)}" for i, j in found[:3]
        ]
        return [f"{first} and {second} share {len(found)} row(s), first {'; '.join(shown)}. {consequence}"][
            : len(found)
        ]

    held_out = [role for role in datasets if role not in ("train_dataset", "validation_dataset")]
    for role in held_out:
        for message in shared("validation_dataset", role, "Remove them from one of the two."):
            raise ValueError(message)
    if set(hashes["validation_dataset"]) == set(hashes["train_dataset"]):
        messages = [
            "validation_dataset and train_dataset have the same rows: nothing tells right rows from wrong ones. Give "
            "rows that you trust to --validation_dataset, and keep them out of --train_dataset"
        ]
    else:
        messages = shared("validation_dataset", "train_dataset", "The choice of rows will favour them.")
    for role in held_out:
        messages += shared(role, "train_dataset", "The result on them says nothing about new rows.")
    for message in messages:
        logger.warning(message)


def attach_example_ids(dataset: Dataset) -> Dataset:
    """Add `example_id` (int64), 0 .. N-1 in order; keep a column of that name, or raise ValueError if not unique."""
    if "example_id" not in dataset.column_names:
        return dataset.add_column("example_id", np.arange(len(dataset), dtype=np.int64))
    ids = _arrow_column(dataset, "example_id")
    if ids.type != pa.int64() or ids.null_count or pc.count_distinct(ids).as_py() != len(ids):
        raise ValueError('column "example_id": the ids must be unique int64 numbers. Remove it to get new ones.')
    return dataset


def row_table(dataset: Dataset, hashes: Sequence[str]) -> pa.Table:
    """What tells each row in the files of a run: example_id (its index), source, row and content_hash."""
    index = pa.array(np.arange(len(dataset)))
    return pa.table(
        {
            "example_id": index,
            "source": _arrow_column(dataset, "source").cast(pa.string())
            if "source" in dataset.column_names
            else pa.nulls(len(dataset), pa.string()),
            "row": _arrow_column(dataset, "row") if "row" in dataset.column_names else index,
            "content_hash": pa.array(hashes, pa.string()),
        }
    )


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
            kept = _arrow_column(prepared, "example_id").combine_chunks()
            is_kept = pc.is_in(_arrow_column(rows, "example_id"), value_set=kept)
            shown = f" (first: {row_name(rows, role, pc.index(is_kept, False).as_py())})"
        logger.warning(f"{role}: {num_dropped} of {len(rows)} rows dropped, {too_long}{shown}. Raise --max_length")


def row_name(dataset: Dataset, role: str, i: int) -> str:
    """Name row `i` by its file, or by its role in a data set that `load_rows` did not make."""
    row = dataset.with_format(None)[i]
    is_ours = isinstance(row.get("row"), int) and isinstance(row.get("source"), str)
    return place_in_file(row["source"], row["row"]) if is_ours else f"{role}, row {i}"


def place_in_file(name: str, row: int) -> str:
    """Name a row of the file ``name``."""
    # Only where each object has a line of its own does the row tell the line.
    return f"{name}, row {row}" + (f" (line {row + 1})" if name.lower().endswith((".jsonl", ".jsonl.gz")) else "")


def _arrow_column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def content_columns(dataset: Dataset, role: str) -> list[str]:
    """The columns that TRL reads of the rows; raises ValueError where none of its text formats fits."""
    for names in (["prompt", "completion"], ["messages"], ["text"]):
        if set(names) <= set(dataset.column_names):
            return names
    raise ValueError(f"{role}: neither prompt and completion, messages nor text in {', '.join(dataset.column_names)}.")
