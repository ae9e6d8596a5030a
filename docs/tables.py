"""Write the tables of the documents from committed results: `python docs/tables.py`; nothing in them is typed.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; its results are in `benchmarks/results/NAME.json`.
Where a benchmark has several tables, `NAME.PART` is one of them.
"""

import json
import re
import statistics
import sys
import textwrap
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tamis.compare.table import best_variants

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]

from tables_of_costs import COSTS, as_table  # noqa: E402
from tables_of_recipes import recipes_table  # noqa: E402
from tables_of_suite import SUITE  # noqa: E402

DOCUMENTS = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("results", "theory", "samples", "scaling", "messages")),
)
BOLD = ("tamis", "tamis, refining")
ESTIMATES = {
    "shares_half_wrong": "strings, one common mistake",
    "shares_other_operation": "strings, a mistake for each operation",
    "sigmorphon": "SIGMORPHON German",
    "scouting": "scouting alone: SCAN and CLINC150",
    "hypercleaning": "MNIST",
}


def _groups(rows: list[dict[str, Any]], *names: str) -> list[tuple[tuple[Any, ...], list[dict[str, Any]]]]:
    """The values that rows have under these names, in order of appearance, each with its rows."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.items())


def demo_table(rows: list[dict[str, Any]]) -> str:
    """One line per method of `tamis demo`, of a group of variants the best."""
    num_variants = Counter(row["group"] for row in rows)
    columns = "method | exact match | loss | gap closed | AUROC | seconds"
    lines: list[list[str]] = []
    for row in best_variants(rows):
        found = num_variants[row["group"]]
        name = row["method"] if found == 1 else f"{row['group']} (best of {found})"
        auroc = "" if row["selection_auroc"] is None else f"{row['selection_auroc']:.3f}"
        values = [f"{row['test_accuracy']:.3f}", f"{row['test_loss']:.3f}", f"{row['gap_closure']:.2f}", auroc]
        if row["method"] in BOLD:
            name, values = f"**{name}**", [f"**{value}**" if value else "" for value in values]
        lines.append([name, *values, str(round(row["seconds"]))])
    return as_table(columns, lines)


def shares_table(results: dict[str, Any]) -> str:
    """One line per share of wrong rows of `benchmarks/shares.py`, means over the seeds; of rivals the best variant."""
    columns = "wrong | trusted | mixing | SEAL | **tamis** | oracle | gap closed | right rows | AUROC | weight of wrong"
    lines: list[list[str]] = []
    for (wrong,), rows in sorted(_groups(results["rows"], "wrong")):
        tamis = [row for row in rows if row["method"] == "tamis"]
        best = [_mean_of_best(rows, prefix) for prefix in ("trusted rows", "mixing", "SEAL", "tamis", "oracle")]
        gaps = [row["gap_closure"] for row in tamis if row["gap_closure"] is not None]
        closed = f"{_mean(gaps):.2f} ({', '.join(f'{gap:.2f}' for gap in gaps)})" if gaps else ""
        share = f"{_mean([row['estimated_share_right'] for row in tamis]):.3f}"
        expected = [row["expected_auroc"] for row in tamis if row["expected_auroc"] is not None]
        known = [row["selection_auroc"] for row in tamis if row["selection_auroc"] is not None]
        auroc = f"{f'{_mean(expected):.3f}' if expected else 'none'} ({_mean(known):.3f})" if known else ""
        by_labels = _mean([row["weight_on_wrong_by_labels"] for row in tamis])
        weight = f"{_mean([row['weight_on_wrong'] for row in tamis]):.3f} ({by_labels:.3f})"
        cells = [f"{wrong:.0%}", *(f"{value:.3f}" for value in best), closed, share, auroc, weight]
        cells[4] = f"**{cells[4]}**"
        lines.append(cells)
    return as_table(columns, lines)


def unlike_table(results: dict[str, Any]) -> str:
    """One line per share of wrong rows and method of `benchmarks/unlike.py`, of a group of variants the best."""
    columns = "wrong | method | exact match | loss | gap closed | AUROC"
    lines: list[list[str]] = []
    (seed,) = {row["seed"] for row in results["rows"]}
    for (wrong,), rows in sorted(_groups(results["rows"], "wrong_share")):
        for row in best_variants(rows):
            assert row["seed"] == seed
            auroc = "" if row["selection_auroc"] is None else f"{row['selection_auroc']:.3f}"
            values = [f"{row['test_accuracy']:.3f}", f"{row['test_loss']:.3f}", f"{row['gap_closure']:.2f}", auroc]
            name = f"**{row['method']}**" if row["method"] in BOLD else row["method"]
            lines.append([f"{wrong:.0%}", name, *values])
    return as_table(columns, lines)


def hypercleaning_table(results: dict[str, Any], metric: str, title: str) -> str:
    """One line per method of `benchmarks/hypercleaning.py`, one column per share of redrawn labels, over the seeds."""
    redrawn = sorted({row["redrawn"] for row in results["rows"]})
    columns = " | ".join([title, *(f"{share:.0%}" for share in redrawn)])
    lines: list[list[str]] = []
    for (method,), rows in _groups(results["rows"], "method"):
        cells = []
        for share in redrawn:
            found = [row for row in rows if row["redrawn"] == share]
            values = [row[metric] for row in found if row.get(metric) is not None]
            cells.append(f"{_mean(values):.4f} ± {statistics.stdev(values):.4f}" if values else "")
        if any(cells):
            lines.append([f"**{method}**" if method in BOLD else f"`{method}`", *cells])
    return as_table(columns, lines)


def sigmorphon_table(results: dict[str, Any]) -> str:
    """One line per seed of `benchmarks/sigmorphon.py`; of mixing and SEAL the best variant."""
    columns = "seed | plain | trusted | mixing | SEAL | **tamis** | oracle | gap closed | gap closed, loss | AUROC"
    lines: list[list[str]] = []
    for (seed,), rows in sorted(_groups(results["rows"], "seed")):
        (tamis,) = [row for row in rows if row["method"] == "tamis"]
        shown = ("plain SFT", "trusted rows", "mixing", "SEAL", "tamis", "oracle")
        best = [_mean_of_best(rows, prefix) for prefix in shown]
        cells = [f"{value:.3f}" for value in best] + [f"{tamis[n]:.2f}" for n in ("gap_closure", "gap_closure_loss")]
        cells[4] = f"**{cells[4]}**"
        lines.append([str(seed), *cells, f"{tamis['selection_auroc']:.3f}"])
    return as_table(columns, lines)


def refining_table(results: dict[str, Any]) -> str:
    """One line per scenario and seed of `benchmarks/refining.py`: exact match and loss."""
    columns = "task | seed | trusted | mixing | selection alone | with refining | oracle | extra gap closed, loss"
    lines: list[list[str]] = []
    for (scenario, seed), rows in _groups(results["rows"], "scenario", "seed"):
        found = {row["group"]: row for row in best_variants(rows)}
        offline, online = found["tamis"], found["tamis, refining"]
        names = ("trusted rows alone", "direct mixing", "tamis", "tamis, refining", "oracle (right rows)")
        cells = [f"{found[name]['test_accuracy']:.3f} / {found[name]['test_loss']:.3f}" for name in names]
        extra = [online[n] - offline[n] for n in ("gap_closure", "gap_closure_loss")]
        lines.append([f"`{scenario}`", str(seed), *cells, f"{extra[0]:.2f}, {extra[1]:.2f}"])
    return as_table(columns, lines)


def ablations_table(results: dict[str, Any]) -> str:
    """One line per variant of `benchmarks/refining_ablations.py`, means over the seeds."""
    columns = "group | variant | exact match | loss | right at the last refresh"
    lines: list[list[str]] = []
    for (group, variant), rows in _groups(results["rows"], "group", "variant"):
        match = [row["test_accuracy"] for row in rows]
        right = [row["right_at_last_refresh"] for row in rows if row["right_at_last_refresh"] is not None]
        cells = [f"{_mean(match):.3f} ({', '.join(f'{value:.3f}' for value in match)})"]
        cells += [f"{_mean([row['test_loss'] for row in rows]):.3f}", f"{_mean(right):.0%}" if right else ""]
        lines.append([f"`{group}`", variant, *cells])
    return as_table(columns, lines)


def scouting_table(results: dict[str, Any]) -> str:
    """One line per base model of `benchmarks/scouting.py`; one value per seed."""
    columns = "task | pretraining steps | AUROC | believed | kept rows | wrong among them"
    lines: list[list[str]] = []
    for (scenario, steps), rows in _groups(results["rows"], "scenario", "pretrain_steps"):
        cells = [
            ", ".join(f"{row['selection_auroc']:.3f}" for row in rows),
            f"{sum(row['is_believed'] for row in rows)} of {len(rows)}",
            *(", ".join(f"{row[name]:.0%}" for row in rows) for name in ("share_kept", "wrong_among_kept")),
        ]
        lines.append([scenario, f"{steps:,}", *cells])
    return as_table(columns, lines)


def llm_scouting_table(results: dict[str, Any]) -> str:
    """One line per data set and seed of `benchmarks/llm.py`: what the scout found, beside truth and simpler scores."""
    columns = "rows | belief | AUROC of p_right | expected | AUROC of scores | of base loss | of length | right rows"
    lines: list[list[str]] = []
    for row in results["rows"]:
        if row["method"] == "tamis":
            expected = f"{row['expected_auroc']:.3f}" if row["is_believed"] else ""
            share = f"{row['estimated_share_right']:.2f} ({row['share_right']:.2f})"
            cells = [f"`{row['dataset']}`", f"{row['belief']:.2f}", f"{row['auroc']:.3f}", expected]
            cells += [f"{row[name]:.3f}" for name in ("auroc_of_scores", "auroc_of_base_loss", "auroc_of_length")]
            lines.append([*cells, share])
    return as_table(columns, lines)


def llm_losses_table(results: dict[str, Any]) -> str:
    """One line per data set and seed of `benchmarks/llm.py`: held-out losses, and tamis less the better mixing."""
    columns = "rows | base model | trusted | mixing | **tamis** | tamis less mixing"
    lines: list[list[str]] = []
    for (dataset, _), rows in _groups(results["rows"], "dataset", "seed"):
        found: dict[str, dict[str, Any]] = {}
        for row in rows:
            found[row["group"]] = min(found.get(row["group"], row), row, key=lambda row: row["test_loss"])
        names = ("base model", "trusted rows alone", "direct mixing", "tamis")
        cells = [f"{found[name]['test_loss']:.3f} ± {found[name]['test_loss_error']:.3f}" for name in names]
        cells[-1] = f"**{cells[-1]}**"
        difference = f"{found['tamis']['difference']:+.3f} ± {found['tamis']['difference_error']:.3f}"
        lines.append([f"`{dataset}`", *cells, difference])
    return as_table(columns, lines)


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


def deployed_table(results: dict[str, Any]) -> str:
    """One line per scenario of `benchmarks/deployed.py`."""
    lines = [
        [f"`{row['scenario']}`", f"{row['match_of_the_run']:.3f}", f"{row['match_of_the_card']:.3f}"]
        for row in results["rows"]
    ]
    return as_table("rows and model | match that the run prints | match of the card's snippet", lines)


def estimates_table() -> str:
    """Estimates of tamis against the truth, over all runs of each benchmark in `ESTIMATES`."""
    columns = "benchmark | runs | believed | right rows | error | AUROC of believed | error"
    lines: list[list[str]] = []
    shares, aurocs = [], []
    for name, title in ESTIMATES.items():
        rows = [row for row in _read(name)["rows"] if row["method"] == "tamis"]
        believed = [row for row in rows if row["is_believed"] and _known_auroc(row) is not None]
        share = [(row["share_right"], row["estimated_share_right"]) for row in rows]
        auroc = [(_known_auroc(row), row["expected_auroc"]) for row in believed]
        shares += share
        aurocs += auroc
        cells = [title, str(len(rows)), str(len(believed)), *_truth_and_error(share), *_truth_and_error(auroc)]
        lines.append(cells)
    errors = _truth_and_error(shares)[1], _truth_and_error(aurocs)[1]
    lines.append(["**all**", str(len(shares)), str(len(aurocs)), "", f"**{errors[0]}**", "", f"**{errors[1]}**"])
    return as_table(columns, lines)


def _known_auroc(row: dict[str, Any]) -> float | None:
    known: float | None = row["auroc"] if "auroc" in row else row["selection_auroc"]
    return known


def _truth_and_error(pairs: list[tuple[Any, Any]]) -> tuple[str, str]:
    """The range of the truth, and the mean absolute error of the estimates, of pairs of both."""
    truths = [truth for truth, _ in pairs]
    low, high = f"{min(truths):.2f}", f"{max(truths):.2f}"
    return low if low == high else f"{low} to {high}", f"{_mean([abs(a - b) for a, b in pairs]):.3f}"


def theory_solutions_table(results: dict[str, Any]) -> str:
    """One line per method on the separable problem of `benchmarks/theory.py`."""
    columns = "method | weight of useless rows | validation loss | loss of useful rows | model"
    lines: list[list[str]] = []
    for row in _part(results, "solutions"):
        share = "" if row["useless_share"] is None else _small(row["useless_share"])
        model = f"({row['theta_0']:.3f}, {row['theta_1']:.3f})"
        cells = [share, _small(row["validation_loss"]), _small(row["useful_loss"]), model]
        lines.append([row["method"], *cells])
    return as_table(columns, lines)


def theory_not_separable_table(results: dict[str, Any]) -> str:
    """One line per problem and method."""
    columns = "problem | method | model | validation loss"
    lines: list[list[str]] = []
    for row in _part(results, "not_separable"):
        cells = [row["problem"], row["method"], f"{row['theta_0'] + 0.0:.3f}", _small(row["validation_loss"])]
        lines.append(cells)
    return as_table(columns, lines)


def theory_posterior_table(results: dict[str, Any]) -> str:
    """One line per pair of distributions, one column per share of right rows; means over the seeds."""
    rows = _part(results, "posterior")
    shares = sorted({row["share_right"] for row in rows})
    columns = " | ".join(["scores", *(f"{share:.0%}" for share in shares)])
    lines: list[list[str]] = []
    for (problem,), same in _groups(rows, "problem"):
        cells = []
        for share in shares:
            found = [row for row in same if row["share_right"] == share]
            estimate, error = (_mean([row[n] for row in found]) for n in ("estimated_share_right", "posterior_error"))
            cells.append(f"{estimate:.3f} ({error:.3f})")
        lines.append([problem, *cells])
    return as_table(columns, lines)


def theory_weights_table(results: dict[str, Any]) -> str:
    """One line per noise, one column per rule."""
    rows = _part(results, "weights")
    rules = [rule for rule in dict.fromkeys(row["method"] for row in rows) if rule != "best"]
    columns = " | ".join(["mistakes", "noise", *rules])
    lines: list[list[str]] = []
    for (mistakes, noise), same in _groups(rows, "problem", "noise"):
        found = {row["method"]: row["error"] for row in same}
        lines.append([mistakes, f"{noise:g}", *(f"{found[rule]:.2f}" for rule in rules)])
    return as_table(columns, lines)


def _part(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["part"] == name]


def _small(value: float) -> str:
    """Three digits, or zero where float64 cannot tell it from that."""
    return "0" if value < 1e-12 else f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _read(name: str) -> Any:
    """Committed results of a benchmark."""
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean_of_best(rows: list[dict[str, Any]], prefix: str) -> float:
    """Mean over the seeds of the exact match of the best method whose name begins so."""
    best: dict[int, float] = {}
    for row in rows:
        if row["method"].startswith(prefix):
            best[row["seed"]] = max(best.get(row["seed"], 0.0), row["test_accuracy"])
    return _mean(list(best.values()))


def _mean_and_each(values: list[float], digits: int) -> str:
    """The mean, and in brackets the value of each seed."""
    return f"{_mean(values):.{digits}f} ({', '.join(f'{value:.{digits}f}' for value in values)})"


def round_trip_table(results: dict[str, Any]) -> str:
    """One line per task and way of `benchmarks/round_trip.py`: means, and the values of the seeds."""
    lines: list[list[str]] = []
    groups = _groups(results["rows"], "scenario", "method")
    of_tamis = {key[0]: _mean([row["gap_closure"] for row in rows]) for key, rows in groups if key[1] == "tamis"}
    for (scenario, method), rows in groups:
        if not method.startswith(("tamis", "score, select", "small scorer", "oracle")):
            continue
        closures = [row["gap_closure"] for row in rows]
        aurocs = [row["selection_auroc"] for row in rows if row["selection_auroc"] is not None]
        lines.append(
            [
                scenario,
                method,
                _mean_and_each([row["test_accuracy"] for row in rows], 3),
                _mean_and_each(closures, 2),
                f"{_mean(closures) / of_tamis[scenario]:.2f}",
                f"{_mean(aurocs):.3f}" if aurocs else "",
            ]
        )
    return as_table("task | way | exact match (by seed) | gap closed | share of tamis's | AUROC", lines)


def fill(text: str) -> str:
    """The document with its tables made anew."""

    def table(match: re.Match[str]) -> str:
        name = match.group(1)
        makers = {
            "unlike": unlike_table,
            "hypercleaning.accuracy": partial(hypercleaning_table, metric="accuracy_best", title="best accuracy"),
            "hypercleaning.f1": partial(hypercleaning_table, metric="f1", title="F1"),
            "refining_ablations": ablations_table,
            "demo": demo_table,
            "sigmorphon": sigmorphon_table,
            "refining": refining_table,
            "scouting": scouting_table,
            "deployed": deployed_table,
            **SUITE,
            "round_trip": round_trip_table,
            **COSTS,
            "llm.scouting": llm_scouting_table,
            "llm.losses": llm_losses_table,
            "llm_samples": llm_samples,
            "recipes": recipes_table,
            "theory.solutions": theory_solutions_table,
            "theory.not_separable": theory_not_separable_table,
            "theory.posterior": theory_posterior_table,
            "theory.weights": theory_weights_table,
        }
        lines = estimates_table() if name == "estimates" else makers.get(name, shares_table)(_read(name.split(".")[0]))
        return f"<!-- table: {name} -->\n{lines}\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w.]+) -->.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text(encoding="utf-8")), encoding="utf-8")
