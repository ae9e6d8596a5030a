"""What a person says of single rows: keep this one, drop that one, whatever the run says (`tamis select --overrides`).

The report of a run writes such a file. One JSON object a line: `source`, `row`, `content_hash`, `keep` (true or false).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tamis.curation.choice import Mask
from tamis.readers import lines_of
from tamis.rows import place_in_file
from tamis.weights_file import weight_batches

_KINDS = {"source": str, "row": int, "content_hash": str, "keep": bool}


def read_overrides(given: str, weights_file: Path) -> dict[int, bool]:
    """Whether rows are kept, by their place in `weights.parquet`.

    Raises:
        ValueError: the file cannot be read, contradicts itself, or speaks of a row that was not weighed or said
            something else then.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Check `overrides`")
    wished = _wishes(path)
    found = _places(weights_file, wished)
    missing = next((key for key in wished if key not in found), None)
    if missing is not None:
        raise ValueError(f"{path}: {place_in_file(*missing)} was not weighed by this run. Take the line out")
    overrides = dict[int, bool]()
    for key, (content_hash, keep) in wished.items():
        place, known = found[key]
        if content_hash != known:
            raise ValueError(f"{path}: {place_in_file(*key)} said something else when it was weighed. Mark it anew")
        overrides[place] = keep
    return overrides


def apply_overrides(chosen_N: Mask, overrides: dict[int, bool]) -> Mask:
    """The chosen rows, with those that a person keeps, without those that a person drops."""
    changed_N = chosen_N.copy()
    changed_N[list(overrides)] = list(overrides.values())
    return changed_N


def _wishes(path: Path) -> dict[tuple[str, int], tuple[str, bool]]:
    wished = dict[tuple[str, int], tuple[str, bool]]()
    for number, line in enumerate(lines_of(path, path.name), 1):
        if not line.strip():
            continue
        mark = _parsed(line, f"{path.name}, line {number}")
        key, wish = (mark["source"], mark["row"]), (mark["content_hash"], mark["keep"])
        if wished.setdefault(key, wish) != wish:
            raise ValueError(f"{path.name}, line {number}: an earlier line says otherwise of this row. Remove one")
    return wished


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        mark = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON ({error.msg}). Export the marks again") from error
    for name, kind in _KINDS.items():
        if not isinstance(mark, dict) or type(mark.get(name)) is not kind:
            names = ", ".join(f'"{name}" ({kind.__name__})' for name, kind in _KINDS.items())
            raise ValueError(f'{where}: "{name}" is missing or of another kind. A mark has {names}')
    return dict(mark)


def _places(path: Path, keys: dict[tuple[str, int], Any]) -> dict[tuple[str, int], tuple[int, str]]:
    """Place and content hash of the rows that have these sources and row numbers."""
    found, first = dict[tuple[str, int], tuple[int, str]](), 0
    rows = pa.array(sorted({row for _, row in keys}), pa.int64())
    for batch in weight_batches(path, ["source", "row", "content_hash"]):
        near = np.flatnonzero(pc.is_in(batch["row"], rows).to_numpy(zero_copy_only=False))
        for place, row in zip(near.tolist(), batch.take(pa.array(near)).to_pylist(), strict=True):
            key = (row["source"], row["row"])
            if key in keys:
                found[key] = (first + place, row["content_hash"])
        first += len(batch)
    return found
