"""The tables of `benchmarks/suite.py`, for `docs/tables.py`."""

from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np
from suite_summary import BAD_SHARE, MIN_GAP, describe, group_cells, has_warned
from tables_of_costs import as_table


def suite_table(results: dict[str, Any]) -> str:
    """One line per cell of `benchmarks/suite.py`, means over its seeds."""
    columns = "scenario, wrong rows, trusted rows | seeds | unjudged | SEAL | **tamis** | oracle | gap closed"
    columns += " | right rows | AUROC"
    lines: list[list[str]] = []
    for cell in group_cells(results["rows"]):
        seal = np.max([values for name, values in cell.accuracy.items() if name.startswith("SEAL")], axis=0)
        means = [f"{values.mean():.3f}" for values in (cell.unjudged, seal)]
        means += [f"**{cell.accuracy['tamis'].mean():.3f}**", f"{cell.accuracy['oracle (right rows)'].mean():.3f}"]
        closed = f"{cell.closures('tamis').mean():.2f}" if cell.gap >= MIN_GAP else ""
        shares = [fmean([row[name] for row in cell.tamis]) for name in ("estimated_share_right", "share_right")]
        believed = [row for row in cell.tamis if row["is_believed"] and row["selection_auroc"] is not None]
        aurocs = [fmean([row[name] for row in believed]) for name in ("expected_auroc", "selection_auroc") if believed]
        pairs = [f"{pair[0]:.2f} ({pair[1]:.2f})" if pair else "" for pair in (shares, aurocs)]
        name = describe(cell.key).replace(" wrong", "", 1).replace("trusted rows: ", "")
        lines.append([name, str(len(cell.tamis)), *means, closed, *pairs])
    return as_table(columns, lines)


def suite_rivals_table(results: dict[str, Any]) -> str:
    """One line per method of `benchmarks/suite.py`, over the runs in which all rivals were run."""
    with_rivals = {_run(row) for row in results["rows"] if row["group"] == "random"}
    rows = [row for row in results["rows"] if _run(row) in with_rivals]
    cells = [cell for cell in group_cells(rows) if cell.gap >= MIN_GAP]
    closures = {name: [float(cell.closures(name)[0]) for cell in cells] for name in cells[0].accuracy}
    lines: list[list[str]] = []
    for name in sorted(closures, key=lambda name: -median(closures[name])):
        known = [row["selection_auroc"] for row in rows if row["group"] == name and row["selection_auroc"] is not None]
        shown = f"**{name}**" if name == "tamis" else name
        figures = [f"{function(closures[name]):.2f}" for function in (median, fmean, min)]
        lines.append([shown, *figures, f"{fmean(known):.3f}" if known else ""])
    return as_table("method | gap closed, median | mean | lowest | AUROC, mean", lines)


def _run(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("scenario", "wrong_share", "num_validation", "trusted", "seed"))


def suite_means_table(results: dict[str, Any]) -> str:
    """What the suite comes to, beside what was to be reached."""
    figures = results["aggregates"]

    def mean(name: str) -> float:
        return float(figures[name]["mean"])

    lines = [["gap closed by tamis, mean over the cells that have a gap", f"{mean('gap_closure_tamis'):.2f}", ">= 0.8"]]
    for name in ("mixing", "trusted_alone"):
        other = name.replace("_", " rows ")
        num = f"{mean(f'below_{name}') * figures[f'below_{name}']['num_seeds']:.0f}"
        cells = f"{num} of {figures[f'below_{name}']['num_seeds']}"
        lines.append([f"cells in which tamis is below {other} by more than the error", cells, "none"])
    lines.append(
        ["error of the share of right rows, mean, fair trusted rows", f"{mean('share_error_fair'):.3f}", "<= 0.07"]
    )
    lines.append(["error of the AUROC, mean, fair trusted rows", f"{mean('auroc_error_fair'):.3f}", "<= 0.05"])
    return as_table("figure | measured | bar", lines)


def suite_warnings_table(results: dict[str, Any]) -> str:
    """Runs of tamis whose share of right rows is far off, and those that warn, by kind of the trusted rows."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in results["rows"]:
        if row["method"] == "tamis" and row["share_right"] < 1:
            kinds.setdefault(row["trusted"], []).append(row)
    lines = []
    for kind, rows in kinds.items():
        is_bad = [abs(row["estimated_share_right"] - row["share_right"]) > BAD_SHARE for row in rows]
        warned = [has_warned(row) for row in rows]
        hits = sum(bad and alarm for bad, alarm in zip(is_bad, warned, strict=True))
        lines.append([kind, str(len(rows)), str(sum(is_bad)), str(hits), str(sum(warned) - hits)])
    return as_table("trusted rows | runs | far off | of these warned | false alarms", lines)


SUITE: dict[str, Callable[[dict[str, Any]], str]] = {
    "suite": suite_table,
    "suite.rivals": suite_rivals_table,
    "suite.means": suite_means_table,
    "suite.warnings": suite_warnings_table,
}
