"""Scouting alone: is it ever inverted (SCAN), and what is among the rows that it keeps (CLINC150)?

    python benchmarks/scouting.py --output_dir runs/scouting [--seeds 0 1 2] [--num_validation 64] [--quick]

Both failed before calibration: a scout of SCAN ranked wrong rows above right ones and no warning was given, and a third
of the rows kept on CLINC were wrong. Base models are pretrained for 60, 300 and 1,000 steps, so that some know next to
nothing of the task. Nothing is trained but the scouts. An inverted scout is one that is believed although the AUROC of
its weights is below one half.
"""

from typing import Any

from common import DATA, estimates, finish, make_parser
from tasks import clinc, scan
from tasks.pool import make_task

from tamis.compare.runs import Method, run_method

SCENARIOS = {"scan": scan, "clinc": clinc}
WRONG_SHARES = {"scan": 0.5, "clinc": 0.39}
PRETRAIN_STEPS = (60, 300, 1000)


def aggregate(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Over all runs of a scenario: how often the scout was inverted or not believed; over seeds: what was kept."""
    aggregates: dict[str, list[float | None]] = {}
    for row in rows:
        inverted = row["is_believed"] and row["selection_auroc"] < 0.5
        aggregates.setdefault(f"{row['scenario']}_inverted", []).append(float(inverted))
        aggregates.setdefault(f"{row['scenario']}_believed", []).append(float(row["is_believed"]))
        name = f"{row['scenario']}_{row['pretrain_steps']}_steps_{row['num_validation']}_trusted"
        for figure in ("selection_auroc", "wrong_among_kept", "share_kept"):
            aggregates.setdefault(f"{name}_{figure}", []).append(row[figure])
    return aggregates


def main() -> None:
    parser = make_parser(__doc__, quick="one base model of 20 steps: shows that it runs", scenarios=tuple(SCENARIOS))
    parser.add_argument("--num_validation", type=int, nargs="+", default=[64], help="sizes of the trusted set")
    arguments = parser.parse_args()
    rows = []
    for scenario in arguments.scenarios:
        if not (DATA / SCENARIOS[scenario].FOLDER).is_dir():
            print(f"{scenario} is left out: its data are not here")
            continue
        for seed in arguments.seeds:
            for pretrain_steps in (20,) if arguments.quick else PRETRAIN_STEPS:
                pool = SCENARIOS[scenario].draw_pool(seed, pretrain_steps=pretrain_steps)
                for num_validation in arguments.num_validation:
                    folder = arguments.output_dir / f"{scenario}{seed}" / f"steps{pretrain_steps}_{num_validation}"
                    wrong_share = WRONG_SHARES[scenario]
                    task = make_task(folder, pool, wrong_share=wrong_share, num_validation=num_validation)
                    settings = pool.settings | {"seed": seed, "max_steps": 1}
                    row = run_method(Method("tamis", task.train_file, {}), task, folder, settings)
                    row = {"scenario": scenario, "seed": seed, "pretrain_steps": pretrain_steps, **row}
                    rows.append(row | {"num_validation": num_validation} | estimates(folder, task))
    finish(arguments, rows, aggregate(rows))


if __name__ == "__main__":
    main()
