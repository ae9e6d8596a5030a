"""`tamis select`: the rows that a run keeps, in files of the user's own format, with a manifest of where they are from.

The files are read again by the settings in the run's `config.yaml`, and every row must still say what it said when it
was weighed. No model is loaded.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset

from tamis.curation.choice import Choice, Mask, ranks
from tamis.curation.originals import Columns, write_rows
from tamis.data import origins_of, read_rows
from tamis.files import write_atomically
from tamis.output_dir import CONFIG_FILES
from tamis.readers import kind_of
from tamis.rows import check_rows, place_in_file
from tamis.sources import paths_of

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_WEIGHTS = "weights.parquet"
_BLOCK = 1 << 20  # bytes read at a time


@dataclass
class SelectArguments:
    """Settings of `tamis select`.

    Attributes:
        weights: a run directory, or its `weights.parquet`.
        output_dir: where the files of kept rows go, each under its own name.
        keep, top_k, min_p_right, sample, per_source, seed: see `tamis.curation.choice.Choice`.
        add_columns: write weight, probability and rank of every row beside it; the rank is 0 for rows that were left
            out of training.
        dropped_dir: where the other rows go.
        overwrite_output_dir: replace files that are there.
        train_dataset, prompt_column, response_column, train_split: as for `tamis train`, which has noted them.
    """

    weights: str = field(metadata={"help": "Run directory, or a weights.parquet."})
    output_dir: str = field(metadata={"help": "Folder for the files of kept rows."})
    keep: str = field(default="auto", metadata={"help": "'auto': rows more likely right than wrong; or a share: 0.8."})
    top_k: int | None = field(default=None, metadata={"help": "Keep so many rows, the best."})
    min_p_right: float | None = field(default=None, metadata={"help": "Keep rows at least so likely right."})
    sample: int | None = field(default=None, metadata={"help": "Draw so many of the kept rows, by their weights."})
    per_source: bool = field(default=False, metadata={"help": "Shares, numbers and samples are of each source."})
    seed: int = field(default=0, metadata={"help": "Seed of the sample."})
    add_columns: bool = field(
        default=False, metadata={"help": "Add the columns tamis_weight, tamis_p_right and tamis_rank."}
    )
    dropped_dir: str | None = field(default=None, metadata={"help": "Folder for the rows that are not kept."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace files that are there."})
    train_dataset: list[str] | None = field(
        default=None, metadata={"help": "The rows, where they are not where the run has read them."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "As in the run; needed without its config."})
    response_column: str | None = field(default=None, metadata={"help": "As in the run; needed without its config."})
    train_split: str | None = field(default=None, metadata={"help": "As in the run; needed without its config."})


@dataclass
class _Source:
    """One file of the run, or a data set that is no file: the rows of it that were weighed.

    Attributes:
        path: of the file or of the saved data set; None where it is from the hub.
        part: its rows of `weights.parquet`.
        row_R: where each of them stands in the file.
    """

    name: str
    origin: Path | Dataset
    path: Path | None
    part: slice
    row_R: np.ndarray[Any, Any]

    @property
    def num_rows(self) -> int:
        return len(self.row_R)


def select(arguments: SelectArguments) -> list[tuple[str, Any]]:
    """Write the kept rows and the manifest; returns what was done, as lines of a table.

    Raises:
        ValueError: the settings cannot work, a file is missing, a row no longer says what it said when it was weighed,
            or a file would be overwritten.
    """
    choice = Choice(**{f.name: getattr(arguments, f.name) for f in fields(Choice)})
    path = _weights_path(arguments.weights)
    weights = _read_weights(path)
    sources = list(_find_sources(arguments, path, weights))
    is_kept_N = choice.rows(weights)
    columns = _added_columns(weights) if arguments.add_columns else {}
    folders = {True: Path(arguments.output_dir)}
    if arguments.dropped_dir is not None:
        folders[False] = Path(arguments.dropped_dir)
        if folders[True].resolve() == folders[False].resolve():
            raise ValueError("`output_dir` and `dropped_dir` are one folder: give two")
    targets = {kept: [folder / _file_name(source) for source in sources] for kept, folder in folders.items()}
    _refuse_present(arguments, [*targets[True], *targets.get(False, []), folders[True] / MANIFEST], sources)
    for kept, files in targets.items():
        for source, target in zip(sources, files, strict=True):
            _write(source, is_kept_N == kept, columns, target)
    _write_manifest(arguments, path, weights, sources, is_kept_N)
    return _summary(arguments, targets, is_kept_N)


# --- what was weighed -------------------------------------------------------------------------------------------------


def _weights_path(given: str) -> Path:
    path = Path(given).expanduser()
    path = path / _WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give a run directory, or its {_WEIGHTS}, to `weights`")
    return path


def _read_weights(path: Path) -> pa.Table:
    try:
        weights = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as Parquet ({error}). Check that it is whole") from error
    names = ("source", "row", "content_hash", "weight", "p_right", "score", "kept")
    if missing := [name for name in names if name not in weights.column_names]:
        raise ValueError(f'{path}: no column "{missing[0]}": it was not written by this version of tamis')
    return weights


def _find_sources(arguments: SelectArguments, path: Path, weights: pa.Table) -> Iterator[_Source]:
    """The files of the run, in order; each row of `weights` is compared with what the file says now."""
    config = _config_of(path.parent)
    given = arguments.train_dataset or config.get("train_dataset")
    if not given:
        raise ValueError(f"{path.parent} does not say which rows were weighed: give `train_dataset`")
    options = {name: getattr(arguments, name) or config.get(name) for name in ("prompt_column", "response_column")}
    split = arguments.train_split or config.get("train_split", "train")
    skipped: list[dict[str, Any]] | None = [] if config.get("skip_bad_rows") else None
    first = 0
    for one in paths_of([given] if isinstance(given, str) else given, "train_dataset"):
        for name, origin in origins_of(one, "train_dataset", split):
            rows = Dataset(read_rows(origin, name, role="train_dataset", skipped=skipped, **options))
            part = slice(first, first + len(rows))
            _compare(weights[part], rows, name)
            file = origin if isinstance(origin, Path) else Path(one).expanduser()
            yield _Source(name, origin, file if file.exists() else None, part, weights["row"][part].to_numpy())
            first = part.stop
    if first < len(weights):
        raise ValueError(f"{len(weights)} rows were weighed, and there are {first}. Give the rows of the run")


def _config_of(folder: Path) -> dict[str, Any]:
    """The settings of the run; nothing where there are none that can be read."""
    for name in reversed(CONFIG_FILES):
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
            config = yaml.safe_load((folder / name).read_text(encoding="utf-8"))
            if isinstance(config, dict):
                return config
    return {}


def _compare(weights: pa.Table, rows: Dataset, name: str) -> None:
    hashes, places = check_rows(rows, "train_dataset"), rows["row"][:]
    before = zip(weights["row"].to_pylist(), weights["content_hash"].to_pylist(), strict=True)
    for row, now, (known_row, known) in zip(places, hashes, before, strict=False):
        if (row, now) != (known_row, known):
            raise ValueError(
                f"{place_in_file(name, row)} does not say what it said when it was weighed. Give the rows of the run, "
                "or weigh them anew"
            )
    if len(weights) < len(hashes):
        raise ValueError(f"{name}: rows were added since they were weighed. Give the rows of the run")


# --- what is written --------------------------------------------------------------------------------------------------


def _added_columns(weights: pa.Table) -> Columns:
    """For each weighed row, by the name of its column."""
    columns = {f"tamis_{name}": _rounded(weights[name].to_numpy()) for name in ("weight", "p_right")}
    with suppress(ValueError):  # all rows are equal: no rank
        columns["tamis_rank"] = ranks(weights).astype(np.int64)
    return columns


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """To six digits: they go into text."""
    return np.array([float(f"{value:.6g}") for value in values.tolist()])


def _file_name(source: _Source) -> str:
    """Under the output folder; what is no file has the name of the hub data set, without what paths cannot hold."""
    return source.name if isinstance(source.origin, Path) else re.sub(r"[^\w.-]+", "--", source.name)


def _refuse_present(arguments: SelectArguments, targets: list[Path], sources: list[_Source]) -> None:
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise ValueError(f"two sources are called {twice[0].name}: select from each of them alone")
    origins = {source.path.resolve() for source in sources if source.path is not None}
    for target in targets:
        if target.resolve() in origins:
            raise ValueError(f"{target} is what the rows are from: choose another `output_dir`")
        if target.is_dir() and not (target / "state.json").is_file():
            raise ValueError(f"{target} is a folder of something else: choose another `output_dir`")
        if target.exists() and not arguments.overwrite_output_dir:
            raise ValueError(f"{target} is there already: choose another folder, or set `overwrite_output_dir=True`")


def _write(source: _Source, chosen_N: Mask, columns: Columns, target: Path) -> None:
    """From rows as they were weighed to rows as they stand in the file, where there may be more: those left out."""
    num_rows = _num_rows(source)
    chosen_R = np.zeros(num_rows, dtype=bool)
    chosen_R[source.row_R] = chosen_N[source.part]
    spread = {}
    for name, values_N in columns.items():
        spread[name] = np.zeros(num_rows, dtype=values_N.dtype)
        spread[name][source.row_R] = values_N[source.part]
    write_rows(source.origin, source.name, chosen_R, spread, target)


def _num_rows(source: _Source) -> int:
    """Of the file; of text files up to the last row that was weighed, for they need not be counted."""
    if isinstance(source.origin, Dataset):
        return len(source.origin)
    if kind_of(source.origin) == ".parquet":
        return int(pq.read_metadata(source.origin).num_rows)
    return int(source.row_R[-1]) + 1 if source.num_rows else 0


def _write_manifest(
    arguments: SelectArguments, path: Path, weights: pa.Table, sources: list[_Source], is_kept_N: Mask
) -> None:
    """Where the rows are from; no time and no folder of this machine, so that the same command gives the same bytes."""
    settings = {name: value for name, value in asdict(arguments).items() if name not in ("weights", "output_dir")}
    del settings["overwrite_output_dir"], settings["dropped_dir"]
    manifest = {
        "format_version": FORMAT_VERSION,
        "versions": {"tamis": version("tamis")},
        "weights": {"file": path.name, "blake2b": _digest(path)},
        "settings": settings,
        "num_rows": len(weights),
        "num_kept": int(is_kept_N.sum()),
        "sources": [
            {
                "name": source.name,
                "blake2b": _digest(source.origin) if isinstance(source.origin, Path) else None,
                "num_rows": source.num_rows,
                "num_kept": int(is_kept_N[source.part].sum()),
            }
            for source in sources
        ],
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomically(Path(arguments.output_dir) / MANIFEST, lambda file: file.write_text(text, encoding="utf-8"))


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _summary(arguments: SelectArguments, targets: dict[bool, list[Path]], is_kept_N: Mask) -> list[tuple[str, Any]]:
    num_kept, total = int(is_kept_N.sum()), len(is_kept_N)
    lines: list[tuple[str, Any]] = [("rows kept", f"{num_kept} of {total} ({num_kept / total:.0%})")]
    lines += [("kept", file) for file in targets[True]]
    lines += [("dropped", file) for file in targets.get(False, [])]
    return [*lines, ("manifest", Path(arguments.output_dir) / MANIFEST)]
