"""The picture of a comparison."""

from pathlib import Path
from typing import Any

import numpy as np

from tamis.compare.methods import REFINING
from tamis.compare.seal import SEAL
from tamis.compare.table import best_variants
from tamis.compare.task import Task, learned_weights, right_responses, run_dir
from tamis.files import write_atomically
from tamis.output_dir import read_metrics


def draw_comparison(rows: list[dict[str, Any]], task: Task, output_dir: Path) -> None:
    """``comparison.png``: learning curves; weights of right and wrong rows; with refining the generated ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    is_refined = any(row["method"] == REFINING for row in rows)
    num_panels = 3 + is_refined
    figure, panels = plt.subplots(1, num_panels, figsize=(4.75 * num_panels, 4.2), layout="constrained")
    curves, *histograms = panels[:3]
    for row in best_variants(rows):
        records = read_metrics(run_dir(output_dir, row["method"]))
        points = {r["step"]: r["eval_teacher_forced_match"] for r in records if "eval_teacher_forced_match" in r}
        width = 2.5 if row["method"].startswith("tamis") else 1.3
        curves.plot(list(points), list(points.values()), label=row["method"], linewidth=width)
    curves.set(xlabel="training step", ylabel="exact match on held-out rows", title="Learning curves")
    curves.legend(fontsize=8)
    for axes, name in zip(histograms, (SEAL, "tamis"), strict=True):
        weights, is_right = learned_weights(output_dir, name, task)
        bins = np.linspace(0, weights.max() * 1.001, 40)
        for label, mask, colour in (("right rows", is_right, "tab:green"), ("wrong rows", ~is_right, "tab:red")):
            axes.hist(weights[mask], bins, alpha=0.6, label=label, color=colour)
        axes.set(xlabel="weight", ylabel="rows", title=f"Weights learned by {name}")
        axes.legend()
    if is_refined:
        _draw_refreshes(panels[3], right_responses(output_dir, REFINING, task))
    write_atomically(output_dir / "comparison.png", lambda path: figure.savefig(path, format="png", dpi=110))
    plt.close(figure)


def _draw_refreshes(axes: Any, refreshes: list[dict[str, float]]) -> None:
    steps = [refresh["step"] for refresh in refreshes]
    axes.plot(steps, [refresh["share"] for refresh in refreshes], "o-", label="all alike")
    axes.plot(steps, [refresh["weighted_share"] for refresh in refreshes], "s-", label="as they are trained on")
    axes.set(xlabel="training step", ylim=(0, 1.02), title="Right responses among the generated")
    axes.legend()
