"""A selection rule of your own, in 30 lines: a row loses weight only while its excess loss is above a limit."""

import torch
from torch import Tensor

from tamis import Selector


class ThresholdSelector(Selector):
    """Scores fall by ``step`` for every loss that is more than ``limit`` above the reference, and else rise by it.

    Args:
        limit: excess loss in nats per token.
        step: in logits.
    """

    def __init__(self, limit: float = 0.0, step: float = 2.0):
        self.limit, self.step = limit, step

    def next_scores(self, score_B: Tensor, excess_B: Tensor) -> Tensor:
        """See `tamis.Selector`."""
        return score_B - self.step * torch.where(excess_B > self.limit, 1.0, -1.0)


# trainer = BilevelTrainer(model, BilevelConfig(output_dir="run"), selector=ThresholdSelector(), ...)
