"""The table of the recipes' twins, for `docs/tables.py`."""

from typing import Any

from tables_of_costs import as_table


def recipes_table(results: dict[str, Any]) -> str:
    """One line per twin, seed and method of `benchmarks/recipes.py`."""
    lines = [
        [
            row["twin"],
            str(row["seed"]),
            row["method"],
            f"{row['right_loss']:.3f}",
            f"{row['wrong_loss']:.3f}",
            _by_kind(row.get("kept")),
            _by_kind(row.get("weight")),
        ]
        for row in results["rows"]
    ]
    return as_table("twin | seed | method | loss, right kinds | loss, wrong kind | kept | share of the weight", lines)


def _by_kind(shares: dict[str, float] | None) -> str:
    """The share of each kind of rows, by name: they stand in the order of a shuffled file."""
    return ", ".join(f"{kind} {share:.0%}" for kind, share in sorted((shares or {}).items()))
