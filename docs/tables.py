"""Write the tables of the documents from committed results: `python docs/tables.py`; nothing in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; its results are in `benchmarks/results/NAME.json`.
"""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tamis.compare.table import best_variants

ROOT = Path(__file__).resolve().parents[1]
BOLD = ("tamis", "tamis, refining")


def demo_table(rows: list[dict[str, Any]]) -> str:
    """One line per method of `tamis demo`, of a group of variants the best."""
    num_variants = Counter(row["group"] for row in rows)
    lines = ["| method | exact match | loss | gap closed | AUROC | seconds |", "|---|---|---|---|---|---|"]
    for row in best_variants(rows):
        found = num_variants[row["group"]]
        name = row["method"] if found == 1 else f"{row['group']} (best of {found})"
        auroc = "" if row["selection_auroc"] is None else f"{row['selection_auroc']:.3f}"
        values = [f"{row['test_accuracy']:.3f}", f"{row['test_loss']:.3f}", f"{row['gap_closure']:.2f}", auroc]
        if row["method"] in BOLD:
            name, values = f"**{name}**", [f"**{value}**" if value else "" for value in values]
        lines.append(f"| {' | '.join([name, *values, str(round(row['seconds']))])} |")
    return "\n".join(lines)


def shares_table(results: dict[str, Any]) -> str:
    """One line per share of wrong rows of `benchmarks/shares.py`, means over the seeds; of rivals the best variant."""
    lines = [
        "| wrong | trusted | mixing | SEAL | **tamis** | oracle | gap closed | right rows | AUROC | weight of wrong |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for wrong in sorted({row["wrong"] for row in results["rows"]}):
        rows = [row for row in results["rows"] if row["wrong"] == wrong]
        tamis = [row for row in rows if row["method"] == "tamis"]
        best = [_mean_of_best(rows, prefix) for prefix in ("trusted rows", "mixing", "SEAL", "tamis", "oracle")]
        gaps = [row["gap_closure"] for row in tamis if row["gap_closure"] is not None]
        closed = f"{_mean(gaps):.2f} ({', '.join(f'{gap:.2f}' for gap in gaps)})" if gaps else ""
        share = f"{_mean([row['estimated_share_right'] for row in tamis]):.3f}"
        expected = [row["expected_auroc"] for row in tamis if row["expected_auroc"] is not None]
        known = [row["selection_auroc"] for row in tamis if row["selection_auroc"] is not None]
        auroc = f"{f'{_mean(expected):.3f}' if expected else 'none'} ({_mean(known):.3f})" if known else ""
        by_labels = _mean([row["weight_on_wrong_by_labels"] for row in tamis])
        weight = f"{_mean([row['weight_on_wrong'] for row in tamis]):.3f} ({by_labels:.3f})"
        cells = [f"{wrong:.0%}", *(f"{value:.3f}" for value in best), closed, share, auroc, weight]
        cells[4] = f"**{cells[4]}**"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def unlike_table(results: dict[str, Any]) -> str:
    """One line per share of wrong rows and method of `benchmarks/unlike.py`, of a group of variants the best."""
    lines = ["| wrong | method | exact match | loss | gap closed | AUROC |", "|---|---|---|---|---|---|"]
    (seed,) = {row["seed"] for row in results["rows"]}
    for wrong in sorted({row["wrong_share"] for row in results["rows"]}):
        for row in best_variants([row for row in results["rows"] if row["wrong_share"] == wrong]):
            assert row["seed"] == seed
            auroc = "" if row["selection_auroc"] is None else f"{row['selection_auroc']:.3f}"
            values = [f"{row['test_accuracy']:.3f}", f"{row['test_loss']:.3f}", f"{row['gap_closure']:.2f}", auroc]
            name = f"**{row['method']}**" if row["method"] in BOLD else row["method"]
            lines.append(f"| {wrong:.0%} | {' | '.join([name, *values])} |")
    return "\n".join(lines)


def hypercleaning_table(results: dict[str, Any]) -> str:
    """One line per method of `benchmarks/hypercleaning.py`: mean and deviation over the seeds."""
    figures = ("accuracy_best", "accuracy_selected", "f1", "auroc")
    lines = [
        "| method | best accuracy | accuracy chosen on validation | F1 | AUROC | right rows: estimated (true) |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in results["rows"]):
        prefix = "" if method == "tamis" else f"{method}_"
        found = [results["aggregates"].get(prefix + figure) for figure in figures]
        cells = ["" if f is None else f"{f['mean']:.4f} ± {f['std']:.4f}" for f in found]
        share = [results["aggregates"].get(f"{prefix}{name}") for name in ("estimated_share_right", "share_right")]
        cells.append(f"{share[0]['mean']:.3f} ({share[1]['mean']:.3f})" if all(share) else "")
        lines.append(f"| {f'**{method}**' if method in BOLD else f'`{method}`'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_of_best(rows: list[dict[str, Any]], prefix: str) -> float:
    """Mean over the seeds of the exact match of the best method whose name begins so."""
    best: dict[int, float] = {}
    for row in rows:
        if row["method"].startswith(prefix):
            best[row["seed"]] = max(best.get(row["seed"], 0.0), row["test_accuracy"])
    return _mean(list(best.values()))


def fill(text: str) -> str:
    """The document with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        makers = {"unlike": unlike_table, "hypercleaning": hypercleaning_table, "demo": demo_table}
        lines = makers.get(name, shares_table)(found)
        return f"<!-- table: {name} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        document.write_text(fill(document.read_text(encoding="utf-8")), encoding="utf-8")
