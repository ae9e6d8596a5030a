"""The trusted rows that are nearest to a row, by the words and letters they share: TF-IDF over letter trigrams."""

import zlib
from collections.abc import Sequence

import numpy as np

from tamis.report.run_folder import Values

_NUM_BUCKETS = 4096
_MAX_LETTERS = 1_000


def nearest(texts: Sequence[str], trusted: Sequence[str], num_nearest: int = 3) -> list[list[int]]:
    """For each text the places of the most similar trusted texts, the nearest first; those that share nothing are left.

    The similarity is the cosine of hashed counts of letter trigrams, each weighed by the log of how rare it is among
    the trusted texts. Only the first thousand letters count.
    """
    if not texts or not trusted:
        return [[] for _ in texts]
    count_TX, count_VX = _counts(texts), _counts(trusted)
    rarity_X = np.log((1 + len(trusted)) / (1 + (count_VX > 0).sum(axis=0))) + 1
    unit_TX, unit_VX = _unit(count_TX * rarity_X), _unit(count_VX * rarity_X)
    similarity_TV = unit_TX @ unit_VX.T
    order = np.argsort(-similarity_TV, axis=1, kind="stable")[:, :num_nearest]
    return [[int(v) for v in row if similarity_TV[t, v] > 0] for t, row in enumerate(order)]


def _counts(texts: Sequence[str]) -> Values:
    counts = np.zeros((len(texts), _NUM_BUCKETS), dtype=np.float32)
    for row, text in zip(counts, texts, strict=True):
        letters = f" {text[:_MAX_LETTERS].lower()} "
        buckets = [zlib.crc32(letters[i : i + 3].encode()) % _NUM_BUCKETS for i in range(len(letters) - 2)]
        np.add.at(row, buckets, 1)
    return counts


def _unit(values: Values) -> Values:
    unit: Values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return unit
