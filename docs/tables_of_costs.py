"""Tables of time, memory and size, and of runs that die, for `docs/tables.py`."""

import textwrap
from collections.abc import Callable
from typing import Any

Results = dict[str, Any]


def as_table(columns: str, lines: list[list[str]]) -> str:
    """A table, of the names of its columns, as Markdown divides them, and the cells of each line."""
    head = f"| {columns} |\n{'|---' * (columns.count(' | ') + 1)}|\n"
    return head + "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def ten_million_table(results: Results) -> str:
    """One line per command and kind of file of `benchmarks/ten_million.py`."""
    lines = [
        [
            f"`tamis {row['command']}`",
            f"`{row['file']}`",
            *_size(row["num_rows"], row["seconds"], row["own_gb"]),
            f"{row['peak_gb'] * 1e9 / 2**30:.2f}",
        ]
        for row in results["rows"]
    ]
    return as_table("command | file | rows | seconds | memory of its own, GiB | with pages of files, GiB", lines)


def check_speed_table(results: Results) -> str:
    """One line per kind of rows of `benchmarks/check_speed.py`."""
    lines = [[f"`{row['rows']}`", *_size(row["num_rows"], row["total_s"], row["peak_gb"])] for row in results["rows"]]
    return as_table("rows | number | seconds | peak memory, GiB", lines)


def report_size_table(results: Results) -> str:
    """One line of `benchmarks/report_size.py`."""
    lines = [
        [f"{row['num_rows']:,}", f"{row['page_mb']:.1f}", f"{row['write_s']:.1f}", f"{row['view_s']:.1f}"]
        for row in results["rows"]
    ]
    return as_table("rows | page, MB | seconds to write | seconds to view", lines)


def newcomer_table(results: Results) -> str:
    """The steps of `benchmarks/newcomer.py`."""
    return as_table("step | seconds", [[f"`{row['step']}`", f"{row['seconds']:.0f}"] for row in results["rows"]])


def selector_scale_table(results: Results) -> str:
    """One line per number of rows of `benchmarks/selector_scale.py`."""
    lines = [
        [
            f"{row['num_rows']:,}",
            f"{row['update_us']:.0f}",
            f"{row['bytes_per_row']:.1f}",
            f"{row['mean_error']:.0e}",
            f"{row['settle_s']:.2f}",
            f"{row['visits_s']:.2f}",
        ]
        for row in results["rows"]
    ]
    columns = "rows | update, µs | bytes a row | error of the mean weight | scout's weights, s | visits of an epoch, s"
    return as_table(columns, lines)


def speed_table(results: Results) -> str:
    """One line per case of `benchmarks/speed.py`."""
    lines = [
        [
            row["case"],
            f"{1000 * row['tamis_s']:.0f}",
            f"{1000 * row['sft_s']:.0f}",
            _ratio(row),
            f"{row['memory_ratio']:.2f} ({row['heap_ratio']:.2f})",
        ]
        for row in results["rows"]
    ]
    return as_table("case | ms a step | beside it | ratio | memory, ratio (with glibc's heap)", lines)


def _ratio(row: dict[str, Any]) -> str:
    """The median over pairs, the smallest and the largest."""
    return f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def ranks_table(results: Results) -> str:
    """One line per engine and number of ranks of `benchmarks/ranks.py`."""
    lines = [
        [
            str(row["num_ranks"]),
            row["engine"],
            f"{row['step_ms']:.0f}",
            f"{row['sft_ms']:.0f}",
            _ratio(row),
            f"{row['scout_s']:.1f}",
            f"{row['refresh_s']:.1f}",
        ]
        for row in results["rows"]
    ]
    return as_table("ranks | engine | ms a step | `SFTTrainer` | ratio | scouting, s | a refresh, s", lines)


def long_run_table(results: Results) -> str:
    """One line per tenth of `benchmarks/long_run.py`."""
    lines = [
        [f"{row['step']:,}", f"{row['memory_mb']:.0f}", str(row["num_files"]), f"{row['step_ms']:.1f}"]
        for row in results["rows"]
    ]
    return as_table("step | memory, MB | open files | ms a step", lines)


def rival_cost_table(results: Results) -> str:
    """One line per method of `benchmarks/rival_cost.py`."""
    lines = [[row["method"], f"{row['forwards']:.1f}", f"{row['cpu_seconds']:.0f}"] for row in results["rows"]]
    return as_table("method | forward-equivalents a row | CPU seconds", lines)


def kills_table(results: Results) -> str:
    """One line per run and moment of `benchmarks/kills.py`, and their sum."""
    stories = [row for row in results["rows"] if row["kind"] == "kills"]
    keys = dict.fromkeys((row["scenario"], row["aim"]) for row in stories)
    lines = [[*key, *_deaths([row for row in stories if (row["scenario"], row["aim"]) == key])] for key in keys]
    lines.append(["**all**", "", *(f"**{cell}**" for cell in _deaths(stories))])
    return as_table("run | killed | runs | kills | runs that differ", lines)


def _deaths(rows: list[dict[str, Any]]) -> list[str]:
    return [str(len(rows)), str(sum(len(row["after"]) for row in rows)), _differing(rows)]


def failures_table(results: Results) -> str:
    """One line per command and error of `benchmarks/kills.py`, and their sum."""
    failures = [row for row in results["rows"] if row["kind"] == "failure"]
    keys = dict.fromkeys((row["command"], row["error"]) for row in failures)
    lines = []
    for command, error in keys:
        found = [row for row in failures if (row["command"], row["error"]) == (command, error)]
        lines.append([f"`tamis {command}`", f"`{error}`", *_failures(found)])
    lines.append(["**all**", "", *(f"**{cell}**" for cell in _failures(failures))])
    return as_table("command | error | writes that failed | clear messages | runs that differ in the end", lines)


def _failures(rows: list[dict[str, Any]]) -> list[str]:
    return [str(len(rows)), str(sum(row["is_clear"] for row in rows)), _differing(rows)]


def _differing(rows: list[dict[str, Any]]) -> str:
    return str(sum(bool(row["differences"]) for row in rows))


def scout_cost_table(results: Results) -> str:
    """Scouting beside training, of `benchmarks/scout_cost.py`."""
    of_tamis, of_plain = results["rows"]
    scouting = of_tamis["scouting_cpu_seconds"]
    lines = []
    for name, row in (("`tamis train`", of_tamis), ("plain SFT", of_plain)):
        training = row["training_cpu_seconds"]
        lines.append([name, f"{scouting:.0f}", f"{training:.0f}", f"{scouting / training:.2f}"])
    return as_table("beside | scouting, s | training, s | ratio", lines)


def bad_inputs_list(results: Results) -> str:
    """Each input of `benchmarks/bad_inputs.py` and what it is answered, by where it stands."""
    parts = []
    for kind in dict.fromkeys(row["kind"] for row in results["rows"]):
        found = [row for row in results["rows"] if row["kind"] == kind]
        pairs = (f"{_shown(row['input'], '')}\n{_shown(row['message'], '    ')}" for row in found)
        parts.append(f"## In {kind}\n\n```text\n" + "\n".join(pairs) + "\n```")
    return "\n\n".join(parts)


def _shown(text: str, indent: str) -> str:
    """Lines that fit a page, of what is cut where it is long."""
    text = text.removeprefix("tamis train: ").replace("\t", "\\t").rstrip("\n") or "(nothing)"
    lines = (text if len(text) <= 400 else f"{text[:399]}…").splitlines()
    return "\n".join(
        textwrap.fill(line, 116, initial_indent=indent, subsequent_indent=indent or "  ", break_on_hyphens=False)
        for line in lines
    )


def _size(num_rows: int, seconds: float, peak_gb: float) -> list[str]:
    return [f"{num_rows:,}", f"{seconds:.0f}", f"{peak_gb * 1e9 / 2**30:.2f}"]


COSTS: dict[str, Callable[[Results], str]] = {
    "ten_million": ten_million_table,
    "check_speed": check_speed_table,
    "report_size": report_size_table,
    "newcomer": newcomer_table,
    "selector_scale": selector_scale_table,
    "speed": speed_table,
    "ranks": ranks_table,
    "long_run": long_run_table,
    "rival_cost": rival_cost_table,
    "scout_cost": scout_cost_table,
    "bad_inputs": bad_inputs_list,
    "kills.killed": kills_table,
    "kills.failures": failures_table,
}
