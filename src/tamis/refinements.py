"""`refinements.parquet`: one row per refresh and refined row, a row group per refresh.

Parquet cannot grow in place, so a refresh writes the file anew. It copies the earlier ones row group by row group:
however many there are, one is in memory.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tamis.files import write_atomically

REFINEMENTS = "refinements.parquet"
SCHEMA = pa.schema(
    {
        "example_id": pa.int64(),
        "source": pa.string(),
        "row": pa.int64(),
        "step": pa.int64(),
        "prompt": pa.string(),
        "original": pa.string(),
        "responses": pa.list_(pa.string()),
        "token_ids": pa.list_(pa.list_(pa.int32())),
        "statuses": pa.list_(pa.string()),
        "log_probs": pa.list_(pa.float64()),
        "response_weights": pa.list_(pa.float64()),
        "response_p_right": pa.list_(pa.float64()),
        "weight": pa.float64(),
        "original_weight": pa.float64(),
        "is_refined": pa.bool_(),
    }
)


def add_refresh(path: Path, refresh: pa.Table, metadata: dict[str, str]) -> None:
    """Add a refresh to the file, which is made where there is none.

    Args:
        refresh: with `SCHEMA`.
        metadata: of the file.

    Raises:
        WriteError: the file stays as it was.
    """
    schema = SCHEMA.with_metadata(metadata)
    write_atomically(path, lambda temporary: _write(temporary, schema, chain(_refreshes(path), [refresh])))


def drop_refreshes(path: Path, first_step: int) -> None:
    """Drop what was refined at ``first_step`` and after it; a file that is not there stays so.

    Raises:
        WriteError: the file stays as it was.
    """
    if not path.exists():
        return
    schema = pq.read_schema(path)
    kept = (refresh.filter(pc.less(refresh["step"], first_step)) for refresh in _refreshes(path))
    write_atomically(path, lambda temporary: _write(temporary, schema, kept))


def _refreshes(path: Path) -> Iterator[pa.Table]:
    if path.exists():
        with pq.ParquetFile(path) as file:
            for k in range(file.num_row_groups):
                yield file.read_row_group(k, use_threads=False)


def _write(path: Path, schema: pa.Schema, refreshes: Iterable[pa.Table]) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for refresh in refreshes:
            if refresh.num_rows:
                # an earlier version of tamis may have written fewer columns
                table = pa.concat_tables([schema.empty_table(), refresh], promote_options="default")
                writer.write_table(table.select(schema.names))
