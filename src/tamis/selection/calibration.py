"""Calibration: from the scores of training rows and of unseen validation rows to the probability that a row is right.

Right training rows and validation rows that a scout has not been trained on are exchangeable, so the latter show what
a right row looks like to the scout. Both samples are described by the same few Gaussians; only the shares differ:

    training rows      f(s) = sum_j t_j g_j(s)
    validation rows    h(s) = sum_j v_j g_j(s)

With ``pi`` the share of right rows, ``f = pi h + (1 - pi) wrong`` and ``wrong >= 0``, so that ``pi <= t_j / v_j`` in
every component. The largest such ``pi`` is the estimate (that of mixture proportion estimation; Blanchard et al. 2010),
with ``v`` as even as the data allow (`_validation_share`), and ``p_right = pi h / f`` is one less the local false
discovery rate (Efron et al. 2001), here made to fall with the score. Maximum likelihood by EM over both samples at once
is our derivation; figures in LOG.md.

A score is a loss or an excess loss, in any unit: larger is worse. Shape suffixes: R training rows, V validation rows,
J components, X bins.
"""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from tamis.selection.mixture import (
    Array,
    Mixture,
    Sample,
    densities,
    falling,
    falling_ratio,
    fit_mixture,
    refit,
    shares_below,
)

# Share of right rows below which the validation rows are probably of another kind than these, or easier.
FEW_RIGHT = 0.05
_TOLERANCE = 0.25  # of the log-likelihood, which falls by 0.23 from its peak to a quartile of a normal error
_MIN_ROWS = 3.0  # validation rows that must stand behind a share of right rows
_RANK_WIDTH = 0.03  # of the training rows: how far apart rows may rank and still be taken for alike
_NUM_BISECTIONS = 8
_NUM_RESAMPLES = 60  # of the interval; each is fitted from the mixture of all rows on


@dataclass(frozen=True)
class Calibration:
    """What the scores of a scout mean.

    Attributes:
        mean, deviation: of the J components, by rising mean.
        training_share, validation_share: t and v, each summing to one.
        lowest, highest: scores beyond these are taken to be these.
        belief: probability that they differ at all (`tamis.selection.evidence`); `p_right` is one as far as they do
            not.
        share_interval: of `share_right`, 90% of the bootstrap, given this scout and this belief.
    """

    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    training_share: tuple[float, ...]
    validation_share: tuple[float, ...]
    lowest: float
    highest: float
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
        density_XJ = densities(grid, means, deviations) * np.array(self.training_share)
        ratio = falling_ratio(np.array(self.training_share), np.array(self.validation_share))
        density = density_XJ.sum(axis=1) + 1e-300
        posterior = falling((density_XJ @ (ratio / ratio.max())) / density, density)
        return self.belief * np.interp(scores, grid, posterior) + 1 - self.belief

    def border(self) -> float | None:
        """The score from which on rows are more likely wrong than right; None where all rows are alike in that."""
        grid = np.linspace(self.lowest, self.highest, 1001)
        is_wrong = self.p_right(grid) < 0.5
        return float(grid[is_wrong.argmax()]) if is_wrong.any() and not is_wrong.all() else None

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
    belief: float = 1.0,
    interval_seed: int | None = None,
) -> Calibration:
    """Calibrate scores.

    Args:
        training_R: of training rows, right and wrong ones.
        validation_V: of validation rows that the scout has not seen, on the scale of the training rows' scores.
        weight_V: what each of the latter counts; one when not given.
        belief: see `Calibration`.
        interval_seed: of the bootstrap of `Calibration.share_interval`; when not given it is left out (0, 1).
    """
    sample = Sample.of(training_R, validation_V, weight_V)
    if sample is None:  # all scores are the same: there is nothing to tell rows apart by
        lowest = float(training_R[0])
        return Calibration((0.0,), (1.0,), (1.0,), (1.0,), lowest, lowest + 1.0, 0.0, (1.0, 1.0))
    best = fit_mixture(sample)
    training_share = best.training_share.clip(min=0.5 / len(training_R))
    validation_share = _validation_share(sample, best, training_share)
    if _share_right(training_share, validation_share) > 1 - 1e-9:
        belief = 0.0
    return Calibration(
        tuple(best.mean.tolist()),
        tuple(best.deviation.tolist()),
        tuple(training_share.tolist()),
        tuple(validation_share.tolist()),
        sample.lowest,
        sample.highest,
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


def _share_right(training_share: Array, validation_share: Array) -> float:
    return float(min(1 / falling_ratio(training_share, validation_share).max(), 1.0))


def _validation_share(sample: Sample, mixture: Mixture, training_share: Array) -> Array:
    """Shares of validation rows with which as many training rows are right as the data do not speak against.

    The least of a few ratios with errors is too small on average, and the fewer rows are wrong, the more right ones
    that costs. So it is not the likeliest shares that count, but those of the largest share of right rows whose
    likelihood is as good within `_TOLERANCE` (a one-sided profile likelihood; figures in LOG.md).
    """
    share = _supported(training_share, mixture.validation_share, sample.weight.sum())
    density_VJ = mixture.densities(sample.validation) + 1e-300
    low, high = _share_right(training_share, share), 1.0
    _, best = shares_below(density_VJ, sample.weight, share, training_share / low)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        found, log_likelihood = shares_below(density_VJ, sample.weight, share, training_share / middle)
        if log_likelihood >= best - _TOLERANCE:
            low, share = middle, found
        else:
            high = middle
    return share


def _supported(training_share: Array, validation_share: Array, num_validation: float) -> Array:
    """The shares of validation rows, where the components with the best scores hold some of them.

    One validation row with a lower score than all others would have a component of its own, in which there is hardly a
    training row: hardly any row were right. So it counts with the next component.
    """
    num_J = (validation_share * num_validation).cumsum()
    first = slice(0, int(np.searchsorted(num_J, min(_MIN_ROWS, num_validation) - 1e-9)) + 1)
    together = training_share[first] * validation_share[first].sum() / training_share[first].sum()
    return np.concatenate([together, validation_share[first.stop :]])


def _interval(sample: Sample, mixture: Mixture, belief: float, seed: int) -> tuple[float, float]:
    """Of the share of right rows, 90%: by the bootstrap over the rows of both samples."""
    generator, shares = np.random.default_rng(seed), []
    num_training, num_validation = int(sample.counts.sum()), len(sample.validation)
    num_each = round(1 / sample.weight[0])  # scores that stand for one validation row: see `placed`
    for _ in range(_NUM_RESAMPLES):
        counts = generator.multinomial(num_training, sample.counts / num_training).astype(float)
        rows = generator.integers(num_validation // num_each, size=num_validation // num_each)
        places = (rows[:, None] * num_each + np.arange(num_each)).ravel()
        drawn = replace(
            sample,
            centers=sample.centers[counts > 0],
            counts=counts[counts > 0],
            validation=sample.validation[places],
            weight=sample.weight[places],
        )
        found = refit(drawn, mixture, max_iterations=60)
        share = _validation_share(drawn, found, found.training_share)
        shares.append(belief * _share_right(found.training_share, share) + 1 - belief)
    low, high = np.quantile(shares, [0.05, 0.95])
    return float(low), float(high)
