"""`refinements.parquet`, written refresh by refresh."""

import weakref

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tamis.refinements import SCHEMA, add_refresh, drop_refreshes


def refresh(step: int, num_rows: int = 3) -> pa.Table:
    rows = [{"example_id": i, "step": step, "responses": [f"{step} {i}"], "weight": 1.0} for i in range(num_rows)]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "refinements.parquet"
    for step in (0, 4, 8):
        add_refresh(path, refresh(step), {"tamis_format_version": "4"})
    return path


def test_a_refresh_is_a_row_group_after_the_earlier_ones(path):
    assert pq.read_table(path).equals(pa.concat_tables([refresh(0), refresh(4), refresh(8)]))
    assert pq.ParquetFile(path).num_row_groups == 3
    assert pq.read_schema(path).metadata[b"tamis_format_version"] == b"4"


def test_what_is_dropped_and_added_again_gives_the_same_bytes(path):
    before = path.read_bytes()
    drop_refreshes(path, 4)
    assert pq.read_table(path)["step"].to_pylist() == [0] * 3
    for step in (4, 8):
        add_refresh(path, refresh(step), {"tamis_format_version": "4"})
    assert path.read_bytes() == before


def test_of_a_refresh_in_one_group_with_others_the_later_rows_go(tmp_path):
    path = tmp_path / "refinements.parquet"  # earlier versions wrote one group for all
    pq.write_table(pa.concat_tables([refresh(0), refresh(4)]), path)
    drop_refreshes(path, 4)
    assert pq.read_table(path).equals(refresh(0))


def test_columns_that_an_earlier_version_did_not_have_are_null(tmp_path):
    path = tmp_path / "refinements.parquet"
    pq.write_table(refresh(0).drop_columns(["response_p_right"]), path)
    add_refresh(path, refresh(4), {})
    assert pq.read_table(path).equals(pa.concat_tables([refresh(0), refresh(4)]))


def test_a_refresh_without_rows_leaves_a_readable_file(tmp_path):
    path = tmp_path / "refinements.parquet"
    add_refresh(path, refresh(0, num_rows=0), {})
    assert pq.read_table(path).num_rows == 0
    drop_refreshes(tmp_path / "absent.parquet", 0)
    assert not (tmp_path / "absent.parquet").exists()


def test_one_earlier_refresh_is_in_memory_at_a_time(path, monkeypatch):
    alive, most = [], []

    class Watched(pq.ParquetFile):
        def read_row_group(self, *args, **kwargs):
            table = super().read_row_group(*args, **kwargs)
            alive.append(weakref.ref(table))
            most.append(sum(ref() is not None for ref in alive))
            return table

    monkeypatch.setattr(pq, "ParquetFile", Watched)
    add_refresh(path, refresh(12), {})
    assert len(most) == 3 and max(most) <= 2  # the one being read, and the one just written
