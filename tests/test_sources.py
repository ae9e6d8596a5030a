"""Several sources of training rows, columns inside objects, and bad rows that are left out."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import message_of, pairs, read_jsonl, write_jsonl
from datasets import Dataset

from tamis import load_rows
from tamis.cli import main
from tamis.rows import column_values
from tamis.sources import load_sources


def load(*sources, **options) -> Dataset:
    return load_sources([str(source) for source in sources], role="train_dataset", **options)


@pytest.fixture
def folder(tmp_path):
    """a.jsonl with rows 0 and 1; b/x.parquet and b/y.parquet with row 10 and 20 each."""
    write_jsonl(tmp_path / "a.jsonl", pairs(2))
    (tmp_path / "b").mkdir()
    for name, start in (("y", 20), ("x", 10)):
        pq.write_table(pa.Table.from_pylist(pairs(1, start)), tmp_path / "b" / f"{name}.parquet")
    return tmp_path


def test_files_and_patterns_in_their_order(folder):
    rows = load(folder / "a.jsonl", folder / "b" / "*.parquet")
    assert rows["prompt"][:] == ["0=", "1=", "10=", "20="]
    assert rows["source"][:] == ["a.jsonl", "a.jsonl", "x.parquet", "y.parquet"] and rows["row"][:] == [0, 1, 0, 0]
    assert load(folder / "**" / "*.parquet")["prompt"][:] == ["10=", "20="]


def test_one_source_is_what_the_loader_gives(folder):
    one, other = load(folder / "a.jsonl"), load_rows(folder / "a.jsonl", role="train_dataset")
    assert one.to_list() == other.to_list() and one.column_names == other.column_names


def test_files_of_one_name_are_told_apart(folder):
    write_jsonl(folder / "b" / "a.jsonl", pairs(1, 5))
    paths = [str(folder / "a.jsonl"), str(folder / "b" / "a.jsonl")]
    assert load(*paths)["source"][:] == [paths[0], paths[0], paths[1]]


@pytest.mark.parametrize("weight_column", [None, "w"])
def test_every_row_gets_the_weight_of_its_source(folder, weight_column):
    write_jsonl(folder / "a.jsonl", [row | {"w": i} for i, row in enumerate(pairs(2))])
    write_jsonl(folder / "c.jsonl", [row | {"w": 3} for row in pairs(1, 30)])
    rows = load(folder / "a.jsonl", folder / "c.jsonl", source_weights=[2.0, 0.5], weight_column=weight_column)
    assert rows["weight"][:] == ([2.0, 2.0, 0.5] if weight_column is None else [0.0, 2.0, 1.5])


@pytest.mark.parametrize(
    ("sources", "options", "problem"),
    [
        (["a.jsonl", "b/*.csv"], {}, "b/*.csv: no file matches"),
        (["a.jsonl", "none.jsonl"], {}, "none.jsonl: no such file"),
        (["a.jsonl", "*.jsonl"], {}, "a.jsonl: named twice in train_dataset"),
        (["a.jsonl"], {"source_weights": [1.0, 2.0]}, "2 `source_weights` for 1 sources"),
        (["a.jsonl"], {"source_weights": [-1.0]}, "-1.0 is not a finite number >= 0"),
        (["a.jsonl", "texts.jsonl"], {}, "texts.jsonl: not the layout of a.jsonl"),
    ],
)
def test_sources_that_cannot_be_read_together(folder, monkeypatch, sources, options, problem):
    monkeypatch.chdir(folder)
    write_jsonl(folder / "texts.jsonl", [{"text": "1"}])
    if "*.jsonl" in sources:
        (folder / "texts.jsonl").unlink()
    assert problem in message_of(lambda: load(*sources, **options))


# --- columns inside objects -------------------------------------------------------------------------------------------

NESTED = [{"meta": {"q": {"text": f"{i}="}, "answer": f"{2 * i}", "w": i + 1}, "id": i} for i in range(3)]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_dot_leads_into_an_object(tmp_path, kind):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_jsonl(path, NESTED)
    else:
        pq.write_table(pa.Table.from_pylist(NESTED), path)
    columns = {"prompt_column": "meta.q.text", "response_column": "meta.answer", "weight_column": "meta.w"}
    rows = load(path, **columns)
    assert rows["completion"][:] == ["0", "2", "4"] and rows["weight"][:] == [1.0, 2.0, 3.0]
    assert [prompt.strip() for prompt in rows["prompt"]] == ["0=", "1=", "2="]


def test_a_column_with_a_dot_in_its_name_comes_first():
    assert column_values([{"meta.a": 1, "meta": {"a": 2}}], "meta.a") == [1]
    assert column_values([{"meta": {"a": 2}}, {"meta": None}, {}], "meta.a") == [2, None, None]


def test_a_path_that_leads_nowhere_is_named(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", NESTED)
    columns = {"prompt_column": "meta.q.text", "response_column": "meta.reply"}
    assert 'row 0 (line 1), column "meta.reply": the response is missing' in message_of(lambda: load(path, **columns))
    columns["response_column"] = "mta.answer"
    assert 'there is no column "mta.answer"' in message_of(lambda: load(path, **columns))


# --- bad rows ---------------------------------------------------------------------------------------------------------

GOOD = '{"prompt": "1=", "completion": "2", "w": 1}\n'
BAD = {
    '{"prompt": null, "completion": "2", "w": 1}\n': "the prompt is missing",
    '{"prompt": "1=", "comp\n': "not valid JSON",
    '{"prompt": "3=", "completion": " ", "w": 1}\n': "the response is empty",
    "7\n": "not an object",
    '{"prompt": "4=", "completion": 5, "w": 1}\n': "is not text",
    '{"prompt": "4=", "completion": "5", "w": -1}\n': "not a finite number >= 0",
}


@pytest.mark.parametrize("is_first", [True, False])
def test_bad_rows_are_left_out_counted_and_kept(tmp_path, caplog, is_first):
    path = tmp_path / "rows.jsonl"
    lines = [*BAD, GOOD, GOOD] if is_first else [GOOD, *BAD, GOOD]
    path.write_text("".join(lines))
    skipped = []
    rows = load(path, weight_column="w", skipped=skipped)
    places = [6, 7] if is_first else [0, 7]
    assert rows["row"][:] == places and rows["weight"][:] == [1.0, 1.0] and rows["completion"][:] == ["2", "2"]
    assert [entry["row"] for entry in skipped] == [i for i in range(8) if i not in places]
    for entry, (line, problem) in zip(skipped, BAD.items(), strict=True):
        assert problem in entry["problem"] and f"row {entry['row']} (line {entry['row'] + 1})" in entry["problem"]
        assert entry["source"] == "rows.jsonl"
        assert entry["content"] == line or set(entry["content"]) == {"prompt", "completion"}
    assert "rows.jsonl: 6 of 8 rows skipped, first rows.jsonl, row " in caplog.text
    message_of(lambda: load(path, weight_column="w"))


def test_bad_rows_of_csv_and_parquet(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion\n1=,2\n1=,2,3\n,4\n5=,6\n7=,\n")
    skipped = []
    assert load(tmp_path / "rows.csv", skipped=skipped)["row"][:] == [0, 2, 3]  # an empty prompt is one
    assert [entry["row"] for entry in skipped] == [1, 4] and "3 values for 2 columns" in skipped[0]["problem"]
    pq.write_table(pa.Table.from_pylist([*pairs(2), {"prompt": None, "completion": "x"}]), tmp_path / "rows.parquet")
    skipped = []
    assert load(tmp_path / "rows.parquet", skipped=skipped)["row"][:] == [0, 1]
    assert skipped[0]["content"] == {"prompt": None, "completion": "x"}


def test_bad_rows_in_several_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("tamis.rows.BATCH_SIZE", 2)
    rows = [row if i % 3 else row | {"completion": ""} for i, row in enumerate(pairs(7))]
    path, skipped = write_jsonl(tmp_path / "rows.jsonl", rows), []
    assert load(path, skipped=skipped)["row"][:] == [1, 2, 4, 5]
    assert [entry["row"] for entry in skipped] == [0, 3, 6]


@pytest.mark.parametrize("lines", [list(BAD), ["7\n", "8\n"]])
def test_a_file_of_bad_rows_alone_is_an_error(tmp_path, lines):
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    message = message_of(lambda: load(tmp_path / "rows.jsonl", weight_column="w", skipped=[]))
    assert message.startswith(f"rows.jsonl: all {len(lines)} rows are bad, first rows.jsonl, row 0")


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_of_several_sources_with_weights_and_bad_rows(folder, model_dir, caplog):
    with open(folder / "a.jsonl", "a") as file:
        file.write('{"prompt": "1=", "comp\n')
    flags = ["--model_name_or_path", model_dir, "--use_cpu", "--bf16", "false", "--report_to", "none"]
    flags += ["--max_steps", "1", "--per_device_train_batch_size", "2", "--skip_bad_rows", "--selector", "column"]
    sources = ["--train_dataset", str(folder / "a.jsonl"), str(folder / "b/*.parquet"), "--source_weights", "1", "3"]
    run, again = folder / "run", folder / "again"
    assert main(["train", *flags, *sources, "--output_dir", str(run)]) == 0
    table = pq.read_table(run / "weights.parquet")
    assert table["weight"].to_pylist() == pytest.approx([0.5, 0.5, 1.5, 1.5])
    (entry,) = read_jsonl(run / "skipped_rows.jsonl")
    assert entry["row"] == 2 and "a.jsonl: 1 of 3 rows skipped" in caplog.text
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(again)]) == 0
    assert pq.read_table(again / "weights.parquet").equals(table)


def test_one_source_in_a_config_needs_no_list(folder, model_dir):
    config = {"train_dataset": str(folder / "a.jsonl"), "model_name_or_path": model_dir, "selector": "none"}
    config |= {"max_steps": 0, "use_cpu": True, "bf16": False, "report_to": "none", "output_dir": str(folder / "run")}
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(folder / "mine.yaml")]) == 0


def test_weights_of_sources_have_no_effect_on_a_selector_that_does_not_read_them(folder, model_dir, caplog):
    flags = ["--model_name_or_path", model_dir, "--use_cpu", "--bf16", "false", "--report_to", "none"]
    flags += ["--max_steps", "0", "--selector", "none", "--output_dir", str(folder / "run")]
    assert main(["train", *flags, "--train_dataset", str(folder / "a.jsonl"), "--source_weights", "2"]) == 0
    assert "source_weights is set but has no effect" in caplog.text
