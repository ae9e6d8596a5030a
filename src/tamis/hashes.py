"""What rows say, as numbers of 64 bits: to compare rows, and to tell whether they are those of an earlier run."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from json.encoder import encode_basestring
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

Hashes: TypeAlias = NDArray[np.uint64]  # one for each row: a list of texts would take ten times the memory
_AT_ONCE = 10_000


def content_hashes(rows: Iterable[Mapping[str, Any]]) -> Hashes:
    """The hash of each row (N, uint64): BLAKE2b over its columns as JSON, with sorted names and without null values."""
    return np.fromiter((int.from_bytes(_digest(_as_json(dict(row)))) for row in rows), np.uint64)


def hex_digits(hashes: Hashes) -> list[str]:
    """Hashes as files have them: 16 hex digits each."""
    return [f"{value:016x}" for value in hashes.tolist()]


def fingerprint(hashes: Hashes) -> str:
    """Hash a data set by the hashes of its rows, in order: 16 hex digits."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(hashes), _AT_ONCE):
        digest.update("".join(hex_digits(hashes[start : start + _AT_ONCE])).encode())
    return digest.hexdigest()


def versioned_fingerprint(key: str) -> str:
    """By which `datasets` finds again what it has derived from rows; other versions may derive other tokens."""
    return _digest(" ".join([key, *map(version, ("tamis", "trl", "transformers", "tokenizers"))])).hex()


def derived_fingerprint(dataset: Dataset, key: str) -> str:
    """Of a data set that is made from another one in the way that ``key`` names: `datasets` need not hash it."""
    return versioned_fingerprint(f"{dataset._fingerprint} {key}")


def num_distinct(hashes: Hashes) -> int:
    """How many differ. `np.unique` would take five times the memory."""
    ordered = np.sort(hashes)
    return int((ordered[1:] != ordered[:-1]).sum()) + min(len(ordered), 1)


def num_repeats(hashes: Hashes) -> int:
    """Rows that say what another row says, beyond the first of each."""
    return len(hashes) - num_distinct(hashes)


def is_in(hashes: Hashes, others: Hashes) -> NDArray[np.bool_]:
    """Whether each hash (N, bool) is among the others, of which there is at least one."""
    ordered, found = np.sort(others), np.empty(len(hashes), dtype=bool)
    for start in range(0, len(hashes), _AT_ONCE):
        part = hashes[start : start + _AT_ONCE]
        place = np.searchsorted(ordered, part).clip(max=len(ordered) - 1)
        found[start : start + len(part)] = ordered[place] == part
    return found


def shared_rows(first: Hashes, second: Hashes) -> Sequence[tuple[int, int]]:
    """The places of rows of the first data set that the second has too, each with its first place there."""
    place_N = np.flatnonzero(is_in(first, second))
    others = np.flatnonzero(is_in(second, first))
    place_of = dict(zip(second[others[::-1]].tolist(), others[::-1].tolist(), strict=True))
    return [(place, place_of[digest]) for place, digest in zip(place_N.tolist(), first[place_N].tolist(), strict=True)]


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _as_json(value: Any) -> str:
    """JSON with sorted keys and no null fields: Arrow gives a message the fields that any message of the column has."""
    if isinstance(value, str):
        return encode_basestring(value)
    if isinstance(value, list):
        return f"[{', '.join([_as_json(item) for item in value])}]"
    if isinstance(value, dict):
        fields = [
            f"{encode_basestring(key)}: {_as_json(item)}" for key, item in sorted(value.items()) if item is not None
        ]
        return f"{{{', '.join(fields)}}}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # Arrow makes 1 a 1.0 where another row of the column has 0.5
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
