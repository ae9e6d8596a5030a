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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset

from tamis.curation.choice import Choice, Mask, ranks
from tamis.curation.originals import Columns, Wanted, write_rows
from tamis.curation.overrides import apply_overrides, read_overrides
from tamis.curation.refined import USES, NewResponse, read_responses
from tamis.curation.upload import check_upload, upload
from tamis.curation.weighed import Source, find_sources, read_weights
from tamis.files import WriteError, writing
from tamis.output_dir import claimed
from tamis.refinements import REFINEMENTS
from tamis.summary import rows_kept
from tamis.weights_file import weights_path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
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
        use_refined: write dropped rows after all, with new responses of a refining run; see
            `tamis.curation.refined.read_responses`.
        overrides: a file of rows that are kept or dropped whatever the run says; see `tamis.curation.overrides`.
        dropped_dir: where the other rows go.
        overwrite_output_dir: replace files that are there.
        hub_dataset_id, hub_private_repo, hub_token: upload what was written, see `tamis.curation.upload`.
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
    use_refined: str | None = field(
        default=None,
        metadata={
            "help": "Write dropped rows with new responses of a refining run: the 'best' one of each, or 'all'.",
            "choices": USES,
        },
    )
    overrides: str | None = field(
        default=None, metadata={"help": "Rows to keep or drop whatever the run says, as its report exports them."}
    )
    dropped_dir: str | None = field(default=None, metadata={"help": "Folder for the rows that are not kept."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace files that are there."})
    hub_dataset_id: str | None = field(
        default=None, metadata={"help": "Upload to this data set of the hub, USER/NAME."}
    )
    hub_private_repo: bool | None = field(default=None, metadata={"help": "Whether a new one on the hub is private."})
    hub_token: str | None = field(default=None, metadata={"help": "Token for the hub, if `hf auth login` has none."})
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
    check_upload(arguments.hub_dataset_id, arguments.hub_private_repo, arguments.hub_token)
    path = weights_path(arguments.weights, "weights")
    weights = read_weights(path)
    chosen_N = choice.rows(weights)
    overrides = read_overrides(arguments.overrides, path) if arguments.overrides else {}
    is_kept_N = apply_overrides(chosen_N, overrides)
    responses = dict[int, list[NewResponse]]()
    if arguments.use_refined:
        responses = read_responses(path.parent / REFINEMENTS, arguments.use_refined, is_kept_N)
    columns = _added_columns(weights, overrides, arguments.use_refined) if arguments.add_columns else {}
    sources, folders = find_sources(path, {name: getattr(arguments, name) for name in _REREADING}, weights)
    del weights  # of millions of rows
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
                with writing(folder / name, output_dirs[kept] / name):
                    _write(source, is_kept_N == kept, columns, responses if kept else {}, folder / name)
        with writing(staged[True] / MANIFEST, output_dirs[True] / MANIFEST):
            manifest = _manifest(arguments, choice, path, sources, is_kept_N, responses)
            (staged[True] / MANIFEST).write_text(manifest, encoding="utf-8")
        (output_dirs[True] / MANIFEST).unlink(missing_ok=True)  # it would not be of these files
        moves = [
            move
            for kept, target in reversed(output_dirs.items())  # the manifest last
            for move in _moves(staged[kept], target, [*names, MANIFEST] if kept else names)
        ]
        _put(moves, takes_back=not arguments.overwrite_output_dir)
    lines = [rows_kept(pa.array(is_kept_N))]
    if responses:
        num_written = sum(map(len, responses.values()))
        lines.append(("new responses", f"{num_written} of {len(responses)} rows that were dropped"))
    if changed := int((chosen_N != is_kept_N).sum()):
        lines.append(("overrides", f"{changed} rows changed"))
    lines += [("kept" if kept else "dropped", str(d / name)) for kept, d in output_dirs.items() for name in names]
    lines.append(("manifest", str(output_dirs[True] / MANIFEST)))
    if arguments.hub_dataset_id:
        lines.append(("uploaded", upload(output_dirs[True], [*names, MANIFEST], arguments)))
    return lines


# --- what is written --------------------------------------------------------------------------------------------------


def _added_columns(weights: pa.Table, overrides: dict[int, bool], use_refined: str | None) -> Columns:
    """For each weighed row, by the name of its column. A row that a person keeps counts as right, with weight one."""
    columns = {f"tamis_{name}": weights[name].to_numpy().astype(np.float32) for name in ("weight", "p_right")}
    try:
        columns["tamis_rank"] = ranks(weights)
    except ValueError as error:
        logger.warning(f"the column tamis_rank is left out: {error}")
    for place, is_kept in overrides.items():
        weight = columns["tamis_weight"][place]
        columns["tamis_weight"][place] = max(weight, 1.0) if is_kept else 0.0
        columns["tamis_p_right"][place] = float(is_kept)
    if use_refined:
        columns["tamis_refined"] = np.zeros(len(weights), dtype=bool)
    return columns


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
    """A folder for what is not whole yet; what a process that was killed has left in it is removed.

    It lies in ``folder``, or beside it if there is none, so that a move from one to the other is a renaming.
    """
    folder = folder.resolve()
    root = folder / ".tamis" if folder.is_dir() else folder.with_name(f".{folder.name}.tamis")
    staging = root / "rows"
    with writing(folder):
        root.mkdir(parents=True, exist_ok=True)
    try:
        with claimed(root):
            shutil.rmtree(staging, ignore_errors=True)
            try:
                with writing(folder):
                    staging.mkdir()
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    finally:
        with suppress(OSError):  # another process is there
            root.rmdir()


def _moves(staging: Path, folder: Path, names: list[str]) -> list[tuple[Path, Path]]:
    """From where to where: the whole folder at once where there is none yet, else its files one after the other."""
    if not folder.exists():
        return [(staging, folder)]
    return [(staging / name, folder / name) for name in names]


def _put(moves: list[tuple[Path, Path]], *, takes_back: bool) -> None:
    """Make all the moves.

    Args:
        takes_back: undo them if one fails. Only where nothing is overwritten: else old files would be lost.

    Raises:
        WriteError: one failed.
    """
    for k, (staged, target) in enumerate(moves):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                shutil.rmtree(target)
            staged.replace(target)
        except OSError as error:
            for back, put in moves[:k] if takes_back else ():
                put.replace(back)
            raise WriteError(error.errno, error.strerror, str(target)) from error


def _write(
    source: Source, chosen_N: Mask, columns: Columns, responses: dict[int, list[NewResponse]], target: Path
) -> None:
    """From rows as they were weighed to rows as they stand in the file, where there may be more: those left out."""
    target.parent.mkdir(parents=True, exist_ok=True)

    def spread(values_N: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if num_rows == len(source.place_R):
            return values_N[source.rows]
        values_R = np.zeros(num_rows, dtype=values_N.dtype)
        values_R[source.place_R] = values_N[source.rows]
        return values_R

    num_rows, first = source.num_rows, source.rows.start
    mine = {int(source.place_R[i - first]): new for i, new in responses.items() if first <= i < source.rows.stop}
    spread_columns = {name: spread(values_N) for name, values_N in columns.items()}
    write_rows(source.origin, source.name, Wanted(spread(chosen_N), spread_columns, source.names, mine), target)


def _manifest(
    arguments: SelectArguments,
    choice: Choice,
    path: Path,
    sources: list[Source],
    is_kept_N: Mask,
    responses: dict[int, list[NewResponse]],
) -> str:
    """Where the rows are from; no time and no folder of this machine, so that the same command gives the same bytes."""

    def num_new(rows: slice) -> int:
        return sum(len(new) for i, new in responses.items() if rows.start <= i < rows.stop)

    overrides = None if arguments.overrides is None else Path(arguments.overrides).expanduser()
    found = {
        "format_version": FORMAT_VERSION,
        "versions": {"tamis": version("tamis")},
        "weights": {"file": path.name, "blake2b": _digest(path)},
        "overrides": overrides and {"file": overrides.name, "blake2b": _digest(overrides)},
        "settings": asdict(choice) | {name: getattr(arguments, name) for name in ("use_refined", "add_columns")},
        "num_rows": len(is_kept_N),
        "num_kept": int(is_kept_N.sum()),
        "num_new_responses": num_new(slice(0, len(is_kept_N))),
        "sources": [
            {
                "name": source.name,
                "blake2b": _digest(source.origin) if isinstance(source.origin, Path) else None,
                "num_rows": len(source.place_R),
                "num_kept": int(is_kept_N[source.rows].sum()),
                "num_new_responses": num_new(source.rows),
            }
            for source in sources
        ],
    }
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()
