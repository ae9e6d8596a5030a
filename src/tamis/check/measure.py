"""What a run will take: time, memory and disk, from the real model and real rows.

A few optimizer steps are trained and thrown away, with the run's own code; so are a few steps of a scout and a few
rows measured. Times of a step are scaled by its tokens with their padding, which vary from step to step. Nothing is
written.
"""

import math
import resource
import sys
import time
from itertools import islice
from typing import Any

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

from tamis.check.cost import Need, Time, num_events, parameters_of
from tamis.config import BilevelConfig
from tamis.losses import fused_losses, row_losses
from tamis.randomness import permutation
from tamis.selection.scout import Scout, ScoutSettings
from tamis.selection.trials import work_of
from tamis.stream import MicroBatch
from tamis.trainer import BilevelTrainer
from tamis.training_progress import ProgressCallback, use_progress

_LONG_ENOUGH = 4.0  # seconds of a measurement; it ends with the step, or the batch, that is under way
_TOO_LONG = 20.0  # seconds of a first step that is not made again
_MAX_STEPS = 50
_MAX_ROWS = 256
_SAMPLED_STEPS = 500  # of the stream, to know how many tokens a step has


def measure(trainer: BilevelTrainer, args: BilevelConfig, num_steps: int) -> tuple[Time, Need]:
    """Train a few steps, and say how long all will take and how much memory; the trainer is of no use afterwards.

    Args:
        trainer: fresh. Its output directory is not written to.
        args: settings of the run.
        num_steps: optimizer steps of the run.

    Raises:
        RuntimeError, MemoryError: there is too little memory for a step.
    """
    sends_scout = args.sends_scout() and trainer.weighting.scouting.is_possible
    scout = trainer.weighting.scouting.scout if sends_scout else None
    step_seconds = seconds_per_step(trainer, num_steps)
    _longest_step(trainer)
    trainer.optimizer.state.clear()  # in a run, scouting comes before there are states
    seconds_per_token = _seconds_per_token(trainer)
    scouting = 0.0 if scout is None else _scouting_seconds(trainer, scout, seconds_per_token)
    evaluation = _evaluated_tokens(trainer, args, num_steps) * seconds_per_token
    kept = parameters_of(trainer.model).num_trained_bytes if scout is not None and scout.keep else 0
    return Time(step_seconds, step_seconds * num_steps, scouting, evaluation), _memory(trainer, kept)


def seconds_per_step(trainer: BilevelTrainer, num_steps: int) -> float:
    """Of an optimizer step on average, by a few of them; the trainer is of no use afterwards."""
    return _train(trainer, num_steps) * _tokens_per_step(trainer)


def _train(trainer: BilevelTrainer, num_steps: int) -> float:
    """Train a few steps without scouting, refining and files; returns the seconds of a token."""
    weighting, timer = trainer.weighting, _Timer(trainer)
    trainer.recorder = weighting.recorder = weighting.refiner = None
    weighting.scouting.recorder = weighting.scouting.scout = None
    use_progress(trainer, ProgressCallback("measuring"))
    trainer.add_callback(timer)
    trainer.args.max_steps = min(num_steps, _MAX_STEPS)
    trainer.args.eval_strategy = trainer.args.save_strategy = "no"
    trainer.args.eval_on_start = trainer.args.load_best_model_at_end = False
    trainer.train()
    return timer.seconds_per_token()


class _Timer(TrainerCallback):
    """Times optimizer steps, and ends the training when it knows enough. The first step counts only if it is alone."""

    def __init__(self, trainer: BilevelTrainer):
        self._trainer = trainer
        self._collate = trainer.batches.collate
        trainer.batches.collate = self._count  # type: ignore[method-assign]
        self._started = 0.0
        self._steps: list[tuple[float, int]] = []
        self._num_tokens = 0

    def _count(self, micro_batches: Any) -> list[dict[str, Any]]:
        batches = self._collate(micro_batches)
        self._num_tokens = sum(batch["input_ids"].numel() for batch in batches)
        return batches

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The batches of the step are made."""
        self._started = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has made its step."""
        self._steps.append((_now() - self._started, self._num_tokens))
        (first, _), *others = self._steps
        if first > _TOO_LONG or sum(seconds for seconds, _ in others) > _LONG_ENOUGH:
            control.should_training_stop = True

    def seconds_per_token(self) -> float:
        """Of a training step, forward and backward; the tokens of padding are counted too."""
        steps = self._steps[1:] or self._steps
        return sum(seconds for seconds, _ in steps) / max(sum(num_tokens for _, num_tokens in steps), 1)


def _now() -> float:
    """Seconds, once the device has done what it was asked to."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _tokens_per_step(trainer: BilevelTrainer) -> float:
    """Tokens of an optimizer step on average, as the stream will make them up, with padding."""
    length_of = {
        role: dict(zip(dataset["example_id"][:], _lengths(dataset, trainer.args).tolist(), strict=True))
        for role, dataset in (("training", trainer.train_dataset), ("validation", trainer.validation_dataset))
        if dataset is not None
    }
    accumulation, total, num = trainer.args.gradient_accumulation_steps, 0, 0
    for batch in islice(iter(trainer.get_train_dataloader()), _SAMPLED_STEPS):
        lengths = [length_of["training"][i] for i in batch.training_ids]
        lengths += [length_of["validation"][i] for i in batch.validation_ids]
        total, num = total + max(lengths) * len(lengths), num + 1
    return total / num * accumulation


def _lengths(dataset: Any, args: BilevelConfig) -> Any:
    """Tokens of each prepared row, as it was cut."""
    num_tokens = np.asarray(dataset["num_tokens"][:])
    return num_tokens if args.max_length is None else num_tokens.clip(max=args.max_length)


def _longest_step(trainer: BilevelTrainer) -> None:
    """Forward and backward over the longest rows: what takes most memory, while the optimizer holds its states."""
    validation = trainer.validation_dataset if trainer.args.trains_on_validation else None

    def longest(dataset: Any, number: int) -> list[int]:
        order = np.argsort(-_lengths(dataset, trainer.args), kind="stable")[:number]
        return [dataset[int(place)]["example_id"] for place in order]

    ids = longest(trainer.train_dataset, trainer.args.per_device_train_batch_size)
    num_validation = math.ceil(trainer.resolved.validation_rows_per_step / trainer.args.micro_batches_per_step)
    others = [] if validation is None else longest(validation, num_validation)
    (batch,) = trainer.batches.collate([MicroBatch(ids, others)])
    batch.pop("rows")
    model = trainer.model_wrapped
    model.train()
    with trainer.accelerator.autocast():
        loss = fused_losses(model, batch).mean()
    trainer.accelerator.backward(loss)
    model.zero_grad(set_to_none=True)


def _seconds_per_token(trainer: BilevelTrainer) -> float:
    """Of a forward pass without gradients, on training rows as they come."""
    size = 2 * trainer.args.per_device_train_batch_size
    order = permutation(len(trainer.train_dataset), trainer.args.seed, epoch=0, level=0)[:_MAX_ROWS]
    seconds, num_tokens = 0.0, 0
    for places in order.split(size):
        rows = trainer.train_dataset.select(places.tolist())
        started = _now()
        row_losses(
            trainer.model, rows, trainer.batches.collate_rows, trainer.accelerator, batch_size=len(rows), title=""
        )
        seconds, num_tokens = seconds + _now() - started, num_tokens + int(_lengths(rows, trainer.args).sum())
        if seconds > _LONG_ENOUGH:
            break
    return seconds / max(num_tokens, 1)


def _scouting_seconds(trainer: BilevelTrainer, scout: Scout, seconds_per_token: float) -> float:
    """At most, see `work_of`; ``seconds_per_token`` are of a forward pass."""
    settings = trainer.weighting.scouting.settings()
    training, validation = (
        _lengths(rows, trainer.args) for rows in (trainer.train_dataset, trainer.validation_dataset)
    )
    work = work_of(settings, len(training), len(validation))
    num_tokens = work.num_training_rows * training.mean() + work.num_validation_rows * validation.mean()
    return work.num_steps * _scout_step_seconds(trainer, scout, settings) + float(num_tokens) * seconds_per_token


def _scout_step_seconds(trainer: BilevelTrainer, scout: Scout, settings: ScoutSettings) -> float:
    assert trainer.batches.validation is not None, "checked by the settings"
    ids_V, marks = trainer.batches.validation.ids, range(1, _MAX_STEPS + 1)
    started = _now()
    with scout.descent(trainer.model_wrapped, ids_V, settings, settings.learning_rates[0], marks, "") as steps:
        num_done = next(num_done for num_done in steps if num_done == _MAX_STEPS or _now() - started > _LONG_ENOUGH)
        return float((_now() - started) / num_done)


def _evaluated_tokens(trainer: BilevelTrainer, args: BilevelConfig, num_steps: int) -> int:
    """Tokens of held-out rows that the run measures, each as often as it does: before, after and in between."""
    held_out = trainer.eval_dataset
    if held_out is None:
        return 0
    num_times = 2 + num_events(args.eval_strategy, args.eval_steps, num_steps, args.num_train_epochs)
    return num_times * int(_lengths(held_out, args).sum())


def _memory(trainer: BilevelTrainer, kept: int) -> Need:
    """The most that was in use so far, and on the CPU the parameters of the scout that a run with refining keeps."""
    device = trainer.accelerator.device
    if device.type == "cuda":
        return Need(torch.cuda.max_memory_reserved(device), *available_memory(device))
    unit = 1 if sys.platform == "darwin" else 1024  # of getrusage
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return Need(own + kept, *available_memory(device))


def available_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that a run may take, what this process holds included, and the name of what has them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), "GPU"
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss, "CPU"
