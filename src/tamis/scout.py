"""Scouting: judge every training row before the model is trained on any of them.

A model that has been trained on a row knows it by heart, right or wrong: its loss no longer says whether the row agrees
with the trusted ones. So a scout comes first. The model descends the validation loss alone, gently; each training row
is then judged by how far its loss has fallen or risen against the model before; and the model goes back to where it
began. The scores are settled before training starts, at the price of a few steps on validation rows and one or two
forward passes over the training rows (docs/method.md; figures in LOG.md).

Shape suffixes: B rows of a batch, N rows of the training dataset.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from tamis.progress import ProgressCallback, use_progress
from tamis.references import fused_losses

logger = logging.getLogger(__name__)


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


def row_losses(
    model: nn.Module, dataset: Dataset, collator: Callable, accelerator: Accelerator, *, batch_size: int, title: str
) -> Tensor:
    """Token-mean losses (float32, on the CPU) of all rows of a prepared dataset, in its order.

    The ranks share the work. ``title`` names the progress bar; there is none when it is empty.
    In evaluation mode, longest rows first: padding is least so, and a lack of memory shows at once.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(dataset)), key=lambda i: (-lengths[i], i))
    mine = order[accelerator.process_index :: accelerator.num_processes]
    rows = dataset.select_columns(["input_ids", "labels"]).select(mine)
    losses: list[float] = []
    was_training = model.training
    model.eval()
    try:
        batches = DataLoader(rows, batch_size, collate_fn=collator)
        for batch in tqdm(batches, title, disable=not (title and accelerator.is_main_process)):
            inputs = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            with torch.no_grad(), accelerator.autocast():
                losses += fused_losses(model, inputs).float().tolist()
    finally:
        model.train(was_training)
    loss_N = torch.empty(len(dataset))
    for indices, values in gather_object([(mine, losses)]):
        loss_N[torch.tensor(indices, dtype=torch.int64)] = torch.tensor(values)
    return loss_N


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """On leaving, the trainable parameters are what they were on entering. The copy is kept on the CPU."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().to("cpu", copy=True) for name, p in trainable.items()}
    try:
        yield
    finally:
        for name, parameter in trainable.items():
            parameter.data.copy_(before[name])
            parameter.grad = None


def judge_rows(
    model: nn.Module,
    args: SFTConfig,
    train_dataset: Dataset,
    validation_dataset: Dataset,
    processing_class: PreTrainedTokenizerBase,
    collator: Callable,
    accelerator: Accelerator,
    *,
    reference: str,
    num_steps: int,
    learning_rate: float,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Losses of all training rows by the scout, and their reference losses; the model is put back.

    Args:
        train_dataset, validation_dataset: prepared (``input_ids``, ``labels``).
        reference: ``base`` (the model as it is now) or ``zero``.
        num_steps, learning_rate, batch_size: of the descent of the validation loss; the batch size per device.

    Returns:
        ``loss_N`` and ``reference_N``, float32, nats per token, in the order of ``train_dataset``.
    """

    def judge(title: str) -> Tensor:
        title = "" if args.disable_tqdm else title
        judge_batch_size = 2 * args.per_device_train_batch_size  # no gradients are kept: twice the rows fit
        return row_losses(model, train_dataset, collator, accelerator, batch_size=judge_batch_size, title=title)

    reference_N = judge("rows before scouting") if reference == "base" else torch.zeros(len(train_dataset))
    with put_back(model):
        descend_validation_loss(
            model,
            args,
            validation_dataset,
            processing_class,
            num_steps=num_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
        )
        return judge("rows after scouting"), reference_N
