"""What more ranks change: scouting, a step and a refresh of tamis on 1, 2 and 4 ranks, a step beside `SFTTrainer`.

    python benchmarks/ranks.py --output_dir runs/ranks [--num_pairs 3] [--quick]

The model and the rows of `speed.py`, all of the model trained, gloo on CPUs; one rank without an engine, more with DDP
and with FSDP2. Every rank has 8 training rows a step and one trusted row, however many ranks there are; scouting and a
refresh have the same 128 rows to do. All figures are the processor's seconds of a rank, the largest over ranks, and
medians over pairs: a machine with fewer cores than ranks makes them wait for each other, which does not count.

- `step_ms`, `sft_ms`, `ratio` (`low`, `high`): a step, and that of `SFTTrainer` on the same rows, engine and ranks.
- `scout_s`: all before the first step: the search for one scout of fixed rate and length, and the scores of all rows.
- `refresh_s`: two responses of 16 tokens to each of half of the rows.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import speed
import torch
from accelerate.state import AcceleratorState
from common import finish, make_parser
from datasets import concatenate_datasets
from trl import SFTConfig, SFTTrainer

from tamis import BilevelConfig, BilevelTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from distributed_runs import FSDP, fsdp_on_cpus

NUM_RANKS = (1, 2, 4)
NUM_TRAINING, NUM_VALIDATION, NUM_STEPS = 128, 16, 12
REFINING = {"refine_fraction": 0.5, "refine_start": 0.5, "refine_every": NUM_STEPS, "num_generations": 2}
OURS: dict[str, Any] = {
    "scout_learning_rate": 1e-4, "scout_epochs": 1, "refine_policy": "random", "max_new_tokens": 16,
    "per_device_validation_batch_size": 1, "overwrite_output_dir": True,
} | REFINING  # fmt: skip


class Clock(speed.Clock):
    """Notes also when the first step began, and the longest time between two steps, in which responses are written."""

    def __init__(self) -> None:
        super().__init__()
        self.started, self.first, self.ended, self.between = time.process_time(), 0.0, 0.0, 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_begin(*args, **kwargs)
        if self.ended:
            self.between = max(self.between, self.began - self.ended)
        else:
            self.first = self.began - self.started

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        super().on_step_end(*args, **kwargs)
        self.ended = time.process_time()


def run(model_dir: str, folder: str, engine: str, is_ours: bool) -> list[float]:
    """Seconds before the first step, of a step, and of a refresh, on this rank."""
    train = speed.make_rows(NUM_TRAINING, False, seed=0)
    validation = speed.make_rows(NUM_VALIDATION, False, seed=1)
    common: dict[str, Any] = speed.SHARED | {"output_dir": folder, "max_steps": NUM_STEPS}
    common |= {"ddp_backend": "gloo"} if engine != "none" else {}
    common |= FSDP if engine == "FSDP2" else {}
    AcceleratorState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # of an earlier run
    trainer: SFTTrainer
    if is_ours:
        args = BilevelConfig(per_device_train_batch_size=speed.BATCH_SIZE, **common, **OURS)
        trainer = BilevelTrainer(model_dir, args, train_dataset=train, validation_dataset=validation)
    else:
        plain = SFTConfig(per_device_train_batch_size=speed.BATCH_SIZE + 1, **common)
        rows = concatenate_datasets([train, validation])
        trainer = SFTTrainer(model_dir, plain, train_dataset=rows)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    return [clock.first, clock.seconds / NUM_STEPS, clock.between]


def measure_here(model_dir: str, folder: Path, engine: str, num_pairs: int) -> None:
    """On one of the ranks: all pairs, the first of which is not counted; its times go to a file in ``folder``."""
    torch.set_num_threads(1)
    AcceleratorState.__init__ = fsdp_on_cpus(AcceleratorState.__init__)  # type: ignore[method-assign]
    pairs = []
    for pair in range(num_pairs + 1):
        sides = (True, False) if pair % 2 else (False, True)
        found = {is_ours: run(model_dir, str(folder / "run"), engine, is_ours) for is_ours in sides}
        pairs.append([found[True], found[False]])
    (folder / f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(pairs[1:]))


def measure(model_dir: Path, engine: str, num_ranks: int, num_pairs: int) -> dict[str, Any]:
    """One row of the table."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *(torchrun if engine != "none" else []), __file__]
        asked = {"model_dir": str(model_dir), "folder": folder, "engine": engine}
        subprocess.run(
            [*command, json.dumps(asked | {"num_pairs": num_pairs})],
            check=True, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        ranks = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    assert len(ranks) == num_ranks
    ours, plain = (
        [[max(rank[pair][side][k] for rank in ranks) for k in range(3)] for pair in range(num_pairs)]
        for side in range(2)
    )
    ratios = [mine[1] / other[1] for mine, other in zip(ours, plain, strict=True)]
    return {
        "engine": engine,
        "num_ranks": num_ranks,
        "step_ms": 1000 * median(step for _, step, _ in ours),
        "sft_ms": 1000 * median(step for _, step, _ in plain),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "scout_s": median(first for first, _, _ in ours),
        "refresh_s": median(between for _, _, between in ours),
    }


def measure_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of the table."""
    model_dir = speed.make_model(arguments.output_dir / "model")
    rows = []
    for num_ranks in NUM_RANKS[:2] if arguments.quick else NUM_RANKS:
        for engine in ("DDP", "FSDP2") if num_ranks > 1 else ("none",):
            rows.append(measure(model_dir, engine, num_ranks, arguments.num_pairs))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = make_parser(__doc__, quick="one pair on one rank and on two: shows that it runs", seeds=())
    parser.add_argument("--num_pairs", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.num_pairs = 1
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    finish(arguments, measure_all(arguments), {})


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].startswith("{"):  # one of the ranks
        asked = json.loads(sys.argv[1])
        measure_here(asked.pop("model_dir"), Path(asked.pop("folder")), **asked)
    else:
        main()
