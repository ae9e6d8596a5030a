"""Rows that come twice: within a data set and between the sets of a run, to the letter and nearly.

Nearly: the Jaccard similarity of their character 5-grams is at least 0.8, as MinHash estimates it (128 permutations, a
standard error of 0.035 at the border). Case and white space do not count. What is found depends on what the rows say,
not on their order.

Shape suffix: N rows of a data set.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashDeduplicator

from tamis.hashes import Hashes, content_hashes, is_in, num_distinct
from tamis.inference import prompt_of
from tamis.progress import track
from tamis.rows import PROMPT_PARTS, content_columns, iter_rows

SHINGLE_SIZE = 5  # characters: words would find little in short rows, and none in Chinese
THRESHOLD = 0.8
# Of a larger data set a sample is searched: each row costs about 35 microseconds and 2 KB. Two hundred MB are enough.
MAX_SEARCHED = 100_000
_NUM_PERMUTATIONS, _NUM_BANDS, _SEED = 128, 16, 0
_BATCH_SIZE = 2000
_NUM_SHOWN = 3


@dataclass(frozen=True)
class Keys:
    """What the rows of a data set say, as hashes.

    Attributes:
        row_N: of prompt and response.
        prompt_N: of the prompt with all that belongs to it; None where rows are texts without one.
    """

    row_N: Hashes
    prompt_N: Hashes | None


def keys_of(dataset: Dataset, role: str, hashes: Hashes) -> Keys:
    """The keys of checked rows.

    Args:
        hashes: of the rows, from `tamis.rows.check_rows`.
    """
    content = content_columns(dataset, role)
    if content == ["text"]:
        return Keys(hashes, None)
    names = [content[0], *(name for name in PROMPT_PARTS if name in dataset.column_names)]
    return Keys(hashes, content_hashes(map(_prompt_alone, iter_rows(dataset, names))))


def _prompt_alone(row: dict[str, Any]) -> dict[str, Any]:
    parts = {name: row[name] for name in PROMPT_PARTS if row.get(name) is not None}
    return parts | {"prompt": prompt_of(row)[0]}


def num_other_answers(keys: Keys) -> int | None:
    """Distinct rows whose prompt has another response in another row, beyond the first of each prompt."""
    return None if keys.prompt_N is None else num_distinct(keys.row_N) - num_distinct(keys.prompt_N)


@dataclass(frozen=True)
class Shared:
    """Rows of one data set that another one has too.

    Attributes:
        rows: with prompt and response.
        prompts: with the prompt; None where rows are texts.
    """

    rows: int
    prompts: int | None


def shared(keys: Keys, other: Keys) -> Shared:
    """How many rows of the first data set are in the other, each as often as it is there."""
    prompts = None
    if keys.prompt_N is not None and other.prompt_N is not None:
        prompts = int(is_in(keys.prompt_N, other.prompt_N).sum())
    return Shared(int(is_in(keys.row_N, other.row_N).sum()), prompts)


# --- near-duplicates --------------------------------------------------------------------------------------------------


@dataclass
class Near:
    """Rows of a data set that are near-duplicates, but no copies, of others.

    Attributes:
        num_rows: how many; of a group within one data set all but one.
        num_searched: the distinct rows that were looked at, in a sample where there are more than `MAX_SEARCHED`.
        pairs: places of some of them, each with the place of the row that it resembles.
    """

    num_searched: int
    num_rows: int = 0
    pairs: list[tuple[int, int]] = field(default_factory=list)


def near_duplicates(
    datasets: Mapping[str, Dataset], keys: Mapping[str, Keys], *, show_progress: bool = False
) -> dict[tuple[str, str], Near]:
    """What is found within each data set, under its role twice, and in each of the data sets before it.

    Args:
        datasets: by role; each is compared with those before it, so that the largest comes last.
    """
    indices: dict[str, RMinHashDeduplicator] = {}
    found: dict[tuple[str, str], Near] = {}
    for role, dataset in datasets.items():
        indices[role] = RMinHashDeduplicator(
            threshold=THRESHOLD, num_perm=_NUM_PERMUTATIONS, use_lsh=True, num_bands=_NUM_BANDS, seed=_SEED
        )
        place_N = _searched(keys[role].row_N)
        found |= {(role, other): Near(len(place_N)) for other in indices}
        flagged = _search(role, dataset, place_N, keys, indices, show_progress)
        for other, places in flagged.items():
            near = found[role, other]
            near.num_rows, near.pairs = len(places), _pairs(dataset, sorted(places)[:_NUM_SHOWN], indices[other])
    return found


def _searched(row_N: Hashes) -> NDArray[np.int64]:
    """Places of the distinct rows in the order of their hashes, which is none; the first of them are a sample."""
    share = 2 * MAX_SEARCHED / len(row_N)  # of the hashes that there may be, which are used evenly
    while True:
        (place_N,) = np.nonzero(row_N < np.uint64(share * 2**64)) if share < 1 else (np.arange(len(row_N)),)
        first = np.unique(row_N[place_N], return_index=True)[1][:MAX_SEARCHED]
        if share >= 1 or len(first) == MAX_SEARCHED:
            return place_N[first]
        share *= 8  # many rows are copies


def _search(
    role: str,
    dataset: Dataset,
    place_N: NDArray[np.int64],
    keys: Mapping[str, Keys],
    indices: Mapping[str, RMinHashDeduplicator],
    show_progress: bool,
) -> dict[str, list[int]]:
    """Places of the near-duplicates by the data set that they were found in; puts the rows into their own index."""
    flagged: dict[str, list[int]] = {other: [] for other in indices}
    parts = np.split(place_N, range(_BATCH_SIZE, len(place_N), _BATCH_SIZE))
    for part_N in track(parts, "looking for near-duplicates", len(parts), is_shown=show_progress):
        places = part_N.tolist()
        sketches = RMinHash.from_token_sets(
            map(_shingles, _texts(dataset, role, places)), num_perm=_NUM_PERMUTATIONS, seed=_SEED
        )
        # A row that is to be looked up must not have the name of one that is there.
        names = [f"{role} {place}" for place in places]
        for other, index in indices.items():
            if other == role:
                is_near = [not is_kept for is_kept in index.add_pairs(zip(names, sketches, strict=True))]
            else:
                is_near = index.is_duplicate_pairs(list(zip(names, sketches, strict=True)))
                is_copy = np.isin(keys[role].row_N[part_N], keys[other].row_N)
                is_near = [one and not copy for one, copy in zip(is_near, is_copy.tolist(), strict=True)]
            flagged[other] += [place for place, is_one in zip(places, is_near, strict=True) if is_one]
    return flagged


def _pairs(dataset: Dataset, places: Sequence[int], index: RMinHashDeduplicator) -> list[tuple[int, int]]:
    if not places:
        return []
    texts = _texts(dataset, "", places)
    partners = index.get_duplicate_sets([_shingles(text) for text in texts])
    others = [[int(name.rpartition(" ")[2]) for name in names] for names in partners]
    return [(place, min(found)) for place, found in zip(places, others, strict=True) if found]


def _shingles(text: str) -> list[str]:
    text = " ".join(text.lower().split())
    return [text[i : i + SHINGLE_SIZE] for i in range(max(len(text) - SHINGLE_SIZE + 1, 1))]


def _texts(dataset: Dataset, role: str, places: Sequence[int]) -> Iterator[str]:
    """What rows say, all in one text."""
    names = content_columns(dataset, role)
    parts = [name for name in ("prompt_input",) if name in dataset.column_names]
    for row in iter_rows(dataset.select(places), [*names[:1], *parts, *names[1:]]):
        yield "\n".join(_text(value) for value in row.values() if value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(message.get("content") or "" for message in value)
