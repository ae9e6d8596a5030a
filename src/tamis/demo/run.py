"""`tamis demo`: a small world on disk, and tamis beside its alternatives on it, by the code path of `tamis train`.

What comes out, in the output directory: `world/` (base model, rows, labels), `runs/NAME/` (a run directory each),
`comparison.json` (one object per method) and `comparison.png` (learning curves; weights of right and wrong rows; right
responses among those that refining has generated), `report.html` and `clean/` (the page on the run of tamis, and the
rows that it keeps).
A run that is there already, with the same settings, is not made again.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tamis.compare.methods import compare_methods
from tamis.compare.pictures import draw_comparison
from tamis.compare.runs import TAMIS
from tamis.compare.table import format_table
from tamis.compare.task import Task, run_dir
from tamis.curation.select import SelectArguments, select
from tamis.demo.language import make_language_world
from tamis.demo.world import SCENARIOS, make_world
from tamis.files import write_atomically
from tamis.report.page import ReportArguments, report
from tamis.report.run_folder import read_run
from tamis.terminal import LOG_LEVELS

MIXING_RHOS = (0.1, 0.3, 0.5, 0.8)
# What every run on the demo's world shares.
SETTINGS: dict[str, Any] = {
    "max_steps": 600,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 250,
    "save_strategy": "no",
    "max_length": 64,
    "report_to": "none",
    "bf16": False,
    "activation_checkpointing": False,
    "use_cpu": True,
}
LANGUAGE = "language"
REFINING_SETTINGS: dict[str, Any] = {"refine_fraction": "auto", "max_new_tokens": 8, "generation_batch_size": 250}
LANGUAGE_SETTINGS: dict[str, Any] = SETTINGS | {"learning_rate": 8e-4}


@dataclass
class DemoArguments:
    """Settings of the demo.

    Attributes:
        output_dir: where everything goes.
        seed: of the world and of all runs.
        max_steps: training steps of every method.
        log_level: ``debug`` shows what each run says, and the libraries below.
        scenario: ``language``, see `tamis.demo.language`; or one of `tamis.demo.world.make_world`.
    """

    output_dir: str = field(default="demo", metadata={"help": "Folder for world, runs, table and picture."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of all runs."})
    max_steps: int = field(default=600, metadata={"help": "Training steps of every method."})
    log_level: str = field(default="passive", metadata={"help": "debug shows everything.", "choices": LOG_LEVELS})
    scenario: str = field(default=LANGUAGE, metadata={"help": "The world.", "choices": (LANGUAGE, *SCENARIOS)})


def run_demo(arguments: DemoArguments) -> list[dict[str, Any]]:
    """Make the world, run all methods, write table and picture, print the table; returns its rows."""
    output_dir = Path(arguments.output_dir)
    task, settings, refining = _make_task(arguments, output_dir / "world")
    common = settings | {
        "max_steps": arguments.max_steps,
        "seed": arguments.seed,
        "eval_strategy": "steps",
        "eval_steps": max(arguments.max_steps // 6, 1),
        "logging_steps": max(arguments.max_steps // 12, 1),
    }
    rows = compare_methods(task, output_dir, common, MIXING_RHOS, refining)
    text = json.dumps(rows, indent=1)
    write_atomically(output_dir / "comparison.json", lambda path: path.write_text(text))
    draw_comparison(rows, task, output_dir)
    tamis, clean = run_dir(output_dir, TAMIS), output_dir / "clean"
    label = "fault" if arguments.scenario == LANGUAGE else "family"
    page = ReportArguments(str(tamis), output=str(output_dir / "report.html"), label_column=label)
    report(page)
    print(f"{format_table(rows)}\n")
    print(f"{output_dir}/report.html      every row, and why it was kept or dropped: open it in a browser")
    if read_run(str(tamis)).is_believed:  # else all rows are kept
        select(SelectArguments(str(tamis), str(clean), overwrite_output_dir=True))
        print(f"{clean}/{task.train_file.name}  the rows that tamis keeps")
    print(f"{output_dir}/comparison.png   the methods beside each other; their runs are in {output_dir}/runs")
    return rows


def _make_task(arguments: DemoArguments, folder: Path) -> tuple[Task, dict[str, Any], dict[str, Any] | None]:
    """The world, what all runs on it share, and the settings of refining.

    No refining of the language: the base model knows none of its words, and so cannot write right responses.
    """
    if arguments.scenario == LANGUAGE:
        return make_language_world(folder, seed=arguments.seed), LANGUAGE_SETTINGS, None
    return make_world(folder, seed=arguments.seed, scenario=arguments.scenario), SETTINGS, REFINING_SETTINGS
