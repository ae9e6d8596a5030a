"""What is checked and known of rows: that they can be trained on, what they say, where they came from.

Every error is one line that names the file, the row and the column, and says what to do. Rows are counted from 0.
A data set may have a million rows: Python objects are made of a batch of them at a time.
"""

import json
import logging
import math
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from tamis.hashes import Hashes, content_hashes, hex_digits, is_in, shared_rows

logger = logging.getLogger(__name__)

TEXT_FORMATS = (("prompt", "completion"), ("messages",), ("text",))  # of TRL, by their columns
# Columns that belong to a prompt beside the prompt itself; `tamis.prompts` puts them in.
PROMPT_PARTS = ("prompt_input", "system", "history", "tools")
MIXED = "text and lists of messages are mixed. Give all prompts and responses one form"
BATCH_SIZE = 10_000
Rows: TypeAlias = Iterator[dict[str, Any]] | Dataset
Batches: TypeAlias = Iterator[list[dict[str, Any]] | Dataset]


def check_rows(dataset: Dataset, role: str) -> Hashes:
    """Check that every row can be trained on, and hash what it says.

    Both are done once for each data set: `fingerprint`, `check_overlap` and `row_table` take the hashes.

    Args:
        dataset: in one of TRL's formats; `row` and `source`, as `load_rows` writes them, are used in messages.
        role: `train_dataset`, `validation_dataset` or `eval_dataset`; stands for the file where there is no `source`.

    Returns:
        The hash (N, uint64) of prompt and completion, messages or text, with what belongs to the prompt beside them
        (`PROMPT_PARTS`), see `tamis.hashes.content_hashes`. Other columns and the order of rows do not enter.

    Raises:
        ValueError: no rows, no known format, a null prompt, a response without text, a value of the wrong type,
            messages without a response or with training flags that cannot be honoured, or a `weight` that is null,
            NaN, infinite or negative.
    """
    if len(dataset) == 0:
        raise ValueError(f"{role}: there are no rows. Give a data set with at least one row.")
    place = partial(row_name, dataset, role)
    parts = [name for name in PROMPT_PARTS if name in dataset.column_names]
    names = {name: name for name in [*content_columns(dataset, role), *parts]}
    check, hashes, first = ContentCheck(place), np.empty(len(dataset), np.uint64), 0
    for batch in batches(dataset):
        columns = {name: column_values(batch, name) for name in names}
        if check.add(columns, names):
            rows = (dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True))
            hashes[first : first + len(batch)] = content_hashes(rows)
        first += len(batch)
    check.finish()
    if "weight" in dataset.column_names:
        for start, batch in zip(count(0, BATCH_SIZE), batches(dataset), strict=False):
            check_weights(column_values(batch, "weight"), "weight", place, first=start)
    return hashes


def batches(rows: Rows) -> Batches:
    """Split rows into batches: as Python objects, a million rows would take ten times the memory of an Arrow table."""
    if isinstance(rows, Dataset):
        for start in range(0, len(rows), BATCH_SIZE):
            yield rows.select(range(start, min(start + BATCH_SIZE, len(rows))))
    else:
        while batch := list(islice(rows, BATCH_SIZE)):
            yield batch


def iter_rows(dataset: Dataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of all rows, row by row."""
    for batch in batches(dataset):
        columns = [column_values(batch, name) for name in names]
        yield from (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))


def column_values(batch: list[dict[str, Any]] | Dataset, column: str) -> list[Any]:
    """Return the values of one column as Python objects; a dot in its name leads into an object, `meta.answer`."""
    if isinstance(batch, list):
        return [_value_at(row, column) for row in batch]
    root = column if column in batch.column_names else column.partition(".")[0]
    values = batch.with_format(None)[root][:]
    return values if root == column else [_value_at({root: value}, column) for value in values]


def has_column(column: str, found: Collection[str]) -> bool:
    """Whether a name is that of a column, or leads into one."""
    return column in found or column.partition(".")[0] in found


def _value_at(row: dict[str, Any], column: str) -> Any:
    if column in row or "." not in column:
        return row.get(column)
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


class ContentCheck:
    """Looks for values that cannot be trained on, in batches of rows.

    Args:
        place: what names a row, from its index.
    """

    def __init__(self, place: Callable[[int], str]):
        self.place = place
        self.num_rows = 0
        self._are_lists: bool | None = None  # what all prompts and responses have to be: told by the first value
        self._bad: dict[str, list[tuple[int, str]]] = {}

    def add(self, columns: Mapping[str, list[Any]], names: Mapping[str, str]) -> bool:
        """Check the next rows, and return whether all is well so far.

        Args:
            columns: their prompt and completion, messages or text, and then the `PROMPT_PARTS` that they have.
            names: what the file calls each of these columns.
        """
        content, first = next(iter(columns.items()))
        value = next((value for value in first if value is not None), None)
        if self._are_lists is None and value is not None:
            self._are_lists = isinstance(value, list)
        are_lists = bool(self._are_lists)
        for kind, column in columns.items():
            bad = self._bad.setdefault(names[kind], [])
            for i, value in enumerate(column, start=self.num_rows):
                is_part = kind in PROMPT_PARTS
                problem = (
                    _problem_of_part(value, kind, content, are_lists) if is_part else _problem(value, kind, are_lists)
                )
                if problem:
                    bad.append((i, problem))
        self.num_rows += len(first)
        return self.is_good

    @property
    def is_good(self) -> bool:
        """Whether no bad value has been found."""
        return not any(self._bad.values())

    def take_bad(self) -> dict[int, str]:
        """The bad rows that have been found, each with its problem; from then on they are none."""
        found: dict[int, str] = {}
        for name, bad in self._bad.items():
            for i, problem in bad:
                found.setdefault(i, f'{self.place(i)}, column "{name}": {problem}.')
        self._bad = {}
        return found

    def finish(self) -> None:
        """Raise ValueError on the first bad value."""
        for name, bad in self._bad.items():
            if not bad:
                continue
            rows = ", ".join(str(i) for i, _ in bad[:9])
            more = f" {len(bad)} rows of the column are bad, first {rows}." if bad[1:] else ""
            raise ValueError(f'{self.place(bad[0][0])}, column "{name}": {bad[0][1]}.{more}')


def check_weights(
    weights: list[Any], column: str, place: Callable[[int], str], places: Iterable[int] | None = None, first: int = 0
) -> list[float]:
    """Return the weights as floats, those at ``places`` or all of them.

    Args:
        first: the number of the first row, for ``place``.

    Raises:
        ValueError: one of them is not finite and >= 0.
    """
    floats = []
    for i in range(len(weights)) if places is None else places:
        value = weights[i]
        try:
            floats.append(float(value))
        except (TypeError, ValueError, OverflowError):
            floats.append(math.nan)
        if not 0 <= floats[-1] < math.inf:
            raise ValueError(
                f'{place(first + i)}, column "{column}": the weight {value!r:.40} is not a finite number >= 0.'
            )
    return floats


def _problem(value: Any, kind: str, are_lists: bool) -> str | None:
    noun = {"completion": "response", "messages": "list of messages"}.get(kind, kind)
    if isinstance(value, list) and kind in ("prompt", "completion", "messages"):
        return _problem_of_messages(value, kind) if are_lists else MIXED
    if value is None:
        return f"the {noun} is missing. Remove the row or fill it in"
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
    if problem := _problem_of_flags(messages, kind):
        return problem
    answered = any(message["role"] == "assistant" and (message.get("content") or "").strip() for message in messages)
    return None if answered or kind == "prompt" else "no message of the assistant has content. Remove the row"


def last_answer(messages: Sequence[Mapping[str, Any]]) -> int:
    """The place of the last message of the assistant, of which checked messages have one."""
    return max(i for i, message in enumerate(messages) if message["role"] == "assistant")


def training_flag(message: Mapping[str, Any]) -> Any:
    """Whether a message says that it is trained on: `train` (Axolotl, OpenPipe) or `weight` (OpenAI); None if not."""
    flag = message.get("train")
    return message.get("weight") if flag is None else flag


def _problem_of_flags(messages: list[Any], kind: str) -> str | None:
    """What can be honoured: all answers are trained on, or the last one; in prompt and completion, what TRL does."""
    for i, message in enumerate(messages):
        flag = training_flag(message)
        if flag not in (None, 0, 1):
            return f"message {i} has the weight {flag!r:.40}, not 0 or 1. Weigh the row instead, by `weight_column`"
        if flag and (message["role"] != "assistant" or kind == "prompt"):
            return f"message {i} is to be trained on, and only the responses are. Remove its train or weight"
    answers = [training_flag(message) in (None, 1) for message in messages if message["role"] == "assistant"]
    if (
        kind == "prompt"
        or not answers
        or all(answers)
        or (kind == "messages" and answers[-1] and not any(answers[:-1]))
    ):
        return None
    return "its train or weight fields leave out some answers, but not all but the last one. Make a row of each answer"


def _problem_of_part(value: Any, kind: str, content: str, are_lists: bool) -> str | None:
    """What is wrong with a part of a prompt beside a prompt, messages or text."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return None
    if content == "text":
        return f"a text is trained on as it is, and has no place for {kind}. Rename the column, or put it in the text"
    if are_lists and kind in ("prompt_input", "history"):
        return f"messages have no place for {kind} beside them. Make messages of it, or rename the column"
    if kind == "history":
        is_right = isinstance(value, list) and all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in value
        )
        return None if is_right else f"{reprlib.repr(value)} is not a list of [user, assistant]. Rename the column"
    if kind == "tools":
        try:
            tools = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            tools = None
        is_right = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
        return None if is_right else f"{reprlib.repr(value)} is not a list of tools, nor JSON of one. Rename the column"
    noun = kind.removeprefix("prompt_")
    return None if isinstance(value, str) else f"the {noun} {reprlib.repr(value)} is not text. Put it in quotes"


def check_overlap(datasets: Mapping[str, Dataset], hashes: Mapping[str, Hashes]) -> None:
    """Warn of the same row (prompt and response) in two of the data sets: validation or held-out rows trained on.

    Args:
        datasets: by role: `train_dataset`, `validation_dataset`, and all that are held out.
        hashes: by role, of every row, from `check_rows`.

    Raises:
        ValueError: validation and evaluation share a row, so that the result could not be trusted.
    """

    def shared(first: str, second: str, consequence: str) -> list[str]:
        found = shared_rows(hashes[first], hashes[second])
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
    validation, training = hashes["validation_dataset"], hashes["train_dataset"]
    if is_in(validation, training).all() and is_in(training, validation).all():
        messages = [
            "validation_dataset and train_dataset have the same rows: nothing tells right rows from wrong ones. Give "
            "rows that you trust to `validation_dataset`, and keep them out of `train_dataset`"
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
    ids = arrow_column(dataset, "example_id")
    if ids.type != pa.int64() or ids.null_count or pc.count_distinct(ids).as_py() != len(ids):
        raise ValueError('column "example_id": the ids must be unique int64 numbers. Remove it to get new ones.')
    return dataset


def row_table(dataset: Dataset, hashes: Hashes) -> pa.Table:
    """What tells each row in the files of a run: example_id (its index), source, row and content_hash."""
    index = pa.array(np.arange(len(dataset)))
    return pa.table(
        {
            "example_id": index,
            "source": arrow_column(dataset, "source").cast(pa.string())
            if "source" in dataset.column_names
            else pa.nulls(len(dataset), pa.string()),
            "row": arrow_column(dataset, "row") if "row" in dataset.column_names else index,
            "content_hash": pa.chunked_array(
                [pa.array(hex_digits(part)) for part in np.split(hashes, range(BATCH_SIZE, len(hashes), BATCH_SIZE))]
            ),
        }
    )


def row_name(dataset: Dataset, role: str, i: int) -> str:
    """Name row `i` by its file, or by its role in a data set that `load_rows` did not make."""
    row = dataset.with_format(None)[i]
    is_ours = isinstance(row.get("row"), int) and isinstance(row.get("source"), str)
    return place_in_file(row["source"], row["row"]) if is_ours else f"{role}, row {i}"


def place_in_file(name: str, row: int) -> str:
    """Name a row of the file ``name``."""
    # Only where each object has a line of its own does the row tell the line.
    return f"{name}, row {row}" + (f" (line {row + 1})" if name.lower().endswith((".jsonl", ".jsonl.gz")) else "")


def arrow_column(dataset: Dataset, column: str) -> pa.ChunkedArray:
    """One column as Arrow has it, without a copy."""
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def content_columns(dataset: Dataset, role: str) -> list[str]:
    """The columns that TRL reads of the rows; raises ValueError where none of its text formats fits."""
    for names in TEXT_FORMATS:
        if set(names) <= set(dataset.column_names):
            return list(names)
    raise ValueError(f"{role}: neither prompt and completion, messages nor text in {', '.join(dataset.column_names)}.")


def is_conversational(dataset: Dataset) -> bool:
    """Whether the rows are messages with roles; all rows of a checked data set are alike."""
    names = [name for name in ("messages", "prompt") if name in dataset.column_names]
    return bool(names) and isinstance(dataset.with_format(None)[0][names[0]], list)
