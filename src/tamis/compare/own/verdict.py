"""What the runs of `tamis compare` say: one line a method, and one sentence.

The difference between two methods is that of the same held-out rows and the same seeds. Its error has two parts, as if
both had been drawn: rows, the standard error of the rows' differences, each averaged over the seeds; and seeds, the
standard error of the seeds' differences, each averaged over the rows. A difference below twice its error is noise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tamis.compare.own.contenders import BASE, PLAIN, SELECT
from tamis.compare.own.metrics import Metric
from tamis.compare.own.runner import Result
from tamis.compare.runs import TAMIS
from tamis.compare.table import MIXING, TRUSTED_ALONE

NUM_ERRORS = 2.0
WITHOUT_SELECTION = (PLAIN, TRUSTED_ALONE, MIXING)
_WITH_TAMIS = (TAMIS, SELECT)


@dataclass(frozen=True)
class Difference:
    """How much better one method is than another.

    Attributes:
        value: positive if the first one is better.
        error: standard error.
        num_seeds: that both have run with.
    """

    value: float
    error: float
    num_seeds: int

    @property
    def is_noise(self) -> bool:
        """Whether it may be nothing."""
        return not abs(self.value) > NUM_ERRORS * self.error


@dataclass(frozen=True)
class Line:
    """A method over all seeds.

    Attributes:
        values: by metric the mean over rows and seeds.
        spreads: by metric the standard deviation over seeds of the mean over rows; None with one seed.
        behind: how much better tamis is by the metric that decides; None for tamis itself.
        num_variants: of which this is the best.
        seconds, num_steps, num_tokens: of a run, on average.
        errors: of the runs that failed.
    """

    method: str
    group: str
    values: dict[str, float]
    spreads: dict[str, float | None]
    behind: Difference | None
    num_variants: int
    num_seeds: int
    seconds: float
    num_steps: float
    num_tokens: float
    errors: list[str]


def difference(first: Sequence[Result], second: Sequence[Result], metric: Metric) -> Difference | None:
    """How much better the first method is; None if the two have no seed in common."""
    theirs = {result.seed: result.values[metric.name] for result in second if result.error is None}
    pairs = [(r.values[metric.name], theirs[r.seed]) for r in first if r.error is None and r.seed in theirs]
    if not pairs:
        return None
    better_SR: NDArray[np.float64] = np.array([np.subtract(mine, other) for mine, other in pairs])
    if metric.is_lower_better:
        better_SR = -better_SR
    num_seeds, num_rows = better_SR.shape
    variance = better_SR.mean(axis=0).var(ddof=1) / num_rows if num_rows > 1 else 0.0
    variance += better_SR.mean(axis=1).var(ddof=1) / num_seeds if num_seeds > 1 else 0.0
    return Difference(float(better_SR.mean()), math.sqrt(variance), num_seeds)


def table(results: Sequence[Result], metrics: Sequence[Metric]) -> list[Line]:
    """One line a group: its best variant by the first metric, the best line first; failed groups last."""
    groups: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        groups.setdefault(result.group, {}).setdefault(result.method, []).append(result)
    ours = groups.get(TAMIS, {}).get(TAMIS, [])
    lines = [_best(list(variants.values()), ours, metrics) for variants in groups.values()]
    sign = 1 if metrics[0].is_lower_better else -1
    return sorted(lines, key=lambda line: sign * line.values[metrics[0].name] if line.values else math.inf)


def _best(variants: list[list[Result]], ours: list[Result], metrics: Sequence[Metric]) -> Line:
    name, sign = metrics[0].name, 1 if metrics[0].is_lower_better else -1

    def rank(runs: list[Result]) -> tuple[int, float]:
        done = [np.mean(run.values[name]) for run in runs if run.error is None]
        return len(runs) - len(done), sign * float(np.mean(done)) if done else math.inf  # a complete one before others

    runs = min(variants, key=rank)
    done, first = [run for run in runs if run.error is None], runs[0]
    means = {metric.name: [float(np.mean(run.values[metric.name])) for run in done] for metric in metrics if done}
    return Line(
        method=first.method,
        group=first.group,
        values={metric: float(np.mean(found)) for metric, found in means.items()},
        spreads={m: float(np.std(found, ddof=1)) if len(found) > 1 else None for m, found in means.items()},
        behind=None if first.method == TAMIS else difference(ours, runs, metrics[0]),
        num_variants=len(variants),
        num_seeds=len(done),
        seconds=float(np.mean([run.seconds for run in done])) if done else 0.0,
        num_steps=float(np.mean([run.num_steps for run in done])) if done else 0.0,
        num_tokens=float(np.mean([run.num_tokens for run in done])) if done else 0.0,
        errors=[f"{run.method}, seed {run.seed}: {run.error}" for runs in variants for run in runs if run.error],
    )


def verdict(lines: Sequence[Line], metric: Metric) -> str:
    """The result in a few sentences."""
    by_group = {line.group: line for line in lines if line.values}
    tamis, found = by_group.get(TAMIS), [by_group[g] for g in WITHOUT_SELECTION if g in by_group]
    if tamis is None:
        return "tamis has no result, so nothing can be said of it."
    if not found:
        return "Nothing to compare tamis with: add plain_sft, trusted_alone or mixing to --methods."
    name = metric.name
    sign = 1 if metric.is_lower_better else -1
    best = min(found, key=lambda line: sign * line.values[name])
    assert best.behind is not None, "only tamis has none"
    text = f"On your data tamis has {_label(metric)} {tamis.values[name]:.4g}, and the best without selection, "
    text += f"{best.method}, {best.values[name]:.4g}. {_difference(best.behind)}"
    if BASE in by_group:
        text += f" The model began at {by_group[BASE].values[name]:.4g}."
    above = [line for line in by_group.values() if line.behind and line.group not in (BASE, best.group)]
    above = [line for line in above if line.behind and line.behind.value < 0 and not line.behind.is_noise]
    if above:
        text += f" Better than tamis: {', '.join(line.method for line in above)}."
    if tamis.num_seeds == 1:
        text += " There is one seed: how much another one would change is not known."
    return text


def _difference(behind: Difference) -> str:
    shown = f"{abs(behind.value):.2g} ± {behind.error:.1g}"
    if behind.is_noise:
        return f"The difference of {shown} is within the noise: selection does not show here."
    if behind.value > 0:
        return f"tamis is better by {shown}: selection pays."
    return f"tamis is worse by {shown}: do not select here."


def _label(metric: Metric) -> str:
    return "a held-out loss of" if metric.is_lower_better else f"{metric.name} of"


def format_lines(lines: Sequence[Line], metrics: Sequence[Metric]) -> str:
    """The table as text."""
    head = ["method", *(metric.name for metric in metrics), "tamis better by", "steps", "tokens", "seconds"]
    rows = [cells(line, metrics) for line in lines]
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    text = []
    for row in [head, *rows]:
        figures = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        text.append("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())
    return "\n".join(text)


def cells(line: Line, metrics: Sequence[Metric]) -> list[str]:
    """A line of the table as texts."""
    name = line.method if line.num_variants == 1 else f"{line.method} (best of {line.num_variants})"
    if not line.values:
        return [f"{name}: failed", *[""] * (len(metrics) + 4)]
    figures = []
    for metric in metrics:
        spread = line.spreads[metric.name]
        figures.append(f"{line.values[metric.name]:.4f}" + ("" if spread is None else f" ± {spread:.4f}"))
    behind = "" if line.behind is None else f"{line.behind.value:+.4f} ± {line.behind.error:.4f}"
    if line.group == BASE:
        return [name, *figures, behind, "", "", ""]
    return [name, *figures, behind, f"{line.num_steps:,.0f}", _thousands(line.num_tokens), f"{line.seconds:,.0f}"]


def _thousands(number: float) -> str:
    if number < 1e4:
        return f"{number:,.0f}"
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"
