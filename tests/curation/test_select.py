"""`tamis select`: kept rows come out as they went in, in every format; rows that have changed are refused."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import message_of
from datasets import Dataset, DatasetDict, load_from_disk
from weighed_files import P_RIGHT, ROWS, as_csv, chosen, json_lines, write_as

from tamis.cli import main
from tamis.sources import load_sources

# --- formats ----------------------------------------------------------------------------------------------------------


def test_lines_of_json_stay_to_the_byte(weigh, tmp_path):
    lines = ['{"prompt":"1=", "completion" : "\\u0031", "x": 1.50e2}', '{"prompt": "2=", "completion": "2", "k":[ ]}']
    (tmp_path / "a.jsonl").write_text(f"{lines[0]}\n\n{lines[1]}")
    weigh("a.jsonl", p_right=[0.9, 0.9])
    chosen()
    assert (tmp_path / "clean/a.jsonl").read_text() == f"{lines[0]}\n{lines[1]}\n"


def test_json_lines_keep_their_ends_and_the_byte_order_mark(weigh, tmp_path):
    text = "\ufeff" + json_lines(ROWS).replace("\n", "\r\n")
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    weigh("a.jsonl", "b.jsonl.gz", p_right=[0.9])
    chosen()
    assert (tmp_path / "clean/a.jsonl").read_bytes() == text.encode()
    assert gzip.decompress((tmp_path / "clean/b.jsonl.gz").read_bytes()) == text.encode()


def test_json_lines_packed_or_not(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json_lines(ROWS).encode()))
    weigh("a.jsonl", "b.jsonl.gz")
    chosen(dropped_dir="dropped")
    kept, dropped = json_lines(ROWS[:2] + ROWS[3:]), json_lines(ROWS[2:3])
    for folder, expected in (("clean", kept), ("dropped", dropped)):
        assert (tmp_path / folder / "a.jsonl").read_text(encoding="utf-8") == expected
        assert gzip.decompress((tmp_path / folder / "b.jsonl.gz").read_bytes()).decode() == expected


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_json(weigh, tmp_path, indent):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=indent), encoding="utf-8")
    weigh("a.json")
    chosen()
    text = (tmp_path / "clean/a.json").read_text(encoding="utf-8")
    assert json.loads(text) == ROWS[:2] + ROWS[3:] and ("\n  " in text) == bool(indent)


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_records_of_csv_stay_to_the_byte(weigh, tmp_path, name, delimiter, end):
    as_csv(tmp_path / name, ROWS, delimiter, end)
    weigh(name)
    chosen()
    as_csv(tmp_path / "expected", ROWS[:2] + ROWS[3:], delimiter, end)
    assert (tmp_path / "clean" / name).read_bytes() == (tmp_path / "expected").read_bytes()


def test_parquet_keeps_its_schema(weigh, tmp_path):
    table = pa.Table.from_pylist(ROWS).append_column("vector", pa.array([[1.5]] * 4, pa.list_(pa.float16())))
    table = table.replace_schema_metadata({"made by": "a user"})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, compression="zstd")
    weigh("a.parquet")
    chosen()
    found = pq.read_table(tmp_path / "clean/a.parquet")
    assert found.equals(table.take([0, 1, 3])) and found.schema.metadata[b"made by"] == b"a user"
    metadata = pq.read_metadata(tmp_path / "clean/a.parquet")
    assert metadata.num_row_groups == 2 and metadata.row_group(0).column(0).compression == "ZSTD"


def test_saved_data_sets_and_their_splits(weigh, tmp_path):
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows.select([0]), "more": rows}).save_to_disk(tmp_path / "many")
    for name, config in (("one", {}), ("many", {"train_split": "more"})):
        weigh(name, **config)
        chosen(output_dir=f"clean-{name}")
        found = load_from_disk(tmp_path / f"clean-{name}" / name)
        assert found.to_list() == ROWS[:2] + ROWS[3:] and found.features == rows.features


@pytest.mark.parametrize("source", [".", "../saved", ".."])
def test_a_saved_data_set_never_leaves_the_output_folder(weigh, tmp_path, monkeypatch, source):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved/inner").mkdir()
    weigh("saved")
    inside = "saved/inner" if source == ".." else "saved"
    monkeypatch.chdir(tmp_path / inside)
    chosen(weights=str(tmp_path / "run"), train_dataset=[source], output_dir=str(tmp_path / "clean"))
    assert load_from_disk(tmp_path / "clean" / "saved").to_list() == ROWS[:2] + ROWS[3:]
    assert load_from_disk(tmp_path / "saved").to_list() == ROWS


def test_folders_and_patterns_keep_their_names(weigh, tmp_path):
    (tmp_path / "data/train").mkdir(parents=True)
    for name in ("data/train/a.jsonl", "data/train/b.jsonl", "more.jsonl"):
        (tmp_path / name).write_text(json_lines(ROWS), encoding="utf-8")
    weigh("data", "mo*.jsonl")
    chosen()
    found = sorted(path.relative_to(tmp_path / "clean").as_posix() for path in (tmp_path / "clean").rglob("*.jsonl"))
    assert found == ["data/train/a.jsonl", "data/train/b.jsonl", "more.jsonl"]


def test_rows_that_were_skipped_are_neither_kept_nor_dropped(weigh, tmp_path):
    bad = ["not json", '{"prompt": "9=", "completion": ""}']
    lines = json_lines(ROWS).splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([lines[0], bad[0], *lines[1:], bad[1]]), encoding="utf-8")
    weigh("a.jsonl", skip_bad_rows=True)
    chosen(dropped_dir="dropped", add_columns=True)
    kept = [json.loads(line) for line in (tmp_path / "clean/a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in kept] == ["1=", "2=", "4="]
    assert [row["tamis_p_right"] for row in kept] == [0.9, 0.7, 0.8]
    assert (tmp_path / "dropped/a.jsonl").read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "saved"])
def test_what_the_run_knows_can_stand_beside_each_row(weigh, tmp_path, name):
    write_as(tmp_path / name, ROWS)
    weigh(name)
    chosen(add_columns=True)
    again = load_sources(["clean/" + name], role="train_dataset", weight_column="tamis_weight")
    squares = np.square(P_RIGHT) / np.mean(np.square(P_RIGHT))
    assert again["weight"][:] == pytest.approx(squares[[0, 1, 3]].tolist(), rel=1e-5)
    assert again["completion"][:] == [ROWS[i]["completion"] for i in (0, 1, 3)]
    (tmp_path / name).rename(tmp_path / "before")
    (tmp_path / "clean" / name).rename(tmp_path / name)
    weigh(name)
    message = message_of(lambda: chosen(output_dir="second", add_columns=True))
    assert 'there is a column "tamis_weight" already' in message


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [lines[0].replace("11", "12"), *lines[1:]], "a.jsonl, row 0 (line 1) does not say what it said"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "a.jsonl, row 0 (line 1) does not say"),
        (lambda lines: lines[1:], "a.jsonl, row 0 (line 1) does not say"),
        (lambda lines: lines[:-1], "4 rows were weighed, and there are 3"),
        (lambda lines: [*lines, lines[0]], "a.jsonl: rows were added since they were weighed"),
    ],
)
def test_rows_that_have_changed_are_refused(weigh, tmp_path, change, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json_lines(ROWS), encoding="utf-8")
    weigh("a.jsonl")
    path.write_text("\n".join(change(path.read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    assert message in message_of(chosen)
    assert not (tmp_path / "clean").exists()


def test_columns_that_are_not_read_may_change(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("a.jsonl")
    (tmp_path / "a.jsonl").write_text(json_lines(row | {"note": "new"} for row in ROWS), encoding="utf-8")
    chosen()
    assert (tmp_path / "clean/a.jsonl").read_text(encoding="utf-8").count('"note": "new"') == 3


def test_nothing_is_overwritten_and_no_file_is_its_own_source(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("a.jsonl")
    chosen()
    before = (tmp_path / "clean/a.jsonl").read_bytes()
    assert "clean/a.jsonl is there already" in message_of(lambda: chosen(top_k=1))
    assert (tmp_path / "clean/a.jsonl").read_bytes() == before
    chosen(top_k=1, overwrite_output_dir=True)
    assert (tmp_path / "clean/a.jsonl").read_bytes() != before
    message = message_of(lambda: chosen(output_dir=".", overwrite_output_dir=True))
    assert message.startswith("a.jsonl is what the rows are from")
    assert "are one folder" in message_of(lambda: chosen(output_dir="x", dropped_dir="./x"))


def test_a_saved_data_set_is_not_written_over_itself_nor_over_another_folder(weigh, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    weigh("saved")
    message = message_of(lambda: chosen(output_dir=".", overwrite_output_dir=True))
    assert message.startswith("saved is what the rows are from")
    assert load_from_disk(tmp_path / "saved").to_list() == ROWS
    (tmp_path / "clean/saved").mkdir(parents=True)
    (tmp_path / "clean/saved/mine.txt").write_text("mine")
    message = message_of(lambda: chosen(overwrite_output_dir=True))
    assert message.startswith("clean/saved is a folder of something else")
    assert (tmp_path / "clean/saved/mine.txt").read_text() == "mine"


def test_files_of_which_no_row_is_kept_can_be_read(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    as_csv(tmp_path / "b.csv", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    weigh("a.jsonl", "b.csv", "c.parquet", "saved", p_right=[0.9] * 4 + [0.1] * 12)
    chosen()
    assert (tmp_path / "clean/b.csv").read_bytes() == b"prompt,completion,note\r\n"
    assert pq.read_table(tmp_path / "clean/c.parquet").num_rows == 0
    assert load_from_disk(tmp_path / "clean/saved").features == Dataset.from_list(ROWS).features


def test_csv_with_a_byte_order_mark_and_a_last_line_without_end(weigh, tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufeffprompt,completion\r\n1=,11\r\n\r\n2=,"2\r\n2"'.encode())
    weigh("a.csv", p_right=[0.9, 0.9])
    chosen(add_columns=True)
    text = (tmp_path / "clean/a.csv").read_bytes().decode()
    assert text.startswith("\ufeffprompt,completion,tamis_weight,tamis_p_right") and '"2\r\n2",1.0,0.9' in text
    assert text.count("\n") == text.count("\r\n") == 4


def test_files_of_one_name_keep_the_folders_that_tell_them_apart(weigh, tmp_path):
    for folder in ("deep/x", "deep/y"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    (tmp_path / "deep/b.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("deep/*/a.jsonl", "deep/b.jsonl")
    chosen()
    found = sorted(path.relative_to(tmp_path / "clean").as_posix() for path in (tmp_path / "clean").rglob("*.jsonl"))
    assert found == ["b.jsonl", "x/a.jsonl", "y/a.jsonl"]


def test_rows_do_not_go_into_a_folder_that_is_read_as_training_rows(weigh, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("data")
    for folders in ({"output_dir": "data/clean"}, {"dropped_dir": "data"}):
        assert "lies in a folder that the rows are from" in message_of(lambda folders=folders: chosen(**folders))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["a.jsonl"]


def test_a_source_is_not_called_as_the_manifest(weigh, tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(ROWS))
    weigh("manifest.json")
    assert message_of(chosen).startswith("a source is called manifest.json")


def test_number_types_of_other_files_change_no_row(weigh, tmp_path):
    for name, turn in (("a.jsonl", 1), ("b.jsonl", 1.5)):
        roles = [{"role": "user", "content": "1=", "turn": turn}, {"role": "assistant", "content": "11", "turn": turn}]
        (tmp_path / name).write_text(json_lines([{"messages": roles}]))
    weigh("a.jsonl", "b.jsonl", p_right=[0.9, 0.9])
    chosen()
    assert (tmp_path / "clean/a.jsonl").read_bytes() == (tmp_path / "a.jsonl").read_bytes()


def test_rows_that_were_skipped_for_their_weight_are_skipped_again(weigh, tmp_path):
    rows = [row | {"w": -1.0 if i == 1 else 1.0} for i, row in enumerate(ROWS)]
    (tmp_path / "a.jsonl").write_text(json_lines(rows), encoding="utf-8")
    weigh("a.jsonl", skip_bad_rows=True, weight_column="w", p_right=[0.9])
    chosen()
    kept = (tmp_path / "clean/a.jsonl").read_text(encoding="utf-8")
    assert kept == json_lines([rows[0], *rows[2:]])


def test_where_one_file_fails_none_is_written(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(json_lines(row | {"tamis_weight": 1} for row in ROWS), encoding="utf-8")
    weigh("a.jsonl", "b.jsonl")
    assert 'b.jsonl, row 0 (line 1): there is a column "tamis_weight" already' in message_of(
        lambda: chosen(add_columns=True, dropped_dir="dropped")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "run"]


def test_what_is_there_and_of_another_kind_is_refused(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "clean").mkdir()
    (tmp_path / "clean/a.jsonl").symlink_to(tmp_path / "mine")
    weigh("a.jsonl")
    assert "mine is a file: choose another" in message_of(lambda: chosen(output_dir="mine"))
    assert "clean/a.jsonl is a file of something else" in message_of(lambda: chosen(overwrite_output_dir=True))
    assert (tmp_path / "mine").read_text() == "mine"


def test_added_columns_leave_nothing_beside_a_saved_data_set(weigh, tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    before = sorted(path.name for path in (tmp_path / "saved").iterdir())
    weigh("saved")
    chosen(add_columns=True)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == before


def test_equal_rows_have_no_rank(weigh, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("a.jsonl", p_right=[0.9])
    chosen(add_columns=True)
    assert "tamis_rank is left out: the run gives all rows one weight" in caplog.text
    assert "tamis_rank" not in (tmp_path / "clean/a.jsonl").read_text(encoding="utf-8")


# --- as a command -----------------------------------------------------------------------------------------------------


def test_the_same_command_twice_gives_the_same_bytes(weigh, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"prompt,completion,note\n5=,55,x\n6=,66,y\n"))
    weigh("a.jsonl", "b.csv.gz")
    for folder in ("first", "second"):
        assert main(["select", "run", "--output_dir", folder, "--sample", "3", "--add_columns"]) == 0
    out = capsys.readouterr().out
    assert "rows kept  3 of 6 (50%)" in out and "first/manifest.json" in out
    for name in ("a.jsonl", "b.csv.gz", "manifest.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    manifest = json.loads((tmp_path / "first/manifest.json").read_text())
    assert manifest["num_rows"] == 6 and manifest["num_kept"] == 3 and manifest["settings"]["sample"] == 3
    assert [source["name"] for source in manifest["sources"]] == ["a.jsonl", "b.csv.gz"]
    assert sum(source["num_kept"] for source in manifest["sources"]) == 3


def test_without_the_config_the_rows_are_named(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines({"q": r["prompt"], "a": r["completion"]} for r in ROWS))
    weigh("a.jsonl", prompt_column="q", response_column="a")
    (tmp_path / "run/weights.parquet").rename(tmp_path / "mine.parquet")
    assert "does not say which rows were weighed: give `train_dataset`" in message_of(
        lambda: chosen(weights="mine.parquet")
    )
    chosen(weights="mine.parquet", train_dataset=["a.jsonl"], prompt_column="q", response_column="a")
    assert (tmp_path / "clean/a.jsonl").read_text().count("\n") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("none --output_dir clean", "none: no such file. Give a run directory, or its weights.parquet, to --weights"),
        ("run", "the following arguments are required: --output_dir. See tamis select --help"),
        ("run --output_dir clean --kep 0.5", "unknown option --kep; did you mean --keep? See tamis select --help"),
        ("run --output_dir clean --keep 2", "keep must be 'auto' or a share above 0 and at most 1, got 2"),
        ("run --output_dir clean --top_k 2 --keep 0.5", "--top_k and --keep both say which rows are kept"),
        ("run --output_dir clean --train_dataset none.jsonl", "none.jsonl: no such file or folder. Check"),
        ("a.jsonl --output_dir clean", "a.jsonl: cannot be read as Parquet"),
    ],
)
def test_mistakes_end_in_one_line(weigh, tmp_path, options, message, capsys):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh("a.jsonl")
    assert main(["select", *options.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("tamis select: ") and message in error
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text()) and not (tmp_path / "clean").exists()
