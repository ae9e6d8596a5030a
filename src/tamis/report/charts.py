"""The pictures of the page, as SVG that takes the colour of its text from the page, light or dark."""

import io
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from tamis.report.run_folder import RunFolder, Values

_INK = "#010203"  # becomes the colour of the text around
RIGHT, WRONG, TRUSTED, OTHER = "#2a9d8f", "#c8553d", "#e9a820", "#5b7db1"  # told apart by lightness too
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "axes.spines.top": False,
    "axes.spines.right": False, "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "axes.titlesize": 10, "legend.frameon": False,
}  # fmt: skip
_CURVES = {
    "training_loss": ("training rows", OTHER),
    "weighted_training_loss": ("training rows, weighted", RIGHT),
    "validation_loss": ("trusted rows", TRUSTED),
    "eval_loss": ("held-out rows", WRONG),
}
_WEIGHTING = {"ess_ratio": "effective share of the rows", "weight_entropy": "entropy of the weights, nats"}
_NUM_BINS = 60


def drawn(name: str, draw: Callable[[Axes], None], height: float = 2.7) -> str:
    """An SVG of one picture.

    Args:
        name: tells its elements from those of the other pictures on the page.
        height: in inches; the width is 5.2.
    """
    style: Any = _STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.2, height), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    return (
        svg[svg.index("<svg") :]
        .replace(_INK, "currentColor")
        .replace('id="', f'id="{name}-')
        .replace('href="#', f'href="#{name}-')
        .replace("url(#", f"url(#{name}-")
    )


def learning_curves(run: RunFolder) -> str | None:
    """Losses by step; None where none was logged."""
    curves = {name: run.curve(name) for name in _CURVES}
    if not any(steps for steps, _ in curves.values()):
        return None

    def draw(axes: Axes) -> None:
        for name, (steps, values) in curves.items():
            if steps:
                label, colour = _CURVES[name]
                axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) < 25 else None, ms=3)
        axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(0, None))
        axes.legend()

    return drawn("curves", draw)


def weighting_curve(run: RunFolder, name: str) -> str | None:
    """Effective share of rows, entropy of the weights, or penalty gap by step; None where it was not logged."""
    steps, values = run.curve(name)
    if len(steps) < 2:
        return None

    def draw(axes: Axes) -> None:
        axes.plot(steps, values, color=OTHER)
        axes.set(xlabel="step", ylabel=_WEIGHTING.get(name, "penalty gap, nats per token"))

    return drawn(name.replace("_", "-"), draw, height=1.9)


def score_histogram(run: RunFolder) -> str | None:
    """Scores of training rows, the trusted rows that the scout has not seen over them, and the border."""
    score_N, validation = run.training_scores(), run.validation_scores()
    if score_N is None or validation is None or run.scout is None:
        return None
    score_V, weight_V = validation
    p_right_N = run.column("p_right") if run.is_believed else np.ones(len(score_N))
    is_known_N = ~np.isnan(score_N) & ~np.isnan(p_right_N)  # a row may be left out here that was scored elsewhere
    border = run.scout.get("border")

    def draw(axes: Axes) -> None:
        everything = np.concatenate([score_N[is_known_N], score_V])
        low, high = np.percentile(everything, [0.5, 97])  # what is beyond stands in the outermost bars
        edges = np.linspace(low, max(high, low + 1e-6), _NUM_BINS + 1)
        inside = score_N[is_known_N].clip(edges[0], edges[-1])
        p_right = p_right_N[is_known_N]
        groups = (
            [(p_right, RIGHT, "right"), (1 - p_right, WRONG, "wrong")]
            if run.is_believed
            else [(p_right, OTHER, "training rows")]
        )
        below = np.zeros(_NUM_BINS)
        for weights, colour, label in groups:
            counts = np.histogram(inside, edges, weights=weights)[0]
            text = f"training rows, expected {label}" if run.is_believed else label
            axes.bar(edges[:-1], counts, np.diff(edges), below, align="edge", color=colour, alpha=0.75, label=text)
            below += counts
        trusted = np.histogram(score_V.clip(edges[0], edges[-1]), edges, weights=weight_V)[0]
        scale = p_right.sum() / max(trusted.sum(), 1e-12)
        axes.stairs(_smooth(trusted) * scale, edges, color=TRUSTED, lw=2, label="unseen trusted rows, to scale")
        if border is not None:
            axes.axvline(border, color=_INK, lw=1, ls="--")
            for text, side, offset in (("kept", "right", -5), ("dropped", "left", 5)):
                place: Any = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side}
                axes.annotate(text, (border, 1), (offset, 2), **place)
        is_excess = bool(run.scout and run.scout.get("base_coefficient"))
        name = "excess loss over the base model" if is_excess else "loss by the scout"
        axes.set(xlabel=f"{name}, nats per token (outermost bars: and beyond)", ylabel="rows")
        axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper right")

    return drawn("scores", draw, height=3.2)


def weight_histogram(run: RunFolder) -> str:
    """How the weights are spread, where there are no scores to show."""
    weight_N = run.column("weight")

    def draw(axes: Axes) -> None:
        axes.hist(weight_N, _NUM_BINS, color=OTHER)
        axes.set(xlabel="weight (mean one)", ylabel="rows", yscale="log")

    return drawn("weights", draw)


def by_group(name: str, groups: Sequence[tuple[str, Values]], is_kept_N: Values, weight_N: Values) -> str:
    """Share of rows that are kept and share of the weight, for groups of rows.

    Args:
        groups: their names, and whether each row belongs to them.
    """
    labels = [f"{_shortened(label) or 'none'} ({mask.sum():,})" for label, mask in groups]
    kept = [is_kept_N[mask].mean() if mask.any() else 0.0 for _, mask in groups]
    weight = [weight_N[mask].mean(dtype=float) if mask.any() else 0.0 for _, mask in groups]

    def draw(axes: Axes) -> None:
        places = np.arange(len(groups))
        axes.barh(places, kept, color=RIGHT, alpha=0.8)
        for place, (share, mean) in enumerate(zip(kept, weight, strict=True)):
            axes.annotate(f" {share:.0%}, weight {mean:.2f}", (share, place), va="center")
        axes.set(yticks=places, yticklabels=labels, xlim=(0, 1.45), xticks=(0, 0.5, 1), xlabel="share of rows kept")
        axes.invert_yaxis()

    return drawn(name, draw, height=0.9 + 0.28 * len(groups))


def length_groups(length_N: Values, num_groups: int = 6) -> list[tuple[str, Values]]:
    """Rows by the length of their responses, in groups of about one size."""
    known = length_N[~np.isnan(length_N)]
    if not len(known):
        return []
    edges = np.unique(np.quantile(known, np.linspace(0, 1, num_groups + 1)).round())
    if len(edges) < 3:
        return []
    groups = []
    for i, (low, high) in enumerate(pairwise(edges)):
        is_last = i == len(edges) - 2
        mask = (length_N >= low) & ((length_N <= high) if is_last else (length_N < high))
        groups.append((f"{low:,.0f} to {high if is_last else high - 1:,.0f}", mask))
    return groups


def _smooth(counts: Values) -> Values:
    """Few rows in many bins: the mean of each bin and its neighbours."""
    kernel = np.array([1, 2, 3, 2, 1]) / 9
    smoothed: Values = np.convolve(np.pad(counts, 2, mode="edge"), kernel, mode="valid")
    return smoothed


def _shortened(label: str, longest: int = 24) -> str:
    return label if len(label) <= longest else f"{label[: longest - 1]}…"
