"""What the model card of a run tells of its rows, read from the files of the run; TRL writes the rest of the card."""

import json
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

_NAMES = {"train_dataset": "training rows", "validation_dataset": "trusted rows", "eval_dataset": "held-out rows"}


def data_section(folder: Path, num_rows: dict[str, int], sources: Iterable[str]) -> str:
    """The section on the rows: how many, whence, what a scout found, how many are kept and refined.

    Args:
        folder: of the run.
        num_rows: by role, as `train_dataset`; roles without rows are left out.
        sources: names of the files or hub data sets of the training rows. Of a path only the last part is shown: a
            card is published.
    """
    lines = [f"{name}: {num_rows[role]:,}" for role, name in _NAMES.items() if num_rows.get(role)]
    if shown := list(dict.fromkeys(source_name(source) for source in sources)):
        lines.append(f"sources of the training rows: {', '.join(f'`{name}`' for name in shown)}")
    lines += _found_by_scout(folder / "scout.json")
    lines += _kept_and_refined(folder / "weights.parquet")
    listed = "".join(f"- {line[0].upper()}{line[1:]}\n" for line in lines)
    return f"## Data\n\n{listed}"


def source_name(source: str) -> str:
    """A name of the hub as it is, of a path the last part."""
    path = PurePath(source)
    return source if not path.is_absolute() and source.count("/") == 1 and not path.suffix else path.name


def _found_by_scout(path: Path) -> list[str]:
    if not path.is_file():
        return []
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not found["is_believed"]:
        return ["the trusted rows did not tell the training rows apart: all count nearly the same"]
    low, high = found["share_right_interval_90"]
    lines = [f"share estimated right: {found['share_right']:.0%} (90% interval {low:.0%} to {high:.0%})"]
    if (auroc := found["expected_auroc"]) is not None:
        lines.append(f"AUROC to expect of the weights: {auroc:.2f}")
    return lines


def _kept_and_refined(path: Path) -> list[str]:
    if not path.is_file():
        return []
    table = pq.read_table(path, columns=["kept", "refined"])
    num_refined = pc.sum(table["refined"]).as_py() or 0
    num_kept = pc.sum(table["kept"]).as_py() or 0
    lines = [f"rows kept: {num_kept:,} ({num_kept / table.num_rows:.0%})"]
    return [*lines, f"rows trained on with responses of the model: {num_refined:,}"] if num_refined else lines
