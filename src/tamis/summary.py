"""The end of `tamis train`: what came out, read from the run directory, and what to do next."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tamis.output_dir import EXAMPLE, read_metrics


def summarize(output_dir: str | Path, *, has_held_out: bool) -> list[tuple[str, str]]:
    """Lines of a table, as (name, text).

    Args:
        output_dir: of a run that has ended.
        has_held_out: whether there were held-out rows.
    """
    folder = Path(output_dir)
    lines = _held_out(folder) if has_held_out else []
    lines.append(_rows_kept(folder))
    lines.append(("model", str(folder)))
    lines.append(("weights", str(folder / "weights.parquet")))
    if (folder / "refinements.parquet").is_file():
        lines.append(("responses", str(folder / "refinements.parquet")))
    lines.append(("look at them", _report_command(folder)))
    return [*lines, ("next", _next_command(folder)), ("clean rows", select_command(folder))]


def summarize_scores(output_dir: str | Path) -> list[tuple[str, str]]:
    """The same of `tamis score`."""
    folder = Path(output_dir)
    lines = [_rows_kept(folder), ("weights", str(folder / "weights.parquet"))]
    lines.append(("look at them", _report_command(folder)))
    return [*lines, ("next", select_command(folder)), ("or", train_command(folder))]


def rows_kept(is_kept: pa.ChunkedArray | pa.Array) -> tuple[str, str]:
    """The line on the rows that are kept: how many, and of how many."""
    num_kept = pc.sum(is_kept).as_py() or 0
    return "rows kept", f"{num_kept} of {len(is_kept)} ({num_kept / len(is_kept):.0%})"


def _rows_kept(folder: Path) -> tuple[str, str]:
    return rows_kept(pq.read_table(folder / "weights.parquet", columns=["kept"])["kept"])


def _held_out(folder: Path) -> list[tuple[str, str]]:
    evaluated = [record for record in read_metrics(folder) if record.get("eval_loss") is not None]
    if not evaluated:
        return []
    before = [record for record in evaluated if record["step"] == 0][:1]

    def change(name: str, digits: int) -> str:
        shown = [f"{record[name]:.{digits}f}" for record in (*before, evaluated[-1])]
        return f"{shown[0]} before, {shown[1]} after" if before else shown[0]

    return [
        ("held-out loss", change("eval_loss", 4)),
        ("held-out match", f"{change('eval_teacher_forced_match', 3)} (rows whose every token is the first choice)"),
    ]


def _next_command(folder: Path) -> str:
    example = folder / EXAMPLE
    if example.is_file():
        return f"python {example}"
    return f"tamis train --config {folder / 'config.yaml'} --output_dir {folder}-again"


def select_command(folder: Path) -> str:
    """How to get the clean rows of a run."""
    return f"tamis select {folder} --output_dir {folder}-clean"


def train_command(folder: Path) -> str:
    """How to train by the weights of a scoring."""
    return f"tamis train --config {folder / 'config.yaml'} --scores {folder} --output_dir {folder}-trained"


def _report_command(folder: Path) -> str:
    return f"tamis report {folder}"


def format_summary(lines: list[tuple[str, Any]]) -> str:
    """The table as text, its second column aligned."""
    width = max(len(name) for name, _ in lines) + 2
    return "\n".join(f"{name:<{width}}{text}" for name, text in lines)
