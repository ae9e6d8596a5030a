"""What a way of scoring costs, in forward passes over the training rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tamis.compare.scores_text import backbone
from tamis.trainer import BilevelTrainer


@dataclass
class Cost:
    """Work done by a model: a token costs 1 forward, and 2 more where a backward follows.

    Attributes:
        num_tokens: token forwards so far.
        num_training_tokens: in one pass over the training rows.
    """

    num_tokens: int
    num_training_tokens: int

    @property
    def forwards(self) -> float:
        """Forward-equivalents per training row (a backward is 2)."""
        return self.num_tokens / self.num_training_tokens


@contextmanager
def counted(trainer: BilevelTrainer) -> Iterator[Cost]:
    """Count what passes through the model of a trainer, padding left out.

    A forward that records gradients is taken to be followed by a backward. Passes that activation checkpointing repeats
    do not count. With `padding_free` the tokens that fill a line do.
    """
    cost = Cost(0, sum(len(ids) for ids in trainer.train_dataset["input_ids"]))

    def count(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> None:
        mask = inputs.get("attention_mask")
        num_tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
        cost.num_tokens += num_tokens * (3 if torch.is_grad_enabled() else 1)

    hook = backbone(trainer.model).register_forward_hook(count, with_kwargs=True)
    try:
        yield cost
    finally:
        hook.remove()
