"""SEAL's selection rule: Adam on the logits of all rows.

Shape suffixes: B rows of a batch, N rows of the training dataset.
"""

import math

import torch
from torch import Tensor

from tamis.config import ScoreMap
from tamis.selection.row_weights import ScoreWeights


class AdamWeights(ScoreWeights):
    """Adam on the logits of all N rows in every step, along the gradient of ``mean_batch(w * e)``: SEAL's rule.

    As published (arXiv 2410.07471 and its code): the softmax ties the rows together, so that no logit's gradient is
    zero; the betas are 0.9 and 0.95, the rate is constant. SEAL's other map is the sigmoid, under which the rows
    outside the batch move by their momentum alone. A step costs O(N) in time and makes a few vectors of N values.

    Ours is a constant in the logits, which the softmax does not see: published logits begin at 0.1 and drift; here a
    score is the log of the row's weight, so that those of different times can be compared (`restore`). Ours too is
    that sigmoids are divided by their mean, and not by one half.

    Args:
        learning_rate: Adam's step in logits.
    """

    _BETAS = (0.9, 0.95)
    _EPSILON = 1e-8

    def __init__(self, num_examples: int, score_map: ScoreMap, learning_rate: float):
        super().__init__(num_examples, score_map)
        self.learning_rate, self.num_steps = learning_rate, 0
        self.first_moment_N = torch.zeros(num_examples)
        self.second_moment_N = torch.zeros(num_examples)

    def _gradient(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """Of ``mean_batch(w * e)`` in all N logits."""
        pull_B = self.weights(example_ids_B, excess_B) * excess_B / len(example_ids_B)
        if self.table.score_map == "bounded":
            pull_B = pull_B * (1 - torch.sigmoid(self.scores(example_ids_B)))
            return torch.zeros(len(self)).index_put_((example_ids_B,), pull_B)
        others_N = self.all_weights() * (-pull_B.sum() / self.table.num_active)
        return others_N.index_add_(0, example_ids_B, pull_B)  # dw_b / ds_j = w_b * ([b = j] - w_j / N)

    def _step(self, example_ids_B: Tensor, excess_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores and both moments of all N rows after the step. Changes nothing."""
        gradient_N = self._gradient(example_ids_B, excess_B)
        first_N = torch.lerp(gradient_N, self.first_moment_N, self._BETAS[0])
        second_N = torch.lerp(gradient_N.square(), self.second_moment_N, self._BETAS[1])
        first, second = (1 - beta ** (self.num_steps + 1) for beta in self._BETAS)  # bias corrections
        change_N = first_N / first / ((second_N / second).sqrt() + self._EPSILON)
        score_N = self.table.score_N - self.learning_rate * change_N
        if self.table.score_map == "softmax":
            score_N -= score_N.logsumexp(0) - math.log(self.table.num_active)
        return score_N, first_N, second_N

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """As published, the weights of a step are those from before its losses."""
        return self.weights_of(self.scores(example_ids_B))

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """See `RowWeights`; O(N)."""
        score_N, self.first_moment_N, self.second_moment_N = self._step(example_ids_B, excess_B)
        self.num_steps += 1
        self.table.set_all(score_N)
        super().update(example_ids_B, loss_B, excess_B)

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """See `RowWeights`."""
        super().restore(example_ids_B, scores_B)
        self.first_moment_N[example_ids_B] = self.second_moment_N[example_ids_B] = 0.0  # of other responses

    def state_dict(self) -> dict[str, Tensor]:
        """See `RowWeights`."""
        moments = {"first_moment_N": self.first_moment_N, "second_moment_N": self.second_moment_N}
        return super().state_dict() | moments | {"num_steps": torch.tensor(self.num_steps)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        self.first_moment_N = state["first_moment_N"].clone()
        self.second_moment_N = state["second_moment_N"].clone()
        self.num_steps = int(state["num_steps"])
