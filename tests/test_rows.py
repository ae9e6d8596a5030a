"""Known answers for what is checked and known of rows, whatever they were read from."""

import hashlib
import json
import logging

import numpy as np
import pytest
from conftest import message_of, write_jsonl
from datasets import Dataset

from tamis.data import load_rows
from tamis.hashes import fingerprint, hex_digits, is_in, num_distinct, shared_rows
from tamis.lengths import report_dropped
from tamis.rows import attach_example_ids, check_overlap, check_rows, row_table

QA = [{"question": "2+2?", "answer": "4"}, {"question": "3+3?\n", "answer": " 6"}]
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def load(path, rows) -> Dataset:
    return load_rows(write_jsonl(path, rows), role="train_dataset")


def content_hashes(dataset: Dataset) -> list[str]:
    return hex_digits(check_rows(dataset, "train_dataset"))


def overlap(caplog, train: Dataset, validation: Dataset, evaluation: Dataset | None = None) -> list[str]:
    """The warnings."""
    caplog.clear()
    datasets = {"train_dataset": train, "validation_dataset": validation, "eval_dataset": evaluation}
    datasets = {role: dataset for role, dataset in datasets.items() if dataset is not None}
    check_overlap(datasets, {role: check_rows(dataset, role) for role, dataset in datasets.items()})
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_check_rows_on_a_data_set_made_in_python():
    check_rows(Dataset.from_list([{"prompt": "a", "completion": "b", "weight": 0.0}]), "eval_dataset")
    check_rows(Dataset.from_list([{"messages": CHAT, "source": "forum", "row": "7"}]), "eval_dataset")

    def text(rows):
        return message_of(lambda: check_rows(Dataset.from_list(rows), "eval_dataset"))

    assert text([{"text": "a"}, {"text": ""}]) == (
        'eval_dataset, row 1, column "text": the text is empty. Remove the row or fill it in.'
    )
    assert text([{"text": "", "source": "forum"}]).startswith("eval_dataset, row 0, ")
    assert text([{"text": "", "source": "a.jsonl", "row": 7}]).startswith("a.jsonl, row 7 (line 8), ")
    assert text([{"text": "a", "weight": -1}]).startswith('eval_dataset, row 0, column "weight": the weight -1 is not')
    assert text([{"input_ids": [1]}]) == "eval_dataset: neither prompt and completion, messages nor text in input_ids."
    assert text([]).startswith("eval_dataset: there are no rows")


def test_check_rows_follows_the_order_of_the_data_set():
    rows = Dataset.from_list([{"text": "a"}, {"text": ""}, {"text": "b"}])
    check_rows(rows.select([0, 2]), "train_dataset")
    assert "train_dataset, row 2, " in message_of(lambda: check_rows(rows.select([2, 0, 1]), "train_dataset"))
    assert "train_dataset, row 1, " in message_of(lambda: check_rows(rows.with_format("numpy"), "train_dataset"))


def test_check_rows_counts_across_batches(monkeypatch):
    monkeypatch.setattr("tamis.rows.BATCH_SIZE", 2)
    rows = Dataset.from_dict({"prompt": list("abcde"), "completion": ["a", "b", "c", "", " "]})
    assert message_of(lambda: check_rows(rows, "eval_dataset")) == (
        'eval_dataset, row 3, column "completion": the response is empty. Remove the row or fill it in. '
        "2 rows of the column are bad, first 3, 4."
    )
    late = Dataset.from_dict({"prompt": ["a", "b", None], "completion": ["", "b", "c"]})
    assert message_of(lambda: check_rows(late, "eval_dataset")).startswith('eval_dataset, row 2, column "prompt"')
    assert len(check_rows(rows.select(range(3)), "eval_dataset")) == 3


# --- hashes, overlap, ids ---


def test_content_hashes_depend_on_content_alone(tmp_path):
    jsonl = load(tmp_path / "a.jsonl", QA)
    (tmp_path / "b.csv").write_text('id,answer,question\n1,4,2+2?\n2, 6,"3+3?\n"\n')
    csv = load_rows(tmp_path / "b.csv", role="train_dataset")
    hashes = content_hashes(jsonl)
    assert hashes == content_hashes(csv)
    assert content_hashes(jsonl.select([1, 0])) == hashes[::-1]
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in hashes)


def test_the_fingerprint_is_the_documented_one(monkeypatch):
    """Of the digits of all hashes in order; earlier checkpoints have it."""
    numbers = np.array([7, 2**63, 0, 7], np.uint64)
    expected = hashlib.blake2b("".join(hex_digits(numbers)).encode(), digest_size=8).hexdigest()
    assert hex_digits(numbers)[:2] == ["0000000000000007", "8000000000000000"]
    assert fingerprint(numbers) == expected != fingerprint(numbers[[1, 0, 2, 3]])
    monkeypatch.setattr("tamis.hashes._AT_ONCE", 3)
    assert fingerprint(numbers) == expected


def test_content_hash_is_the_documented_one():
    expected = hashlib.blake2b('{"text": "ä"}'.encode(), digest_size=8).hexdigest()
    assert content_hashes(Dataset.from_list([{"text": "ä"}])) == [expected]


def test_content_hashes_tell_prompt_from_completion():
    pairs = [("a", "bc"), ("ab", "c"), ("abc", "d"), ("a", "b\nc")]
    rows = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
    assert len(set(content_hashes(rows))) == len(pairs)


def test_content_hash_of_messages_ignores_null_fields():
    alone = Dataset.from_list([{"messages": CHAT}])
    with_tools = [{"messages": [*CHAT, {"role": "assistant", "content": "x", "name": "n"}]}, {"messages": CHAT}]
    assert content_hashes(Dataset.from_list(with_tools))[1] == content_hashes(alone)[0]


def test_hashes_are_compared_as_numpy_compares_them(monkeypatch):
    monkeypatch.setattr("tamis.hashes._AT_ONCE", 3)
    draw = np.random.default_rng(0)
    first, second = (draw.integers(0, 40, size).astype(np.uint64) + np.uint64(2**63 - 20) for size in (50, 25))
    assert num_distinct(first) == len(np.unique(first)) and num_distinct(first[:0]) == 0
    assert is_in(first, second).tolist() == np.isin(first, second).tolist()
    places = second.tolist()
    expected = [(i, places.index(digest)) for i, digest in enumerate(first.tolist()) if digest in places]
    assert list(shared_rows(first, second)) == expected


def test_overlap(tmp_path, caplog):
    def rows(name, texts):
        return load(tmp_path / name, [{"text": text} for text in texts])

    train = rows("train.jsonl", "abcdefgh")
    assert overlap(caplog, train, rows("val.jsonl", "xy"), rows("test.jsonl", "z")) == []
    assert overlap(caplog, train, rows("val.jsonl", "xy")) == []

    found = overlap(caplog, train, rows("val.jsonl", "xhba"), rows("test.jsonl", "cdefz"))
    assert len(found) == 2
    assert found[0].startswith(
        "validation_dataset and train_dataset share 3 row(s), first val.jsonl, row 1 (line 2) = train.jsonl, row 7 "
        "(line 8); val.jsonl, row 2 (line 3) = train.jsonl, row 1 (line 2); val.jsonl, row 3"
    )
    assert found[1].startswith("eval_dataset and train_dataset share 4 row(s), first test.jsonl, row 0 (line 1) = ")
    assert found[1].count(" = ") == 3

    text = message_of(lambda: overlap(caplog, train, rows("val.jsonl", "xy"), rows("test.jsonl", "zy")))
    assert text.startswith(
        "validation_dataset and eval_dataset share 1 row(s), first val.jsonl, row 1 (line 2) = test.jsonl, row 1 (line "
    )


def test_overlap_names_the_first_of_equal_rows(caplog):
    found = overlap(caplog, Dataset.from_dict({"text": ["a", "b", "b"]}), Dataset.from_dict({"text": ["b"]}))
    assert "validation_dataset, row 0 = train_dataset, row 1." in found[0]


def test_attach_example_ids():
    rows = Dataset.from_list([{"text": text} for text in "abc"])
    shuffled = attach_example_ids(rows.select([2, 0, 1]))
    assert shuffled.to_dict() == {"text": ["c", "a", "b"], "example_id": [0, 1, 2]}
    assert shuffled.features["example_id"].dtype == "int64"
    assert attach_example_ids(shuffled.select([2, 0]))["example_id"][:] == [2, 0]
    for ids in ([0, 0, 1], [0, None, 1], ["a", "b", "c"]):
        bad = rows.add_column("example_id", ids)
        assert "unique int64" in message_of(lambda bad=bad: attach_example_ids(bad))


def test_content_hash_is_that_of_sorted_json_without_nulls(monkeypatch):
    call = {"name": "null", "arguments": {"z": 1.5, "a": True, "names": ['ä\n"\u2028', None, ""]}}
    rows = [
        {"prompt": [CHAT[0]], "completion": [{"role": "assistant", "content": "x", "tool_calls": [call]}]},
        {"prompt": [CHAT[0]], "completion": [CHAT[1]]},
    ]
    dataset = Dataset.from_list(rows)
    assert "tool_calls" in dataset[1]["completion"][0], "with null"
    texts = [json.dumps(row, ensure_ascii=False, sort_keys=True) for row in rows]
    expected = [hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]
    assert content_hashes(dataset) == expected
    monkeypatch.setattr("tamis.rows.BATCH_SIZE", 1)
    assert content_hashes(dataset) == expected


def test_row_table():
    rows = Dataset.from_dict({"text": ["a", "b", "c"], "row": [5, 6, 7], "source": ["x", "x", "y"]}).select([2, 0])
    hashes = check_rows(rows, "train_dataset")
    expected = {"example_id": [0, 1], "source": ["y", "x"], "row": [7, 5], "content_hash": hex_digits(hashes)}
    assert row_table(rows, hashes).to_pydict() == expected
    unnamed = row_table(rows.select_columns(["text"]), hashes)
    assert unnamed.to_pydict() == expected | {"source": [None, None], "row": [0, 1]}
    assert [str(field.type) for field in unnamed.schema] == ["int64", "string", "int64", "string"]


@pytest.mark.parametrize("ids", [[7, 3, 9, 4], ["d", "a", "b", "c"]])
def test_report_dropped_names_the_first(caplog, ids):
    rows = Dataset.from_dict({"text": list("wxyz"), "example_id": ids})
    report_dropped("eval_dataset", rows, rows.select([3, 0]), max_length=5)
    assert "2 of 4 rows dropped" in caplog.text and "max_length=5: rows 1, 2. Raise" in caplog.text
    caplog.clear()
    report_dropped("eval_dataset", rows, rows.select([3, 1, 0, 2]), max_length=5)
    assert caplog.text == ""
    assert "all 4 rows are left out" in message_of(lambda: report_dropped("eval_dataset", rows, rows.select([]), 5))


def test_no_column_is_walked_row_by_row(monkeypatch):
    """A `datasets` column iterates row by row, at 10 us each: a million rows would take seconds for every column."""
    rows = Dataset.from_dict({"text": list("abc"), "row": [0, 1, 2], "source": ["x"] * 3, "weight": [1.0] * 3})

    def refuse(dataset):
        raise AssertionError("row by row")

    monkeypatch.setattr(Dataset, "__iter__", refuse)
    rows = attach_example_ids(attach_example_ids(rows))
    row_table(rows, check_rows(rows, "train_dataset"))
    report_dropped("train_dataset", rows, rows.select([0, 2]), max_length=5)


def test_validation_rows_that_are_the_training_rows(tmp_path, caplog):
    train = load(tmp_path / "train.jsonl", [{"text": text} for text in "abc"])
    same = load(tmp_path / "val.jsonl", [{"text": text} for text in "cba"])
    (message,) = overlap(caplog, train, same)
    assert message.startswith("validation_dataset and train_dataset have the same rows")
