"""The page of a comparison: the sentence, a picture, the table; one file that needs nothing else."""

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes

from tamis.compare.own.budget import Budget
from tamis.compare.own.contenders import BASE, REFINING, SELECT
from tamis.compare.own.metrics import Metric
from tamis.compare.own.verdict import NUM_ERRORS, Line, cells
from tamis.compare.runs import TAMIS
from tamis.report.charts import OTHER, RIGHT, drawn


def render(
    lines: Sequence[Line],
    metrics: Sequence[Metric],
    sentence: str,
    budget: Budget,
    settings: dict[str, Any],
    versions: dict[str, str],
) -> str:
    """The page as HTML; all texts are escaped."""
    environment = Environment(loader=PackageLoader("tamis.compare.own"), autoescape=True, undefined=StrictUndefined)
    style = files("tamis.report").joinpath("templates", "page.css").read_text("utf-8")
    return environment.get_template("comparison.html.jinja").render(
        sentence=sentence,
        budget=budget,
        num_errors=NUM_ERRORS,
        metrics=metrics,
        rows=[cells(line, metrics) for line in lines],
        errors=[error for line in lines for error in line.errors],
        picture=Markup(_picture(lines, metrics[0])),
        settings={name: str(value) for name, value in settings.items()},
        versions=versions,
        style=Markup(style),
    )


def _picture(lines: Sequence[Line], metric: Metric) -> str:
    """Each method as a point, with the standard deviation over its seeds."""
    shown = [line for line in lines if line.values and (line.group != BASE or len(lines) < 3)]

    def draw(axes: Axes) -> None:
        for place, line in enumerate(reversed(shown)):
            is_ours = line.group in (TAMIS, REFINING, SELECT)
            value, spread = line.values[metric.name], line.spreads[metric.name]
            axes.errorbar(value, place, xerr=spread or 0.0, fmt="o", color=RIGHT if is_ours else OTHER, capsize=3)
        axes.set_yticks(range(len(shown)), [line.method for line in reversed(shown)])
        better = "lower" if metric.is_lower_better else "higher"
        axes.set(xlabel=f"{metric.name} on the held-out rows, {better} is better", ylim=(-0.6, len(shown) - 0.4))

    return drawn("comparison", draw, height=1.0 + 0.27 * len(shown))
