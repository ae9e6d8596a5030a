"""`weights.parquet` of an earlier run: where it is, and its columns in batches."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tamis.rows import BATCH_SIZE

WEIGHTS = "weights.parquet"


def weights_path(given: str, setting: str) -> Path:
    """The `weights.parquet` of a run directory, or the file that is named itself.

    Args:
        setting: that names it.

    Raises:
        ValueError: there is none.
    """
    path = Path(given).expanduser()
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such file. Give a run directory, or its {WEIGHTS}, to `{setting}`")
    return path


def require_columns(path: Path, names: Sequence[str]) -> None:
    """Refuse a `weights.parquet` without these columns.

    Raises:
        ValueError: with the first that is missing.
    """
    found = pq.read_schema(path).names
    if missing := [name for name in names if name not in found]:
        raise ValueError(f'{path}: no column "{missing[0]}": it was not written by this version of tamis')


def weight_batches(path: Path, columns: list[str], size: int = BATCH_SIZE, **options: Any) -> Iterator[pa.RecordBatch]:
    """Some columns of `weights.parquet`, in batches of ``size`` rows.

    One thread, and nothing read ahead: that would take twice the memory on the way, and keep it.

    Args:
        options: of [`~pyarrow.parquet.ParquetFile`].
    """
    with pq.ParquetFile(path, pre_buffer=False, **options) as file:
        yield from file.iter_batches(size, columns=columns, use_threads=False)
