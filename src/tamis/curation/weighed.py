"""What was weighed: the weights of a run, and the files whose rows they belong to."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from tamis.data import joined
from tamis.output_dir import CONFIG_FILES, config_path
from tamis.readers import kind_of
from tamis.rows import check_rows, row_name
from tamis.sources import parts_of

_WEIGHTS = "weights.parquet"


@dataclass
class Source:
    """One file of the run, or a data set that is no file: the rows of it that were weighed.

    Attributes:
        name: what the run calls it.
        origin: see `tamis.data.origins_of`.
        path: of the file or of the saved data set; None where it is from the hub.
        rows: its rows of `weights.parquet`.
        place_R: where each of them stands in the file.
    """

    name: str
    origin: Path | Dataset
    path: Path | None
    rows: slice
    place_R: np.ndarray[Any, Any]

    @property
    def num_rows(self) -> int:
        """Of the file; of text files up to the last row that was weighed, for they need not be counted."""
        if isinstance(self.origin, Dataset):
            return len(self.origin)
        if kind_of(self.origin) == ".parquet":
            return int(pq.read_metadata(self.origin).num_rows)
        return int(self.place_R.max(initial=-1)) + 1


def weights_path(given: str) -> Path:
    """The `weights.parquet` of a run directory, or the file that is named itself.

    Raises:
        ValueError: there is none.
    """
    path = Path(given).expanduser()
    path = path / _WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give a run directory, or its {_WEIGHTS}, to `weights`")
    return path


def read_weights(path: Path) -> pa.Table:
    """One row per training row, see `tamis.recorder.Recorder.write_weights`.

    Raises:
        ValueError: it cannot be read, or has not the columns.
    """
    try:
        weights = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}). Check that it is whole") from error
    names = ("source", "row", "content_hash", "weight", "p_right", "score", "kept")
    if missing := [name for name in names if name not in weights.column_names]:
        raise ValueError(f'{path}: no column "{missing[0]}": it was not written by this version of tamis')
    return weights


def find_sources(run_dir: Path, given: dict[str, Any], weights: pa.Table) -> tuple[list[Source], list[Path]]:
    """The files of the run, in order, and which of them are folders.

    Args:
        run_dir: its configuration says how its rows were read.
        given: settings that take the place of those of the run, where they are not empty; see `Rereading`.

    Raises:
        ValueError: a row no longer says what it said when it was weighed, or a file is missing.
    """
    settings = _config_of(run_dir) | {name: value for name, value in given.items() if value}
    if not settings.get("train_dataset"):
        raise ValueError(f"{run_dir} does not say which rows were weighed: give `train_dataset`")
    named = settings["train_dataset"]
    parts = parts_of(
        [named] if isinstance(named, str) else named,
        role="train_dataset",
        split=settings.get("train_split", "train"),
        skipped=[] if settings.get("skip_bad_rows") else None,
        **{name: settings.get(name) for name in ("prompt_column", "response_column", "weight_column")},
    )
    _compare(weights, joined([part.table for part in parts], "train_dataset"))
    sources, first = list[Source](), 0
    for part in parts:
        path = part.origin if isinstance(part.origin, Path) else Path(part.source).expanduser()
        places = slice(first, first + len(part.table))
        known = path.resolve() if path.exists() else None
        sources.append(Source(part.name, part.origin, known, places, part.table["row"].to_numpy()))
        first = places.stop
    folders = {Path(part.source).expanduser() for part in parts}
    return sources, [folder.resolve() for folder in folders if folder.is_dir()]


def _config_of(run_dir: Path) -> dict[str, Any]:
    """The settings of the run; nothing where there are none that can be read."""
    for path in (config_path(run_dir), run_dir / CONFIG_FILES[0]):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            if isinstance(config, dict):
                return config
    return {}


def _compare(weights: pa.Table, rows: Dataset) -> None:
    found = zip(rows["row"][:], check_rows(rows, "train_dataset"), strict=True)
    known = zip(weights["row"].to_pylist(), weights["content_hash"].to_pylist(), strict=True)
    for i, (now, before) in enumerate(zip(found, known, strict=False)):
        if now != before:
            raise ValueError(
                f"{row_name(rows, 'train_dataset', i)} does not say what it said when it was weighed. Give the rows of "
                "the run, or weigh them anew"
            )
    if len(rows) > len(weights):
        name = rows[len(weights)]["source"]
        raise ValueError(f"{name}: rows were added since they were weighed. Give the rows of the run")
    if len(rows) < len(weights):
        raise ValueError(f"{len(weights)} rows were weighed, and there are {len(rows)}. Give the rows of the run")
