"""Row weights: what is known of every training row, and what it weighs.

Scores come from a scout before training (`ScoutWeights`), along the steps from a rule (`SelectorWeights`, in O(batch))
or from SEAL's Adam (`AdamWeights`, O(N) a step), or the weights are given (`StaticWeights`). 12 bytes a row are kept
here, 4 more by the reference, 8 more by Adam.

Shape suffixes: B rows of a batch, R rows that a scout has measured, N rows of the training dataset.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tamis.bilevel import effective_sample_size, weight_entropy
from tamis.selection.scores import ScoreTable, TableMap
from tamis.selection.selectors import Selector


class RowWeights(ABC):
    """Weights of the N training rows, mean one over those that are trained on.

    Attributes:
        uses_excess: whether the losses of the steps change anything.
        num_updates_N: how often each row was seen (int32).
        last_loss_N: its loss when last seen, nats per token (float32, NaN before; a scout sees all rows).
    """

    uses_excess = True

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
        """Commit one optimizer step: the rows of all its micro-batches and ranks.

        Args:
            loss_B, excess_B: nats per token, float32.
        """
        self.num_updates_N.index_add_(0, example_ids_B, torch.ones(len(example_ids_B), dtype=torch.int32))
        self.last_loss_N[example_ids_B] = loss_B.float()

    def visits_N(self) -> Tensor | None:
        """How often each row is to be visited in an epoch on average; None where each is visited once.

        The same tensor as long as nothing changes.
        """
        return None

    def p_right_N(self) -> Tensor:
        """Probability that each row is right (float32), NaN where it is not known."""
        return torch.full((len(self),), math.nan)

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

    def __init__(self, num_examples: int, score_map: TableMap):
        super().__init__(num_examples)
        self.table = ScoreTable(num_examples, score_map)

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
        return super().state_dict() | self.table.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        self.table.load_state_dict(state)


class ScoutWeights(ScoreWeights):
    """Weights by the probability that a row is right, which a scout has found before training; settled from then on.

    A row's score is the log-odds of that probability p, and its weight ``p^2`` over the mean: the probability, times
    the confidence in it (our choice, docs/method.md). The weight is not a coefficient of the row's loss but how often
    the row is visited: the expected gradient is the same, rows that are surely wrong cost nothing, and a step has as
    many useful rows as if they were not there.
    """

    uses_excess = False
    _MAX_LOG_ODDS = 30.0

    def __init__(self, num_examples: int):
        super().__init__(num_examples, "squared")
        self.table.set_all(torch.full((num_examples,), self._MAX_LOG_ODDS))
        self.is_known = False
        self._visits_N: Tensor | None = None

    def settle(self, example_ids_R: Tensor, p_right_R: Tensor) -> None:
        """Take over what a scout has found for all R rows that are trained on."""
        self.settle_scores(example_ids_R, self.scores_of(p_right_R))

    def settle_scores(self, example_ids_R: Tensor, scores_R: Tensor) -> None:
        """The same from the scores of an earlier run."""
        self.restore(example_ids_R, scores_R)
        self.is_known = True

    def scores_of(self, p_right: Tensor) -> Tensor:
        """The scores of rows with these probabilities; any shape."""
        return torch.logit(p_right.double()).clamp(-self._MAX_LOG_ODDS, self._MAX_LOG_ODDS).float()

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """One for each visit: the weight is in how many there are."""
        return torch.ones(len(example_ids_B))

    def visits_N(self) -> Tensor | None:
        """See `RowWeights`."""
        if self._visits_N is None and self.is_known:
            self._visits_N = self.all_weights()
        return self._visits_N

    def restore(self, example_ids_B: Tensor, scores_B: Tensor) -> None:
        """See `RowWeights`."""
        super().restore(example_ids_B, scores_B)
        self._visits_N = None

    def p_right_N(self) -> Tensor:
        """See `RowWeights`."""
        return torch.sigmoid(self.all_scores()) if self.is_known else super().p_right_N()

    def num_useful(self) -> float | None:
        """How many rows that are surely right all rows together are worth; None where it is not known."""
        return float(self.table.sums[0]) if self.is_known else None

    def state_dict(self) -> dict[str, Tensor]:
        """See `RowWeights`."""
        return super().state_dict() | {"is_known": torch.tensor(self.is_known)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        self.is_known, self._visits_N = bool(state["is_known"]), None


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
        return self.selector.next_scores(score_B, excess_B).float()

    def weights(self, example_ids_B: Tensor, excess_B: Tensor) -> Tensor:
        """See `RowWeights`."""
        scores_B = self.table.score_N[example_ids_B]
        return self.table.weights_of(self._next_scores(example_ids_B, excess_B), instead_of=scores_B)

    def update(self, example_ids_B: Tensor, loss_B: Tensor, excess_B: Tensor) -> None:
        """See `RowWeights`."""
        self.table.set(example_ids_B, self._next_scores(example_ids_B, excess_B))
        self.selector.observe(excess_B)
        super().update(example_ids_B, loss_B, excess_B)

    def state_dict(self) -> dict[str, Tensor]:
        """See `RowWeights`."""
        return super().state_dict() | {f"rule.{name}": t for name, t in self.selector.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """See `RowWeights`."""
        super().load_state_dict(state)
        rule = {name.removeprefix("rule."): t for name, t in state.items() if name.startswith("rule.")}
        self.selector.load_state_dict(rule)


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
            raise ValueError("the column 'weight' is 0 on every training row whose prompt fits: raise `max_length`")
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
