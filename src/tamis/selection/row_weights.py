"""Row weights: what is known of every training row, and what it weighs.

An update touches the rows of the batch and nothing else, so a step costs O(batch) whatever N; 12 bytes a row are kept
here and 4 more by the reference. Scores come from a rule (`SelectorWeights`), from Adam on one logit per row
(`AdamWeights`, the one that costs O(N) a step and 20 bytes a row), or the weights are given (`StaticWeights`).

Shape suffixes: B rows of a batch, R rows that a scout has measured, N rows of the training dataset.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tamis.bilevel import effective_sample_size, weight_entropy
from tamis.config import DEFAULT_SELECTOR_LEARNING_RATE, ScoreMap
from tamis.selection.scores import ScoreTable
from tamis.selection.selectors import BmoSelector, MirrorSelector, Selector, check_selector


class RowWeights(ABC):
    """Weights of the N training rows, mean one over those that are trained on.

    Attributes:
        uses_excess: whether losses change anything.
        is_settled: whether the scores no longer change while training.
        num_updates_N: how often each row was seen (int32).
        last_loss_N: its loss when last seen, nats per token (float32, NaN before).
    """

    uses_excess = True
    is_settled = False

    def __init__(self, num_examples: int):
        self.num_updates_N = torch.zeros(num_examples, dtype=torch.int32)
        self.last_loss_N = torch.full((num_examples,), math.nan, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.num_updates_N)

    @abstractmethod
    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """Weights (float32) of the rows of a batch, for this very step. Changes nothing.

        Args:
            excess_B: nats per token, float32.
        """

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """Commit one optimizer step: the rows of all its micro-batches and ranks, each at most once.

        Args:
            loss_B, excess_B: nats per token, float32.
        """
        self.num_updates_N[example_ids_B] += 1
        self.last_loss_N[example_ids_B] = loss_B.float()

    @abstractmethod
    def exclude(self, example_ids: Tensor) -> None:
        """Rows that are never trained on: weight 0, and the mean of one is that of the others."""

    @abstractmethod
    def scores(self, example_ids_B: Tensor) -> Tensor:
        """The committed scores of these rows."""

    @abstractmethod
    def weights_of(self, scores: Tensor) -> Tensor:
        """Weights that rows with these scores have among the present ones; any shape."""

    @abstractmethod
    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """Give rows scores from outside: those they had before they were refined, or a scout's."""

    @abstractmethod
    def restart(self, example_ids_B: Tensor) -> None:
        """Rows whose response was replaced, so that what is known of them is void: weight one, never seen."""

    def _forget(self, example_ids_B: Tensor) -> None:
        self.num_updates_N[example_ids_B] = 0
        self.last_loss_N[example_ids_B] = math.nan

    @abstractmethod
    def effective_sample_size(self) -> float:
        """``(sum w)^2 / sum w^2`` over all rows, between 1 and N."""

    @abstractmethod
    def entropy(self) -> float:
        """Entropy in nats of the weights as a distribution over rows, at most ``log(N)``."""

    def all_scores(self) -> Tensor:
        """The committed scores of all N rows; a copy."""
        return self.scores(torch.arange(len(self)))

    def all_weights(self) -> Tensor:
        """Weights of all N rows (float32, mean one over those not excluded), by the committed scores."""
        return self.weights_of(self.all_scores())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        return {"num_updates_N": self.num_updates_N, "last_loss_N": self.last_loss_N}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: the state is that of another number of rows.
        """
        if len(state["num_updates_N"]) != len(self):
            raise ValueError(
                f"the checkpoint scores {len(state['num_updates_N'])} training rows, the dataset has {len(self)}: "
                "resume with the dataset the run was started with"
            )
        self.num_updates_N, self.last_loss_N = state["num_updates_N"].clone(), state["last_loss_N"].clone()


class ScoreWeights(RowWeights):
    """Weights that are a map of scores: one score per row, kept in a `ScoreTable`."""

    def __init__(self, num_examples: int, score_map: ScoreMap):
        super().__init__(num_examples)
        self.table = ScoreTable(num_examples, score_map)

    @abstractmethod
    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """The scores these rows will have once ``excess_B`` (nats per token) is committed. Changes nothing."""

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """See `RowWeights`."""
        if not self.is_settled:
            self.table.set(example_ids_B, self._next_scores(example_ids_B, excess_B))
        super().update(example_ids_B, loss_B, excess_B)

    def exclude(self, example_ids: Tensor) -> None:
        """See `RowWeights`."""
        self.table.exclude(example_ids)

    def scores(self, example_ids_B: Tensor) -> Tensor:
        """See `RowWeights`."""
        return self.table.score_N[example_ids_B]

    def weights_of(self, scores: Tensor) -> Tensor:
        """See `RowWeights`."""
        return self.table.weights_of(scores)

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """See `RowWeights`."""
        self.table.set(example_ids_B, scores_B)

    def restart(self, example_ids_B: Tensor) -> None:
        """See `RowWeights`."""
        self.restore(example_ids_B, torch.full((len(example_ids_B),), self.table.neutral_score(example_ids_B)))
        self._forget(example_ids_B)

    def effective_sample_size(self) -> float:
        """See `RowWeights`."""
        return self.table.effective_sample_size()

    def entropy(self) -> float:
        """See `RowWeights`."""
        return self.table.entropy()

    def state_dict(self) -> dict[str, Tensor]:
        """See `RowWeights`."""
        return super().state_dict() | self.table.state_dict() | {"is_settled": torch.tensor(self.is_settled)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        self.table.load_state_dict(state)
        self.is_settled = bool(state["is_settled"])


class SelectorWeights(ScoreWeights):
    """Weights by a `Selector`.

    The loss just measured counts already, so that a row is scored before its first training step, not after it: once a
    model has been trained on a row, its loss says less about the row (memorisation).
    """

    def __init__(self, num_examples: int, selector: Selector):
        super().__init__(num_examples, selector.score_map)
        self.selector = selector
        self.uses_excess = selector.uses_excess

    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        score_B = self.table.score_N[example_ids_B]
        return score_B if self.is_settled else self.selector.next_scores(score_B, excess_B).float()

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """See `RowWeights`."""
        scores_B = self.table.score_N[example_ids_B]
        return self.table.weights_of(self._next_scores(example_ids_B, excess_B), instead_of=scores_B)

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """See `RowWeights`."""
        super().update(example_ids_B, loss_B, excess_B)
        if not self.is_settled:
            self.selector.observe(excess_B)

    def score_rows(self, example_ids_R: Tensor, loss_R: Tensor, excess_R: Tensor) -> None:
        """Score all R rows that will be trained on by the losses of a scout, and settle the scores.

        Args:
            loss_R, excess_R: of the scout, nats per token.
        """
        assert self.selector.can_scout, "checked by the settings"
        self.selector.fit(excess_R)
        ScoreWeights.update(self, example_ids_R, loss_R, excess_R)
        self.is_settled = True

    def settle(self, example_ids_R: Tensor, loss_R: Tensor) -> None:
        """Leave the scores of all R rows as they are, weights one, for want of evidence, and settle them.

        Args:
            loss_R: by a scout that is not believed, nats per token.
        """
        self.is_settled = True
        ScoreWeights.update(self, example_ids_R, loss_R, loss_R)

    def scout_scores(self, excess_B: Tensor) -> Tensor:
        """Scores that rows would have by these excess losses of a scout, in the way that `score_rows` scored all."""
        return self.selector.next_scores(torch.zeros(len(excess_B)), excess_B).float()

    def state_dict(self) -> dict[str, Tensor]:
        """See `RowWeights`."""
        return super().state_dict() | {f"rule.{name}": t for name, t in self.selector.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        rule = {name.removeprefix("rule."): t for name, t in state.items() if name.startswith("rule.")}
        self.selector.load_state_dict(rule)


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

    def _next_scores(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        return self._step(example_ids_B, excess_B)[0][example_ids_B]

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """As published, the weights of a step are those from before its losses."""
        return self.weights_of(self.scores(example_ids_B))

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """See `RowWeights`; O(N)."""
        score_N, self.first_moment_N, self.second_moment_N = self._step(example_ids_B, excess_B)
        self.num_steps += 1
        self.table.set_all(score_N)
        RowWeights.update(self, example_ids_B, loss_B, excess_B)

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


class StaticWeights(RowWeights):
    """Given weights: weighted SFT, or, with all of them one, direct mixing of the two datasets.

    A row's score is its weight.

    Args:
        weight_N: finite and non-negative; divided by its mean here.

    Raises:
        ValueError: all weights are zero.
    """

    uses_excess = False

    def __init__(self, weight_N: Tensor):
        super().__init__(len(weight_N))
        if not weight_N.sum() > 0:
            raise ValueError("the column 'weight' is zero on every training row: give at least one row a weight")
        self.weight_N = (weight_N.double() / weight_N.double().mean()).float()
        self._is_active_N = torch.ones(len(weight_N), dtype=torch.bool)

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """See `RowWeights`."""
        return self.weight_N[example_ids_B]

    def exclude(self, example_ids: Tensor) -> None:
        """See `RowWeights`."""
        self.weight_N[example_ids] = 0
        self._is_active_N[example_ids] = False
        if not self.weight_N.sum() > 0:
            raise ValueError("the column 'weight' is 0 on every training row whose prompt fits: raise --max_length")
        self.weight_N *= self._is_active_N.sum() / self.weight_N.sum()  # tensors: the ratio of equals is exactly one

    def scores(self, example_ids_B: Tensor) -> Tensor:
        """See `RowWeights`."""
        return self.weight_N[example_ids_B]

    def weights_of(self, scores: Tensor) -> Tensor:
        """See `RowWeights`."""
        return scores

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """See `RowWeights`."""
        self.weight_N[example_ids_B] = scores_B

    def restart(self, example_ids_B: Tensor) -> None:
        """See `RowWeights`."""
        self.restore(example_ids_B, torch.ones(len(example_ids_B)))
        self._forget(example_ids_B)

    def effective_sample_size(self) -> float:
        """See `RowWeights`."""
        return effective_sample_size(self.weight_N)

    def entropy(self) -> float:
        """See `RowWeights`."""
        return weight_entropy(self.weight_N)

    def state_dict(self) -> dict[str, Tensor]:
        """See `RowWeights`; the weights too, since refined rows have other ones."""
        return super().state_dict() | {"weight_N": self.weight_N}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        self.weight_N = state["weight_N"].clone()


def make_row_weights(
    selector: str | Selector,
    num_examples: int,
    *,
    score_map: ScoreMap = "bounded",
    learning_rate: float | None = None,
    temperature: float = 0.5,
    weight_N: Tensor | None = None,
) -> RowWeights:
    """The row weights by a selector's name (see the table in `tamis.selection.selectors`), or by an instance.

    Args:
        num_examples: N.
        score_map, learning_rate, temperature: for the names that have one; None takes the default of the name.
        weight_N: the column of selector ``column``.

    Raises:
        ValueError: there is no selector of that name, ``column`` without ``weight_N``, or see `check_selector`.
    """
    if not isinstance(selector, str):
        check_selector(selector)
        return SelectorWeights(num_examples, selector)
    if learning_rate is None:
        learning_rate = DEFAULT_SELECTOR_LEARNING_RATE.get(selector, 0.0)
    match selector:
        case "mirror":
            return SelectorWeights(num_examples, MirrorSelector(learning_rate, score_map))
        case "bmo":
            return SelectorWeights(num_examples, BmoSelector(temperature, score_map))
        case "softmax":
            return AdamWeights(num_examples, "softmax", learning_rate)
        case "sigmoid":
            return AdamWeights(num_examples, "bounded", learning_rate)
        case "column":
            if weight_N is None:
                raise ValueError("selector 'column' needs weight_N, one weight per training row")
            return StaticWeights(weight_N)
        case "none":
            return StaticWeights(torch.ones(num_examples))
    raise ValueError(f"unknown selector {selector!r}: choose a name of BilevelConfig.selector or give a Selector")
