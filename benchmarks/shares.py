"""Whatever the share of wrong rows: two worlds, from none to nine in ten.

    python benchmarks/shares.py --output_dir runs/shares [--seeds 0 1 2] [--scenarios ...] [--shares 0 0.1] [--quick]

The demo's world of strings in two forms: `half_wrong`, where all wrong answers have one mistake in common, and
`other_operation`, where each operation has its own. Only the share of wrong rows changes; base model, 64 trusted rows
and held-out rows are the same. tamis runs with its defaults, direct mixing has the best rho of a grid, the gap is that
between the better of mixing and trusted rows alone and the oracle. Reported beside it: the shares of right rows and
the AUROC that tamis expects, against the truth, the weight that wrong rows get, and what they would get from a logistic
posterior fitted with the labels to the same scores.
"""

from pathlib import Path
from typing import Any

from common import estimates, finish, make_parser

from tamis.compare.methods import compare_methods
from tamis.compare.table import format_table
from tamis.compare.task import Task
from tamis.demo.run import SETTINGS
from tamis.demo.world import make_world, with_wrong_fraction

SCENARIOS = ("half_wrong", "other_operation")
SHARES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
RHOS = (0.1, 0.3, 0.8)


def run_share(task: Task, folder: Path, common: dict[str, Any]) -> list[dict[str, Any]]:
    """All methods at one share, and the estimates in the row of tamis."""
    rows = compare_methods(task, folder, common, RHOS)
    for row in rows:
        if row["method"] == "tamis":
            row |= estimates(folder, task)
    return rows


def main() -> None:
    parser = make_parser(__doc__, scenarios=SCENARIOS)
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    arguments = parser.parse_args()

    all_rows: list[dict[str, Any]] = []
    aggregates: dict[str, list[float | None]] = {"share_error": [], "auroc_error": []}
    for seed in arguments.seeds:
        for scenario in arguments.scenarios:
            folder = arguments.output_dir / f"{scenario}{seed}"
            world = make_world(
                folder / "world", seed=seed, scenario=scenario, pretrain_steps=20 if arguments.quick else None
            )
            common = SETTINGS | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
            for share in arguments.shares:
                part = folder / f"wrong{share:g}"
                task = with_wrong_fraction(world, part / "task", share, seed)
                rows = run_share(task, part, common)
                print(f"{scenario}, seed {seed}, {share:.0%} wrong\n{format_table(rows)}", flush=True)
                all_rows += [row | {"scenario": scenario, "wrong": share, "seed": seed} for row in rows]
                (tamis,) = [row for row in rows if row["method"] == "tamis"]
                name = f"{scenario}_{share:g}_wrong"
                aggregates.setdefault(f"{name}_gap_closure", []).append(tamis["gap_closure"])
                aggregates.setdefault(f"{name}_accuracy", []).append(tamis["test_accuracy"])
                aggregates["share_error"].append(abs(tamis["estimated_share_right"] - tamis["share_right"]))
                if tamis["expected_auroc"] is not None and tamis["selection_auroc"] is not None:
                    aggregates["auroc_error"].append(abs(tamis["expected_auroc"] - tamis["selection_auroc"]))
    finish(arguments, all_rows, aggregates)


if __name__ == "__main__":
    main()
