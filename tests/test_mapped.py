"""Rows that are many are mapped from a file, and are the same rows."""

import json

import datasets.config
import numpy as np
import pyarrow as pa
import pytest
from conftest import assert_close, pairs, parameters

from tamis import mapped as mapped_module
from tamis.data import load_rows
from tamis.files import WriteError
from tamis.mapped import as_dataset, one_table
from tamis.sources import load_sources


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache of `datasets`, and every table of two rows is a large one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tamis.mapped.LARGEST_IN_MEMORY", 50)
    monkeypatch.setattr("tamis.rows.BATCH_SIZE", 2)
    return tmp_path / "cache/tamis"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(number, name="Hello"):
    return [{"prompt": f"question {i}", "completion": f"{name} {i}"} for i in range(number)]


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_large_rows_are_those_of_small_ones(tmp_path, cache, monkeypatch):
    path = write(tmp_path / "rows.jsonl", rows_of(7))
    mapped = load_rows(path, role="train_dataset")
    (file,) = mapped.cache_files
    (name,) = files_in(cache)
    assert name.endswith("/rows.arrow") and file["filename"] == str(cache / name)
    monkeypatch.setattr("tamis.mapped.LARGEST_IN_MEMORY", 2**28)
    in_memory = load_rows(path, role="train_dataset")
    assert in_memory.cache_files == [] and mapped.to_dict() == in_memory.to_dict()
    assert mapped.features == in_memory.features


def test_the_file_is_written_once_and_derived_rows_stand_beside_it(tmp_path, cache):
    path = write(tmp_path / "rows.jsonl", rows_of(7))
    first = load_rows(path, role="train_dataset")
    (file,) = cache.rglob("rows.arrow")
    written = file.stat().st_mtime_ns
    upper = first.map(lambda row: {"completion": row["completion"].upper()})
    again = load_rows(path, role="train_dataset")
    assert again._fingerprint == first._fingerprint and file.stat().st_mtime_ns == written
    assert upper[6]["completion"] == "HELLO 6" and len(files_in(cache)) == 2
    other = load_rows(write(path, rows_of(7, name="Bye")), role="train_dataset")
    assert other[0]["completion"] == "Bye 0" and other._fingerprint != first._fingerprint


def test_several_sources_and_messages_with_fields_of_their_own(tmp_path, cache):
    """Parts with unlike fields are brought together, as they are in memory."""
    call = [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with_call = [turns[0], {"role": "assistant", "content": "x", "tool_calls": call}]
    paths = [
        write(tmp_path / "a.jsonl", [{"messages": turns}] * 5),
        write(tmp_path / "b.jsonl", [{"messages": with_call}] * 5),
    ]
    found = load_sources([str(path) for path in paths], role="train_dataset", source_weights=[1.0, 2.0])
    assert found["weight"][:] == [1.0] * 5 + [2.0] * 5 and found["source"][:] == ["a.jsonl"] * 5 + ["b.jsonl"] * 5
    assert found[0]["messages"][1]["content"] == "Hello" and found[9]["messages"][1]["tool_calls"] == call
    assert found.cache_files


def test_a_run_on_mapped_rows_learns_the_same(tmp_path, cache, bilevel, monkeypatch):
    """The tokens are mapped too, and made once: the second run finds them."""
    files = [write(tmp_path / name, rows) for name, rows in (("a.jsonl", pairs(6)), ("b.jsonl", pairs(4, start=50)))]

    def run():
        train, trusted = (load_rows(file, role="train_dataset") for file in files)
        trainer = bilevel(train, trusted, selector="mirror", max_steps=3, prompt_template="plain")
        trainer.train()
        return trainer.train_dataset.cache_files, parameters(trainer.model), trainer.row_weights["weight"]

    tokens, *mapped = run()
    assert tokens and all(file["filename"].startswith(str(cache)) for file in tokens)
    known = files_in(cache)
    run()
    assert files_in(cache) == known
    monkeypatch.setattr("tamis.mapped.LARGEST_IN_MEMORY", 2**28)
    _, *in_memory = run()
    assert_close(mapped[0], in_memory[0], atol=0.0)
    assert np.array_equal(mapped[1], in_memory[1])


def test_files_that_are_small_one_by_one_are_moved_out_together_and_once(tmp_path, cache, monkeypatch):
    """Many of them would fill the memory as one large one does."""
    moved, move_out = [], mapped_module._moved_out
    monkeypatch.setattr(mapped_module, "_moved_out", lambda table: moved.append(len(table)) or move_out(table))
    monkeypatch.setattr(mapped_module, "LARGEST_IN_MEMORY", 400)
    paths = [write(tmp_path / f"{name}.jsonl", rows_of(2, name)) for name in "abcdef"]
    tables = [len(load_rows(path, role="train_dataset")) for path in paths]
    assert tables == [2] * 6 and moved == [], "each alone stays in memory"
    found = load_sources([str(path) for path in paths], role="train_dataset")
    assert found["source"][:] == [path.name for path in paths for _ in range(2)] and found.cache_files
    assert 0 < sum(moved) <= len(found)


def test_rows_that_do_not_fit_leave_nothing_behind(cache):
    tables = [pa.table({"a": ["text" * 20]}), pa.table({"a": [1] * 20})]
    with pytest.raises(ValueError, match=r"^rows.csv: the rows do not fit into one table \(ArrowTypeError"):
        one_table(tables, "rows.csv")
    assert files_in(cache) == []


def test_a_cache_that_cannot_be_written_is_named(cache):
    cache.parent.mkdir()
    cache.write_text("a file where the folder should be", encoding="utf-8")
    with pytest.raises(OSError, match="cache/tamis"):
        one_table([pa.table({"a": ["text" * 20]})], "rows.csv")


def test_a_full_disk_is_named_and_the_next_try_succeeds(cache, monkeypatch):
    table = pa.table({"a": ["text" * 20]})

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(pa.ipc, "new_stream", fail)
        with pytest.raises(WriteError, match=r"No space left on device.*rows\.arrow"):
            as_dataset(table)
    assert files_in(cache) == []
    assert as_dataset(table)["a"][:] == ["text" * 20]
