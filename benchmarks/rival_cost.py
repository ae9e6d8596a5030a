"""What judging the rows costs, of tamis and of its rivals: 20,000 rows, 200 trusted ones, the demo's world of strings.

    python benchmarks/rival_cost.py --output_dir runs/rival_cost [--quick]

In forward-equivalents a training row: a forward pass over all training rows is 1, forward and backward 3, so that three
epochs of SFT are 9. And in seconds of the processor in this process, on one thread. Training on the judged rows is not
part of it, except where the judging is the training: SEAL's first stage. BDS judges in the training itself.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import finish, make_parser
from trl import ModelConfig

from tamis.compare.cost import counted
from tamis.compare.rivals import RIVALS
from tamis.compare.seal import ONE_STAGE, SEAL, SealTrainer
from tamis.compare.task import Task
from tamis.config import BilevelConfig
from tamis.demo.run import SETTINGS
from tamis.demo.world import make_world
from tamis.run import DataArguments, make_trainer
from tamis.trainer import BilevelTrainer

Judge = Callable[[BilevelTrainer], Any]


def cost_of(
    judge: Judge, task: Task, folder: Path, settings: dict[str, Any], kind: type[BilevelTrainer] = BilevelTrainer
) -> dict[str, float]:
    """Forward-equivalents a training row, and seconds, of what ``judge`` does with a trainer of these settings."""
    data = DataArguments([str(task.train_file)], str(task.validation_file))
    args = BilevelConfig(str(folder), **settings, overwrite_output_dir=True, eval_strategy="no", disable_tqdm=True)
    trainer = make_trainer(data, args, ModelConfig(model_name_or_path=str(task.model_dir)), trainer_class=kind)
    begin = time.process_time()
    with counted(trainer) as cost:
        judge(trainer)
    return {"forwards": cost.forwards, "cpu_seconds": time.process_time() - begin}


def main() -> None:
    arguments = make_parser(__doc__, seeds=()).parse_args()
    torch.set_num_threads(1)
    size = {"num_train": 400, "num_validation": 40, "pretrain_steps": 20} if arguments.quick else {}
    task = make_world(
        arguments.output_dir / "world", **{"num_train": 20_000, "num_validation": 200, "num_eval": 10} | size
    )
    training = {name: value for name, value in SETTINGS.items() if name != "max_steps"} | {"num_train_epochs": 3}

    def run(name: str, judge: Judge, settings: dict[str, Any], **more: Any) -> dict[str, Any]:
        row = {"method": name} | cost_of(judge, task, arguments.output_dir / name.replace(" ", "_"), settings, **more)
        print(row, flush=True)
        return row

    static = training | {"selector": "none"}
    one_step = SETTINGS | {"max_steps": 1}  # the scout judges before it
    rows = [run("tamis", lambda trainer: trainer.train(), one_step)]
    rows += [run(name, rival.score, static) for name, rival in RIVALS.items()]
    rows.append(run(SEAL, lambda trainer: trainer.train(), training | ONE_STAGE, kind=SealTrainer))
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
