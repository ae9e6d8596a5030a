"""Scouting: score every training row before the model is trained on any of them.

A model that has been trained on a row knows it by heart, right or wrong: its loss no longer says whether the row agrees
with the trusted ones. So a scout comes first. The model descends the validation loss alone, gently; each training row
is then scored by how far its loss has fallen or risen against the model before; and the model goes back to where it
began. The scores are settled before training starts, at the price of a few steps on validation rows and one or two
forward passes over the training rows (docs/method.md; figures in LOG.md).

Shape suffixes: B rows of a batch, N rows of the training dataset.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from tamis.files import write_atomically
from tamis.losses import row_losses
from tamis.progress import ProgressCallback, use_progress

logger = logging.getLogger(__name__)

SCOUT_FILE = "scout.safetensors"


class PlainTrainer(SFTTrainer):
    """TRL's `SFTTrainer` that tells nobody about the run and shows one bar."""

    def _send_telemetry(self) -> None:
        pass

    def train_with_bar(self, title: str) -> None:
        """Train, with a progress bar of that name instead of printed logs."""
        use_progress(self, ProgressCallback(title))
        self.train()


def descend_validation_loss(
    model: Any,
    args: SFTConfig,
    validation_dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    *,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
) -> None:
    """Train ``model`` in place on the (prepared) validation rows alone, for ``num_steps`` optimizer steps.

    Precision, optimizer, accumulation and gradient clipping are those of ``args``; nothing is saved or reported.
    """
    args = copy.copy(args)
    args.max_steps, args.learning_rate, args.per_device_train_batch_size = num_steps, learning_rate, batch_size
    args.lr_scheduler_type, args.warmup_steps = "constant", 0
    args.save_strategy = args.eval_strategy = args.logging_strategy = "no"
    args.model_init_kwargs, args.eval_on_start = None, False
    args.report_to, args.push_to_hub, args.load_best_model_at_end = [], False, False
    trainer = PlainTrainer(model, args, train_dataset=validation_dataset, processing_class=processing_class)
    trainer.train_with_bar("scouting")


Parameters = dict[str, Tensor]


def trainable_parameters(model: nn.Module) -> Parameters:
    """A copy on the CPU."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """On leaving, the trainable parameters are what they were on entering. The copy is kept on the CPU."""
    before = trainable_parameters(model)
    try:
        yield
    finally:
        put(model, before)


def put(model: nn.Module, parameters: Parameters) -> None:
    """Give the model these values, bit for bit."""
    own = dict(model.named_parameters())
    for name, value in parameters.items():
        own[name].data.copy_(value)
        own[name].grad = None


class Scout:
    """The model after a gentle descent of the validation loss alone, called back whenever there are rows to score.

    Its trainable parameters (with LoRA the adapter alone) are kept on the CPU, none on the accelerator.

    Args:
        model: as it is before training.
        args, collator, accelerator, processing_class: those of its trainer.
        reference: ``base`` (the model as it is now) or ``zero``.
        keep_base: keep the base model's parameters too, so that rows can be scored after training has begun.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SFTConfig,
        collator: Callable,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        reference: str,
        keep_base: bool = False,
    ):
        self.model, self.args, self.reference = model, args, reference
        self.collator, self.accelerator, self.processing_class = collator, accelerator, processing_class
        self.base_parameters = trainable_parameters(model) if reference == "base" and keep_base else {}
        self.parameters: Parameters = {}

    def descend(self, validation_dataset: Dataset, *, num_steps: int, learning_rate: float, batch_size: int) -> None:
        """Make the scout: descend the loss of the (prepared) validation rows; the model is put back."""
        with put_back(self.model):
            descend_validation_loss(
                self.model,
                self.args,
                validation_dataset,
                self.processing_class,
                num_steps=num_steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
            )
            self.parameters = trainable_parameters(self.model)

    def losses(self, rows: Dataset, title: str = "") -> Tensor:
        """Token-mean losses (R, float32) of prepared rows by the scout."""
        assert self.parameters, "descend() comes first"
        with put_back(self.model):
            put(self.model, self.parameters)
            return self._present_losses(rows, title)

    def reference_losses(self, rows: Dataset, title: str = "") -> Tensor:
        """Those of the reference: the base model, or zero."""
        if self.reference == "zero":
            return torch.zeros(len(rows))
        if not self.base_parameters:  # the base model is the present one: nothing has been trained yet
            return self._present_losses(rows, title)
        with put_back(self.model):
            put(self.model, self.base_parameters)
            return self._present_losses(rows, title)

    def _present_losses(self, rows: Dataset, title: str) -> Tensor:
        # No gradients are kept: twice the rows fit.
        batch_size, title = 2 * self.args.per_device_train_batch_size, "" if self.args.disable_tqdm else title
        return row_losses(self.model, rows, self.collator, self.accelerator, batch_size=batch_size, title=title)

    def save(self, path: Path) -> None:
        """Write the scout's parameters; the base model's are those that a run starts from."""
        tensors = {name: value.contiguous() for name, value in self.parameters.items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary))

    def load(self, path: Path) -> None:
        """Inverse of `save`.

        Raises:
            ValueError: the file is not there, or is that of another model.
        """
        if not path.is_file():
            raise ValueError(f"{path} is missing: without the scout new responses cannot be scored; start the run anew")
        self.parameters = load_file(path)
        if self.parameters.keys() != {name for name, p in self.model.named_parameters() if p.requires_grad}:
            raise ValueError(f"{path} belongs to another model: start the run anew")
