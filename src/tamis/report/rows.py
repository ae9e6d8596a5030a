"""The rows of a run with what they say, read again from the user's files; a row that has changed since has no text."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tamis.curation.weighed import known_rows, rows_again
from tamis.data import load_rows
from tamis.readers import read_file
from tamis.report.run_folder import RunFolder, Values
from tamis.rows import batches, column_values, has_column, last_answer
from tamis.sources import Part
from tamis.weights_file import weight_batches

MAX_SHOWN = 50_000
_MAX_LABELS = 12
_NUM_EXTREME = 5_000


@dataclass
class RowTexts:
    """What N rows say.

    Attributes:
        content: prompt and response of the rows that are shown, by place.
        length_N: of the responses, in characters; NaN where it is not known.
        label_N: value of the label column, as text; None where there is no such column.
        problem: why texts are missing, as a sentence; None where none is.
    """

    content: dict[int, tuple[str, str]] = field(default_factory=dict)
    length_N: Values = field(default_factory=lambda: np.empty(0))
    label_N: list[str] | None = None
    problem: str | None = None


def shown_rows(run: RunFolder, max_shown: int = MAX_SHOWN) -> Values:
    """Places of the rows that the page holds: all, or the best, the worst, those at the border and some at random."""
    assert run.weights is not None
    num_rows = len(run.weights)
    if num_rows <= max_shown:
        return np.arange(num_rows)
    num_extreme = min(_NUM_EXTREME, max_shown // 6)
    value_N = run.column("score" if run.is_believed else "weight").copy()
    value_N[np.isnan(value_N)] = -np.inf
    is_chosen_N = np.zeros(num_rows, dtype=bool)
    is_chosen_N[_lowest(value_N, num_extreme)] = True
    is_chosen_N[_lowest(-value_N, num_extreme)] = True
    is_chosen_N[_lowest(np.abs(value_N), 2 * num_extreme)] = True  # unknown ones are the farthest from the border
    others = np.flatnonzero(~is_chosen_N)
    num_drawn = max_shown - (num_rows - len(others))
    is_chosen_N[np.random.default_rng(0).choice(others, num_drawn, replace=False)] = True
    return np.flatnonzero(is_chosen_N)


def _lowest(value_N: Values, number: int) -> Values:
    """Places of the lowest values, in no order."""
    return np.argpartition(value_N, number - 1)[:number]


def read_texts(run: RunFolder, shown: Values, label_column: str | None = None) -> RowTexts:
    """Read the rows of a run again.

    Args:
        shown: places of the rows whose texts are kept.
        label_column: a column of the user's files that sorts rows into kinds.

    Raises:
        ValueError: there is no such column.
    """
    assert run.weights is not None
    texts = RowTexts(length_N=np.full(len(run.weights), np.nan, np.float32))
    wanted, place, changed = set(shown.tolist()), 0, 0
    labels: list[str] | None = None if label_column is None else []
    known = known_rows(run.path / "weights.parquet")
    try:
        for part, _, tables in rows_again(run.config):
            first = place
            for table, hashes in tables:
                for row, content_hash in zip(table.to_pylist(), hashes, strict=True):
                    if next(known, (0, ""))[1] != content_hash:
                        changed += 1
                    else:
                        prompt, response = prompt_and_response(row)
                        texts.length_N[place] = len(response)
                        if place in wanted:
                            texts.content[place] = (prompt, response)
                    place += 1
            if labels is not None:
                assert label_column is not None
                labels += _labels(part, label_column, run.column("row")[first:place])
    except (ValueError, IndexError, OSError) as error:
        if label_column and f'"{label_column}"' in str(error):
            raise
        texts.problem = f"The training rows cannot be read: {error}."
    if changed:
        texts.problem = f"{changed:,} rows no longer say what they said when they were weighed: they have no text here."
    texts.label_N = labels if labels is not None and len(labels) == len(run.weights) else None
    return texts


def validation_texts(run: RunFolder, max_rows: int = 2_000) -> list[tuple[str, str]]:
    """Prompt and response of the trusted rows, as far as they are there."""
    source = run.config.get("validation_dataset")
    if not source:
        return []
    columns = {name: run.config.get(name) for name in ("prompt_column", "response_column")}
    skipped: list[dict[str, Any]] | None = [] if run.config.get("skip_bad_rows") else None
    try:
        split = run.config.get("validation_split", "train")
        rows = load_rows(str(source), role="validation_dataset", split=split, skipped=skipped, **columns)
    except (ValueError, OSError):
        return []
    return [prompt_and_response(row) for row in rows.select(range(min(len(rows), max_rows)))]


def prompt_and_response(row: dict[str, Any]) -> tuple[str, str]:
    """What a row says, as two texts."""
    if "text" in row:
        return "", row["text"]
    if "messages" in row:
        place = last_answer(row["messages"])
        before, last = row["messages"][:place], row["messages"][place : place + 1]
    else:
        before, last = row["prompt"], row["completion"]
    parts = [row.get("system"), *(f"user: {q}\nassistant: {a}" for q, a in row.get("history") or ())]
    parts += [_as_text(before), row.get("prompt_input")]
    return "\n".join(part for part in parts if part), _as_text(last, with_roles=False)


def _as_text(content: Any, with_roles: bool = True) -> str:
    if isinstance(content, str):
        return content
    texts = [str(message.get("content") or message.get("tool_calls") or "") for message in content]
    if not with_roles or len(texts) == 1:
        return "\n".join(texts)
    return "\n".join(f"{message['role']}: {text}" for message, text in zip(content, texts, strict=True))


def hashes_of(run: RunFolder, shown: Values) -> list[str]:
    """The content hashes of rows, which are in ascending order."""
    found, first = list[str](), 0
    for batch in weight_batches(run.path / "weights.parquet", ["content_hash"]):
        places = shown[(shown >= first) & (shown < first + len(batch))] - first
        found += batch["content_hash"].take(pa.array(places)).to_pylist()
        first += len(batch)
    return found


def _labels(part: Part, column: str, row_M: Values) -> list[str]:
    """The labels of those rows of a file that were weighed."""
    rows = batches(part.origin) if isinstance(part.origin, Dataset) else read_file(part.origin, part.name)
    labels = list[str]()
    for batch in rows:
        names = batch[0] if isinstance(batch, list) else batch.column_names
        if not has_column(column, list(names)):
            raise ValueError(f'{part.name}: there is no column "{column}". Check `label_column`')
        labels += [str(value) for value in column_values(batch, column)]
    return [labels[row] for row in row_M.tolist()]


def grouped(values_N: pa.ChunkedArray, most: int = _MAX_LABELS) -> list[tuple[str, Values]]:
    """Each text with whether rows have it, the most frequent first, then by name; the rare ones together."""
    encoded = values_N.combine_chunks()
    encoded = encoded if pa.types.is_dictionary(encoded.type) else encoded.dictionary_encode()
    names = [*map(str, encoded.dictionary.to_pylist()), str(None)]  # the last is that of rows that have none
    code_N = encoded.indices.fill_null(len(names) - 1).to_numpy()
    count_of = dict(enumerate(np.bincount(code_N, minlength=len(names)).tolist()))
    codes = sorted((code for code in count_of if count_of[code]), key=lambda code: (-count_of[code], names[code]))
    frequent = codes[: most if len(codes) <= most else most - 1]
    groups = [(names[code], code_N == code) for code in frequent]
    if len(frequent) < len(codes):
        groups.append(("all others", ~np.isin(code_N, frequent)))
    return groups
