"""Losses of rows: the fused forward, by which parameters, over a whole dataset, and the stop where one is not finite.

Shape suffixes: B rows of a batch, N rows of a dataset.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tamis.bilevel import example_losses
from tamis.padding_free import joined_forward
from tamis.progress import track
from tamis.ranks import local, named_parameters, share, trained

Parameters = dict[str, Tensor]
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class NonFiniteLossError(RuntimeError):
    """A row's loss is NaN or infinite. Raised before the optimizer step: model and checkpoints are as they were."""


def stop_if_not_finite(loss_B: Tensor, name_of: Callable[[int], str], step: int) -> None:
    """Raise where a loss is not finite.

    Args:
        loss_B: losses, or excess losses.
        name_of: the name of a row, by its place in ``loss_B``.
        step: the optimizer step that would follow, from 0.

    Raises:
        NonFiniteLossError: naming up to eight rows.
    """
    bad = (~loss_B.isfinite()).nonzero().squeeze(1).tolist()
    if not bad:
        return
    raise NonFiniteLossError(
        f"step {step + 1}: the loss is not finite on {', '.join(map(name_of, bad[:8]))}"
        f"{', ...' if len(bad) > 8 else ''}. Stopped before the optimizer step; the last checkpoint is intact. "
        "Look at the named rows; if every row is affected, lower `learning_rate`."
    )


def fused_forward(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
    """Token-mean losses (B) of a batch by a model that carries TRL's fused LM head, and all of its outputs.

    Rows of a batch with ``position_ids`` go through the model without padding: see `tamis.padding_free`.
    """
    is_padded = "position_ids" not in inputs
    outputs = model(**inputs, use_cache=False, fused_lm_head=True) if is_padded else joined_forward(model, inputs)
    nll_B, _ = example_losses(outputs.log_probs, outputs.label_mask)
    return nll_B, outputs


def fused_losses(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The losses of `fused_forward` alone."""
    return fused_forward(model, inputs)[0]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no activation checkpointing (both are for training mode only), then every module as it was.

    The parameters and their types are not touched.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def trainable_parameters(model: nn.Module) -> Parameters:
    """A copy on the CPU; of a sharded model that of the shards of this rank."""
    return {name: local(parameter).to("cpu", copy=True) for name, parameter in trained(model).items()}


@contextlib.contextmanager
def exchanged(model: nn.Module, parameters: Parameters) -> Iterator[None]:
    """Within it the model has these values and ``parameters`` holds the model's; no third copy is made."""

    def exchange() -> None:
        own = named_parameters(model)
        for name, value in parameters.items():
            part = local(own[name])
            present = part.to("cpu", copy=True)
            part.copy_(value)
            value.copy_(present)

    exchange()
    try:
        yield
    finally:
        exchange()


def row_losses(
    model: nn.Module, dataset: Dataset, collate: Collate, accelerator: Accelerator, *, batch_size: int, title: str
) -> Tensor:
    """Token-mean losses (N, float32, on the CPU) of all rows of a prepared dataset, in its order.

    The ranks share the work. In evaluation mode, longest rows first: padding is least so, and a lack of memory shows
    at once.

    Args:
        collate: rows with ``input_ids`` and ``labels`` to a batch.
        title: of the progress bar; there is none when it is empty.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(dataset)), key=lambda i: (-lengths[i], i))
    mine = share(order, accelerator.process_index, accelerator.num_processes)
    rows = dataset.select_columns(["input_ids", "labels"]).select(mine)
    losses: list[float] = []
    # A generator of its own: a loader draws from the global one, and dropout goes on as if nothing had been measured.
    batches = DataLoader(rows, batch_size, collate_fn=collate, generator=torch.Generator())
    with evaluation_mode(model):
        is_shown = bool(title) and accelerator.is_main_process
        for batch in track(batches, title, len(batches), is_shown=is_shown):
            inputs = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            with torch.no_grad(), accelerator.autocast():
                losses += fused_losses(model, inputs).float().tolist()
    loss_N = torch.empty(len(dataset))
    for indices, values in gather_object([(mine, losses)]):
        loss_N[torch.tensor(indices, dtype=torch.int64)] = torch.tensor(values)
    return loss_N
