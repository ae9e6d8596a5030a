"""Evidence: whether unseen validation rows differ from training rows, and how much of that is chance.

If no row is wrong, validation rows that a scout has not seen are like any training rows: it does not matter which of
the rows are called validation rows. So the Gaussians are fitted to all rows together, the shares of the validation rows
among them are compared with those of all rows, and the same is done with rows drawn at random from both (a permutation
test; exact within a fold but for the centring of its scores). The strongest of many trials is compared with the
strongest of as many trials by chance, so that trying more does not lead to believing more.

Shape suffixes: K folds, S sampled training rows, V validation rows, J components, B draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tamis.selection.mixture import Array, Sample, falling_ratio, fit_mixture

_NUM_DRAWS = 100
_NUM_ITERATIONS = 60


@dataclass(frozen=True)
class Comparison:
    """Training rows and unseen validation rows under the Gaussians that describe both together.

    Attributes:
        share_J: of the components among all rows.
        training_KSJ: density of each component over that of their mixture at each training row, by the scout of each
            fold.
        validation_VJ: the same at each validation row, by the scout that has not seen it.
    """

    share_J: Array
    training_KSJ: Array
    validation_VJ: Array

    @property
    def evidence(self) -> float:
        """See `evidence_of`."""
        return float(evidence_of(self.validation_VJ[None], self.share_J)[0])


def compare(score_KS: Array, score_V: Array) -> Comparison:
    """Compare rows by their scores.

    Args:
        score_KS: of the training rows by the scout of each fold, in a unit that the folds share.
        score_V: of each validation row by the scout that has not seen it.
    """
    sample = Sample.of(score_KS.ravel(), score_V)
    if sample is None:
        return Comparison(np.ones(1), np.ones((*score_KS.shape, 1)), np.ones((len(score_V), 1)))
    mixture = fit_mixture(sample, tied=True)
    share_J = mixture.training_share

    def ratios(scores: Array) -> Array:
        density = mixture.densities(scores.clip(sample.lowest, sample.highest)) + 1e-300
        return np.asarray(density / (density @ share_J)[..., None])

    return Comparison(share_J, ratios(score_KS), ratios(score_V))


def evidence_of(ratio_BVJ: Array, share_J: Array) -> Array:
    """Twice the log-likelihood ratio (B) of rows between shares of their own and those of all rows; at least zero.

    The shares of their own are the likeliest, made to fall relative to those of all rows: a higher score is never
    better, so rows with higher scores than others are no evidence.
    """
    share_BJ = np.broadcast_to(share_J, (len(ratio_BVJ), len(share_J)))
    for _ in range(_NUM_ITERATIONS):
        share_BJ = share_BJ * np.einsum("bvj,bv->bj", ratio_BVJ, 1 / np.einsum("bvj,bj->bv", ratio_BVJ, share_BJ))
        share_BJ /= ratio_BVJ.shape[1]
    falling_BJ = np.stack([share_J * falling_ratio(share_J, share_J_of_draw) for share_J_of_draw in share_BJ])
    return np.asarray(2 * np.log(np.einsum("bvj,bj->bv", ratio_BVJ, falling_BJ)).sum(axis=1).clip(min=0.0))


def evidence_by_chance(comparisons: Sequence[Comparison], fold_V: NDArray[np.int64], seed: int) -> float:
    """How strong the strongest evidence of these trials is on average if validation rows are like training rows.

    Args:
        fold_V: of each validation row.
        seed: of the draws, which are the same in all trials.
    """
    num_training = comparisons[0].training_KSJ.shape[1]
    draw_BV = _draws(num_training, fold_V, np.random.default_rng(seed))
    is_training_BV = draw_BV < num_training
    strongest_B = np.zeros(_NUM_DRAWS)
    for comparison in comparisons:
        ratio_BVJ = np.where(
            is_training_BV[..., None],
            comparison.training_KSJ[fold_V, draw_BV.clip(max=num_training - 1)],
            comparison.validation_VJ[(draw_BV - num_training).clip(min=0)],
        )
        strongest_B = np.maximum(strongest_B, evidence_of(ratio_BVJ, comparison.share_J))
    return float(strongest_B.mean())


def belief_in(evidence: float, by_chance: float) -> float:
    """Probability that validation rows differ from training rows.

    Akaike's weight ``1 / (1 + exp(k - evidence / 2))`` against no difference. The number of parameters k stands there
    for the evidence that they lead to by chance, which is measured here instead (as in Ishiguro et al. 1997).
    """
    return 1 / (1 + math.exp(min(by_chance - evidence / 2, 700.0))) if evidence > 0 else 0.0


def _draws(num_training: int, fold_V: NDArray[np.int64], generator: np.random.Generator) -> NDArray[np.int64]:
    """In place of each validation row (B, V) another row of its fold: a training row s, or validation row v as S + v.

    No row is drawn twice, so that a training row stands for one validation row, whatever the fold.
    """
    draw_BV = np.empty((_NUM_DRAWS, len(fold_V)), dtype=np.int64)
    for draw_V in draw_BV:
        free = np.arange(num_training)
        for k in np.unique(fold_V):
            (of_fold,) = np.nonzero(fold_V == k)
            draw_V[of_fold] = generator.choice(np.append(free, num_training + of_fold), len(of_fold), replace=False)
            free = np.setdiff1d(free, draw_V[of_fold], assume_unique=True)
    return draw_BV
