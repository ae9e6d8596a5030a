"""Draws `docs/costs.png`: what weights cost as rows grow, and what ranks change, from `benchmarks/results/`.

    python benchmarks/costs_picture.py

The results are those of `selector_scale.py` and `ranks.py`.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tamis.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PARTS = {
    "update_s": "an update along the steps",
    "settle_s": "a scout's weights, once a run",
    "visits_s": "the visits of an epoch",
}
STYLES = {"DDP": ("#1f77b4", "o"), "FSDP2": ("#d62728", "s")}


def rows_of(name: str) -> list[dict[str, Any]]:
    """Those of committed results."""
    rows: list[dict[str, Any]] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text("utf-8"))["rows"]
    return rows


def draw_rows(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Seconds over the number of rows."""
    numbers = [row["num_rows"] for row in rows]
    for (key, label), marker in zip(PARTS.items(), "os^", strict=True):
        seconds = [row["update_us"] / 1e6 if key == "update_s" else row[key] for row in rows]
        axes.loglog(numbers, seconds, marker=marker, label=label)
    bytes_per_row = max(row["bytes_per_row"] for row in rows)
    axes.set(xlabel="training rows", ylabel="seconds, one thread", title=f"weights: {bytes_per_row:.0f} bytes a row")
    axes.legend()
    axes.grid(alpha=0.3)


def draw_step(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """A step over that of `SFTTrainer`, over the number of ranks."""
    for place, (engine, (colour, marker)) in enumerate(STYLES.items()):
        found = of_engine(rows, engine)
        ratios = [row["ratio"] for row in found]
        errors = [[row["ratio"] - row["low"] for row in found], [row["high"] - row["ratio"] for row in found]]
        places = [row["num_ranks"] * (1 + 0.03 * place) for row in found]
        axes.errorbar(places, ratios, yerr=errors, color=colour, marker=marker, capsize=3, label=engine)
    axes.axhline(1.05, color="0.5", linestyle=":", label="bar: 1.05")
    axes.set(ylabel="a step: tamis / SFTTrainer", title="a step on more ranks")
    axes.set_ylim(0.8, 1.3)
    over_ranks(axes)


def draw_shared(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Scouting and a refresh over those of one rank."""
    for engine, (colour, marker) in STYLES.items():
        found = of_engine(rows, engine)
        for key, label, line in (("scout_s", "scouting", "-"), ("refresh_s", "a refresh", "--")):
            shares = [row[key] / found[0][key] for row in found]
            axes.plot(
                [row["num_ranks"] for row in found], shares,
                color=colour, marker=marker, linestyle=line, label=f"{label}, {engine}",
            )  # fmt: skip
    numbers = sorted({row["num_ranks"] for row in rows})
    axes.plot(numbers, [1 / number for number in numbers], color="0.5", linestyle=":", label="shared evenly")
    axes.set(ylabel="a rank's seconds / those of one rank", title="the same rows on more ranks")
    axes.set_ylim(0, 2.6)  # room for the legend
    over_ranks(axes)


def of_engine(rows: list[dict[str, Any]], engine: str) -> list[dict[str, Any]]:
    """One rank, which has no engine, and those with this one."""
    return [row for row in rows if row["engine"] in ("none", engine)]


def over_ranks(axes: Axes) -> None:
    """What both pictures over ranks have."""
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4], ["1", "2", "4"])
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.legend()
    axes.grid(alpha=0.3)


def main() -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    draw_rows(left, rows_of("selector_scale"))
    ranks = rows_of("ranks")
    draw_step(middle, ranks)
    draw_shared(right, ranks)
    path = ROOT / "docs" / "costs.png"
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    plt.close(figure)


if __name__ == "__main__":
    main()
