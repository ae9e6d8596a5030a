"""What each setting of online refining does, on the demo's world with kinds of questions that have bad answers only.

    python benchmarks/refining_ablations.py --output_dir runs/refining_ablations [--seeds 0 1 2] [--quick]

One setting at a time is moved away from those of `refining.py`: the fraction R of questions, the number G of answers,
the temperature tau and level of the response weights, `lowest` against `random`, `bmo` against `uniform`, and when
answers are drawn. Reported: accuracy and loss on held-out rows, and the share of right answers at the last refresh.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from common import finish, make_parser
from refining import REFINING_SETTINGS

from tamis.compare.runs import Method, run_method
from tamis.compare.task import right_responses
from tamis.demo.run import SETTINGS
from tamis.demo.world import make_world
from tamis.files import write_atomically

DEFAULT = "default"
# group -> name of the variant -> what it changes
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "R": {f"{value:g}": {"refine_fraction": value} for value in (0.25, 0.5, 0.9)},
    "G": {str(value): {"num_generations": value} for value in (1, 2, 8)},
    "tau": {f"{value:g}": {"response_temperature": value} for value in (0.5, 0.15, 0.05)},
    "ratio": {
        "sequence, tau 0.5": {"ratio_level": "sequence", "response_temperature": 0.5},
        "uniform": {"response_weighting": "uniform"},
        "uniform, drawn at 0.5": {"response_weighting": "uniform", "generation_temperature": 0.5},
    },
    "when": {
        "every 1/8": {"refine_every": 0.125},
        "every 1/2": {"refine_every": 0.5},
        "from 1/4 on": {"refine_start": 0.25},
    },
    "which": {"random, R 0.7": {"refine_policy": "random", "refine_fraction": 0.7}},  # about the wrong rows' share
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy of every variant, group by group, the default as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = defaultdict(list)
    for row in rows:
        found[row["group"], row["variant"]].append(row["test_accuracy"])
    groups = [group for group in dict.fromkeys(group for group, _ in found) if group != DEFAULT]
    figure, panels = plt.subplots(1, len(groups), figsize=(3 * len(groups), 3.6), layout="constrained", sharey=True)
    for axes, group in zip(panels, groups, strict=True):
        names = [variant for g, variant in found if g == group]
        means = [np.mean(found[group, name]) for name in names]
        axes.bar(names, means, color="tab:blue", alpha=0.7)
        for i, name in enumerate(names):
            axes.plot([i] * len(found[group, name]), found[group, name], "k.")
        axes.axhline(np.mean(found[DEFAULT, DEFAULT]), color="tab:green", label="default")
        axes.axhline(np.mean(found[DEFAULT, "no refining"]), color="tab:red", label="no refining")
        axes.set(title=group)
        axes.tick_params(axis="x", labelrotation=35 if group in ("ratio", "when") else 0)
    panels[0].set(ylabel="exact match on held-out rows", ylim=(0, 1.02))
    panels[0].legend(fontsize=8)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    plt.close(figure)


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    base = REFINING_SETTINGS["bad_kinds"]
    variants = [(DEFAULT, DEFAULT, base), (DEFAULT, "no refining", {})]
    variants += [(group, name, base | change) for group, found in VARIANTS.items() for name, change in found.items()]
    rows, aggregates = [], defaultdict(list)
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed{seed}"
        pretrain_steps = 20 if arguments.quick else None
        task = make_world(folder / "task", seed=seed, scenario="bad_kinds", pretrain_steps=pretrain_steps)
        common = SETTINGS | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
        for group, variant, settings in variants:
            method = Method(f"{group} {variant}", task.train_file, settings)
            row = run_method(method, task, folder, common)
            last = (right_responses(folder, method.name, task) or [{}])[-1] if settings else {}
            rows.append(
                {
                    "group": group,
                    "variant": variant,
                    "seed": seed,
                    "test_accuracy": row["test_accuracy"],
                    "test_loss": row["test_loss"],
                    "right_at_last_refresh": last.get("share"),
                    "seconds": row["seconds"],
                }
            )
            aggregates[f"{group}_{variant}_accuracy"].append(row["test_accuracy"])
    draw(rows, arguments.output_dir / "ablations.png")
    finish(arguments, rows, dict(aggregates))


if __name__ == "__main__":
    main()
