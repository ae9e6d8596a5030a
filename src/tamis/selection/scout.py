"""Scouting: score every training row before the model is trained on any of them.

A model that has been trained on a row knows it by heart, right or wrong: its loss no longer says whether the row agrees
with the validation rows. So a scout comes first. The model descends the validation loss alone for a moment, each
training row is scored by its loss, and the model goes back to where it began. What the scores mean is measured on
validation rows that a scout has not seen (`tamis.selection.trials`, `tamis.selection.calibration`).

SEAL's first epoch (arXiv 2410.07471) scores in the same way within the run itself. Scores by the loss of an adapted
model less that of the base model go back to Moore and Lewis (2010) and CoLoR-Filter (2406.10670), scores by the loss
of a model of held-out data to RHO-loss (2206.07137). Figures in LOG.md, mathematics in docs/method.md.

Shape suffixes: R rows of a prepared dataset, V validation rows.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tamis.config import MAX_SCOUT_EPOCHS, SCOUT_VISITS, BilevelConfig
from tamis.files import write_atomically
from tamis.losses import Parameters, exchanged, fused_losses, row_losses, trainable_parameters
from tamis.progress import track
from tamis.randomness import EndlessPermutations, seeded
from tamis.ranks import is_sharded, local, local_part_of, trained, whole
from tamis.selection.calibration import Calibration
from tamis.stream import Batches, MicroBatch

logger = logging.getLogger(__name__)

SCOUT_FILE = "scout.safetensors"


@dataclass(frozen=True)
class ScoutSettings:
    """How scouts descend, and which are tried.

    Attributes:
        learning_rates: each is tried.
        num_steps: optimizer steps over all validation rows after which a scout is measured, rising.
        betas, epsilon, max_grad_norm: of AdamW, without weight decay: the steps are few. A ``max_grad_norm`` of 0
            clips nothing.
        batch_size: validation rows of a micro-batch and rank.
        num_micro_batches: micro-batches of an optimizer step.
        seed: all the randomness there is.
    """

    learning_rates: tuple[float, ...]
    num_steps: tuple[int, ...]
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    batch_size: int
    num_micro_batches: int
    seed: int


def scout_lengths(num_validation: int, rows_per_step: int, num_epochs: float | None) -> tuple[int, ...]:
    """The numbers of steps after which scouts are measured.

    Args:
        num_epochs: passes over the validation rows. When None the default (see `tamis.config`), half and a quarter of
            it.
    """
    if num_epochs is not None:
        return (max(round(num_epochs * num_validation / rows_per_step), 1),)
    longest = max(min(SCOUT_VISITS, MAX_SCOUT_EPOCHS * num_validation) // rows_per_step, 1)
    return tuple(sorted({max(longest // part, 1) for part in (4, 2, 1)}))


def settings_of_run(args: BilevelConfig, learning_rates: tuple[float, ...], num_validation: int) -> ScoutSettings:
    """How the scouts of a run descend its validation rows, of which there are so many."""
    batch_size = args.per_device_validation_batch_size or args.per_device_train_batch_size
    num_steps = scout_lengths(num_validation, batch_size * args.micro_batches_per_step, args.scout_epochs)
    return make_settings(args, learning_rates, num_steps, batch_size)


def make_settings(
    args: BilevelConfig, learning_rates: tuple[float, ...], num_steps: tuple[int, ...], batch_size: int
) -> ScoutSettings:
    """How scouts descend the validation rows: by these rates, lengths and rows of a micro-batch, else as the run."""
    return ScoutSettings(
        learning_rates=learning_rates,
        num_steps=num_steps,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        batch_size=batch_size,
        num_micro_batches=args.gradient_accumulation_steps,
        seed=args.seed,
    )


@contextmanager
def put_back(model: nn.Module, before: Parameters | None = None) -> Iterator[None]:
    """On leaving, the trainable parameters are what they were on entering, and no other ones are trainable.

    Args:
        before: their values, where there is a copy already.
    """
    values = before or trainable_parameters(model)
    try:
        yield
    finally:
        own = trained(model)
        assert values.keys() == own.keys(), "a scout changes nothing"
        for name, value in values.items():
            local(own[name]).copy_(value)
            own[name].grad = None


def descend(
    model: nn.Module,
    batches: Batches,
    example_ids_V: Tensor,
    settings: ScoutSettings,
    *,
    learning_rate: float,
    num_steps: Sequence[int],
    title: str,
) -> Iterator[int]:
    """Descend the loss of these validation rows alone, in place; pauses after each of ``num_steps``, which rise.

    Steps are taken in float32 whatever the type of a parameter: a gentle step would be rounded away in bf16.

    Args:
        model: as accelerate prepared it.
        title: of the progress bar; there is none when it is empty.
    """
    accelerator = batches.accelerator
    parameters = list(trained(model).values())
    masters = [p if p.dtype == torch.float32 else p.detach().float() for p in parameters]
    optimizer = torch.optim.AdamW(masters, learning_rate, settings.betas, settings.epsilon, weight_decay=0.0)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")
    order = EndlessPermutations(len(example_ids_V), settings.seed)
    show_progress = bool(title) and accelerator.is_main_process
    for step in track(range(num_steps[-1]), title, num_steps[-1], is_shown=show_progress):
        model.train()
        for is_last, batch in _micro_batches(batches, example_ids_V, order, settings, step):
            share_B = batch.pop("rows").share_B
            with nullcontext() if is_last else accelerator.no_sync(model):
                with accelerator.autocast():
                    nll_B = fused_losses(model, batch)
                # DDP averages over the ranks; the shares sum to one over all of them.
                scaler.scale((share_B.to(nll_B.device) * nll_B).sum() * accelerator.num_processes).backward()
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        scaler.unscale_(optimizer)
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(masters, settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)
        if step + 1 in num_steps:
            yield step + 1


def _micro_batches(
    batches: Batches, example_ids_V: Tensor, order: EndlessPermutations, settings: ScoutSettings, step: int
) -> Iterator[tuple[bool, dict[str, Any]]]:
    """Those of one rank and step, each with whether it is the step's last; all ranks together read the order on."""
    accelerator, size = batches.accelerator, settings.batch_size
    wanted = []
    for k in range(settings.num_micro_batches):
        first = (step * settings.num_micro_batches + k) * accelerator.num_processes + accelerator.process_index
        wanted.append(MicroBatch([], example_ids_V[order.places(first * size, size)].tolist()))
    for k, batch in enumerate(batches.collate(wanted)):
        yield k == len(wanted) - 1, batch


@dataclass(frozen=True)
class Finding:
    """The scout that was chosen, and what its scores mean: ``loss - base_coefficient * loss of the base model``.

    Attributes:
        learning_rate, num_steps: of its descent.
        base_coefficient: lambda, 0 or 1.
        calibration: of its scores.
        expected_auroc: probability that a right training row has a lower score than a wrong one; NaN where no row is
            thought to be wrong.
    """

    learning_rate: float
    num_steps: int
    base_coefficient: float
    calibration: Calibration
    expected_auroc: float

    def to_json(self) -> str:
        """Text from which `from_json` makes it again."""
        return json.dumps(vars(self) | {"calibration": self.calibration.to_dict()})

    @classmethod
    def from_json(cls, text: str) -> "Finding":
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"calibration": Calibration.from_dict(values["calibration"])})


class Scout:
    """The model after a descent of the validation loss alone, called back whenever there are rows to score.

    At most two copies of the trainable parameters (with LoRA the adapter alone) are kept, on the CPU: the scout's, and
    those of the base model. Of a sharded model each rank keeps its shards. Without parameters of its own it measures
    the base model only.

    Args:
        model: as it is before training.
        batches: of its trainer.
        batch_size: rows measured at a time and rank.
        keep: keep both copies, so that rows can be scored after training has begun (see `remember_base`).
        show_progress: bars over descents and measurements.
        notes: file for what its trials measure, see `tamis.selection.trial_notes`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        batch_size: int,
        keep: bool,
        show_progress: bool,
        notes: Path | None = None,
    ):
        self.notes = notes
        self.model, self.batches, self.keep = model, batches, keep
        self.batch_size, self.show_progress = batch_size, show_progress
        self.base_parameters: Parameters = {}
        self.parameters: Parameters = {}
        self.finding: Finding | None = None

    @property
    def accelerator(self) -> Accelerator:
        """Of the trainer."""
        return self.batches.accelerator

    @contextmanager
    def descent(
        self,
        model: nn.Module,
        ids_V: Tensor,
        settings: ScoutSettings,
        rate: float,
        num_steps: Sequence[int],
        title: str,
    ) -> Iterator[Iterator[int]]:
        """Within it the model is a scout in the making (see `descend`); on leaving it is put back.

        Dropout follows from the seed alone, not from the descents before.
        """
        title = title if self.show_progress else ""
        with put_back(self.model, self.base_parameters or None), seeded(settings.seed, self.accelerator.device):
            yield descend(model, self.batches, ids_V, settings, learning_rate=rate, num_steps=num_steps, title=title)

    def remember_base(self) -> None:
        """Keep the model as it is as the base model, where both copies are kept; only the first call does."""
        if self.keep and not self.base_parameters:
            self.base_parameters = trainable_parameters(self.model)

    def present_losses(self, rows: Dataset, title: str = "") -> Tensor:
        """Token-mean losses (R, float32) of prepared rows by the model as it is."""
        title, collate = title if self.show_progress else "", self.batches.collate_rows
        return row_losses(self.model, rows, collate, self.accelerator, batch_size=self.batch_size, title=title)

    def base_losses(self, rows: Dataset, title: str = "") -> Tensor:
        """Those by the base model."""
        if not self.base_parameters:  # the base model is the present one: nothing has been trained yet
            return self.present_losses(rows, title)
        with exchanged(self.model, self.base_parameters):
            return self.present_losses(rows, title)

    def p_right(self, rows: Dataset) -> Tensor:
        """Probability (R, float32) that prepared rows are like the validation rows, after training has begun."""
        assert self.finding and self.parameters, "the scout has been made, or loaded"
        with exchanged(self.model, self.parameters):
            score_R = self.present_losses(rows).double()
        if self.finding.base_coefficient:
            score_R -= self.finding.base_coefficient * self.base_losses(rows).double()
        return torch.from_numpy(self.finding.calibration.p_right(score_R.numpy())).float()

    def save(self, path: Path) -> None:
        """Write the scout's parameters and what its scores mean; the base model is the one that the run starts from.

        Called on all ranks, as each may have shards; the main one gathers them on its CPU and writes.
        """
        assert self.finding
        tensors, is_main = self.parameters, self.accelerator.is_main_process
        if is_sharded(self.model):
            with exchanged(self.model, self.parameters):
                whole_parameters = ((name, whole(parameter)) for name, parameter in trained(self.model).items())
                tensors = {name: value.to("cpu", copy=True) for name, value in whole_parameters if is_main}
        metadata = {"finding": self.finding.to_json()}
        tensors = {name: value.contiguous() for name, value in tensors.items()}
        if is_main:
            write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, path: Path) -> None:
        """Inverse of `save`.

        Raises:
            ValueError: the file is not there, or is that of another model.
        """
        if not path.is_file():
            raise ValueError(f"{path} is missing: without the scout new responses cannot be scored; start the run anew")
        own = trained(self.model)
        with safe_open(path, "pt") as file:
            self.finding = Finding.from_json(file.metadata()["finding"])
            if own.keys() != set(file.keys()):
                raise ValueError(f"{path} belongs to another model: start the run anew")
            self.parameters = {name: local_part_of(file.get_tensor(name), p) for name, p in own.items()}
