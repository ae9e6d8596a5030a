"""A made world on disk: its rows, and a manifest that says what it was made from."""

import json
from pathlib import Path
from typing import Any

from tamis.compare.task import Task
from tamis.files import write_atomically

MANIFEST = "world.json"


def open_world(folder: Path, parameters: dict[str, Any]) -> tuple[Task, bool]:
    """The task in ``folder``, and whether it is there already, made from the same parameters.

    Raises:
        ValueError: the folder holds another world.
    """
    fingerprint = json.dumps(parameters, sort_keys=True)
    manifest = folder / MANIFEST
    is_there = manifest.is_file()
    if is_there and manifest.read_text(encoding="utf-8") != fingerprint:
        raise ValueError(f"{folder} holds another world: delete it or choose another folder")
    return Task.in_folder(folder, fingerprint), is_there


def close_world(folder: Path, task: Task) -> None:
    """Say that the world is complete: the last file of a world to be written."""
    write_atomically(folder / MANIFEST, lambda path: path.write_text(task.fingerprint, encoding="utf-8"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows as JSONL."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
