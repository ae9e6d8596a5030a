"""The table at the end of a run."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tamis.summary import format_summary, summarize, summarize_scores


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    pq.write_table(pa.table({"kept": [True, True, False, True]}), folder / "weights.parquet")

    def log(*records):
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return folder

    return log


def evaluation(step, loss, match=0.5):
    return {"step": step, "eval_loss": loss, "eval_teacher_forced_match": match}


def test_held_out_rows_before_and_after(run):
    folder = run(evaluation(0, 3.0, 0.0), {"step": 1, "loss": 9.0}, evaluation(5, 2.0), evaluation(10, 1.5, 0.75))
    lines = dict(summarize(folder, has_held_out=True))
    assert lines["held-out loss"] == "3.0000 before, 1.5000 after"
    assert lines["held-out match"].startswith("0.000 before, 0.750 after")
    assert lines["rows kept"] == "3 of 4 (75%)"
    assert "responses" not in lines


def test_a_run_that_went_on_has_no_loss_before_it_where_none_was_measured(run):
    lines = dict(summarize(run(evaluation(5, 2.0), evaluation(10, 1.5)), has_held_out=True))
    assert lines["held-out loss"] == "1.5000"


def test_no_held_out_rows(run):
    assert [name for name, _ in summarize(run(), has_held_out=False)] == [
        "rows kept",
        "model",
        "weights",
        "look at them",
        "next",
        "clean rows",
    ]


def test_a_loss_that_is_no_number_is_left_out(run):
    names = [name for name, _ in summarize(run(evaluation(0, None)), has_held_out=True)]
    assert "held-out loss" not in names


def test_the_next_command(run):
    folder = run()
    assert dict(summarize(folder, has_held_out=False))["next"].startswith("tamis train --config ")
    (folder / "inference_example.py").touch()
    (folder / "refinements.parquet").touch()
    lines = dict(summarize(folder, has_held_out=False))
    assert lines["next"] == f"python {folder / 'inference_example.py'}"
    assert lines["responses"] == str(folder / "refinements.parquet")


def test_columns_are_aligned():
    assert format_summary([("a", "1"), ("abc", "2")]) == "a    1\nabc  2"


def test_how_to_get_the_clean_rows(run):
    folder = run()
    assert dict(summarize_scores(folder))["look at them"] == f"tamis report {folder}"
    for lines in (dict(summarize(folder, has_held_out=False))["clean rows"], dict(summarize_scores(folder))["next"]):
        assert lines == f"tamis select {folder} --output_dir {folder}-clean"
