"""Online refining where selection cannot win: whole kinds of questions whose training answers are all bad.

    python benchmarks/refining.py --output_dir runs/refining [--seeds 0 1 2] [--scenarios ...] [--quick]

Scenarios: `bad_kinds`, the demo's world in which all training answers of three operations are those of another one;
`sigmorphon`, German inflection with wrong forms in all verbs and half of the nouns (left out where its data are not at
hand). Trusted rows cover the bad kinds, the base model has seen right and wrong answers of every kind. And
`half_wrong`, where selection suffices: what refining costs there. The oracle trains on right answers to all questions.
Reported beside `gap_closure`: `extra_gap_closed`, that of refining less that of selection alone, and a picture of the
share of right answers among the generated ones.
"""

from pathlib import Path
from typing import Any

from common import DATA, finish, make_parser
from sigmorphon import PRETRAIN_STEPS, make_task
from sigmorphon import SETTINGS as SIGMORPHON_SETTINGS

from tamis.compare.methods import REFINING, compare_methods
from tamis.compare.table import format_table
from tamis.compare.task import Task, right_responses
from tamis.demo.run import SETTINGS as DEMO_SETTINGS
from tamis.demo.world import make_world
from tamis.files import write_atomically

SCENARIOS = ("bad_kinds", "half_wrong", "sigmorphon")
RHOS = (0.1, 0.3, 0.8)
# The rows that are rather wrong than right; longest answers.
REFINING_SETTINGS = {
    "bad_kinds": {"refine_fraction": "auto", "max_new_tokens": 8, "generation_batch_size": 256},
    "half_wrong": {"refine_fraction": "auto", "max_new_tokens": 8, "generation_batch_size": 256},
    "sigmorphon": {"refine_fraction": "auto", "max_new_tokens": 30, "generation_batch_size": 256},
}


def make(scenario: str, folder: Path, seed: int, is_quick: bool) -> tuple[Task, dict[str, Any]]:
    """Task and common settings of a scenario."""
    if scenario == "sigmorphon":
        task = make_task(folder / "task", seed, 20 if is_quick else PRETRAIN_STEPS, always_wrong="V")
        return task, SIGMORPHON_SETTINGS
    return make_world(folder / "task", seed=seed, scenario=scenario, pretrain_steps=20 if is_quick else None), (
        DEMO_SETTINGS
    )


def draw(shares: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """Right answers among the generated ones at each refresh, and how long answers are; a line per seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(shares), figsize=(5 * len(shares), 7), layout="constrained", squeeze=False)
    for (right, length), (scenario, runs) in zip(panels.T, shares.items(), strict=True):
        for seed, refreshes in enumerate(runs):
            steps = [refresh["step"] for refresh in refreshes]
            for axes, name, style, label in (
                (right, "share", "o--", "all alike"),
                (right, "weighted_share", "s-", "as they are trained on"),
                (length, "length", "o--", "all questions"),
                (length, "length_of_top", "s-", "top 10% by weight"),
            ):
                colour = "tab:grey" if style == "o--" else "tab:green"
                values = [refresh[name] for refresh in refreshes]
                axes.plot(steps, values, style, color=colour, label=label if seed == 0 else None)
        right.set(ylim=(0, 1.02), title=scenario)
        length.set(ylim=(0, 1.1 * max(refresh["length"] for run in runs for refresh in run)), xlabel="training step")
    panels[0][0].set(ylabel="right answers among the generated")
    panels[1][0].set(ylabel="letters of an answer")
    panels[0][0].legend()
    panels[1][0].legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    plt.close(figure)


def main() -> None:
    arguments = make_parser(__doc__, scenarios=SCENARIOS).parse_args()

    all_rows, aggregates, shares = [], {}, {}
    for scenario in arguments.scenarios:
        if scenario == "sigmorphon" and not (DATA / "sigmorphon2017").is_dir():
            print("sigmorphon is left out: its data are not here")
            continue
        figures: dict[str, list[float | None]] = {"gap_closure": [], "offline_gap_closure": [], "extra_gap_closed": []}
        figures["extra_gap_closed_loss"], shares[scenario] = [], []
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{scenario}{seed}"
            task, settings = make(scenario, folder, seed, arguments.quick)
            common = settings | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
            rows = compare_methods(task, folder, common, RHOS, REFINING_SETTINGS[scenario])
            print(f"{scenario}, seed {seed}\n{format_table(rows)}", flush=True)
            by_name = {row["method"]: row for row in rows}
            online, offline = by_name[REFINING], by_name["tamis"]
            figures["gap_closure"].append(online["gap_closure"])
            figures["offline_gap_closure"].append(offline["gap_closure"])
            for name, figure in (("extra_gap_closed", "gap_closure"), ("extra_gap_closed_loss", "gap_closure_loss")):
                both = online[figure], offline[figure]
                figures[name].append(None if None in both else both[0] - both[1])
            shares[scenario].append(right_responses(folder, REFINING, task))
            all_rows += [row | {"scenario": scenario, "seed": seed} for row in rows]
            all_rows[-2]["refreshes"] = shares[scenario][-1]
        aggregates |= {f"{scenario}_{name}": values for name, values in figures.items()}
    bad = [aggregates[f"{name}_extra_gap_closed"] for name in shares if name != "half_wrong"]
    if bad:
        aggregates["extra_gap_closed"] = [value for values in bad for value in values]
    draw(shares, arguments.output_dir / "refining.png")
    finish(arguments, all_rows, aggregates)


if __name__ == "__main__":
    main()
