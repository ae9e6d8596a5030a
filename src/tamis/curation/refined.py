"""New responses for rows that are dropped: those that a refining run wrote last (`tamis select --use_refined`)."""

import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tamis.curation.choice import Mask
from tamis.layouts import chatml
from tamis.rows import last_answer

logger = logging.getLogger(__name__)

USES = ("best", "all")
_OF_RESPONSES = ("responses", "response_p_right", "response_weights")
_COLUMNS = ("example_id", "step", "weight", "is_refined", *_OF_RESPONSES)


@dataclass(frozen=True)
class NewResponse:
    """A generated response that takes the place of a row's own.

    Attributes:
        p_right: probability that it is right, by the scout of the run; NaN where there was none.
        weight: of the row that it makes, as `weights.parquet` has those of the others.
    """

    text: str
    p_right: float
    weight: float


def read_responses(path: Path, use: str, is_kept_N: Mask) -> dict[int, list[NewResponse]]:
    """The responses that take the place of those of dropped rows, by the rows' places in `weights.parquet`.

    Only of the last time that a row was refined, and only those that are more likely right than wrong, where the run
    knows that.

    Args:
        path: `refinements.parquet` of a run.
        use: ``best``, the one that is most likely right, of equals the one with the highest weight; ``all``, every one
            as a row of its own.
        is_kept_N: of these rows the own response stays.

    Raises:
        ValueError: the run has refined no rows, or ``use`` is none of the two.
    """
    if use not in USES:
        raise ValueError(f"use_refined must be one of {', '.join(USES)}, got {use!r}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file: the run has refined no rows. Leave `use_refined` out")
    found = {i: _usable(record, use) for i, record in last_refinements(path).items() if not is_kept_N[i]}
    if any(math.isnan(response.p_right) for responses in found.values() for response in responses):
        logger.warning("the run does not know how likely its new responses are right: all that could be used are taken")
    return {i: responses for i, responses in found.items() if responses}


def last_refinements(path: Path) -> dict[int, dict[str, Any]]:
    """Of each row that was refined the last record, by its place in `weights.parquet`, in order.

    Earlier versions of tamis have not written ``response_p_right``; it is a list of None then.

    Args:
        path: `refinements.parquet` of a run, see `tamis.recorder.Recorder.add_refinements`.
    """
    last = dict[int, dict[str, Any]]()
    with pq.ParquetFile(path) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                record.setdefault("response_p_right", [None] * len(record["responses"]))
                if record["step"] >= last.get(record["example_id"], record)["step"]:
                    last[record["example_id"]] = record
    return dict(sorted(last.items()))


def _usable(record: dict[str, Any], use: str) -> list[NewResponse]:
    """Best first; a response that was generated twice counts once, with the weight of both."""
    found = dict[str, NewResponse]()
    for text, p, share in zip(*(record[name] for name in _OF_RESPONSES), strict=True):
        p = math.nan if p is None else p
        if share > 0 and text.strip() and not p < 0.5:
            before = found[text].weight if text in found else 0.0
            found[text] = NewResponse(text, p, before + share * record["weight"])
    ordered = sorted(found.values(), key=lambda response: (-response.p_right, -response.weight))
    return [NewResponse(r.text, r.p_right, record["weight"]) for r in ordered[:1]] if use == "best" else ordered


def with_response(row: Mapping[str, Any], names: Mapping[str, str], text: str) -> dict[str, Any]:
    """A row as its file has it, with another response.

    Args:
        names: what the file calls its columns, see `tamis.layouts.names_by_kind`.
    """
    column = names.get("completion") or names["messages"]
    new = dict(row)
    if column in row:
        new[column] = _replaced(row[column], text)
        return new
    root, *inner = column.split(".")
    new[root] = holder = deepcopy(row[root])
    for name in inner[:-1]:
        holder = holder[name]
    holder[inner[-1]] = _replaced(holder[inner[-1]], text)
    return new


def _replaced(old: Any, text: str) -> Any:
    """A response in the form of the old one: text, or messages of which the last answer is replaced."""
    if isinstance(old, str):
        return text
    messages = [dict(message) for message in old]
    answer = messages[last_answer(chatml(old))]
    answer["value" if "value" in answer else "content"] = text
    return messages
