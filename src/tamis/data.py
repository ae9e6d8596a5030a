"""Rows in: what a user names becomes a checked `datasets.Dataset` before any model is loaded.

Every error is one line that names the file, the row and the column, and says what to do. Rows are counted from 0.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.config import HF_DATASETS_CACHE, HF_HUB_OFFLINE
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from tamis.bad_rows import RowSieve
from tamis.layouts import EXTRAS, chatml, choose_columns, names_by_kind, normalized
from tamis.mapped import as_dataset, one_table
from tamis.readers import SUFFIXES, kind_of, one_line, read_file
from tamis.rows import ContentCheck, batches, check_weights, column_values, place_in_file
from tamis.settings import warn_without_effect

logger = logging.getLogger(__name__)

_TIMEOUT = 10.0  # seconds, for one question to the hub


def load_rows(
    source: str | Path,
    *,
    role: str,
    split: str = "train",
    prompt_column: str | None = None,
    response_column: str | None = None,
    weight_column: str | None = None,
    skipped: list[dict[str, Any]] | None = None,
) -> Dataset:
    """Load and check the rows that `source` names, in order.

    Columns of the result: `prompt` and `completion` (text, or lists of messages), or `messages`, or `text`; `row`
    (int64, index in its file, from 0); `source` (name of the file or hub data set); with `weight_column`, `weight`
    (float64). What belongs to a prompt beside these keeps a column of its own, null where a row has none:
    `prompt_input` (Alpaca's input), `system`, `history` (list of [user, assistant]) and `tools` (JSON). The
    `prompt_template` of `BilevelTrainer` joins them. All other columns are dropped. Values stay as they are written,
    NA and 007 in CSV too, except that ShareGPT messages (from, value) become role and content, with user for human
    and assistant for gpt.

    Args:
        source: a .json (list of objects, or one a line), .jsonl, .csv, .tsv or .parquet file (text also with .gz), a
            folder of them, a folder written by `Dataset.save_to_disk`, or a hub name, NAME or NAME:CONFIG.
        role: the flag it came from, `train_dataset`, `validation_dataset` or `eval_dataset`; used in messages.
        split: the split of a folder or a hub data set; a single file has none and is read whole.
        prompt_column, response_column: the columns of a pair where their names are not customary. A dot leads into
            an object: `meta.answer`.
        weight_column: a column of finite weights >= 0, one for each row; as there.
        skipped: a list that gets the bad rows, see `tamis.bad_rows.RowSieve`, instead of an error on the first. They
            are left out, and the others keep their `row`. A file that cannot be read at all stays an error.

    Raises:
        ValueError: nothing is there, it cannot be read, no layout is recognised, or a row fails a check of
            `tamis.rows`.
    """
    columns = {"prompt_column": prompt_column, "response_column": response_column, "weight_column": weight_column}
    files = (
        RowReader(origin, name, role=role, skipped=skipped, **columns)
        for name, origin in origins_of(str(source), role, split)
    )
    return joined(files, str(source))


def joined(files: Iterable[Iterable[pa.Table]], name: str) -> Dataset:
    """One data set of the rows of several files.

    Args:
        files: each in batches, see `RowReader`.

    Raises:
        ValueError: see `load_rows`; or the layouts of the files differ.
    """
    return as_dataset(_filled(one_table(_alike(files), name)))


def _alike(files: Iterable[Iterable[pa.Table]]) -> Iterator[pa.Table]:
    """The batches of all files; that their layouts are the same is known, and checked, at the end."""
    layouts = list[tuple[str, set[str]]]()
    for batches_of_file in files:
        title, columns = "", set[str]()
        for table in batches_of_file:
            title, columns = table["source"][0].as_py(), columns | set(_filled(table).column_names)
            yield table
        layouts.append((title, columns - {"prompt_input", *EXTRAS}))
    for title, layout in layouts:
        if layout != layouts[0][1]:
            raise ValueError(f"{title}: not the layout of {layouts[0][0]}. Give all files the same.")


def _filled(table: pa.Table) -> pa.Table:
    """Without the columns that are empty in all rows."""
    return table.select([column for column in table.column_names if not pa.types.is_null(table[column].type)])


def rows_of(dataset: Dataset, role: str) -> Dataset:
    """The rows of a data set in memory, as `load_rows` gives those of a file; a column `weight` is kept.

    Raises:
        ValueError: see `load_rows`.
    """
    weight_column = "weight" if "weight" in dataset.column_names else None
    return as_dataset(RowReader(dataset, role, role=role, weight_column=weight_column).table())


def origins_of(source: str, role: str, split: str) -> Iterator[tuple[str, Path | Dataset]]:
    """Yield the name and the origin of everything that `source` names: files, or a data set that is no file.

    Raises:
        ValueError: see `load_rows`.
    """
    path = Path(source).expanduser()
    if path.is_file():
        name = f"{role.removesuffix('_dataset')}_split"
        warn_without_effect([name] if split != "train" else [], {f"{path.name} is a file": [name]})
        yield path.name, path
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        with one_line(f"{source}: cannot be read as a saved data set; check that it is whole"):
            saved = load_from_disk(str(path))
        # resolved: the name becomes that of a folder, which ".." must not be
        yield path.resolve().name, _pick(saved, split, source) if isinstance(saved, DatasetDict) else saved
    elif source and path.is_dir():
        path = path.resolve()
        for file in _files_of_folder(path, source, split):
            yield (path.name / file.relative_to(path)).as_posix(), file
    elif _looks_like_path(source):
        raise ValueError(f"{source}: no such file or folder. Check `{role}`.")
    else:
        name, _, config = source.partition(":")
        with one_line(f"{source}: no such file or folder, nor a hub data set with split {split!r}; check `{role}`"):
            _ask_hub(name)
            dataset = load_dataset(name, config or None, split=split)
        yield source, dataset


def _ask_hub(name: str) -> None:
    """Raise where the hub has no such data set or is not reached; `load_dataset` would ask for half a minute."""
    if HF_HUB_OFFLINE or (Path(HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    with suppress(HfHubHTTPError):  # whatever that is, loading will tell
        HfApi().dataset_info(name, timeout=_TIMEOUT)


def _looks_like_path(source: str) -> bool:
    may_be_hub_name = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?(:.+)?", source) and kind_of(Path(source)) not in SUFFIXES
    return not may_be_hub_name or ("/" in source and Path(source).parent.is_dir())


def _pick(splits: Mapping[Any, Any], split: str, source: str) -> Any:
    if split not in splits:
        raise ValueError(f"{source}: no split {split!r}, only {', '.join(map(str, splits))}. Name a file instead.")
    return splits[split]


def _files_of_folder(path: Path, source: str, split: str) -> list[Path]:
    """Return the files of one split by the rules of `datasets`: by names of files and folders."""
    present = {file for file in path.rglob("*") if file.is_file() and kind_of(file) in SUFFIXES}
    if not present:
        raise ValueError(f"{source}: the folder has no files of rows. Give it some, of {', '.join(SUFFIXES)}.")
    with one_line(f"{source}: the folder cannot be read"):
        splits = load_dataset_builder(str(path)).config.data_files or {}
    for file in sorted(present - {Path(file) for files in splits.values() for file in files}):
        logger.warning("%s: %s is left out: by its name or its kind it belongs to no split", source, file.name)
    return [Path(file) for file in _pick(splits, split, source)]


class RowReader:
    """Reads the rows of one file, or of a data set that is no file, in checked batches: an iterator of tables.

    They have the columns of `load_rows`, but for those that are empty in all rows of a batch.

    Args:
        name: of the file.
        role, prompt_column, response_column, weight_column, skipped: see `load_rows`.

    Attributes:
        names: what the file calls the columns that are read, see `tamis.layouts.names_by_kind`; known once rows are.

    Raises:
        ValueError: see `load_rows`.
    """

    def __init__(
        self,
        origin: Path | Dataset,
        name: str,
        *,
        role: str,
        prompt_column: str | None = None,
        response_column: str | None = None,
        weight_column: str | None = None,
        skipped: list[dict[str, Any]] | None = None,
    ):
        self._named = tuple(column for column in (prompt_column, response_column) if column is not None)
        if len(set(self._named)) == 1:
            raise ValueError(f"{role}: `prompt_column` and `response_column` go together and name two columns.")
        self.name, self.origin, self.weight_column = name, origin, weight_column
        self.names: dict[str, str] = {}
        self._place = partial(place_in_file, name)
        self._check = ContentCheck(self._place)
        self._sieve = RowSieve(name, self._place, skipped, weight_column)
        self._found: dict[str, None] = {}
        self._used: tuple[str, ...] = ()

    def table(self) -> pa.Table:
        """All rows."""
        return _filled(one_table(self, self.name))

    def __iter__(self) -> Iterator[pa.Table]:
        rows = read_file(self.origin, self.name) if isinstance(self.origin, Path) else batches(self.origin)
        check, num_read = self._check, 0
        for batch in rows:
            table = self._read(batch)
            if table is not None:
                num_read += len(table)
                yield table
        if check.num_rows == 0:
            raise ValueError(f"{self.name}: there are no rows. Give a file with at least one row.")
        self._sieve.report(check.num_rows)
        self._report(num_read)
        check.finish()

    def _read(self, batch: list[dict[str, Any]] | Dataset) -> pa.Table | None:
        """Check rows under their own column names, then bring them into the columns of `load_rows`; None if none is."""
        check, weight_column = self._check, self.weight_column
        self._found |= dict.fromkeys(chain.from_iterable(batch) if isinstance(batch, list) else batch.column_names)
        if not self._found:  # rows that could not be read have no columns
            self._sieve.good_places(batch, {"": [None] * len(batch)}, None, {"": ""}, check)
            return None
        found = list(self._found)
        self._used = choose_columns(found, self._named, weight_column, self.name, before=self._used)
        self.names = names_by_kind(self._used, found, weight_column)
        columns = {kind: column_values(batch, column) for kind, column in self.names.items()}
        if "messages" in columns:
            columns["messages"] = [chatml(messages) for messages in columns["messages"]]
        weights = None if weight_column is None else column_values(batch, weight_column)
        first = check.num_rows
        kept = self._sieve.good_places(batch, columns, weights, self.names, check)
        if not kept or not check.is_good:
            return None
        columns = {kind: [values[i] for i in kept] for kind, values in columns.items()}
        with one_line(f"{self.name}: the rows do not fit into one table"):
            table = pa.table(normalized(columns))
        if weights is not None:
            floats = check_weights(weights, str(weight_column), self._place, kept, first)
            table = table.append_column("weight", pa.array(floats))
        table = table.append_column("row", pa.array([first + i for i in kept], pa.int64()))
        return table.append_column("source", pa.repeat(self.name, len(table)))

    def _report(self, num_read: int) -> None:
        read = [*self.names.values(), *filter(None, [self.weight_column])]
        left = [name for name in self._found if not any(name in (one, one.partition(".")[0]) for one in read)]
        unread = f"; not read: {', '.join(left)}" if left else ""
        logger.info("%s: %d rows, from the columns %s%s", self.name, num_read, ", ".join(read), unread)
