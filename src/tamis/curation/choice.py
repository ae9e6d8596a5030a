"""Which rows are kept: by the weights of a run, as `weights.parquet` has them."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from tamis.settings import warn_without_effect

logger = logging.getLogger(__name__)

_NOT_KNOWN = "the run does not know how likely its rows are right"
_NOTHING_COUNTED = "no share, number or sample of the rows is asked for"

Mask = np.ndarray[Any, np.dtype[np.bool_]]
Ranks = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
Numbers = np.ndarray[Any, np.dtype[np.floating[Any]]]


@dataclass(frozen=True)
class Choice:
    """How many rows are kept, and which; of the first three at most one is given.

    Attributes:
        keep: ``auto``, the rows that are more likely right than wrong; or a share of the rows, the best ones.
        top_k: that many rows, the best ones.
        min_p_right: the rows with at least this probability of being right.
        sample: of those, draw so many at random, each with a chance in proportion to its weight.
        per_source: shares, numbers and samples are of the rows of each source.
        seed: of the sample.

    Raises:
        ValueError: a value is out of range, or two of the first three are given.
    """

    keep: str = "auto"
    top_k: int | None = None
    min_p_right: float | None = None
    sample: int | None = None
    per_source: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("top_k", "min_p_right") if getattr(self, name) is not None]
        given += ["keep"] if self.keep != "auto" else []
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` both say which rows are kept: give one of them")
        for name in ("top_k", "sample"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.min_p_right is not None and not 0 <= self.min_p_right <= 1:
            raise ValueError(f"min_p_right must lie between 0 and 1, got {self.min_p_right:g}")
        if self.share is not None and not 0 < self.share <= 1:
            raise ValueError(f"keep must be 'auto' or a share above 0 and at most 1, got {self.keep}")
        inactive = {
            _NOTHING_COUNTED: [] if self.ranks or self.sample is not None else ["per_source"],
            "nothing is drawn": ["seed"] if self.sample is None else [],
        }
        warn_without_effect([name for name in ("per_source", "seed") if getattr(self, name)], inactive)

    @property
    def share(self) -> float | None:
        """The share of the rows to keep; None for ``auto``."""
        if self.keep == "auto":
            return None
        try:
            return float(self.keep)
        except ValueError:
            raise ValueError(f"keep must be 'auto' or a share above 0 and at most 1, got {self.keep!r}") from None

    @property
    def ranks(self) -> bool:
        """Whether rows are told apart by their rank."""
        return self.top_k is not None or self.share is not None

    def rows(self, weights: pa.Table) -> Mask:
        """Whether each row is kept.

        Args:
            weights: N rows of `weights.parquet`.

        Raises:
            ValueError: the run has not told the rows apart, or no row is left.
        """
        p_right_N = _column(weights, "p_right")
        if self.min_p_right is not None:
            if np.isnan(p_right_N).all():
                raise ValueError(f"{_NOT_KNOWN}: `min_p_right` has nothing to compare. Use `keep` or `top_k`")
            chosen_N = p_right_N >= self.min_p_right
        elif self.ranks:
            rank_N = ranks(weights)
            chosen_N = self._per_source(weights, rank_N > 0, lambda inside_N: self._best(rank_N, inside_N))
        else:
            chosen_N = weights["kept"].to_numpy()
            if np.isnan(p_right_N).all():
                logger.warning(f"{_NOT_KNOWN}: `keep=auto` keeps every row that was trained on")
        if self.sample is not None:
            weight_N = _column(weights, "weight")
            chosen_N = self._per_source(weights, chosen_N, lambda inside_N: self._drawn(weight_N, inside_N))
        if not chosen_N.any():
            raise ValueError(f"no row is kept. {self._remedy()}")
        return chosen_N

    def _remedy(self) -> str:
        if self.share is not None:
            return "Raise `keep`, or use `top_k`"
        return "Lower `min_p_right`, or use `keep` or `top_k`" if self.min_p_right is not None else "Use `top_k`"

    def _per_source(self, weights: pa.Table, inside_N: Mask, choose: Callable[[Mask], Mask]) -> Mask:
        if not self.per_source:
            return choose(inside_N)
        codes_N = weights["source"].combine_chunks().dictionary_encode().indices.fill_null(-1).to_numpy()
        chosen_N = np.zeros(len(weights), dtype=bool)
        for code in np.unique(codes_N):
            chosen_N |= choose(inside_N & (codes_N == code))
        return chosen_N

    def _best(self, rank_N: Ranks, inside_N: Mask) -> Mask:
        places = np.flatnonzero(inside_N)
        number = self.top_k if self.share is None else round(self.share * len(places))
        best = places[np.argsort(rank_N[places], kind="stable")[:number]]
        return _mask(best, len(rank_N))

    def _drawn(self, weight_N: Numbers, inside_N: Mask) -> Mask:
        """Without replacement: the largest of u^(1/w), u uniform (Efraimidis and Spirakis, 2006)."""
        places = np.flatnonzero(inside_N & (weight_N > 0))
        assert self.sample is not None
        if len(places) < self.sample:
            logger.warning(f"sample asks for {self.sample} rows and there are {len(places)}: all are kept")
        uniform_N = np.random.default_rng(self.seed).random(len(weight_N))
        key = np.log(uniform_N[places]) / weight_N[places]
        return _mask(places[np.argsort(-key, kind="stable")[: self.sample]], len(weight_N))


def ranks(weights: pa.Table) -> Ranks:
    """The rank of each row, 1 for the best; 0 for rows that were left out of training.

    By `score`, the log odds of `p_right`, where that is known, and by `weight` otherwise; equal rows in their order.

    Raises:
        ValueError: all rows are equal.
    """
    p_right_N, weight_N = _column(weights, "p_right"), _column(weights, "weight")
    is_known = not np.isnan(p_right_N).all()
    value_N = _column(weights, "score") if is_known else weight_N
    places = np.flatnonzero(~np.isnan(p_right_N)) if is_known else np.flatnonzero(weight_N > 0)
    if len(places) > 1 and (value_N[places] == value_N[places[0]]).all():
        raise ValueError("the run gives all rows one weight: there are no best ones. `keep=auto` keeps all of them")
    rank_N: Ranks = np.zeros(len(weights), dtype=np.int32 if len(weights) < 2**31 else np.int64)
    rank_N[places[np.argsort(-value_N[places], kind="stable")]] = np.arange(1, len(places) + 1, dtype=rank_N.dtype)
    return rank_N


def _column(weights: pa.Table, name: str) -> Numbers:
    found: Numbers = weights[name].to_numpy()
    return found


def _mask(places: np.ndarray[Any, Any], length: int) -> Mask:
    mask = np.zeros(length, dtype=bool)
    mask[places] = True
    return mask
