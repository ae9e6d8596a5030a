"""`tamis demo`: a small world on disk, and tamis beside its alternatives on it, by the code path of `tamis train`.

What comes out, in the output directory: `world/` (base model, rows, labels), `runs/NAME/` (a run directory each),
`comparison.json` (one object per method) and `comparison.png` (learning curves; weights of right and wrong rows; right
answers among those that refining has generated).
A run that is there already, with the same settings, is not made again.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tamis.compare import REFINING, Task, compare_methods, format_table, learned_weights, right_answers, run_dir
from tamis.recorder import write_atomically
from tamis.synthetic import SCENARIOS, make_world

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


# Half of the rows are wrong; an answer has five letters.
REFINING_SETTINGS: dict[str, Any] = {"refine_fraction": 0.5, "max_new_tokens": 8, "generation_batch_size": 250}


@dataclass
class DemoArguments:
    """Settings of the demo.

    Attributes:
        output_dir: where everything goes.
        seed: of the world and of all runs.
        max_steps: training steps of every method.
        scenario: see `tamis.synthetic.make_world`.
    """

    output_dir: str = field(default="demo", metadata={"help": "Folder for world, runs, table and picture."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of all runs."})
    max_steps: int = field(default=600, metadata={"help": "Training steps of every method."})
    scenario: str = field(default="half_wrong", metadata={"help": f"The world: {', '.join(SCENARIOS)}."})


def draw(rows: list[dict[str, Any]], task: Task, output_dir: Path) -> None:
    """``comparison.png``: learning curves; weights of right and wrong rows; right answers among generated ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, *histograms, shares) = plt.subplots(1, 4, figsize=(19, 4.2), layout="constrained")
    best = max((row for row in rows if row["method"].startswith("mixing")), key=lambda row: row["test_accuracy"])
    for row in rows:
        if row["method"].startswith("mixing") and row is not best:
            continue
        with open(run_dir(output_dir, row["method"]) / "metrics.jsonl", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        points = {r["step"]: r["eval_exact_match"] for r in records if "eval_exact_match" in r}
        width = 2.5 if row["method"].startswith("tamis") else 1.3
        curves.plot(list(points), list(points.values()), label=row["method"], linewidth=width)
    curves.set(xlabel="training step", ylabel="exact match on held-out rows", title="Learning curves")
    curves.legend(fontsize=8)
    for axes, name in zip(histograms, ("softmax (published)", "tamis"), strict=True):
        weights, is_right = learned_weights(output_dir, name, task)
        bins = np.linspace(0, weights.max() * 1.001, 40)
        for label, mask, colour in (("right rows", is_right, "tab:green"), ("wrong rows", ~is_right, "tab:red")):
            axes.hist(weights[mask], bins, alpha=0.6, label=label, color=colour)
        axes.set(xlabel="weight", ylabel="rows", title=f"Weights learned by {name}")
        axes.legend()
    refreshes = right_answers(output_dir, REFINING, task)
    steps = [refresh["step"] for refresh in refreshes]
    shares.plot(steps, [refresh["share"] for refresh in refreshes], "o-", label="all alike")
    shares.plot(steps, [refresh["weighted_share"] for refresh in refreshes], "s-", label="as they are trained on")
    shares.set(xlabel="training step", ylim=(0, 1.02), title="Right answers among the generated")
    shares.legend()
    write_atomically(output_dir / "comparison.png", lambda path: figure.savefig(path, format="png", dpi=110))
    plt.close(figure)


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
    draw(rows, task, output_dir)
    print(format_table(rows))
    print(f"\n{output_dir}/comparison.json  {output_dir}/comparison.png  {output_dir}/runs/tamis/weights.parquet")
    return rows
