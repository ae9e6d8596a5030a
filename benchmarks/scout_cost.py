"""What scouting costs beside training: 20,000 rows, 200 trusted ones, three epochs, defaults.

    python benchmarks/scout_cost.py --output_dir runs/scout_cost [--quick]

The demo's world of strings. Times are those of the processor in this process on one thread, so that other work on the
machine matters little. `cost_ratio` is scouting over training (three epochs, trusted rows in the proportion of the
data), `cost_ratio_plain` over plain SFT of the same rows, which sees no trusted rows.
"""

import time
from typing import Any

import torch
from common import finish, make_parser
from datasets import Dataset

import tamis.scouting
from tamis import BilevelConfig, BilevelTrainer
from tamis.demo.run import SETTINGS
from tamis.demo.world import make_world


def main() -> None:
    arguments = make_parser(__doc__, seeds=()).parse_args()
    torch.set_num_threads(1)
    size = {"num_train": 400, "num_validation": 40, "pretrain_steps": 20} if arguments.quick else {}
    size = {"num_train": 20_000, "num_validation": 200, "num_eval": 10} | size
    task = make_world(arguments.output_dir / "world", **size)
    train, validation = (
        Dataset.from_json(str(path)).select_columns(["prompt", "completion"])
        for path in (task.train_file, task.validation_file)
    )
    settings: dict[str, Any] = {n: v for n, v in SETTINGS.items() if n != "max_steps"} | {"num_train_epochs": 3}
    scouting, send_scout = [], tamis.scouting.send_scout

    def timed(*args: Any, **kwargs: Any) -> Any:
        begin = time.process_time()
        outcome = send_scout(*args, **kwargs)
        scouting.append(time.process_time() - begin)
        return outcome

    tamis.scouting.send_scout = timed  # type: ignore[assignment]
    rows = []
    for name, changes in (("tamis", {}), ("plain SFT", {"selector": "none", "rho": 0.0})):
        args = BilevelConfig(str(arguments.output_dir / name), disable_tqdm=True, **settings, **changes)
        trainer = BilevelTrainer(
            str(task.model_dir), args, train_dataset=train, validation_dataset=None if changes else validation
        )
        begin = time.process_time()
        trainer.train()
        seconds, before = time.process_time() - begin, 0.0 if changes else scouting[0]
        rows.append({"method": name, "scouting_cpu_seconds": before, "training_cpu_seconds": seconds - before})
    of_tamis, of_plain = rows
    ratios = {
        "cost_ratio": [of_tamis["scouting_cpu_seconds"] / of_tamis["training_cpu_seconds"]],
        "cost_ratio_plain": [of_tamis["scouting_cpu_seconds"] / of_plain["training_cpu_seconds"]],
    }
    finish(arguments, rows, ratios)


if __name__ == "__main__":
    main()
