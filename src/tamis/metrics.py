"""Figures by which selections and runs are compared."""

import numpy as np
from numpy.typing import ArrayLike


def auroc(scores: ArrayLike, is_positive: ArrayLike) -> float | None:
    """Probability that a positive row has a higher score than a negative one, ties counting half (Mann-Whitney U).

    Args:
        scores, is_positive: one entry per row.

    Returns:
        A number in [0, 1]; None if one of the two kinds is missing.
    """
    scores, is_positive = np.asarray(scores, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    num_positive, num_negative = is_positive.sum(), (~is_positive).sum()
    if num_positive == 0 or num_negative == 0:
        return None
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = mean_rank[group][is_positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def gap_closure(baseline: float, method: float, oracle: float) -> float | None:
    """``(baseline - method) / (baseline - oracle)``: 0 is as good as the baseline, 1 as good as knowing the clean rows.

    The same for losses and accuracies. None if there is no gap to close.
    """
    return (baseline - method) / (baseline - oracle) + 0.0 if baseline != oracle else None  # + 0.0: no minus zero
