"""Scouting: score every training row before the model is trained on any of them.

A model that has been trained on a row knows it by heart, right or wrong: its loss no longer says whether the row agrees
with the validation rows. So a scout comes first. The model descends the validation loss alone, gently; each training
row is scored by how far its loss has fallen or risen against the model before; and the model goes back to where it
began. Whether it can be believed is measured on validation rows that it has not seen: right training rows should be
like them, and wrong ones have higher excess losses (`Evidence`).

SEAL's first epoch (arXiv 2410.07471) scores in the same way within the run itself. Scores by the loss of an adapted
model less that of the base model go back to Moore and Lewis (2010) and CoLoR-Filter (2406.10670), scores by the loss
of a model of held-out data to RHO-loss (2206.07137). Figures in LOG.md, mathematics in docs/method.md.

Shape suffixes: R rows of a prepared dataset, V validation rows.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import trange

from tamis.files import write_atomically
from tamis.losses import Parameters, exchanged, fused_losses, row_losses, trainable_parameters
from tamis.randomness import EndlessPermutations, permutation, seeded
from tamis.stream import Batches, MicroBatch

logger = logging.getLogger(__name__)

SCOUT_FILE = "scout.safetensors"
_MAX_SAMPLE = 1000  # training rows that validation rows are compared with: more would not lower the error
_MIN_CHECKED = 4  # validation rows; of fewer, half is too little to learn from and half too little to measure by


@dataclass(frozen=True)
class ScoutSettings:
    """How a scout descends.

    Attributes:
        num_steps: optimizer steps over all validation rows.
        learning_rate, betas, epsilon, max_grad_norm: of AdamW, without weight decay: the steps are few. A
            ``max_grad_norm`` of 0 clips nothing.
        batch_size: validation rows of a micro-batch and rank.
        num_micro_batches: micro-batches of an optimizer step.
        seed: all the randomness there is.
    """

    num_steps: int
    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    max_grad_norm: float
    batch_size: int
    num_micro_batches: int
    seed: int


@dataclass(frozen=True)
class Evidence:
    """How well scouts tell training rows from validation rows that they have not seen.

    Attributes:
        criterion: probability that a training row has a higher excess loss than an unseen validation row. One half
            where the two are alike, or where the scout has learned nothing; NaN where there were too few rows to tell.
        error: its standard error.
    """

    criterion: float
    error: float

    @property
    def is_believed(self) -> bool:
        """Whether the criterion exceeds one half by more than its error, or could not be measured."""
        return math.isnan(self.criterion) or self.criterion - 0.5 > self.error


def compare_excess(unseen_V: Tensor, training_R: Tensor) -> tuple[Tensor, Tensor]:
    """How often each unseen validation row (V) has a lower excess loss than a training row, and the reverse (R).

    Both are float64 and have the criterion of `Evidence` as their mean; ties count half. Their variances over V and R
    give its standard error (DeLong et al. 1988).
    """
    lower_VR = (unseen_V[:, None] < training_R).double() + 0.5 * (unseen_V[:, None] == training_R)
    return lower_VR.mean(dim=1), lower_VR.mean(dim=0)


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
        own = dict(model.named_parameters())
        assert values.keys() == {name for name, p in own.items() if p.requires_grad}, "a scout changes nothing"
        for name, value in values.items():
            own[name].data.copy_(value)
            own[name].grad = None


def descend(
    model: nn.Module, batches: Batches, example_ids_V: Tensor, settings: ScoutSettings, *, num_steps: int, title: str
) -> None:
    """Descend the loss of these validation rows alone, in place.

    Steps are taken in float32 whatever the type of a parameter: a gentle step would be rounded away in bf16.

    Args:
        model: as accelerate prepared it.
        num_steps: optimizer steps.
        title: of the progress bar; there is none when it is empty.
    """
    accelerator = batches.accelerator
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = [p if p.dtype == torch.float32 else p.detach().float() for p in trained]
    optimizer = torch.optim.AdamW(masters, settings.learning_rate, settings.betas, settings.epsilon, weight_decay=0.0)
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=accelerator.mixed_precision == "fp16")
    order = EndlessPermutations(len(example_ids_V), settings.seed)
    model.train()
    for step in trange(num_steps, desc=title, disable=not (title and accelerator.is_main_process)):
        for is_last, batch in _micro_batches(batches, example_ids_V, order, settings, step):
            share_B = batch.pop("rows").share_B
            with nullcontext() if is_last else accelerator.no_sync(model):
                with accelerator.autocast():
                    nll_B = fused_losses(model, batch)
                # DDP averages over the ranks; the shares sum to one over all of them.
                scaler.scale((share_B.to(nll_B.device) * nll_B).sum() * accelerator.num_processes).backward()
        for master, parameter in zip(masters, trained, strict=True):
            if master is not parameter and parameter.grad is not None:
                master.grad, parameter.grad = parameter.grad.float(), None
        scaler.unscale_(optimizer)
        if settings.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(masters, settings.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        for master, parameter in zip(masters, trained, strict=True):
            if master is not parameter:
                parameter.data.copy_(master)


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


class Scout:
    """The model after a gentle descent of the validation loss alone, called back whenever there are rows to score.

    At most two copies of the trainable parameters (with LoRA the adapter alone) are kept, on the CPU: the scout's, and
    those of the base model.

    Args:
        model: as it is before training.
        batches: of its trainer.
        reference: ``base`` (the model as it is now) or ``zero``.
        batch_size: rows measured at a time and rank.
        keep: keep both copies, so that rows can be scored after training has begun.
        show_progress: bars over descents and measurements.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        reference: str,
        *,
        batch_size: int,
        keep: bool,
        show_progress: bool,
    ):
        self.model, self.batches, self.reference, self.keep = model, batches, reference, keep
        self.batch_size, self.show_progress = batch_size, show_progress
        self.base_parameters = trainable_parameters(model) if keep else {}
        self.parameters: Parameters = {}
        self.is_believed = True

    @property
    def accelerator(self) -> Accelerator:
        """Of the trainer."""
        return self.batches.accelerator

    @property
    def _validation_ids(self) -> Tensor:
        assert self.batches.validation is not None, "checked by the settings"
        return self.batches.validation.ids

    def score(
        self, model: nn.Module, validation_dataset: Dataset, train_dataset: Dataset, settings: ScoutSettings
    ) -> tuple[Tensor, Tensor]:
        """Losses (R, float32) of the prepared training rows by the scout and by the reference; the model is put back.

        Args:
            model: the model as accelerate prepared it.
        """
        reference_R = self.reference_losses(train_dataset, "rows before scouting")
        with seeded(settings.seed, self.accelerator.device):
            self.evidence = self._evidence(model, validation_dataset, train_dataset, reference_R, settings)
            self.is_believed = self.evidence.is_believed
            with put_back(self.model, self.base_parameters):
                self._descend(model, self._validation_ids, settings, settings.num_steps, "scouting")
                loss_R = self._present_losses(train_dataset, "rows after scouting")
                if self.keep:
                    self.parameters = trainable_parameters(self.model)
        return loss_R, reference_R

    def _evidence(
        self,
        model: nn.Module,
        validation_dataset: Dataset,
        train_dataset: Dataset,
        reference_R: Tensor,
        settings: ScoutSettings,
    ) -> Evidence:
        """Two scouts, each trained on one half of the validation rows and measured on the other half."""
        num_rows = len(validation_dataset)
        if num_rows < _MIN_CHECKED:
            return Evidence(math.nan, math.nan)
        ids_V = self._validation_ids
        reference_V = self.reference_losses(validation_dataset)
        sample = permutation(len(train_dataset), settings.seed, epoch=0, level=0)[:_MAX_SAMPLE].sort().values
        training_rows = train_dataset.select(sample.tolist())
        lower_V, higher_R = torch.empty(num_rows, dtype=torch.float64), torch.zeros(len(sample), dtype=torch.float64)
        halves = permutation(num_rows, settings.seed, epoch=0, level=1).tensor_split(2)
        for seen, unseen in (halves, halves[::-1]):
            with put_back(self.model, self.base_parameters):
                self._descend(model, ids_V[seen], settings, max(settings.num_steps // 2, 1), "checking the scout")
                excess_V = self._present_losses(validation_dataset.select(unseen.tolist()), "") - reference_V[unseen]
                excess_R = self._present_losses(training_rows, "rows, to check the scout") - reference_R[sample]
            lower_V[unseen], higher = compare_excess(excess_V, excess_R)
            higher_R += higher * len(unseen) / num_rows
        error = math.sqrt(lower_V.var().item() / num_rows + higher_R.var().item() / len(sample))
        return Evidence(lower_V.mean().item(), error)

    def _descend(self, model: nn.Module, ids_V: Tensor, settings: ScoutSettings, num_steps: int, title: str) -> None:
        title = title if self.show_progress else ""
        descend(model, self.batches, ids_V, settings, num_steps=num_steps, title=title)

    def losses(self, rows: Dataset, title: str = "") -> Tensor:
        """Token-mean losses (R, float32) of prepared rows by the scout."""
        assert self.parameters, "score() or load() comes first"
        with exchanged(self.model, self.parameters):
            return self._present_losses(rows, title)

    def reference_losses(self, rows: Dataset, title: str = "") -> Tensor:
        """Those of the reference: the base model, or zero."""
        if self.reference == "zero":
            return torch.zeros(len(rows))
        if not self.base_parameters:  # the base model is the present one: nothing has been trained yet
            return self._present_losses(rows, title)
        with exchanged(self.model, self.base_parameters):
            return self._present_losses(rows, title)

    def _present_losses(self, rows: Dataset, title: str) -> Tensor:
        title, collate = title if self.show_progress else "", self.batches.collate_rows
        return row_losses(self.model, rows, collate, self.accelerator, batch_size=self.batch_size, title=title)

    def save(self, path: Path) -> None:
        """Write the scout's parameters; the base model's are those that a run starts from."""
        tensors = {name: value.contiguous() for name, value in self.parameters.items()}
        metadata = {"is_believed": str(self.is_believed)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, path: Path) -> None:
        """Inverse of `save`.

        Raises:
            ValueError: the file is not there, or is that of another model.
        """
        if not path.is_file():
            raise ValueError(f"{path} is missing: without the scout new responses cannot be scored; start the run anew")
        self.parameters = load_file(path)
        with safe_open(path, "pt") as file:
            self.is_believed = (file.metadata() or {}).get("is_believed") == "True"
        if self.parameters.keys() != {name for name, p in self.model.named_parameters() if p.requires_grad}:
            raise ValueError(f"{path} belongs to another model: start the run anew")
