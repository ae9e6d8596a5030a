"""The table of a comparison: gap closures, and one line a method."""

from typing import Any

from tamis.metrics import gap_closure

MIXING, TRUSTED_ALONE = "direct mixing", "trusted rows alone"


def best_variants(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each group of variants the row with the best accuracy on the held-out rows, in the order of the groups."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    return [max(group, key=lambda row: row["test_accuracy"]) for group in groups.values()]


def add_gap_closures(rows: list[dict[str, Any]]) -> None:
    """Add ``gap_closure`` (accuracy) and ``gap_closure_loss`` to every row.

    0 is the best that can be had without judging rows: direct mixing with the best rho, or the trusted rows alone,
    chosen by the same figure on the held-out rows, so that the rival is as strong as can be. 1 is the oracle, the last
    row.
    """
    unjudged = [row for row in rows if row["group"] in (MIXING, TRUSTED_ALONE)]
    oracle = rows[-1]
    best_accuracy = max(row["test_accuracy"] for row in unjudged)
    best_loss = min(row["test_loss"] for row in unjudged)
    for row in rows:
        row["gap_closure"] = gap_closure(best_accuracy, row["test_accuracy"], oracle["test_accuracy"])
        row["gap_closure_loss"] = gap_closure(best_loss, row["test_loss"], oracle["test_loss"])


def format_table(rows: list[dict[str, Any]]) -> str:
    """The comparison as text, one method a line."""
    width = max(len("method"), *(len(row["method"]) for row in rows))
    lines = [f"{'method':{width}} {'test acc':>8} {'test loss':>9} {'gap closed':>10} {'AUROC':>6} {'seconds':>7}"]
    for row in rows:
        selection = "" if row["selection_auroc"] is None else f"{row['selection_auroc']:.3f}"
        closed = "" if row["gap_closure"] is None else f"{row['gap_closure']:.2f}"
        lines.append(
            f"{row['method']:{width}} {row['test_accuracy']:8.3f} {row['test_loss']:9.3f} {closed:>10} "
            f"{selection:>6} {row['seconds']:7.0f}"
        )
    return "\n".join(lines)
