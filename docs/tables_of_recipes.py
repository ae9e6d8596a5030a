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
            _by_kind(row.get("kept"), row.get("weight")),
        ]
        for row in results["rows"]
    ]
    return as_table("twin | seed | method | loss, right kinds | loss, wrong kind | kept (share of the weight)", lines)


def _by_kind(kept: dict[str, float] | None, weight: dict[str, float] | None) -> str:
    """Both shares of each kind of rows, by name: they stand in the order of a shuffled file."""
    if not kept or not weight:
        return ""
    if max(weight.values()) - min(weight.values()) < 0.01:
        return "all alike"
    return ", ".join(f"{kind} {share:.0%} ({weight[kind]:.0%})" for kind, share in sorted(kept.items()))
