"""Calibration: from the scores of training rows and of unseen validation rows to the probability that a row is right.

Right training rows and validation rows that a scout has not been trained on are exchangeable, so the latter show what
a right row looks like to the scout. Both samples are described by the same few Gaussians; only the shares differ:

    training rows      f(s) = sum_j t_j g_j(s)
    validation rows    h(s) = sum_j v_j g_j(s)

With ``pi`` the share of right rows, ``f = pi h + (1 - pi) wrong`` and ``wrong >= 0``, so that ``pi <= t_j / v_j`` in
every component. The largest such ``pi`` is the estimate (that of mixture proportion estimation; Blanchard et al. 2010),
and ``p_right = pi h / f`` is one less the local false discovery rate (Efron et al. 2001), here made to fall with the
score. Maximum likelihood by EM over both samples at once is our derivation; figures in LOG.md.

A score is a loss or an excess loss, in any unit: larger is worse. Shape suffixes: R training rows, V validation rows,
J components, X bins.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_NUM_BINS = 100
_CLIP = (
    0.002  # share of the training rows on either side whose scores are drawn in: a Gaussian must not follow outliers
)
_MIN_DEVIATION = 0.05  # of a component, in standard deviations of the scores
_RANK_WIDTH = 0.03  # of the training rows: how far apart rows may rank and still be taken for alike
_MAX_ITERATIONS = 400
_NUM_RESAMPLES = 60  # of the interval; each is fitted from the mixture of all rows on


@dataclass(frozen=True)
class Calibration:
    """What the scores of a scout mean.

    Attributes:
        mean, deviation: of the J components, by rising mean.
        training_share, validation_share: t and v, each summing to one.
        lowest, highest: scores beyond these are taken to be these.
        evidence: twice the log-likelihood ratio of the validation rows between their own shares and those of the
            training rows: how surely the two differ.
        belief: probability that they differ at all (Akaike's weight); `p_right` is one as far as they do not.
        share_interval: of `share_right`, 90% of the bootstrap, given this scout and this belief.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    training_share: tuple[float, ...]
    validation_share: tuple[float, ...]
    lowest: float
    highest: float
    evidence: float
    belief: float
    share_interval: tuple[float, float]

    @property
    def is_believed(self) -> bool:
        """Whether the scores may decide anything."""
        return self.belief >= 0.5

    @property
    def mixture_share(self) -> float:
        """The share of right rows (pi), if the validation rows differ from the training rows at all."""
        return _share_right(np.array(self.training_share), np.array(self.validation_share))

    @property
    def share_right(self) -> float:
        """The share of right rows to expect: `mixture_share` as far as that is believed, else one."""
        return self.belief * self.mixture_share + 1 - self.belief

    def p_right(self, scores: Array) -> Array:
        """Probability that rows with these scores are right, of any shape; falls with the score."""
        means, deviations = np.array(self.mean), np.array(self.deviation)
        grid = np.linspace(self.lowest, self.highest, 1001)
        density_XJ = _densities(grid, means, deviations) * np.array(self.training_share)
        ratio = _falling_ratio(np.array(self.training_share), np.array(self.validation_share))
        density = density_XJ.sum(axis=1) + 1e-300
        posterior = _falling((density_XJ @ (ratio / ratio.max())) / density, density)
        return self.belief * np.interp(scores, grid, posterior) + 1 - self.belief

    def to_dict(self) -> dict[str, Any]:
        """Plain values, from which `from_dict` makes it again."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        found: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**found)


def fit(
    training_R: Array,
    validation_V: Array,
    *,
    weight_V: Array | None = None,
    belief: float | None = None,
    interval_seed: int | None = None,
) -> Calibration:
    """Calibrate scores.

    Args:
        training_R: of training rows, right and wrong ones.
        validation_V: of validation rows that the scout has not seen, on the scale of the training rows' scores.
        weight_V: what each of the latter counts; one when not given.
        belief: when the evidence is known already, from scores that were not `placed`.
        interval_seed: of the bootstrap of `Calibration.share_interval`; when not given it is left out (0, 1).
    """
    lowest, highest = np.quantile(training_R, [_CLIP, 1 - _CLIP])
    if highest - lowest < 1e-9 * max(1.0, abs(lowest)):  # all are the same: there is nothing to tell rows apart by
        return Calibration((0.0,), (1.0,), (1.0,), (1.0,), float(lowest), float(lowest) + 1.0, 0.0, 0.0, (1.0, 1.0))
    training, validation = training_R.clip(lowest, highest), validation_V.clip(lowest, highest)
    counts, edges = np.histogram(training, _NUM_BINS, (lowest, highest))
    centers = (edges[1:] + edges[:-1])[counts > 0] / 2
    weight_V = np.ones(len(validation)) if weight_V is None else weight_V
    sample = _Sample(centers, counts[counts > 0].astype(float), validation, weight_V)
    found = [_expectation_maximisation(sample, *start) for start in _starts(training)]
    num_rows = len(training) + weight_V.sum()
    best = min(found, key=lambda m: (4 * len(m.mean) - 2) * math.log(num_rows) - 2 * m.log_likelihood)  # BIC
    density_VJ = _densities(validation, best.mean, best.deviation)
    ratio_V = (density_VJ @ best.validation_share + 1e-300) / (density_VJ @ best.training_share + 1e-300)
    falls = _falling_ratio(best.training_share, best.validation_share)
    evidence = 2 * float(weight_V @ np.log(ratio_V)) if falls.max() > falls.min() else 0.0
    # Akaike's weight of the mixture against equal shares: J - 1 numbers more.
    if belief is None:
        belief = 1 / (1 + math.exp(min(len(best.mean) - 1 - evidence / 2, 700.0))) if evidence > 0 else 0.0
    return Calibration(
        tuple(best.mean.tolist()),
        tuple(best.deviation.tolist()),
        tuple(best.training_share.tolist()),
        tuple(best.validation_share.tolist()),
        float(lowest),
        float(highest),
        evidence,
        belief,
        (0.0, 1.0) if interval_seed is None else _interval(sample, best, belief, interval_seed),
    )


def expected_auroc(p_right_R: Array, score_R: Array) -> float:
    """Probability that a right row has a lower score than a wrong one, if the rows are right with these probabilities.

    NaN where no row is expected to be wrong, or none to be right.
    """
    p_R = p_right_R[np.argsort(score_R, kind="stable")]
    wrong_above_R = (1 - p_R)[::-1].cumsum()[::-1] - (1 - p_R) / 2
    total = p_R.sum() * (1 - p_R).sum()
    return float((p_R * wrong_above_R).sum() / total) if total > 1e-9 else math.nan


def placed(rank_V: Array, rank_VS: Array, score_S: Array, p_right_S: Array) -> tuple[Array, Array]:
    """Where validation rows would stand among the scores of a scout that has seen as much as the final one.

    A validation row is scored by a scout that has not seen its fold, which is weaker than the final one. Right training
    rows that the weaker scout ranks next to it tell where such rows stand for the final scout (our derivation).

    Args:
        rank_V: of each validation row among sampled training rows by the scout of its fold, in [0, 1].
        rank_VS: of these training rows by the same scout.
        score_S: of these training rows by the final scout.
        p_right_S: of these training rows, by a first calibration.

    Returns:
        Scores, the quantiles of such rows, and their weights, which sum to the number of validation rows.
    """
    order = np.argsort(score_S)
    nearness_VS = np.exp(-0.5 * ((rank_VS - rank_V[:, None]) / _RANK_WIDTH) ** 2) * p_right_S.clip(min=1e-3)
    below_VS = nearness_VS[:, order].cumsum(axis=1)
    quantiles = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    scores = [np.interp(quantiles * below_S[-1], below_S, score_S[order]) for below_S in below_VS]
    return np.concatenate(scores), np.full(len(scores) * len(quantiles), 1 / len(quantiles))


@dataclass(frozen=True)
class _Sample:
    """Both samples: the training rows in bins (centers, counts), the validation rows one by one with their weights."""

    centers: Array
    counts: Array
    validation: Array
    weight: Array


@dataclass(frozen=True)
class _Mixture:
    """J components by rising mean, their shares in both samples, and the likelihood of all rows."""

    mean: Array
    deviation: Array
    training_share: Array
    validation_share: Array
    log_likelihood: float


def _log_densities(scores: Array, mean: Array, deviation: Array) -> Array:
    z = (scores[:, None] - mean) / deviation
    return np.asarray(-0.5 * z**2 - np.log(deviation) - 0.5 * math.log(2 * math.pi))


def _densities(scores: Array, mean: Array, deviation: Array) -> Array:
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
    sample: _Sample, mean: Array, deviation: Array, share: Array, max_iterations: int = _MAX_ITERATIONS
) -> _Mixture:
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
    order = np.argsort(mean)
    return _Mixture(mean[order], deviation[order], share[0][order], share[1][order], before)


def _falling(values: Array, weights: Array) -> Array:
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


def _falling_ratio(training_share: Array, validation_share: Array) -> Array:
    """``v / t`` of each component, made to fall with the mean: a higher score is never better."""
    return _falling(validation_share / training_share, training_share)


def _share_right(training_share: Array, validation_share: Array) -> float:
    return float(min(1 / _falling_ratio(training_share, validation_share).max(), 1.0))


def _interval(sample: _Sample, mixture: _Mixture, belief: float, seed: int) -> tuple[float, float]:
    """Of the share of right rows, 90%: by the bootstrap over the rows of both samples."""
    generator, shares = np.random.default_rng(seed), []
    num_training, num_validation = int(sample.counts.sum()), len(sample.validation)
    num_each = round(1 / sample.weight[0])  # scores that stand for one validation row: see `placed`
    share = np.stack([mixture.training_share, mixture.validation_share])
    for _ in range(_NUM_RESAMPLES):
        counts = generator.multinomial(num_training, sample.counts / num_training).astype(float)
        rows = generator.integers(num_validation // num_each, size=num_validation // num_each)
        places = (rows[:, None] * num_each + np.arange(num_each)).ravel()
        drawn = _Sample(
            sample.centers[counts > 0], counts[counts > 0], sample.validation[places], sample.weight[places]
        )
        found = _expectation_maximisation(drawn, mixture.mean, mixture.deviation, share, max_iterations=60)
        shares.append(belief * _share_right(found.training_share, found.validation_share) + 1 - belief)
    low, high = np.quantile(shares, [0.05, 0.95])
    return float(low), float(high)
