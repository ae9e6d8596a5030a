"""One score per training row, and the weights that the scores amount to.

Shape suffixes: B rows of a batch, N rows of the training dataset.
"""

import math
from typing import Literal

import torch
from torch import Tensor

TableMap = Literal["bounded", "softmax", "squared"]

# exp() of a score this far above the shift, and its square, are still far from overflow in float64.
_MAX_SOFTMAX_EXPONENT = 200.0
# A sum that has been this much larger since it was last exact has lost half of its digits.
_MAX_CANCELLATION = 1e8


class ScoreTable:
    """One score per row, and the sums over all rows that turn a score into a weight of mean one, kept up to date.

    ``weight_i = N * f(score_i) / sum_j f(score_j)`` with ``f`` the score map:

    - ``bounded``: ``sigmoid``. A row can lose its weight but not take all of it: no weight exceeds ``1 / mean(f)``. It
      is mirror descent under the Fermi-Dirac entropy, whose domain is the box (our derivation).
    - ``softmax``: ``exp``. Mirror descent under the Shannon entropy, on the simplex; collapses when a few rows have
      much lower losses than the rest.
    - ``squared``: ``sigmoid^2``. Of a score that is the log-odds of being right: probability times confidence.

    The three sums (of f, f^2, f log f) give the weights, the effective sample size and the entropy in O(1). They are
    float64, updated by the difference of the changed rows and recomputed exactly once every N changed rows.
    """

    def __init__(self, num_examples: int, score_map: TableMap):
        self.score_map = score_map
        self.score_N = torch.zeros(num_examples, dtype=torch.float32)
        self.num_active = num_examples
        self.shift = 0.0
        self.peak = torch.zeros(2, dtype=torch.float64)  # of the first two sums, to notice cancellation
        self._recompute()

    def __len__(self) -> int:
        return len(self.score_N)

    def mapped(self, scores: Tensor) -> Tensor:
        """``f(scores)`` in float64, same shape; up to the common factor ``exp(-shift)`` for ``softmax``."""
        scores = scores.double()
        if self.score_map == "bounded":
            return torch.sigmoid(scores)
        if self.score_map == "squared":
            return torch.sigmoid(scores).square()
        return torch.exp((scores - self.shift).clamp(max=1.5 * _MAX_SOFTMAX_EXPONENT))

    def weights_of(self, scores: Tensor, instead_of: Tensor | None = None) -> Tensor:
        """Weights (float32, mean one over the dataset) that rows with these scores have among the present N.

        Args:
            instead_of: the scores that the rows have at present, where ``scores`` are not committed yet.
        """
        mapped, total = self.mapped(scores), self.sums[0]
        if instead_of is not None:  # each row on its own, so that the micro-batch it came in does not matter
            total = (total - self.mapped(instead_of)).clamp(min=0) + mapped
        return (mapped * (self.num_active / total.clamp(min=torch.finfo(torch.float64).tiny))).float()

    def neutral_score(self, example_ids: Tensor) -> float:
        """The score with which these rows have weight one: that of the others' mean weight. O(N), exact."""
        others_N = self.score_N.double()
        others_N[example_ids] = -math.inf
        num_others = int(others_N.isfinite().sum())
        if num_others == 0:
            return 0.0  # any score that all rows have
        if self.score_map == "softmax":
            return (others_N.logsumexp(0) - math.log(num_others)).item()
        mean = self.mapped(others_N).sum() / num_others
        return (torch.logit(mean) if self.score_map == "bounded" else torch.logit(mean.sqrt())).item()

    def exclude(self, example_ids: Tensor) -> None:
        """Give these rows no weight for good: they do not count in the mean of the weights either."""
        self.score_N[example_ids] = -math.inf
        self._recompute()

    def set(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """Replace the scores of distinct rows, in O(B)."""
        overflow = self.score_map == "softmax" and scores_B.max().item() - self.shift > _MAX_SOFTMAX_EXPONENT
        self.sums -= self._sums(self.score_N[example_ids_B])
        self.score_N[example_ids_B] = scores_B.float()
        self.sums += self._sums(self.score_N[example_ids_B])
        self.num_stale += len(example_ids_B)
        self.peak = torch.maximum(self.peak, self.sums[:2])
        cancelled = bool((self.peak > _MAX_CANCELLATION * self.sums[:2]).any())
        if overflow or cancelled or self.num_stale >= len(self):
            self._recompute()

    def set_all(self, score_N: Tensor) -> None:
        """Replace the scores of all rows, in O(N). Those of excluded rows stay minus infinity."""
        self.score_N = score_N
        self._recompute()

    def effective_sample_size(self) -> float:
        """``(sum w)^2 / sum w^2`` over all rows, between 1 and N."""
        return (self.sums[0] ** 2 / self.sums[1]).item()

    def entropy(self) -> float:
        """Entropy in nats of the weights as a distribution over rows, at most ``log(N)``."""
        return (self.sums[0].log() - self.sums[2] / self.sums[0]).item()

    def _sums(self, scores: Tensor) -> Tensor:
        mapped = self.mapped(scores)
        return torch.stack([mapped.sum(), mapped.square().sum(), torch.special.xlogy(mapped, mapped).sum()])

    def _recompute(self) -> None:
        if self.score_map == "softmax":
            self.shift = self.score_N.max().item()
        # In chunks: one float64 copy of 10^8 scores would be 0.8 GB.
        self.num_active = int(self.score_N.isfinite().sum())
        self.sums = sum((self._sums(chunk) for chunk in self.score_N.split(2**20)), torch.zeros(3, dtype=torch.float64))
        self.num_stale, self.peak = 0, self.sums[:2].clone()

    def state_dict(self) -> dict[str, Tensor]:
        progress = torch.tensor([self.shift, self.num_stale, *self.peak], dtype=torch.float64)
        return {"score_N": self.score_N, "sums": self.sums, "progress": progress}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.score_N, self.sums = state["score_N"].clone(), state["sums"].clone()
        self.shift, self.num_stale = state["progress"][0].item(), int(state["progress"][1].item())
        self.peak = state["progress"][2:].clone()
        self.num_active = int(self.score_N.isfinite().sum())
