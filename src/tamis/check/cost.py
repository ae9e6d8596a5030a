"""What a run needs, as figures: time, memory and disk, and how they are said."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tamis.config import BilevelConfig

_BYTES_PER_ROW = 100  # of weights.parquet, and of the state in a checkpoint


@dataclass(frozen=True)
class Parameters:
    """Of the model.

    Attributes:
        num, num_trained: all of them, and those that are trained.
        num_bytes, num_trained_bytes: what both take.
    """

    num: int
    num_trained: int
    num_bytes: int
    num_trained_bytes: int


def parameters_of(model: torch.nn.Module) -> Parameters:
    """How many parameters there are; they need not be loaded."""
    found = [(p.numel(), p.numel() * p.element_size(), p.requires_grad) for p in model.parameters()]
    return Parameters(
        num=sum(number for number, _, _ in found),
        num_trained=sum(number for number, _, is_trained in found if is_trained),
        num_bytes=sum(size for _, size, _ in found),
        num_trained_bytes=sum(size for _, size, is_trained in found if is_trained),
    )


@dataclass(frozen=True)
class Time:
    """Seconds of a run and of its parts, without loading and saving.

    Attributes:
        step: of one optimizer step, on average.
        training, scouting, evaluation: in total; of scouting the most that it may take.
    """

    step: float
    training: float
    scouting: float
    evaluation: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.training + self.scouting + self.evaluation


@dataclass(frozen=True)
class Need:
    """Bytes that a run needs, and those that there are.

    Attributes:
        device: where.
        is_measured: False where it is a lower bound by arithmetic.
    """

    needed: int
    available: int
    device: str
    is_measured: bool = True

    @property
    def fits(self) -> bool:
        """Whether there are enough."""
        return self.needed <= self.available


@dataclass(frozen=True)
class Cost:
    """What a run needs.

    Attributes:
        time: None where it was not measured.
        leaves_out_generation: whether new responses take more time than is said.
    """

    parameters: Parameters
    num_steps: int
    time: Time | None
    memory: Need
    disk: Need
    leaves_out_generation: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values; times in seconds, sizes in bytes."""
        return {
            "parameters": vars(self.parameters),
            "num_steps": self.num_steps,
            "seconds": None if self.time is None else vars(self.time) | {"total": self.time.total},
            "memory": vars(self.memory) | {"fits": self.memory.fits},
            "disk": vars(self.disk) | {"fits": self.disk.fits},
            "leaves_out_generation": self.leaves_out_generation,
        }

    def lines(self) -> list[tuple[str, str]]:
        """The same for people, as (name, text)."""
        own, found = self.parameters, []
        if self.time is not None:
            parts = {"scouting at most": self.time.scouting, "evaluation": self.time.evaluation}
            parts = {"training": self.time.training} | {name: part for name, part in parts.items() if part}
            listed = ", ".join(f"{name} {duration(seconds)}" for name, seconds in parts.items())
            more = "; new responses take more" if self.leaves_out_generation else ""
            found.append(("time", f"about {duration(self.time.total)}: {listed}{more}"))
            found.append(("steps", f"{self.num_steps:,} of {self.time.step:.3g} s"))
        else:
            found.append(("steps", f"{self.num_steps:,}"))
        at_least = "" if self.memory.is_measured else "at least "
        where = f" on the {self.memory.device}"
        found.append(("memory", f"{at_least}{size(self.memory.needed)} of {size(self.memory.available)}{where}"))
        found.append(("disk", f"{size(self.disk.needed)} of {size(self.disk.available)}"))
        return [*found, ("parameters", f"{own.num:,}, {own.num_trained:,} of them trained")]


def duration(seconds: float) -> str:
    """For people: 42 s, 3 min 20 s, 5 h 10 min."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes > 6000 else f"{minutes / 60:.1f} h"


def size(num_bytes: float) -> str:
    """For people: 42 MB, 3.4 GB."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{math.ceil(num_bytes / 1e6)} MB"


# --- by arithmetic ----------------------------------------------------------------------------------------------------


def num_events(strategy: Any, every: float | None, num_steps: int, num_epochs: float) -> int:
    """How often something is due, as transformers has it: every so many steps or this part of them, or each epoch."""
    name = str(getattr(strategy, "value", strategy))
    if name == "steps" and every:
        return num_steps // (math.ceil(num_steps * every) if every < 1 else int(every))
    return max(math.ceil(num_epochs), 1) if name in ("epoch", "best") else 0


def least_memory(model: torch.nn.Module) -> int:
    """Bytes of parameters, gradients and the two moments of Adam; activations come on top."""
    found = parameters_of(model)
    return found.num_bytes + 3 * found.num_trained_bytes


def disk_need(model: torch.nn.Module, args: BilevelConfig, num_steps: int, num_rows: int) -> Need:
    """What checkpoints, the model and the weights of rows take, and what is free where they go.

    Args:
        num_rows: training rows.
    """
    found, rows = parameters_of(model), _BYTES_PER_ROW * num_rows
    saved = found.num_trained_bytes if hasattr(model, "peft_config") else found.num_bytes
    num_saved = num_events(args.save_strategy, args.save_steps, num_steps, args.num_train_epochs)
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "steps":
        num_saved += num_events("steps", args.save_steps, num_steps - 1, 1) == num_saved  # the last step is saved too
    if args.save_total_limit:
        num_saved = min(num_saved, args.save_total_limit + 1)  # the oldest goes once the newest is there
    state = 0 if args.save_only_model else 2 * found.num_trained_bytes
    needed = saved + rows + num_saved * (saved + state + rows)
    folder = Path(str(args.output_dir)).absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    return Need(needed, shutil.disk_usage(nearest).free, "disk", is_measured=False)
