"""Score, select and plain SFT, beside tamis in the loop; and a small model that scores for a large one.

    python benchmarks/round_trip.py --output_dir runs/round_trip [--seeds 0 1 2] [--scenarios demo sigmorphon] [--quick]

Two tasks: the demo's world, and German inflection (`benchmarks/sigmorphon.py`). Rows are scored (`tamis score`) by the
base model or by a small one: half as wide, about a quarter of the parameters, pretrained on the same rows for as many
steps or (`trained longer`, the demo alone) for four times as many. The scores are used in one of two ways:

- `select`: `tamis select` with its defaults, and then plain SFT (selector `none`, rho 0) on the kept rows and the
  validation rows in one file. `as many epochs`: with fewer steps, in proportion to these rows.
- `weights`: `tamis train --scores`. By the base model's own scores that is `tamis`.

`selection_auroc` and `share_right` are those of the scoring. All other runs make the same number of steps.
`gap_closure` is on exact match, as in all benchmarks.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import sigmorphon
from common import finish, make_parser, skip_without_data
from trl import ModelConfig

from tamis.compare.methods import compare_methods
from tamis.compare.runs import STATIC, Method, run_method
from tamis.compare.table import add_gap_closures
from tamis.compare.task import Task, is_right
from tamis.config import BilevelConfig
from tamis.curation.select import SelectArguments, select
from tamis.demo.language import make_language_world
from tamis.demo.run import LANGUAGE_SETTINGS
from tamis.metrics import auroc
from tamis.run import DataArguments, score

WIDTH = 96
# By name: suffix of the folder, width of the model, and how often as many steps it was pretrained.
SCORERS = {
    "score": ("", WIDTH, 1),
    "small scorer": ("_small", WIDTH // 2, 1),
    "small scorer, trained longer": ("_small_long", WIDTH // 2, 4),
}
ALL, WITHOUT_THE_LONGEST = tuple(SCORERS), tuple(SCORERS)[:-1]
OF_TRAINING = ("max_steps", "eval_strategy", "eval_steps", "save_strategy")


@dataclass(frozen=True)
class Setup:
    """One of the tasks.

    Attributes:
        make: its files and base model, from the folder, the seed, the width of the model and its steps of pretraining.
        pretrain_steps: of the model that is trained.
        settings: of all runs.
        rhos: of direct mixing.
        scorers: of `SCORERS`.
    """

    make: Callable[..., Task]
    pretrain_steps: int
    settings: dict[str, Any]
    rhos: tuple[float, ...]
    scorers: tuple[str, ...]


def setups(is_quick: bool) -> dict[str, Setup]:
    language_settings = LANGUAGE_SETTINGS | {"max_steps": 600}
    german_steps = sigmorphon.PRETRAIN_STEPS
    return {
        "demo": Setup(make_language_world, 20 if is_quick else 600, language_settings, (0.1, 0.3, 0.8), ALL),
        "sigmorphon": Setup(
            sigmorphon.make_task,
            20 if is_quick else german_steps,
            sigmorphon.SETTINGS,
            sigmorphon.RHOS,
            WITHOUT_THE_LONGEST,
        ),
    }


def score_and_train(
    name: str, scorer: Task, task: Task, folder: Path, common: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Score the rows by the model of one task, and train that of another on the kept rows, and by the weights."""
    scores, clean = folder / "scores" / scorer.model_dir.parent.name, folder / "clean" / scorer.model_dir.parent.name
    if not (scores / "weights.parquet").is_file():
        data = DataArguments([str(scorer.train_file)], validation_dataset=str(scorer.validation_file))
        settings = {key: value for key, value in common.items() if key not in OF_TRAINING}
        args = BilevelConfig(str(scores), **settings)
        score(data, args, ModelConfig(model_name_or_path=str(scorer.model_dir)))
    select(SelectArguments(str(scores), str(clean), overwrite_output_dir=True))
    rows = (clean / task.train_file.name).read_text("utf-8") + task.validation_file.read_text("utf-8")
    file = clean / "with_validation.jsonl"
    file.write_text(rows, "utf-8")
    plain = STATIC | {"rho": 0.0}
    ways = [Method(f"{name}, select", file, plain)]
    if scorer is task:
        num_rows = sum(path.read_text("utf-8").count("\n") for path in (task.train_file, task.validation_file))
        steps = max(round(common["max_steps"] * rows.count("\n") / num_rows), 1)
        ways.append(Method(f"{name}, select, as many epochs", file, plain | {"max_steps": steps}))
    else:
        ways.append(Method(f"{name}, weights", task.train_file, {"scores": str(scores)}))
    p_right = pq.read_table(scores / "weights.parquet", columns=["p_right"])["p_right"].to_numpy()
    found = json.loads((scores / "scout.json").read_text("utf-8"))
    of_scoring = {name: found[name] for name in ("share_right", "is_believed")}
    of_scoring["selection_auroc"] = auroc(np.nan_to_num(p_right, nan=0.5), is_right(task))
    for way in ways:
        yield run_method(way, task, folder, common) | of_scoring


def aggregate(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """One value per seed of tamis and of all ways."""
    values = dict[str, list[float | None]]()
    for row in rows:
        if row["method"] == "tamis" or row["method"].startswith(tuple(SCORERS)):
            for figure in ("test_accuracy", "gap_closure"):
                values.setdefault(f"{figure} {row['scenario']}: {row['method']}", []).append(row[figure])
    return values


def main() -> None:
    parser = make_parser(__doc__, scenarios=("demo", "sigmorphon"))
    arguments = parser.parse_args()
    all_rows: list[dict[str, Any]] = []
    for scenario in arguments.scenarios:
        setup = setups(arguments.quick)[scenario]
        if scenario == "sigmorphon":
            skip_without_data("sigmorphon2017")
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{scenario}{seed}"
            tasks = {
                suffix: setup.make(
                    folder / f"task{suffix}", seed=seed, hidden_size=width, pretrain_steps=setup.pretrain_steps * times
                )
                for suffix, width, times in (SCORERS[name] for name in setup.scorers)
            }
            task = tasks[""]
            common = setup.settings | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
            rows = compare_methods(task, folder, common, setup.rhos, seal_rates=())  # without SEAL
            oracle = rows.pop()
            for name in setup.scorers:
                rows += score_and_train(name, tasks[SCORERS[name][0]], task, folder, common)
            rows.append(oracle)
            add_gap_closures(rows)
            all_rows += [{"scenario": scenario, "seed": seed} | row for row in rows]
            finish(arguments, all_rows, aggregate(all_rows))  # after each: a run that is stopped has a table


if __name__ == "__main__":
    main()
