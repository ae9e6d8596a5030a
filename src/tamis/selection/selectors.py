"""Selectors: rules by which the excess losses of rows become their scores.

A rule sees the scores and excess losses of some rows and says what their scores become; `tamis.selection.row_weights`
keeps the scores and turns them into weights. Implement `Selector` and give an instance to `BilevelTrainer` to try a
rule of your own (examples/custom_selector.py).

Shape suffixes: B rows of a batch.

| name      | score of a row                        | weight                           | source                  |
|-----------|---------------------------------------|----------------------------------|-------------------------|
| `scout`   | log-odds of being right, beforehand   | probability^2 / mean, by visits  | our derivation          |
| `mirror`  | falls by the standardised excess loss | map(s), this step's loss counted | our derivation          |
| `bmo`     | -e / temperature, no memory           | map(s), this step's loss counted | 2511.21056, closed form |
| `softmax` | Adam on the logits of all rows        | N * softmax(s)                   | SEAL, 2410.07471        |
| `sigmoid` | Adam on the logits of all rows        | sigmoid(s) / mean                | SEAL's code             |
| `column`  | none                                  | a column of the dataset / mean   | weighted SFT            |
| `none`    | none                                  | 1                                | direct mixing           |

All but `mirror` and `bmo` are in `tamis.selection.row_weights` and `tamis.selection.adam`: they need more than the
scores of a batch, or no scores at all.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, get_args

import torch
from torch import Tensor

from tamis.config import ScoreMap


class Selector(ABC):
    """A rule that scores rows. Subclass it, in about 30 lines, to try another one.

    Only `next_scores` is needed. A rule with a state of its own (a running mean, say) changes it in `observe`, never in
    `next_scores`, and saves it by `state_dict`.

    Attributes:
        uses_excess: whether it reads the losses at all (else the reference is never computed).
        score_map: how scores become weights; see `tamis.selection.scores.ScoreTable`.
    """

    uses_excess: ClassVar[bool] = True
    score_map: ScoreMap = "bounded"

    @abstractmethod
    def next_scores(self, score_B: Tensor, excess_B: Tensor) -> Tensor:
        """The scores that rows will have once these losses are committed. Changes nothing.

        Args:
            score_B: their present scores, float32; 0 at first.
            excess_B: their losses less those of the reference, nats per token, float32.

        Returns:
            B finite scores, float32. Larger is better.
        """

    def observe(self, excess_B: Tensor) -> None:
        """Take note of one optimizer step's excess losses, after the scores have been updated by them."""

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""


def check_selector(selector: object) -> None:
    """Check that an instance does what `Selector` asks for, on two made-up rows.

    Raises:
        ValueError: with what is wrong and the remedy.
    """
    kind = selector.__name__ if isinstance(selector, type) else type(selector).__name__
    if isinstance(selector, type):
        raise ValueError(f"selector={kind} is a class: give an instance, {kind}(...)")
    if not isinstance(selector, Selector):
        raise ValueError(f"selector={selector!r} is neither a name nor a tamis.Selector: subclass tamis.Selector")
    if selector.score_map not in get_args(ScoreMap):
        raise ValueError(f"{kind}.score_map is {selector.score_map!r}: choose 'bounded' or 'softmax'")
    score_B, excess_B = torch.zeros(2), torch.tensor([-1.0, 1.0])
    scores = selector.next_scores(score_B, excess_B)
    if not isinstance(scores, Tensor) or scores.shape != (2,) or not scores.isfinite().all():
        raise ValueError(f"{kind}.next_scores must return one finite score for each of 2 rows, got {scores!r}")
    again = selector.next_scores(score_B, excess_B)
    if score_B.any() or not torch.equal(excess_B, torch.tensor([-1.0, 1.0])) or not torch.equal(again, scores):
        raise ValueError(f"{kind}.next_scores must change nothing: keep its state in observe()")


class MirrorSelector(Selector):
    """Mirror descent on the weights: each row's score falls by its standardised excess loss.

    ``s <- s - eta * z``, ``z = clip((e - center) / scale, -3, 3)``, with ``center`` and ``scale`` the running mean and
    standard deviation of the excess losses. The step keeps the size of a loss, which Adam
    throws away, and yet ``eta`` means the same on every dataset. The clip bounds what one visit can do to a row.

    Args:
        learning_rate: eta, in score units (logits) per standard deviation of the excess loss.
        score_map: see `Selector`.
    """

    _AVERAGING = 0.05  # of center and scale along the steps: a time constant of 20
    _CLIP = 3.0
    _MIN_SCALE = 1e-4  # below it the excess losses are rounding: with reference `base` those of the first step are

    def __init__(self, learning_rate: float, score_map: ScoreMap = "bounded"):
        self.learning_rate, self.score_map = learning_rate, score_map
        self.center, self.scale, self.num_batches = 0.0, 0.0, 0

    def next_scores(self, score_B: Tensor, excess_B: Tensor) -> Tensor:
        """See `Selector`."""
        if self.scale < self._MIN_SCALE:  # nothing to go by
            return score_B
        z_B = ((excess_B - self.center) / self.scale).clamp(-self._CLIP, self._CLIP)
        return score_B - self.learning_rate * z_B

    def observe(self, excess_B: Tensor) -> None:
        """Move center and scale towards those of the step."""
        self.num_batches += 1
        step = max(self._AVERAGING, 1 / self.num_batches)
        excess_B = excess_B.double()
        self.center += step * (excess_B.mean().item() - self.center)
        self.scale += step * ((excess_B - self.center).square().mean().sqrt().item() - self.scale)

    def state_dict(self) -> dict[str, Tensor]:
        """See `Selector`."""
        return {"moments": torch.tensor([self.center, self.scale, self.num_batches], dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `Selector`."""
        self.center, self.scale, num_batches = state["moments"].tolist()
        self.num_batches = int(num_batches)


class BmoSelector(Selector):
    """Bilevel multi-objective weights ``softmax(-e / temperature)`` over the dataset: closed form, without memory.

    The gradient of the smoothed minimum ``-tau * log mean exp(-l / tau)`` is ``sum_j lambda_j grad l_j`` with exactly
    these weights (our derivation; the minimum is the penalty of weak Pareto optimality on separable data). The rows
    outside the batch enter the sum with the loss they were last seen with.

    Args:
        temperature: tau in nats per token; small is sharp.
        score_map: see `Selector`.
    """

    def __init__(self, temperature: float, score_map: ScoreMap = "softmax"):
        self.temperature, self.score_map = temperature, score_map

    def next_scores(self, score_B: Tensor, excess_B: Tensor) -> Tensor:
        """See `Selector`."""
        return -excess_B / self.temperature
