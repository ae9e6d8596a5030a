"""The report of `tamis check` for people: a table and lines, in colour on a terminal."""

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tamis.check.bad_files import MAX_SHOWN, by_file
from tamis.check.overlap import MAX_SEARCHED, SHINGLE_SIZE, THRESHOLD
from tamis.check.report import DataSet, Report
from tamis.summary import format_summary

_NAMES = {"train_dataset": "training", "validation_dataset": "validation", "eval_dataset": "held-out"}
_FIGURES = {
    "rows": "rows",
    "bad_rows": "bad rows, left out",
    "tokens": "tokens",
    "median_length": "median length",
    "longest": "longest",
    "truncated": "truncated",
    "dropped": "dropped",
    "repeated_rows": "repeated rows",
    "other_answers": "further responses to a prompt",
    "near_duplicates": "near-duplicates",
}
_WIDE = 10_000  # columns where there is no terminal: no line is broken


def show(report: Report) -> None:
    """Print to stdout everything but the errors."""
    console = Console(highlight=False, soft_wrap=True)
    for line in report.notes:
        console.print(Text(line))
    if report.bad_rows:
        _heading(console, "bad rows")
        for line in _bad_rows(report.bad_rows):
            console.print(Text(line))
    if report.data_sets:
        _heading(console, "rows")
        width = None if console.is_terminal else _WIDE
        console.print(_table(report.data_sets, is_plain=not console.is_terminal), width=width, soft_wrap=False)
        console.print(Text(_how_near(report.data_sets), style="dim"))
    if report.example is not None:
        _heading(console, f"trained on ({report.example.title()})")
        console.print(report.example.text())
    if report.settings:
        _heading(console, "settings")
        for line in report.settings:
            console.print(Text(line))
    if report.cost is not None:
        _heading(console, "cost")
        console.print(Text(format_summary(report.cost.lines())))
    if report.warnings or not report.errors:
        _heading(console, "findings" if report.warnings else "nothing to warn of")
    for line in report.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), line))


def _heading(console: Console, text: str) -> None:
    console.print()
    console.print(Text(text, style="bold"))


def _bad_rows(bad_rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, rows in by_file(bad_rows).items():
        lines += [row["problem"] for row in rows[:MAX_SHOWN]]
        if len(rows) > MAX_SHOWN:
            lines.append(f"{name}: {len(rows)} bad rows in all")
    return lines


def _table(data_sets: dict[str, DataSet], is_plain: bool) -> Table:
    table = Table(box=None if is_plain else box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for role in data_sets:
        table.add_column(_NAMES[role], justify="right")
    for name, title in _FIGURES.items():
        values = [getattr(found, name) for found in data_sets.values()]
        if any(value is not None for value in values) and (name != "bad_rows" or any(values)):
            table.add_row(title, *map(_number, values))
    for other in ("validation_dataset", "eval_dataset"):
        shared = [found.shared.get(other) for found in data_sets.values()]
        if not any(shared):
            continue
        for name, title in (("rows", "same row"), ("prompts", "same prompt"), ("near_duplicates", "near-duplicate")):
            values = [None if one is None else getattr(one, name) for one in shared]
            if any(value is not None for value in values):
                table.add_row(f"{_NAMES[other]}: {title}", *map(_number, values))
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _how_near(data_sets: dict[str, DataSet]) -> str:
    text = f"near-duplicates: at least {THRESHOLD:g} of the character {SHINGLE_SIZE}-grams in common, by MinHash"
    if any(found.searched == MAX_SEARCHED for found in data_sets.values()):
        text += f"; of more than {MAX_SEARCHED:,} distinct rows a sample of so many is searched"
    return text
