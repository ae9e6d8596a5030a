"""Mixtures: the scores of training rows and validation rows as the same few Gaussians in other shares.

    training rows      f(s) = sum_j t_j g_j(s)
    validation rows    h(s) = sum_j v_j g_j(s)

Fitted by expectation maximisation over both samples at once (our derivation), from several starts; the number of
Gaussians, at most three, is chosen by the BIC.

Shape suffixes: R training rows, V validation rows, J components, X bins.
"""

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NUM_BINS = 100
_CLIP = 0.002  # share of the training rows on either side that are drawn in: a Gaussian must not follow outliers
_MIN_DEVIATION = 0.05  # of a component, in standard deviations of the scores
_MAX_ITERATIONS = 400
_MAX_CAPPED_ITERATIONS = 50
_TINY = 1e-12


@dataclass(frozen=True)
class Sample:
    """Both samples: the training rows as they are and in bins, the validation rows one by one with their weights.

    Attributes:
        lowest, highest: scores beyond these are taken to be these.
    """

    training: Array
    centers: Array
    counts: Array
    validation: Array
    weight: Array
    lowest: float
    highest: float

    @classmethod
    def of(cls, training_R: Array, validation_V: Array, weight_V: Array | None = None) -> Self | None:
        """The sample of these scores; None where those of the training rows are all the same."""
        lowest, highest = (float(end) for end in np.quantile(training_R, [_CLIP, 1 - _CLIP]))
        if highest - lowest < 1e-9 * max(1.0, abs(lowest)):
            return None
        training, validation = training_R.clip(lowest, highest), validation_V.clip(lowest, highest)
        counts, edges = np.histogram(training, _NUM_BINS, (lowest, highest))
        centers = (edges[1:] + edges[:-1])[counts > 0] / 2
        weight = np.ones(len(validation)) if weight_V is None else weight_V
        return cls(training, centers, counts[counts > 0].astype(float), validation, weight, lowest, highest)


@dataclass(frozen=True)
class Mixture:
    """J components by rising mean, their shares in both samples, and the likelihood of all rows."""

    mean: Array
    deviation: Array
    training_share: Array
    validation_share: Array
    log_likelihood: float

    def densities(self, scores: Array) -> Array:
        """Of each component (last dimension) at scores of any shape."""
        return densities(scores, self.mean, self.deviation)


def fit_mixture(sample: Sample, *, tied: bool = False) -> Mixture:
    """The mixture that is best by the BIC.

    Args:
        tied: both samples have the same shares.
    """
    found = [_expectation_maximisation(sample, *start, tied=tied) for start in _starts(sample.training)]
    num_rows = len(sample.training) + sample.weight.sum()
    num_of_shares = 1 if tied else 2

    def bic(mixture: Mixture) -> float:
        num_components = len(mixture.mean)
        num_parameters = 2 * num_components + num_of_shares * (num_components - 1)
        return num_parameters * math.log(num_rows) - 2 * mixture.log_likelihood

    return min(found, key=bic)


def refit(sample: Sample, mixture: Mixture, max_iterations: int) -> Mixture:
    """The mixture of another sample, from that of a like one on."""
    share = np.stack([mixture.training_share, mixture.validation_share])
    return _expectation_maximisation(sample, mixture.mean, mixture.deviation, share, max_iterations=max_iterations)


def _log_densities(scores: Array, mean: Array, deviation: Array) -> Array:
    z = (scores[..., None] - mean) / deviation
    return np.asarray(-0.5 * z**2 - np.log(deviation) - 0.5 * math.log(2 * math.pi))


def densities(scores: Array, mean: Array, deviation: Array) -> Array:
    """Of each Gaussian (last dimension) at scores of any shape."""
    return np.asarray(np.exp(_log_densities(scores, mean, deviation)))


def _starts(training: Array) -> list[tuple[Array, Array, Array]]:
    """Means, deviations and shares to begin with: slices of the training rows between quantiles."""
    slices = [[0, 0.1, 1], [0, 0.5, 1], [0, 0.9, 1], [0, 0.12, 0.68, 1], [0, 0.36, 0.84, 1]]
    starts = []
    for quantiles in slices:
        ordered = np.sort(training)
        parts = np.split(ordered, (np.array(quantiles[1:-1]) * len(ordered)).astype(int))
        if min(map(len, parts)) < 2:
            continue
        means, deviations = np.array([p.mean() for p in parts]), np.array([p.std() for p in parts])
        starts.append((means, deviations + 0.1 * training.std() + 1e-12, np.diff(quantiles)))
    # One component, which tells no rows apart, where there are too few rows for two.
    return starts or [(np.array([training.mean()]), np.array([training.std() + 1e-12]), np.ones(1))]


def _expectation_maximisation(
    sample: Sample,
    mean: Array,
    deviation: Array,
    share: Array,
    *,
    tied: bool = False,
    max_iterations: int = _MAX_ITERATIONS,
) -> Mixture:
    """The mixture of both samples that is likeliest, from a start on; ``share`` is that of training rows, or both."""
    x = np.concatenate([sample.centers, sample.validation])
    count = np.concatenate([sample.counts, sample.weight])
    is_training = np.arange(len(x)) < len(sample.centers)
    average = np.average(sample.centers, weights=sample.counts)
    spread = math.sqrt(np.average((sample.centers - average) ** 2, weights=sample.counts))
    floor, before = max(_MIN_DEVIATION * spread, 1e-12), -math.inf
    share = np.broadcast_to(share, (2, len(mean)))
    for iteration in range(max_iterations):
        log_joint = _log_densities(x, mean, deviation) + np.log(np.where(is_training[:, None], share[0], share[1]))
        peak = log_joint.max(axis=1, keepdims=True)
        joint = np.exp(log_joint - peak)
        total = joint.sum(axis=1, keepdims=True)
        log_likelihood = float(count @ (peak + np.log(total))[:, 0])
        if iteration > 20 and log_likelihood - before < 1e-7 * abs(log_likelihood):
            break
        before = log_likelihood
        membership = joint / total * count[:, None]
        size = membership.sum(axis=0) + 1e-9
        mean = (membership * x[:, None]).sum(axis=0) / size
        deviation = np.sqrt((membership * (x[:, None] - mean) ** 2).sum(axis=0) / size).clip(min=floor)
        of_training = membership[is_training].sum(axis=0) + 1e-9
        of_training /= of_training.sum()
        of_validation = membership[~is_training].sum(axis=0) + 1e-9
        share = np.stack([of_training, of_validation / of_validation.sum()])
        if tied:
            share = np.broadcast_to(size / size.sum(), share.shape)
    order = np.argsort(mean)
    return Mixture(mean[order], deviation[order], share[0][order], share[1][order], before)


def shares_below(density_VJ: Array, weight_V: Array, share_J: Array, cap_J: Array) -> tuple[Array, float]:
    """The likeliest shares of the validation rows of which none is above its cap, and their log-likelihood.

    Args:
        density_VJ: of each component at each row, positive.
        weight_V: what the rows count.
        share_J: to begin with.
        cap_J: the caps, which sum to at least one.
    """
    before = -math.inf
    for _ in range(_MAX_CAPPED_ITERATIONS):
        share_J = _capped(share_J + _TINY, cap_J)
        total_V = density_VJ @ share_J
        log_likelihood = float(weight_V @ np.log(total_V))
        if log_likelihood - before < 1e-3:
            break
        before, likeliest_J = log_likelihood, share_J
        share_J = share_J * ((weight_V / total_V) @ density_VJ) / weight_V.sum()
    return likeliest_J, before


def _capped(values_J: Array, cap_J: Array) -> Array:
    """Shares in proportion to positive values, but none above its cap."""
    is_free_J, share_J = np.ones(len(values_J), bool), values_J / values_J.sum()
    while (is_above_J := is_free_J & (share_J > cap_J * (1 + 1e-12))).any() and not is_above_J.all():
        is_free_J &= ~is_above_J
        left = 1 - cap_J[~is_free_J].sum()
        share_J = np.where(is_free_J, values_J / max(values_J[is_free_J].sum(), _TINY) * left, cap_J)
    return np.asarray(share_J)


def falling(values: Array, weights: Array) -> Array:
    """The falling sequence next to ``values`` in weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        pools.append((value, weight, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (a, weight_a, count_a), (b, weight_b, count_b) = pools[-2:]
            pools[-2:] = [
                ((a * weight_a + b * weight_b) / (weight_a + weight_b), weight_a + weight_b, count_a + count_b)
            ]
    return np.repeat([value for value, _, _ in pools], [count for _, _, count in pools])


def falling_ratio(training_share: Array, validation_share: Array) -> Array:
    """``v / t`` of each component, made to fall with the mean: a higher score is never better."""
    return falling(validation_share / training_share, training_share)
