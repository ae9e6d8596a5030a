"""Tables of `benchmarks/suite.py` and `benchmarks/llm.py`, for `docs/tables.py`."""

import textwrap
from typing import Any

import numpy as np
from suite_summary import MIN_GAP, describe, group_cells


def suite_table(results: dict[str, Any]) -> str:
    """One line per cell of `benchmarks/suite.py`: means over the seeds; mixing and trusted rows: the better of both."""
    lines = [
        "| scenario | unjudged | SEAL | **tamis** | oracle | gap closed | right rows | AUROC |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in group_cells(results["rows"]):
        seal = [values for name, values in cell.accuracy.items() if name.startswith("SEAL")]
        best = [cell.unjudged, np.max(seal, axis=0), cell.accuracy["tamis"], cell.accuracy["oracle (right rows)"]]
        cells = [f"{values.mean():.3f}" for values in best]
        cells[2] = f"**{cells[2]}**"
        closures = cell.closures("tamis") if cell.gap >= MIN_GAP else None
        cells.append("" if closures is None else f"{closures.mean():.2f} ± {closures.std(ddof=1):.2f}")
        truth = np.mean([row["share_right"] for row in cell.tamis])
        cells.append(f"{np.mean([row['estimated_share_right'] for row in cell.tamis]):.2f} ({truth:.2f})")
        believed = [row for row in cell.tamis if row["is_believed"] and row["selection_auroc"] is not None]
        pairs = [(row["expected_auroc"], row["selection_auroc"]) for row in believed]
        cells.append(_estimate(pairs) if pairs else "")
        lines.append(f"| {describe(cell.key)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _estimate(pairs: list[tuple[float, float]]) -> str:
    """Means of estimates and, in brackets, of truths."""
    return f"{np.mean([estimate for estimate, _ in pairs]):.2f} ({np.mean([truth for _, truth in pairs]):.2f})"


def suite_rivals_table(results: dict[str, Any]) -> str:
    """One line per method of `benchmarks/suite.py`, over the runs in which all rivals were run."""

    def run_of(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("scenario", "wrong_share", "num_validation", "trusted", "seed"))

    judged = {run_of(row) for row in results["rows"] if row["group"] == "random"}
    rows = [row for row in results["rows"] if run_of(row) in judged]
    cells = [cell for cell in group_cells(rows) if cell.gap >= MIN_GAP]
    closures = {name: [cell.closures(name)[0] for cell in cells] for name in cells[0].accuracy}
    lines = [
        "| method | gap closed, mean | lowest | AUROC, mean |",
        "|---|---|---|---|",
    ]
    for name in sorted(closures, key=lambda name: -np.mean(closures[name])):
        known = [row["selection_auroc"] for row in rows if row["group"] == name and row["selection_auroc"] is not None]
        figures = [f"{np.mean(closures[name]):.2f}", f"{min(closures[name]):.2f}"]
        shown = f"**{name}**" if name == "tamis" else name
        lines.append(f"| {shown} | {' | '.join(figures)} | {f'{np.mean(known):.3f}' if known else ''} |")
    return "\n".join(lines)


def rival_cost_table(results: dict[str, Any]) -> str:
    """One line per method of `benchmarks/rival_cost.py`, the cheapest first."""
    lines = ["| method | forward-equivalents a row | CPU seconds |", "|---|---|---|"]
    for row in sorted(results["rows"], key=lambda row: row["forwards"]):
        name = f"**{row['method']}**" if row["method"] == "tamis" else row["method"]
        lines.append(f"| {name} | {row['forwards']:.1f} | {row['cpu_seconds']:.0f} |")
    return "\n".join(lines)


def llm_scouting_table(results: dict[str, Any]) -> str:
    """One line per data set and seed of `benchmarks/llm.py`: what the scout found, beside truth and simpler scores."""
    lines = [
        "| rows | belief | AUROC of p_right | expected | AUROC of scores | of base loss | of length | right rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if row["method"] == "tamis":
            expected = f"{row['expected_auroc']:.3f}" if row["is_believed"] else ""
            share = f"{row['estimated_share_right']:.2f} ({row['share_right']:.2f})"
            cells = [f"`{row['dataset']}`", f"{row['belief']:.2f}", f"{row['auroc']:.3f}", expected]
            cells += [f"{row[name]:.3f}" for name in ("auroc_of_scores", "auroc_of_base_loss", "auroc_of_length")]
            lines.append(f"| {' | '.join([*cells, share])} |")
    return "\n".join(lines)


def llm_losses_table(results: dict[str, Any]) -> str:
    """One line per data set and seed of `benchmarks/llm.py`: held-out losses, and tamis less the better mixing."""
    lines = [
        "| rows | base model | trusted | mixing | **tamis** | tamis less mixing |",
        "|---|---|---|---|---|---|",
    ]
    for dataset, seed in dict.fromkeys((row["dataset"], row["seed"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["dataset"], row["seed"]) == (dataset, seed)]
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            found[row["group"]] = min(found.get(row["group"], row), row, key=lambda row: row["test_loss"])
        names = ("base model", "trusted rows alone", "direct mixing", "tamis")
        cells = [f"{found[name]['test_loss']:.3f} ± {found[name]['test_loss_error']:.3f}" for name in names]
        cells[-1] = f"**{cells[-1]}**"
        difference = f"{found['tamis']['difference']:+.3f} ± {found['tamis']['difference_error']:.3f}"
        lines.append(f"| `{dataset}` | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def llm_samples(results: dict[str, Any]) -> str:
    """Responses side by side, of the first data set of `benchmarks/llm.py`."""
    first = results["rows"][0]["dataset"]
    parts = []
    for number, sample in enumerate((s for s in results["rows"] if s["dataset"] == first), 1):
        texts = {"Held-out response": sample["answer"], "tamis": sample["tamis"], "Mixing": sample["mixing"]}
        parts.append(f"### {number}\n\n{_quoted(sample['prompt'])}")
        parts += [f"**{name}**\n\n{_quoted(text)}" for name, text in texts.items()]
    return "\n\n".join(parts) + "\n"


def _quoted(text: str) -> str:
    lines = [part for line in text.strip().splitlines() for part in textwrap.wrap(line, 116) or [""]]
    return "\n".join(f"> {line}".rstrip() for line in lines)
