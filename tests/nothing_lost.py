"""Real runs of `tamis train`, `score` and `compare` that die, killed or by a write that fails; and what they leave.

Processes are forked from one that has imported everything: each is a run of the command, and starts in no time. Before
libc each has loaded `failing_writes.c`, which records the writes below the output directory and can end the process
half way through one. `benchmarks/kills.py` does this hundreds of times, `test_nothing_lost.py` a few times.
"""

import ctypes
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from conftest import read_jsonl, save_talkative_model, two_kinds, write_jsonl
from safetensors.torch import load_file

IMPORTED = (
    "nothing_lost", "tamis.cli", "tamis.run", "tamis.summary", "tamis.train_parser", "tamis.terminal", "tamis.trainer",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "trl.trainer.sft_trainer",
    "peft", "accelerate", "torch.distributed.tensor", "tamis.curation.select", "tamis.report.page",
)  # fmt: skip
SIGKILL = -1  # in place of an errno
ERRORS = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
RESUME = ("--resume_from_checkpoint", "last")
# What the clock says, and the loss that `transformers` takes the mean of since the process began.
_OF_THE_CLOCK = re.compile("runtime|preparation_time|per_second|seconds|^train_loss$|^total_flos$")
_TEMPORARY = re.compile(r"\.(.+)\.\w{8}\.tmp$|\.tmp\w{6}$")

# Lines of the log, evaluations and checkpoints at steps that do not go together.
OPTIONS = (
    "--per_device_train_batch_size", "4", "--use_cpu", "--bf16", "false", "--report_to", "none",
    "--learning_rate", "1e-2", "--max_steps", "8", "--logging_steps", "3", "--eval_strategy", "steps",
    "--eval_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2",
    "--scout_learning_rate", "1e-2", "--scout_epochs", "8",
)  # fmt: skip
SCENARIOS: dict[str, tuple[str, ...]] = {
    "offline": (),
    "LoRA with dropout": ("--use_peft", "--lora_dropout", "0.3", "--lora_target_modules", "q_proj", "v_proj"),
    "refining": (
        "--refine_fraction", "0.5", "--refine_start", "0.2", "--refine_every", "2", "--num_generations", "2",
        "--max_new_tokens", "4",
    ),
}  # fmt: skip
# Commands that are not resumed: the same one again ends what is left to do.
OTHER_COMMANDS: dict[str, tuple[str, ...]] = {
    "score": (),
    "compare": ("--methods", "trusted_alone", "less", "tamis", "--seeds", "0", "--metric", "eval_loss"),
}


# --- processes --------------------------------------------------------------------------------------------------------


@contextmanager
def forks(folder: Path) -> Iterator[Any]:
    """What makes processes of the command; `folder` gets the library that watches their writes."""
    library = folder / "failing_writes.so"
    source = Path(__file__).with_name("failing_writes.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    before = dict(os.environ)
    os.environ |= {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(IMPORTED))
        first = context.Process(target=int)
        first.start()
        first.join()
    finally:
        os.environ.clear()
        os.environ.update(before)
    yield context


@dataclass(frozen=True)
class Death:
    """How a process is to die.

    Attributes:
        at: the number of a write, from 1.
        of: count only writes with this in their path.
        how: an errno with which it fails; `SIGKILL` kills half way through it.
        after_s: kill only so many seconds after this write, from outside; None: at the write itself.
    """

    at: int = 0
    how: int = 0
    after_s: float | None = None
    of: str = ""


NEVER = Death()


def _live(arguments: list[str], watched: str, said: str, record: str, death: Death) -> None:
    """The process: `tamis` with these arguments, its output in a file."""
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    how = death.how if death.after_s is None else 0
    ctypes.CDLL(None).watch_writes(watched.encode(), record.encode(), death.of.encode(), death.at, how)
    from tamis.cli import main

    sys.exit(main(arguments))


@dataclass(frozen=True)
class Write:
    """One that was recorded: ``mkdir``, ``open``, ``write``, ``rename``, or ``remove`` of a file of a checkpoint.

    Attributes:
        at_s: seconds of the machine's clock.
        path: in the output directory.
    """

    at_s: float
    kind: str
    path: str

    @property
    def name(self) -> str:
        """The path without what differs: a temporary file as what it becomes, a checkpoint without its step."""
        folder, _, name = re.sub(r"^checkpoint-\d+", "checkpoint", self.path).rpartition("/")
        if temporary := _TEMPORARY.search(name):
            name = temporary[1] or "*.safetensors"
        return f"{folder}/{name}" if folder else name


@dataclass(frozen=True)
class Life:
    """What became of a process: its exit code, what it said, what it wrote."""

    exit_code: int
    said: str
    writes: list[Write]

    @property
    def last_words(self) -> str:
        """The line of the command, or whatever else it ended with."""
        lines = self.said.splitlines()
        return next((line for line in lines if line.startswith("tamis ")), lines[-1] if lines else "")


def live(context: Any, arguments: list[str], watched: Path, death: Death = NEVER) -> Life:
    """One process of `tamis` with these arguments; of its writes those below the folder ``watched`` count."""
    said, record = (watched.with_name(f"{watched.name}.{kind}") for kind in ("said", "writes"))
    record.unlink(missing_ok=True)
    process = context.Process(target=_live, args=(arguments, str(watched), str(said), str(record), death))
    process.start()
    if death.after_s is not None:
        while process.is_alive() and len(_recorded(record)) < death.at:
            time.sleep(0.001)
        process.join(death.after_s)
        process.kill()
    process.join()
    writes = [Write(float(at), kind, path) for at, kind, path in map(str.split, _recorded(record))]
    return Life(process.exitcode, said.read_text(encoding="utf-8") if said.exists() else "", writes)


class Runs:
    """Runs of one scenario in a folder of their own, all with the same rows and the same model."""

    def __init__(self, context: Any, folder: Path, *options: str, command: str = "train"):
        self.context, self.folder, self.command = context, folder, command
        right, wrong, trusted = two_kinds("xy")
        files = {"train_dataset": [*right, *wrong], "validation_dataset": trusted, "eval_dataset": right[:3]}
        folder.mkdir(parents=True)
        self.options = ["--model_name_or_path", save_talkative_model(folder / "model"), *OPTIONS, *options]
        for name, rows in files.items():
            self.options += [f"--{name}", write_jsonl(folder / f"{name}.jsonl", rows)]

    def live(self, name: str, *extra: str, death: Death = NEVER) -> Life:
        """One process that works on the run of this name."""
        run = self.folder / name
        return live(self.context, [self.command, *self.options, "--output_dir", str(run), *extra], run, death)

    def resume(self, name: str, death: Death = NEVER) -> Life:
        """One more process, started as a user would: to go on, or, where the run had not begun, anew."""
        has_begun = any((self.folder / name / file).exists() for file in ("config.yaml", "metrics.jsonl"))
        return self.live(name, *(RESUME if has_begun and self.command == "train" else ()), death=death)

    @cached_property
    def whole(self) -> Life:
        """The undisturbed run, in the folder `whole`."""
        life = self.live("whole")
        assert life.exit_code == 0, life.said
        return life

    def differences(self, name: str) -> list[str]:
        """In what a run that has ended is not the undisturbed one."""
        assert self.whole
        first, second = (_contents(self.folder / run) for run in ("whole", name))
        found = [f"{file}: only in {'whole' if file in first else name}" for file in first.keys() ^ second.keys()]
        return found + [f"{file}: differs" for file in first.keys() & second.keys() if first[file] != second[file]]

    def forget(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)


def _recorded(record: Path) -> list[str]:
    text = record.read_text(encoding="utf-8") if record.exists() else ""
    return text.splitlines()[: text.count("\n")]


# --- deaths -----------------------------------------------------------------------------------------------------------


def at_any_moment(writes: list[Write], dice: random.Random) -> Death:
    """A kill at any time between the first of these writes and the last."""
    moment = dice.uniform(writes[0].at_s, writes[-1].at_s)
    at = sum(write.at_s <= moment for write in writes)
    return Death(at, SIGKILL, moment - writes[at - 1].at_s)


def while_scouting(writes: list[Write], dice: random.Random) -> Death:
    """A kill between the configuration of a run and what its scout has found, or while that is written."""
    first = next(i for i, write in enumerate(writes) if write.kind == "rename")
    last = next(i for i, write in enumerate(writes) if write.name == "weights.parquet")
    death = at_any_moment(writes[first:last], dice)
    return replace(death, at=death.at + first)


def within_a_write(writes: list[Write], dice: random.Random, of: str = "") -> Death:
    """A kill half way through a write of a file with ``of`` in its path."""
    number = sum(of in write.path for write in writes)
    return Death(dice.randint(1, number), SIGKILL, of=of)


def while_checkpoints_are_removed(writes: list[Write], dice: random.Random) -> Death:
    """A kill at one of the files of an old checkpoint, some of which are gone by then."""
    return Death(dice.choice([at for at, write in enumerate(writes, 1) if write.kind == "remove"]), SIGKILL)


AIMS: dict[str, Callable[[list[Write], random.Random], Death]] = {
    "at any moment": at_any_moment,
    "while scouting": while_scouting,
    "within a write of a checkpoint": partial(within_a_write, of="checkpoint-"),
    "within a write of the weights": partial(within_a_write, of="weights.parquet"),
    "within any write": within_a_write,
    "while checkpoints are removed": while_checkpoints_are_removed,
}


# --- writes that fail -------------------------------------------------------------------------------------------------


def write_sites(writes: list[Write]) -> Iterator[tuple[str, int]]:
    """Each kind of write of each file once, with the errors that it may have: the name of one, the write's number."""
    sites: dict[tuple[str, str], int] = {}
    for at, write in enumerate(writes, 1):
        if write.kind != "remove":
            sites.setdefault((write.kind, write.name), at)
    for (kind, _), at in sites.items():
        for error in ERRORS:
            if (kind, error) != ("write", "EACCES"):  # permissions are asked for when a file is opened
                yield error, at


# --- what a run has left ----------------------------------------------------------------------------------------------


def _contents(run: Path) -> dict[str, Any]:
    """Every file of a run, in a form in which it can be compared; what depends on the clock is left out."""
    return {str(path.relative_to(run)): _content(path) for path in sorted(run.rglob("*")) if path.is_file()}


def _content(path: Path) -> Any:
    if path.name == "metrics.jsonl":
        return [_without_clock(line) for line in read_jsonl(path)]
    if path.name == "trainer_state.json":
        state = json.loads(path.read_text(encoding="utf-8"))
        state["log_history"] = [_without_clock(line) for line in state["log_history"]]
        return {name: value for name, value in state.items() if name not in ("total_flos", "stateful_callbacks")}
    if path.suffix == ".parquet":
        return str(pq.read_table(path).to_pydict())  # as text: NaN is not NaN
    if path.suffix == ".safetensors":
        tensors = load_file(path)  # of a checkpoint: also what the next line of the log will say of the clock
        return {name: t.numpy().tobytes() for name, t in tensors.items() if not _OF_THE_CLOCK.search(name)}
    if path.suffix in (".pt", ".pth"):
        return str(_plain(torch.load(path, weights_only=False)))
    if path.suffix == ".json":
        return _without_clock(json.loads(path.read_text(encoding="utf-8")))
    if path.name == "training_args.bin" or path.suffix in (".md", ".yaml", ".html"):
        return None  # they name the folder and the day
    return path.read_bytes()


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: _plain(entry) for name, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value


def _without_clock(value: Any) -> Any:
    """What is left of JSON if all that depends on the clock or names the folder is taken out."""
    if isinstance(value, list):
        return [_without_clock(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    kept = {name for name in value if not _OF_THE_CLOCK.search(name) and name != "output_dir"}
    return {name: _without_clock(value[name]) for name in kept}
