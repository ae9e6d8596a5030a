"""`tamis demo`: a small world on disk, and tamis beside its alternatives on it, by the code path of `tamis train`.

What comes out, in the output directory: `world/` (base model, rows, labels), `runs/NAME/` (a run directory each),
`comparison.json` (one object per method) and `comparison.png` (learning curves; weights of right and wrong rows; right
responses among those that refining has generated).
A run that is there already, with the same settings, is not made again.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tamis.compare.methods import compare_methods
from tamis.compare.pictures import draw_comparison
from tamis.compare.table import format_table
from tamis.demo.world import SCENARIOS, make_world
from tamis.files import write_atomically

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
# Half of the rows are wrong; a response has five letters.
REFINING_SETTINGS: dict[str, Any] = {"refine_fraction": 0.5, "max_new_tokens": 8, "generation_batch_size": 250}


@dataclass
class DemoArguments:
    """Settings of the demo.

    Attributes:
        output_dir: where everything goes.
        seed: of the world and of all runs.
        max_steps: training steps of every method.
        scenario: see `tamis.demo.world.make_world`.
    """

    output_dir: str = field(default="demo", metadata={"help": "Folder for world, runs, table and picture."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of all runs."})
    max_steps: int = field(default=600, metadata={"help": "Training steps of every method."})
    scenario: str = field(default="half_wrong", metadata={"help": f"The world: {', '.join(SCENARIOS)}."})


def run_demo(arguments: DemoArguments) -> list[dict[str, Any]]:
    """Make the world, run all methods, write table and picture, print the table; returns its rows."""
    output_dir = Path(arguments.output_dir)
    task = make_world(output_dir / "world", seed=arguments.seed, scenario=arguments.scenario)
    common = SETTINGS | {
        "max_steps": arguments.max_steps,
        "seed": arguments.seed,
        "eval_strategy": "steps",
        "eval_steps": max(arguments.max_steps // 6, 1),
        "logging_steps": max(arguments.max_steps // 12, 1),
    }
    rows = compare_methods(task, output_dir, common, MIXING_RHOS, REFINING_SETTINGS)
    text = json.dumps(rows, indent=1)
    write_atomically(output_dir / "comparison.json", lambda path: path.write_text(text))
    draw_comparison(rows, task, output_dir)
    print(format_table(rows))
    print(f"\n{output_dir}/comparison.json  {output_dir}/comparison.png  {output_dir}/runs/tamis/weights.parquet")
    return rows
