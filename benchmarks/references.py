"""Which reference for the excess loss: `zero`, `base` or `tracked`, on three scenarios.

    python benchmarks/references.py --output_dir runs/references [--seeds 0 1 2] [--scenarios ...] [--quick]

Scenarios: the demo's world, the same with answers of unlike entropy, and SIGMORPHON German (left out where its data
are not at hand; its task is made as in `sigmorphon.py`). Reported: AUROC of the weights, accuracy and loss on held-out
rows, and `useful_weight`: the weight that the right rows of the worse-off family have, relative to equal weights of all
right rows. Below 0.5 a family has lost more than half of its useful weight; it is the trap of the reference `zero`.
"""

import json

import numpy as np
from common import DATA, finish, make_parser
from sigmorphon import PRETRAIN_STEPS, make_task
from sigmorphon import SETTINGS as SIGMORPHON_SETTINGS

from tamis.compare.runs import Method, run_method
from tamis.compare.task import Task, learned_weights
from tamis.demo.run import SETTINGS as DEMO_SETTINGS
from tamis.demo.world import make_world

SCENARIOS = ("half_wrong", "unlike_entropy", "sigmorphon")
REFERENCES = ("zero", "base", "tracked")


def useful_weight(weights: np.ndarray, is_right: np.ndarray, task: Task) -> float:
    """Weight of the right rows of the worse-off family, relative to its share among the right rows."""
    with open(task.train_file, encoding="utf-8") as file:
        family = np.array([json.loads(line).get("family", "all") for line in file])
    shares = []
    for name in set(family):
        mine = is_right & (family == name)
        shares.append((weights[mine].sum() / weights[is_right].sum()) / (mine.sum() / is_right.sum()))
    return float(min(shares))


def main() -> None:
    arguments = make_parser(__doc__, scenarios=SCENARIOS).parse_args()
    rows = []
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed{seed}"
        pretraining = {"pretrain_steps": 20} if arguments.quick else {}
        scenarios = {
            name: (make_world(folder / name, seed=seed, scenario=name, **pretraining), DEMO_SETTINGS, 0.5)
            for name in arguments.scenarios
            if name != "sigmorphon"
        }
        if "sigmorphon" in arguments.scenarios and (DATA / "sigmorphon2017").is_dir():
            task = make_task(folder / "sigmorphon", seed, 20 if arguments.quick else PRETRAIN_STEPS)
            scenarios["sigmorphon"] = (task, SIGMORPHON_SETTINGS, 0.1)
        for scenario, (task, settings, rho) in scenarios.items():
            for reference in REFERENCES:
                common = settings | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
                method = Method(f"{scenario} {reference}", task.train_file, {"reference": reference, "rho": rho})
                row = run_method(method, task, folder, common)
                weights, is_right = learned_weights(folder, method.name, task)
                useful = useful_weight(weights, is_right, task)
                rows.append(
                    {"scenario": scenario, "reference": reference, "seed": seed, **row, "useful_weight": useful}
                )
    aggregates = {}
    for scenario in dict.fromkeys(row["scenario"] for row in rows):
        for reference in REFERENCES:
            mine = [row for row in rows if (row["scenario"], row["reference"]) == (scenario, reference)]
            for figure in ("selection_auroc", "test_accuracy", "test_loss", "useful_weight"):
                aggregates[f"{scenario}_{reference}_{figure}"] = [row[figure] for row in mine]
    finish(arguments, rows, aggregates)


if __name__ == "__main__":
    main()
