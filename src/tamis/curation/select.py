"""`tamis select`: the rows that a run keeps, in files of the user's own format, with a manifest of where they are from.

The files are read again by the settings in the run's `config.yaml`, and every row must still say what it said when it
was weighed. No model is loaded.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tamis.curation.choice import Choice, Mask, ranks
from tamis.curation.originals import Columns, write_rows
from tamis.curation.weighed import Source, find_sources, read_weights, weights_path
from tamis.files import write_atomically
from tamis.summary import rows_kept

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_REREADING = ("train_dataset", "prompt_column", "response_column", "weight_column", "train_split", "skip_bad_rows")


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
        train_dataset, prompt_column, response_column, weight_column, train_split, skip_bad_rows: as for `tamis train`,
            which has noted them.
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
    weight_column: str | None = field(default=None, metadata={"help": "As in the run; needed without its config."})
    train_split: str | None = field(default=None, metadata={"help": "As in the run; needed without its config."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "As in the run; needed without its config."})


def select(arguments: SelectArguments) -> list[tuple[str, Any]]:
    """Write the kept rows and the manifest; returns what was done, as lines of a table.

    Nothing is written where anything fails.

    Raises:
        ValueError: the settings cannot work, a file is missing, a row no longer says what it said when it was weighed,
            or a file would be overwritten.
    """
    choice = Choice(**{f.name: getattr(arguments, f.name) for f in fields(Choice)})
    path = weights_path(arguments.weights)
    weights = read_weights(path)
    sources, folders = find_sources(path.parent, {name: getattr(arguments, name) for name in _REREADING}, weights)
    is_kept_N = choice.rows(weights)
    columns = _added_columns(weights) if arguments.add_columns else {}
    output_dirs = {True: Path(arguments.output_dir)}
    if arguments.dropped_dir is not None:
        output_dirs[False] = Path(arguments.dropped_dir)
    names = _file_names(sources)
    _refuse_folders(output_dirs, folders)
    for folder in output_dirs.values():
        _refuse_present(folder, names, sources, arguments.overwrite_output_dir)
    with ExitStack() as stack:
        staged = {kept: stack.enter_context(_staging(folder)) for kept, folder in output_dirs.items()}
        for kept, folder in staged.items():
            for source, name in zip(sources, names, strict=True):
                _write(source, is_kept_N == kept, columns, folder / name)
        manifest = _manifest(arguments, choice, path, weights, sources, is_kept_N)
        (output_dirs[True] / MANIFEST).unlink(missing_ok=True)  # it would not be of these files
        for kept, folder in staged.items():
            for name in names:
                _put(folder / name, output_dirs[kept] / name)
        write_atomically(output_dirs[True] / MANIFEST, lambda file: file.write_text(manifest, encoding="utf-8"))
    written = [("kept" if kept else "dropped", folder / name) for kept, folder in output_dirs.items() for name in names]
    return [rows_kept(pa.array(is_kept_N)), *written, ("manifest", output_dirs[True] / MANIFEST)]


# --- what is written --------------------------------------------------------------------------------------------------


def _added_columns(weights: pa.Table) -> Columns:
    """For each weighed row, by the name of its column."""
    columns = {f"tamis_{name}": _rounded(weights[name].to_numpy()) for name in ("weight", "p_right")}
    try:
        columns["tamis_rank"] = ranks(weights).astype(np.int64)
    except ValueError as error:
        logger.warning(f"the column tamis_rank is left out: {error}")
    return columns


def _rounded(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """To six digits: they go into text."""
    return np.array([float(f"{value:.6g}") for value in values.tolist()])


def _file_names(sources: list[Source]) -> list[str]:
    """Under the output folder: that of the file; where two would be one, with the folders that tell them apart.

    What is from the hub has its name there, without what paths cannot hold.

    Raises:
        ValueError: one has the name of the manifest.
    """
    names = [source.name if source.path else re.sub(r"[^\w.-]+", "--", source.name) for source in sources]
    if len(set(names)) < len(names):
        paths = [source.path for source in sources if source.path]
        common = os.path.commonpath([path.parent for path in paths])
        names = [
            source.path.relative_to(common).as_posix() if source.path else name
            for source, name in zip(sources, names, strict=True)
        ]
    if MANIFEST in names:
        raise ValueError(f"a source is called {MANIFEST}, as what is written beside the rows: rename it")
    return names


def _refuse_folders(output_dirs: dict[bool, Path], folders: list[Path]) -> None:
    """Check that kept and dropped rows go apart, and neither into a folder that is read as training rows."""
    found = [folder.resolve() for folder in output_dirs.values()]
    if len(set(found)) < len(found):
        raise ValueError("`output_dir` and `dropped_dir` are one folder: give two")
    for output_dir in output_dirs.values():
        if any(output_dir.resolve().is_relative_to(folder) for folder in folders):
            raise ValueError(f"{output_dir} lies in a folder that the rows are from: choose another `output_dir`")
        if output_dir.exists() and not output_dir.is_dir():
            raise ValueError(f"{output_dir} is a file: choose another `output_dir`")


def _refuse_present(folder: Path, names: list[str], sources: list[Source], overwrites: bool) -> None:
    origins = {source.path for source in sources}
    is_dataset = [isinstance(source.origin, Dataset) for source in sources]
    for name, should_be_folder in zip([*names, MANIFEST], [*is_dataset, False], strict=True):
        target = folder / name
        if target.resolve() in origins:
            raise ValueError(f"{target} is what the rows are from: choose another `output_dir`")
        is_alike = (target / "state.json").is_file() if should_be_folder else not target.is_dir()
        if target.is_symlink() or (target.exists() and not is_alike):
            what = "folder" if target.is_dir() else "file"
            raise ValueError(f"{target} is a {what} of something else: choose another `output_dir`")
        if target.exists() and not overwrites:
            raise ValueError(f"{target} is there already: choose another folder, or set `overwrite_output_dir=True`")


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` for what is not whole yet."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as staging:
        yield Path(staging)


def _put(staged: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        shutil.rmtree(target)
    staged.replace(target)


def _write(source: Source, chosen_N: Mask, columns: Columns, target: Path) -> None:
    """From rows as they were weighed to rows as they stand in the file, where there may be more: those left out."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def spread(values_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        values_R = np.zeros(num_rows, dtype=values_N.dtype)
        values_R[source.place_R] = values_N[source.rows]
        return values_R

    num_rows = source.num_rows
    spread_columns = {name: spread(values_N) for name, values_N in columns.items()}
    write_rows(source.origin, source.name, spread(chosen_N), spread_columns, target)


def _manifest(
    arguments: SelectArguments,
    choice: Choice,
    path: Path,
    weights: pa.Table,
    sources: list[Source],
    is_kept_N: Mask,
) -> str:
    """Where the rows are from; no time and no folder of this machine, so that the same command gives the same bytes."""
    found = {
        "format_version": FORMAT_VERSION,
        "versions": {"tamis": version("tamis")},
        "weights": {"file": path.name, "blake2b": _digest(path)},
        "settings": asdict(choice) | {"add_columns": arguments.add_columns},
        "num_rows": len(weights),
        "num_kept": int(is_kept_N.sum()),
        "sources": [
            {
                "name": source.name,
                "blake2b": _digest(source.origin) if isinstance(source.origin, Path) else None,
                "num_rows": len(source.place_R),
                "num_kept": int(is_kept_N[source.rows].sum()),
            }
            for source in sources
        ],
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
