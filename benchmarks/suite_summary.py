"""What the suite comes to: gap closures over cells, losses of tamis, errors of its estimates, warnings; two pictures.

    python benchmarks/suite_summary.py [RESULTS]

draws `docs/suite.png` and `docs/estimates.png` from `benchmarks/results/suite.json`, or the given results.

A cell is a scenario with a share of wrong rows and a trusted set; its runs differ in the seed. Gap closures of a cell
are ratios of means over its seeds, so that no seed with a small gap decides. Of variants of a method the best on the
held-out rows counts, for each seed anew; tamis has none.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tamis.compare.table import MIXING, TRUSTED_ALONE, best_variants
from tamis.files import write_atomically
from tamis.selection.calibration import FEW_RIGHT

ROOT = Path(__file__).resolve().parents[1]
MIN_GAP = 0.02  # cells with a smaller one, in exact match, have no gap closure: it would be noise
BAD_SHARE = 0.15  # estimates of the share of right rows that are so far off are bad ones
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class CellResult:
    """The runs of one cell: exact match by method (of variants the best), one value per seed; NaN where it was not run.

    Attributes:
        key: scenario, share of wrong rows, number of trusted rows, how these are chosen.
        num_eval: held-out rows.
        tamis: the rows of tamis, with its estimates.
    """

    key: tuple[str, float, int, str]
    accuracy: dict[str, np.ndarray]
    num_eval: int
    tamis: Rows

    @property
    def unjudged(self) -> np.ndarray:
        """The better of mixing and the trusted rows alone."""
        return np.maximum(self.accuracy[MIXING], self.accuracy[TRUSTED_ALONE])

    @property
    def gap(self) -> float:
        """Between that and the oracle, mean over the seeds."""
        return float((self.accuracy["oracle (right rows)"] - self.unjudged).mean())

    def closures(self, method: str) -> np.ndarray:
        """Part of the gap that a method closes: their mean over the seeds, without NaN, is the cell's."""
        return (self.accuracy[method] - self.unjudged) / self.gap

    def is_below(self, rival: str) -> bool:
        """Whether tamis is below a rival by more than the error of the difference.

        The error is the larger of two standard errors of the mean over the seeds: by the spread of the seeds, and the
        binomial one of the held-out rows, below which three seeds may fall by chance.
        """
        mine, other = self.accuracy["tamis"], self.accuracy[rival]
        variance = (mine * (1 - mine) + other * (1 - other)) / self.num_eval
        num_seeds = len(mine)
        spread = float((mine - other).std(ddof=1)) if num_seeds > 1 else 0.0
        error = max(spread / num_seeds**0.5, float(variance.sum()) ** 0.5 / num_seeds)
        return bool((mine - other).mean() < -error)


def group_cells(rows: Rows) -> list[CellResult]:
    """The cells of a suite's rows, in the order of the rows."""
    runs: dict[tuple[str, float, int, str], dict[int, Rows]] = {}
    for row in rows:
        key = (row["scenario"], row["wrong_share"], row["num_validation"], row["trusted"])
        runs.setdefault(key, {}).setdefault(row["seed"], []).append(row)
    cells = []
    for key, seeds in runs.items():
        best = [{row["group"]: row["test_accuracy"] for row in best_variants(found)} for found in seeds.values()]
        names = dict.fromkeys(name for found in best for name in found)
        accuracy = {name: [found.get(name, np.nan) for found in best] for name in names}
        tamis = [row for found in seeds.values() for row in found if row["method"] == "tamis"]
        arrays = {name: np.array(values) for name, values in accuracy.items()}
        cells.append(CellResult(key, arrays, tamis[0]["num_eval"], tamis))
    return cells


def aggregate(rows: Rows) -> dict[str, list[float | None]]:
    """The suite in figures.

    ``gap_closure_METHOD``: one value per cell with a gap where it was run. ``below_mixing``, ``below_trusted_alone``: 1
    for a cell where tamis is (`CellResult.is_below`). All others have one value per run of tamis: absolute errors of
    the share of right rows and of the AUROC, and 1 where the scout warned (it is not believed, or finds next to no
    right row) or was bad and did not warn; by kind of the trusted rows. Where no row is wrong a warning is no false
    alarm, and counts by itself.
    """
    figures: dict[str, list[float | None]] = {}

    def add(name: str, value: float | bool) -> None:
        figures.setdefault(name.replace(" ", "_").replace(",", ""), []).append(float(value))

    for cell in group_cells(rows):
        if cell.gap >= MIN_GAP:
            for method in cell.accuracy:
                add(f"gap_closure_{method}", np.nanmean(cell.closures(method)))
        add("below_mixing", cell.is_below(MIXING))
        add("below_trusted_alone", cell.is_below(TRUSTED_ALONE))
        *_, trusted = cell.key
        for row in cell.tamis:
            error = abs(row["estimated_share_right"] - row["share_right"])
            add(f"share_error_{trusted}", error)
            if row["expected_auroc"] is not None and row["selection_auroc"] is not None:
                add(f"auroc_error_{trusted}", abs(row["expected_auroc"] - row["selection_auroc"]))
            kind = "none_wrong" if row["share_right"] == 1 else trusted
            add(f"warned_{kind}", has_warned(row))
            add(f"missed_{kind}", not has_warned(row) and error > BAD_SHARE)
    return figures


def has_warned(row: dict[str, Any]) -> bool:
    """Whether a run of tamis doubts its trusted rows: it does not believe its scout, or finds next to no right row."""
    return not row["is_believed"] or row["estimated_share_right"] < FEW_RIGHT


def describe(key: tuple[str, float, int, str]) -> str:
    """A cell in words; what is as in most cells is not said."""
    scenario, wrong_share, num_validation, trusted = key
    parts = [scenario, f"{wrong_share:.0%} wrong"]
    parts += [f"{num_validation} trusted"] if num_validation != 64 else []
    parts += [f"trusted rows: {trusted}"] if trusted != "fair" else []
    return ", ".join(parts)


def draw_suite(rows: Rows, path: Path) -> None:
    """A line per cell with a gap, a dot per method: its gap closure, and for tamis the spread over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = [cell for cell in group_cells(rows) if cell.gap >= MIN_GAP][::-1]
    methods = dict.fromkeys(name for cell in cells for name in cell.accuracy)
    rivals = [name for name in methods if name not in ("tamis", "oracle (right rows)")]
    figure, axes = plt.subplots(figsize=(10, 1.6 + 0.34 * len(cells)), layout="constrained")
    lowest, places = -1.0, np.arange(len(cells))
    for i, name in enumerate(rivals):
        values = [(place, np.nanmean(cell.closures(name))) for place, cell in zip(places, cells, strict=True)
                  if name in cell.accuracy]  # fmt: skip
        y, x = np.array(values).T
        axes.scatter(x.clip(lowest), y, s=26, marker="oDs^vPX"[i % 7], color=f"C{i % 10}", alpha=0.75,
                     label=name, linewidths=0)  # fmt: skip
    closures = [cell.closures("tamis") for cell in cells]
    means = np.array([values.mean() for values in closures])
    spread = np.array([values.std(ddof=1) if len(values) > 1 else 0.0 for values in closures])
    axes.errorbar(
        means.clip(lowest), places, xerr=spread, fmt="*", color="black", markersize=13, label="tamis", zorder=5
    )
    axes.axvline(0, color="grey", linewidth=1)
    axes.axvline(1, color="grey", linewidth=1, linestyle="--")
    axes.set(
        yticks=places, yticklabels=[describe(cell.key) for cell in cells], xlim=(lowest - 0.1, 1.25),
        xlabel="part of the gap closed\n"
        f"(0: mixing or trusted rows alone, 1: right rows only; left edge: {lowest:g} or less)",
    )  # fmt: skip
    axes.grid(axis="y", linewidth=0.3)
    figure.legend(loc="outside upper center", ncols=5, fontsize=9)
    _save(figure, path)


def draw_estimates(rows: Rows, path: Path) -> None:
    """Estimated against true share of right rows, and AUROC; a dot per run of tamis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tamis = [row for row in rows if row["method"] == "tamis"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    parts = (
        ("share of right rows", "share_right", "estimated_share_right", 0.0),
        ("AUROC", "selection_auroc", "expected_auroc", 0.45),
    )
    for axes, (title, truth, estimate, low) in zip(panels, parts, strict=True):
        for i, trusted in enumerate(dict.fromkeys(row["trusted"] for row in tamis)):
            for is_believed, marker in ((True, "o"), (False, "x")):
                points = [
                    (row[truth], row[estimate])
                    for row in tamis
                    if row["trusted"] == trusted and row["is_believed"] == is_believed
                    and None not in (row[truth], row[estimate])
                ]  # fmt: skip
                if points:
                    label = f"trusted rows: {trusted}" + ("" if is_believed else ", warned")
                    axes.scatter(*zip(*points, strict=True), s=28, marker=marker, color=f"C{i}", alpha=0.7, label=label)
        axes.plot([low, 1], [low, 1], color="grey", linewidth=1)
        axes.set(xlabel="true", ylabel="estimated", title=title, xlim=(low, 1.02), ylim=(low, 1.02))
    panels[0].legend(fontsize=8)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
    plt.close(figure)


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "suite.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    draw_suite(rows, ROOT / "docs" / "suite.png")
    draw_estimates(rows, ROOT / "docs" / "estimates.png")


if __name__ == "__main__":
    main()
