"""Which columns of a file are read, under the names that TRL and the checks know them by.

What belongs to a prompt stays in columns of its own: `tamis.prompts` joins them once the model's template is known.
"""

import json
from collections.abc import Iterable
from typing import Any

from tamis.rows import has_column

# What is read without naming columns, first fit first: TRL's own formats, then the customary names of pairs.
LAYOUTS: tuple[tuple[str, ...], ...] = (
    *(("prompt", "completion"), ("messages",), ("conversations",)),
    *(("prompt", "response"), ("question", "answer"), ("question", "response")),
    *(("instruction", "input", "output"), ("instruction", "output"), ("text",)),
)
KINDS = {1: ("messages",), 2: ("prompt", "completion"), 3: ("prompt", "prompt_input", "completion")}
# Read beside any layout, as Alpaca (system, history), ShareGPT (system, tools) and TRL (tools) write them.
EXTRAS = ("system", "history", "tools")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def choose_columns(
    found: list[str], named: tuple[str, ...], weight_column: str | None, name: str, before: tuple[str, ...]
) -> tuple[str, ...]:
    """The columns to read of those found so far in the file ``name``.

    Args:
        named: the columns of the prompt and of the response, where the user has named them.
        before: those that were read of the rows above.

    Raises:
        ValueError: no layout fits, a column is missing, or the rows below have another layout than those above.
    """
    used = named or next((layout for layout in LAYOUTS if set(layout) <= set(found)), ())
    if not used:
        unknown = f"no known layout fits the columns {_listed(found)}"
        raise ValueError(f"{name}: {unknown}. Name two by `prompt_column` and `response_column`.")
    for column in (*used, weight_column or used[0]):
        if not has_column(column, found):
            raise ValueError(f'{name}: there is no column "{column}"; there is {_listed(found)}.')
    if before and set(used) - set(before) - {"input"}:  # rows without an input may come first
        change = f"the first rows have the columns {_listed(before)}, later ones {_listed(used)}"
        raise ValueError(f"{name}: {change}. Give all rows the same.")
    return used


def _listed(columns: Iterable[str]) -> str:
    """On one line, whatever a file calls its columns."""
    return ", ".join(name if name.isprintable() else repr(name) for name in columns)


def names_by_kind(used: tuple[str, ...], found: list[str], weight_column: str | None) -> dict[str, str]:
    """What the file calls the columns that are read, by what they are: prompt, completion, input, system, ..."""
    kinds = used if used == ("text",) else KINDS[len(used)]
    extras = [name for name in EXTRAS if name in found and name not in used and name != weight_column]
    return dict(zip(kinds, used, strict=True)) | dict(zip(extras, extras, strict=True))


def normalized(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The same with null for what is empty beside the prompt, and tools as JSON, as TRL reads them from text."""
    alike = dict(columns)
    for name in ("prompt_input", "system"):
        if name in columns:
            alike[name] = [value if value and value.strip() else None for value in columns[name]]
    if "history" in columns:
        alike["history"] = [value or None for value in columns["history"]]
    if "tools" in columns:
        alike["tools"] = [tools_as_json(value) for value in columns["tools"]]
    return alike


def tools_as_json(tools: Any) -> str | None:
    """Tools, given as JSON or as a list, as JSON; None where there are none."""
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools
    return json.dumps(_without_nulls(tools), ensure_ascii=False) if tools else None


def _without_nulls(value: Any) -> Any:
    """Parquet gives every object the fields that any object of the column has."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def chatml(messages: Any) -> Any:
    """Turn ShareGPT's from and value into role and content; what has neither is left to the checks."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return messages
    return [_chatml_message(message) if "value" in message else message for message in messages]


def _chatml_message(message: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    sender = message.get("from")
    return {"role": SHAREGPT_ROLES.get(str(sender), sender), "content": message["value"], **rest}
