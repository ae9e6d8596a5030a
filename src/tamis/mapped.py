"""Rows beyond what memory should hold: Arrow files in the cache of `datasets`, mapped into memory from there.

What `datasets` makes of such rows, their tokens above all, it keeps beside them, mapped too, and finds again in the
next run on the same rows.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets.config
import pyarrow as pa
from datasets import Dataset
from datasets.table import MemoryMappedTable

from tamis.files import write_atomically, writing
from tamis.hashes import versioned_fingerprint
from tamis.readers import one_line

# Bytes. Tokens take up to ten times as many as their text, and stay where the rows are.
LARGEST_IN_MEMORY = 2**26
_ROWS_AT_ONCE = 10_000
_A_DAY = 86_400.0  # seconds


def one_table(tables: Iterable[pa.Table], name: str) -> pa.Table:
    """The rows of all tables, mapped into memory where they are many.

    Args:
        name: of the rows, for messages.

    Raises:
        ValueError: the rows do not fit into one table.
        WriteError: they cannot be written to the cache of `datasets`.
    """
    return _joined(list(_in_parts(tables, name)), name)


def _joined(tables: list[pa.Table], name: str) -> pa.Table:
    with one_line(f"{name}: the rows do not fit into one table"):
        # permissive: some messages have fields that others have not
        return pa.concat_tables(tables, promote_options="permissive")


def _in_parts(tables: Iterable[pa.Table], name: str) -> Iterator[pa.Table]:
    waiting, size = list[pa.Table](), 0
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size > LARGEST_IN_MEMORY:
            yield _moved_out(_joined(waiting, name))
            waiting, size = [], 0
            pa.default_memory_pool().release_unused()
    yield from waiting


def _moved_out(table: pa.Table) -> pa.Table:
    """The table in a file that has no name and goes with the last use of it."""
    folder = _cache()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rows.", suffix=".tmp", delete=False) as file:
            path = Path(file.name)
        try:
            _write(table, path)
            return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        finally:
            path.unlink()


def as_dataset(table: pa.Table) -> Dataset:
    """The table as a data set; where it is large, in a file of the cache of `datasets`, written once.

    Raises:
        WriteError: the file cannot be written.
    """
    digest = _digest(table)
    fingerprint = versioned_fingerprint(digest)
    if table.nbytes <= LARGEST_IN_MEMORY:
        return Dataset(table, fingerprint=fingerprint)
    path = _cache() / digest / "rows.arrow"
    if not path.is_file():
        _remove_leftovers(_cache())
        write_atomically(path, lambda path: _write(table, path))
    return Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=fingerprint)


def _cache() -> Path:
    return Path(datasets.config.HF_DATASETS_CACHE) / "tamis"


def _write(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=_ROWS_AT_ONCE)


def _digest(table: pa.Table) -> str:
    """Hash all bytes of a table. `datasets` would pickle it for that, in four times its memory."""
    digest = hashlib.blake2b(str(table.schema).encode(), digest_size=8)
    for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
        digest.update(batch.serialize())  # of a slice its own rows alone
    return digest.hexdigest()


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes have left that were killed while they wrote; others may be writing now."""
    for path in folder.glob("**/.rows.*.tmp"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - _A_DAY:
                path.unlink()
