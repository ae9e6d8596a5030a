"""A step of tamis beside one of `SFTTrainer`: time and peak memory on the same rows.

    python benchmarks/speed.py --output_dir runs/speed [--cases ...] [--num_pairs 5] [--quick]

A Llama of 3M random parameters in float32, an epoch of rows of about 128 tokens, all of one length (`uniform`) or most
of them short and a few long (`long-tailed`). `SFTTrainer` trains on the training and validation rows in one file, and
its batch has as many rows as the training and validation rows of a micro-batch of tamis, so that both see the same rows
in the same number of steps. Models, rows, optimizer, attention and collator are the same.

`ratio` is the time of tamis from the first step to the last over that of `SFTTrainer`: the median over pairs, each run
in turn in one process after one of both that is not counted, with the smallest and the largest (`low`, `high`). It is
the processor's time on one thread, so that other work on the machine matters little. Scouting comes before the first
step, responses are generated between steps: neither is in it, see `scout_cost.py` and `refining_cost.py`. The loss of a
row under the base model is computed at its first visit, in the first epoch therefore.
Cases "... against ..." compare tamis with a setting and without it: `sft_s` and `sft_mb` are without. They run only
where `--cases` names them.
`memory_ratio` is that of the most memory that a process takes after the libraries are loaded, each in a process of its
own, where freed blocks of 64 KB or more go back to the system (`MALLOC_MMAP_THRESHOLD_`): what is needed at once.
`heap_ratio` is the same with glibc's defaults, whose heap keeps holes where sizes vary, as between scouting and
training.
"""

import argparse
import os
import random
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from common import finish, make_parser, random_model
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tamis import BilevelConfig, BilevelTrainer

VOCABULARY, NUM_TOKENS, LONGEST = 2048, 128, 480
NUM_TRAINING, BATCH_SIZE = 128, 8
SHARED: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": [], "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1000, "learning_rate": 1e-4, "max_length": 512,
}  # fmt: skip
ONE_SCOUT: dict[str, Any] = {"scout_learning_rate": 1e-5, "scout_epochs": 1}  # it is not what is measured


@dataclass(frozen=True)
class Case:
    """What is compared with plain SFT, or with itself.

    Attributes:
        settings: of tamis.
        num_validation: rows of each micro-batch.
        is_long_tailed: the lengths of the rows.
        added: settings whose effect is measured: tamis with them is compared with tamis without them.
    """

    settings: dict[str, Any]
    num_validation: int = 1
    is_lora: bool = False
    is_long_tailed: bool = False
    added: dict[str, Any] | None = None


MIRROR = {"selector": "mirror"}
EQUAL = {"selector": "none", "per_device_validation_batch_size": 1}
IN_FOUR = EQUAL | {"per_device_train_batch_size": BATCH_SIZE // 2, "gradient_accumulation_steps": 4}
NO_PADDING, BY_LENGTH = {"padding_free": True}, {"train_sampling_strategy": "batch_rebalance"}
REFINING = ONE_SCOUT | {"refine_fraction": 0.5, "num_generations": 2, "max_new_tokens": NUM_TOKENS // 2}
CASES = {
    "defaults": Case(ONE_SCOUT),
    "defaults, LoRA": Case(ONE_SCOUT, is_lora=True),
    "defaults, long-tailed": Case(ONE_SCOUT, is_long_tailed=True),
    "defaults, long-tailed, LoRA": Case(ONE_SCOUT, is_long_tailed=True, is_lora=True),
    "mirror, reference zero": Case(MIRROR | {"reference": "zero"}, BATCH_SIZE),
    "mirror, reference base": Case(MIRROR | {"reference": "base"}, BATCH_SIZE),
    "mirror, reference base, three epochs": Case(MIRROR | {"reference": "base", "num_train_epochs": 3}, BATCH_SIZE),
    "mirror, reference tracked": Case(MIRROR | {"reference": "tracked"}, BATCH_SIZE),
    "refining": Case(REFINING),
    "refining, LoRA": Case(REFINING, is_lora=True),
    "padding_free against padding, uniform": Case(EQUAL, added=NO_PADDING),
    "padding_free against padding, long-tailed": Case(EQUAL, is_long_tailed=True, added=NO_PADDING),
    "padding_free against padding, long-tailed, LoRA": Case(EQUAL, is_long_tailed=True, is_lora=True, added=NO_PADDING),
    "batch_rebalance against random, long-tailed": Case(IN_FOUR, is_long_tailed=True, added=BY_LENGTH),
    "both against neither, long-tailed": Case(IN_FOUR, is_long_tailed=True, added=NO_PADDING | BY_LENGTH),
}


class Clock(TrainerCallback):
    """The processor's time from the first step to the last."""

    def __init__(self) -> None:
        self.began, self.seconds = 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins; its rows are looked up already, and responses are written."""
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step ends."""
        self.seconds += time.process_time() - self.began


def make_model(folder: Path) -> Path:
    """The model and its tokenizer, one token a word."""
    random_model(
        folder, [*map(str, range(VOCABULARY - 2))], WhitespaceSplit(),
        hidden_size=192, intermediate_size=512, num_hidden_layers=5, num_attention_heads=6,
        max_position_embeddings=1024,
    )  # fmt: skip
    return folder


def make_rows(num_rows: int, is_long_tailed: bool, seed: int) -> Dataset:
    """Prompts and completions of random words, half of a row each."""
    draw = random.Random(seed)

    def words() -> str:
        length = NUM_TOKENS if not is_long_tailed else min(int(draw.lognormvariate(4.2, 0.9)) + 8, LONGEST)
        return " ".join(str(draw.randrange(VOCABULARY - 2)) for _ in range(length // 2))

    return Dataset.from_list([{"prompt": f"{words()} ", "completion": words()} for _ in range(num_rows)])


def make_trainer(case: Case, is_ours: bool, model_dir: Path, folder: str, **settings: Any) -> SFTTrainer:
    """A fresh trainer of one side."""
    train = make_rows(NUM_TRAINING, case.is_long_tailed, seed=0)
    num_validation = NUM_TRAINING * case.num_validation // BATCH_SIZE
    validation = make_rows(num_validation, case.is_long_tailed, seed=1)
    common: dict[str, Any] = {"output_dir": folder, "num_train_epochs": 1} | SHARED | settings
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=["q_proj", "v_proj"]) if case.is_lora else None
    if is_ours or case.added is not None:
        common |= {"per_device_train_batch_size": BATCH_SIZE, "overwrite_output_dir": True} | case.settings
        args = BilevelConfig(**common | ((case.added or {}) if is_ours else {}))
        return BilevelTrainer(
            str(model_dir), args, train_dataset=train, validation_dataset=validation, peft_config=lora
        )
    args = SFTConfig(per_device_train_batch_size=BATCH_SIZE + case.num_validation, **common)
    rows = concatenate_datasets([train, validation])
    return SFTTrainer(str(model_dir), args, train_dataset=rows, peft_config=lora)


def step_seconds(case: Case, model_dir: Path, num_pairs: int) -> dict[str, Any]:
    """Of both sides in turn, in this process."""
    torch.set_num_threads(1)
    found: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for pair in range(num_pairs + 1):
            for is_ours in (True, False) if pair % 2 else (False, True):
                # with another order in each pair: how much of a batch is padding is chance
                clock, trainer = Clock(), make_trainer(case, is_ours, model_dir, folder, seed=pair)
                trainer.add_callback(clock)
                trainer.train()
                found[is_ours].append(clock.seconds / trainer.state.global_step)
    ratios = [ours / plain for ours, plain in zip(found[True][1:], found[False][1:], strict=True)]
    return {
        "tamis_s": median(found[True][1:]),
        "sft_s": median(found[False][1:]),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def memory(case: Case, model_dir: Path, is_ours: bool) -> float:
    """The most that this process takes for an epoch, in MB."""
    torch.set_num_threads(1)
    libraries = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(case, is_ours, model_dir, folder).train()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - libraries) / 1024


def measure(arguments: argparse.Namespace, model_dir: Path) -> None:
    """A row for each case; the results are written after each."""

    def in_its_process(function: Any, *args: Any) -> Any:
        with ProcessPoolExecutor(1, get_context("spawn")) as executor:
            return executor.submit(function, *args).result()

    rows: list[dict[str, Any]] = []
    for name in arguments.cases:
        case = CASES[name]
        found = in_its_process(step_seconds, case, model_dir, arguments.num_pairs)
        ours, plain = (in_its_process(memory, case, model_dir, is_ours) for is_ours in (True, False))
        found |= {"heap_ratio": ours / plain}
        with patch.dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0"):
            ours, plain = (in_its_process(memory, case, model_dir, is_ours) for is_ours in (True, False))
        rows.append({"case": name} | found | {"tamis_mb": ours, "sft_mb": plain, "memory_ratio": ours / plain})
        finish(arguments, rows, {})


def main() -> None:
    parser = make_parser(__doc__, quick="one pair of two cases: shows that it runs", seeds=())
    beside_sft = [name for name, case in CASES.items() if case.added is None]
    parser.add_argument("--cases", nargs="+", default=beside_sft, choices=list(CASES))
    parser.add_argument("--num_pairs", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cases, arguments.num_pairs = arguments.cases[:2], 1
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    model_dir = make_model(arguments.output_dir / "model")
    measure(arguments, model_dir)


if __name__ == "__main__":
    main()
