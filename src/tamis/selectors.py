"""Selectors: how the losses of rows become their weights.

The trainer knows only `Selector`: it asks for the weights of the rows of a batch, given their excess losses, and after
every optimizer step commits the losses it has seen. An update touches the rows of the batch and nothing else, so a
step costs O(batch) whatever N; 12 bytes a row are kept here and 4 more by the reference.

Shape suffixes: B rows of a batch, N rows of the training dataset.

| name      | score of a row                        | weight                           | source                  |
|-----------|---------------------------------------|----------------------------------|-------------------------|
| `mirror`  | falls by the standardised excess loss | map(s), this step's loss counted | our derivation          |
| `softmax` | Adam on logits                        | N * softmax(s)                   | 2511.21056, published   |
| `sigmoid` | Adam on logits                        | sigmoid(s) / mean                | 2406.19976, published   |
| `bmo`     | -e / temperature, no memory           | map(s), this step's loss counted | 2511.21056, closed form |
| `column`  | none                                  | a column of the dataset / mean   | weighted SFT            |
| `none`    | none                                  | 1                                | direct mixing           |
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor

from tamis.bilevel import effective_sample_size, weight_entropy
from tamis.scores import ScoreTable

SELECTOR_NAMES = ("mirror", "softmax", "sigmoid", "bmo", "column", "none")
STATIC_SELECTORS = ("column", "none")

# Step size of the scores: logits per standard deviation of the excess loss for `mirror`, logits for the Adam rules.
DEFAULT_LEARNING_RATE = {"mirror": 1.75, "softmax": 0.1, "sigmoid": 0.1}


class Selector(ABC):
    """Weights of the training rows. Subclass it, in about 30 lines, to try another rule.

    Attributes:
        uses_excess: whether it reads the losses at all (else the reference is never computed).
        is_settled: whether a scout has judged the rows, so that training changes no score any more.
        num_updates_N: how often each row was seen (int32).
        last_loss_N: its loss when last seen, nats per token (float32, NaN before).
    """

    uses_excess = True

    def __init__(self, num_examples: int, score_map: str = "bounded"):
        self.table = ScoreTable(num_examples, score_map)
        self.is_settled = False
        self.num_updates_N = torch.zeros(num_examples, dtype=torch.int32)
        self.last_loss_N = torch.full((num_examples,), math.nan, dtype=torch.float32)

    @abstractmethod
    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """The rule itself: `next_scores` of rows that are not settled."""

    def next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """The scores these rows will have once ``excess_B`` (nats per token) is committed. Changes nothing."""
        if self.is_settled:
            return self.table.score_N[example_ids_B]
        return self._next_scores(example_ids_B, excess_B)

    def judge(self, example_ids_R: Tensor, loss_R: Tensor, excess_R: Tensor) -> None:
        """Take the evidence of a scout on all R rows that will be trained on, and settle the scores by it."""
        Selector.update(self, example_ids_R, loss_R, excess_R)
        self.is_settled = True

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """Weights (float32, mean one over the dataset) of the rows of a batch, for this very step. Changes nothing.

        The loss just measured counts already, so that a row is judged before its first training step, not after it:
        once a model has been trained on a row, its loss says less about the row (memorisation).
        """
        scores_B = self.table.score_N[example_ids_B]
        return self.table.weights_of(self.next_scores(example_ids_B, excess_B), instead_of=scores_B)

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """Commit one optimizer step: the rows of all its micro-batches and ranks, each at most once.

        Args:
            loss_B, excess_B: nats per token, float32.
        """
        self.table.set(example_ids_B, self.next_scores(example_ids_B, excess_B))
        self.num_updates_N[example_ids_B] += 1
        self.last_loss_N[example_ids_B] = loss_B.float()

    def exclude(self, example_ids: Tensor) -> None:
        """Rows that are never trained on: weight 0, and the mean of one is that of the others."""
        self.table.exclude(example_ids)

    def scores(self, example_ids_B: Tensor) -> Tensor:
        """The committed scores of these rows."""
        return self.table.score_N[example_ids_B]

    def weights_of(self, scores: Tensor) -> Tensor:
        """Weights that rows with these scores have among the present ones; any shape."""
        return self.table.weights_of(scores)

    def restart(self, example_ids_B: Tensor) -> None:
        """Rows whose answer was rewritten, so that what is known of them is void: weight one, never seen."""
        self.restore(example_ids_B, torch.full((len(example_ids_B),), self.table.neutral_score(example_ids_B)))
        self.num_updates_N[example_ids_B] = 0

    def judged_scores(self, excess_B: Tensor) -> Tensor:
        """Scores that rows have by these excess losses of a scout alone, in the way that `judge` judged all rows."""
        raise NotImplementedError(f"{type(self).__name__} follows the training steps, it has no scout")

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """Give rows the scores that they had before they were rewritten."""
        self.table.set(example_ids_B, scores_B)

    def all_weights(self) -> Tensor:
        """Weights of all N rows (float32, mean one over those not excluded), by the committed scores."""
        return self.table.weights_of(self.table.score_N)

    def effective_sample_size(self) -> float:
        """``(sum w)^2 / sum w^2`` over all rows, between 1 and N."""
        return self.table.effective_sample_size()

    def entropy(self) -> float:
        """Entropy in nats of the weights as a distribution over rows, at most ``log(N)``."""
        return self.table.entropy()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        return {
            **self.table.state_dict(),
            "is_settled": torch.tensor(self.is_settled),
            "num_updates_N": self.num_updates_N,
            "last_loss_N": self.last_loss_N,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: the state is that of another number of rows.
        """
        if len(state["score_N"]) != len(self.table):
            raise ValueError(
                f"the checkpoint scores {len(state['score_N'])} training rows, the dataset has {len(self.table)}: "
                "resume with the dataset the run was started with"
            )
        self.table.load_state_dict(state)
        self.is_settled = bool(state["is_settled"])
        self.num_updates_N, self.last_loss_N = state["num_updates_N"].clone(), state["last_loss_N"].clone()


def separation(z_R: Tensor) -> float:
    """How far apart two kinds of rows stand: 1 for one Gaussian bell, more for two, less for a bell with outliers.

    The slope of the log-odds between the rows above and below zero, as linear discriminant analysis has it (difference
    of their means over their pooled variance), in units of what it is for a standard Gaussian. Between 0.5 and 8. Our
    derivation.

    Args:
        z_R: centred and scaled excess losses, R rows.
    """
    above_R, below_R = z_R[z_R >= 0], z_R[z_R < 0]
    if len(above_R) < 2 or len(below_R) < 2:
        return 1.0
    pooled = (above_R.var(correction=0) * len(above_R) + below_R.var(correction=0) * len(below_R)) / len(z_R)
    slope = (above_R.mean() - below_R.mean()) / pooled.clamp(min=1e-12)
    of_one_bell = 2 * math.sqrt(2 / math.pi) / (1 - 2 / math.pi)
    return min(max(slope.item() / of_one_bell, 0.5), 8.0)


class MirrorSelector(Selector):
    """Mirror descent on the weights: each row's score falls by its standardised excess loss.

    ``s <- s - eta * z``, ``z = clip((e - center) / scale, -3, 3)``, with ``center`` and ``scale`` the running mean and
    standard deviation of the excess losses (after scouting: see `judge`). The step keeps the size of a loss, which Adam
    throws away, and yet ``eta`` means the same on every dataset. The clip bounds what one visit can do to a row.

    Args:
        learning_rate: eta, in score units (logits) per standard deviation of the excess loss.
    """

    _AVERAGING = 0.05  # of center and scale along the steps: a time constant of 20
    _CLIP = 3.0
    _MIN_SCALE = 1e-4  # below it the excess losses are rounding: with reference `base` those of the first step are

    def __init__(self, num_examples: int, score_map: str, learning_rate: float):
        super().__init__(num_examples, score_map)
        self.learning_rate = learning_rate
        self.center, self.scale, self.num_batches = 0.0, 0.0, 0

    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        return self.table.score_N[example_ids_B] + self.judged_scores(excess_B)

    def judged_scores(self, excess_B: Tensor) -> Tensor:
        if self.scale < self._MIN_SCALE:  # nothing to judge by
            return torch.zeros(len(excess_B))
        z_B = ((excess_B - self.center) / self.scale).clamp(-self._CLIP, self._CLIP)
        return -self.learning_rate * z_B

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        super().update(example_ids_B, loss_B, excess_B)
        if not self.is_settled:
            self.num_batches += 1
            self._average(excess_B.double(), max(self._AVERAGING, 1 / self.num_batches))

    def judge(self, example_ids_R: Tensor, loss_R: Tensor, excess_R: Tensor) -> None:
        """Settle the scores, as sharply as the excess losses tell two kinds of rows apart (`separation`).

        The center is half way between the quartiles: with right and wrong rows in like numbers that lies between the
        two, where the mean is pulled into the wrong ones by their long tail (LOG.md).
        """
        self.center = float(np.quantile(excess_R.double().numpy(), [0.25, 0.75]).mean())
        z_R = (excess_R.double() - self.center) / excess_R.double().std(correction=0).clamp(min=1e-12)
        self.scale = excess_R.double().std(correction=0).item() / separation(z_R.clamp(-self._CLIP, self._CLIP))
        super().judge(example_ids_R, loss_R, excess_R)

    def _average(self, excess_B: Tensor, step: float) -> None:
        """Move center and scale to those of the batch by a fraction ``step``."""
        self.center += step * (excess_B.mean().item() - self.center)
        self.scale += step * ((excess_B - self.center).square().mean().sqrt().item() - self.scale)

    def state_dict(self) -> dict[str, Tensor]:
        moments = torch.tensor([self.center, self.scale, self.num_batches], dtype=torch.float64)
        return super().state_dict() | {"moments": moments}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.center, self.scale, num_batches = state["moments"].tolist()
        self.num_batches = int(num_batches)


class AdamSelector(Selector):
    """The published rule: Adam on one logit per row, along the gradient of ``mean_batch(w * e)``.

    As published the logits of all N rows move in every step, since the softmax ties them together; here only those of
    the batch do (lazy Adam, as `torch.optim.SparseAdam`), which makes it O(batch). Adam divides each gradient by its
    own running size: how large a loss is, the very signal, is lost. Kept for comparison.

    Args:
        learning_rate: Adam's step in logits.
    """

    def __init__(
        self, num_examples: int, score_map: str, learning_rate: float, betas=(0.9, 0.999), epsilon: float = 1e-8
    ):
        super().__init__(num_examples, score_map)
        self.learning_rate, self.betas, self.epsilon = learning_rate, betas, epsilon
        self.first_moment_N = torch.zeros(num_examples)
        self.second_moment_N = torch.zeros(num_examples)

    def _moments(self, example_ids_B: Tensor, excess_B: Tensor) -> tuple[Tensor, Tensor]:
        scores_B = self.table.score_N[example_ids_B]
        weights_B = self.table.weights_of(scores_B)
        if self.table.score_map == "softmax":
            gradient_B = weights_B * (excess_B - (weights_B * excess_B).sum() / len(self.table))
        else:
            gradient_B = weights_B * (1 - torch.sigmoid(scores_B)) * excess_B
        gradient_B = gradient_B / len(example_ids_B)
        first_B = torch.lerp(gradient_B, self.first_moment_N[example_ids_B], self.betas[0])
        second_B = torch.lerp(gradient_B.square(), self.second_moment_N[example_ids_B], self.betas[1])
        return first_B, second_B

    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        first_B, second_B = self._moments(example_ids_B, excess_B)
        num_updates_B = self.num_updates_N[example_ids_B] + 1
        first_B = first_B / (1 - self.betas[0] ** num_updates_B)
        second_B = second_B / (1 - self.betas[1] ** num_updates_B)
        return self.table.score_N[example_ids_B] - self.learning_rate * first_B / (second_B.sqrt() + self.epsilon)

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """As published, the weights of a step are those from before its losses."""
        return self.table.weights_of(self.table.score_N[example_ids_B])

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        moments = self._moments(example_ids_B, excess_B)
        super().update(example_ids_B, loss_B, excess_B)
        self.first_moment_N[example_ids_B], self.second_moment_N[example_ids_B] = moments

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        super().restore(example_ids_B, scores_B)
        self.first_moment_N[example_ids_B] = self.second_moment_N[example_ids_B] = 0.0  # of other answers

    def state_dict(self) -> dict[str, Tensor]:
        moments = {"first_moment_N": self.first_moment_N, "second_moment_N": self.second_moment_N}
        return super().state_dict() | moments

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.first_moment_N = state["first_moment_N"].clone()
        self.second_moment_N = state["second_moment_N"].clone()


class BmoSelector(Selector):
    """Bilevel multi-objective weights ``softmax(-e / temperature)`` over the dataset: closed form, without memory.

    The rows outside the batch enter the sum with the loss they were last seen with.

    Args:
        temperature: tau in nats per token; small is sharp.
    """

    def __init__(self, num_examples: int, score_map: str, temperature: float):
        super().__init__(num_examples, score_map)
        self.temperature = temperature

    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        return self.judged_scores(excess_B)

    def judged_scores(self, excess_B: Tensor) -> Tensor:
        return -excess_B / self.temperature


class ColumnSelector(Selector):
    """Static weights from a column of the dataset: weighted SFT, no validation dataset needed.

    Args:
        weight_N: the column, finite and non-negative; divided by its mean here.
    """

    uses_excess = False

    def __init__(self, weight_N: Tensor):
        super().__init__(len(weight_N))
        if not weight_N.sum() > 0:
            raise ValueError("the column 'weight' is zero on every training row: give at least one row a weight")
        self.weight_N = (weight_N.double() / weight_N.double().mean()).float()

    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        return self.table.score_N[example_ids_B]

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        return self.weight_N[example_ids_B]

    def exclude(self, example_ids: Tensor) -> None:
        super().exclude(example_ids)
        self.weight_N[example_ids] = 0
        if not self.weight_N.sum() > 0:
            raise ValueError("the column 'weight' is 0 on every training row whose prompt fits: raise --max_length")
        self.weight_N *= self.table.num_active / self.weight_N.sum()

    def all_weights(self) -> Tensor:
        return self.weight_N

    def scores(self, example_ids_B: Tensor) -> Tensor:
        return self.weight_N[example_ids_B]

    def weights_of(self, scores: Tensor) -> Tensor:
        return scores

    def restart(self, example_ids_B: Tensor) -> None:
        self.restore(example_ids_B, torch.ones(len(example_ids_B)))
        self.num_updates_N[example_ids_B] = 0

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        self.weight_N[example_ids_B] = scores_B

    def effective_sample_size(self) -> float:
        return effective_sample_size(self.weight_N)

    def entropy(self) -> float:
        return weight_entropy(self.weight_N)


class UniformSelector(ColumnSelector):
    """Every row has weight one: direct mixing of the two datasets."""

    def __init__(self, num_examples: int):
        super().__init__(torch.ones(num_examples))


def make_selector(
    name: str,
    num_examples: int,
    *,
    score_map: str = "bounded",
    learning_rate: float | None = None,
    temperature: float = 0.5,
    weight_N: Tensor | None = None,
) -> Selector:
    """The selector called ``name``; see the table above for what each reads.

    Args:
        num_examples: N.
        score_map, learning_rate, temperature: for the selectors that have one; None takes `DEFAULT_LEARNING_RATE`.
        weight_N: the column of selector ``column``.

    Raises:
        ValueError: there is no selector of that name, or ``column`` without ``weight_N``.
    """
    if learning_rate is None:
        learning_rate = DEFAULT_LEARNING_RATE.get(name, 0.0)
    if name == "mirror":
        return MirrorSelector(num_examples, score_map, learning_rate)
    if name in ("softmax", "sigmoid"):
        adam_map = "softmax" if name == "softmax" else "bounded"
        return AdamSelector(num_examples, adam_map, learning_rate)
    if name == "bmo":
        return BmoSelector(num_examples, score_map, temperature)
    if name == "column":
        if weight_N is None:
            raise ValueError("selector 'column' needs weight_N, one weight per training row")
        return ColumnSelector(weight_N)
    if name == "none":
        return UniformSelector(num_examples)
    raise ValueError(f"unknown selector {name!r}: choose one of {', '.join(SELECTOR_NAMES)}")
