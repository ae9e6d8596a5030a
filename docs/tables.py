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


def fill(text: str) -> str:
    """The document with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
        return f"<!-- table: {name} -->\n{demo_table(rows)}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        document.write_text(fill(document.read_text(encoding="utf-8")), encoding="utf-8")
