"""Dropped rows come back with responses of a refining run, in every format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from weighed_files import ROWS, chosen, json_lines, rows_in, write_as


def refinement(place, responses, p_right, step=1, weight=1.5):
    shares = [1 / len(responses)] * len(responses)
    record = {"example_id": place, "step": step, "responses": responses, "response_weights": shares}
    return record | {"response_p_right": p_right, "weight": weight}


def refine(folder, *records):
    pq.write_table(pa.Table.from_pylist(list(records)), folder / "run" / "refinements.parquet")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "saved"])
def test_dropped_rows_get_the_responses_that_the_run_wrote_last(weigh, tmp_path, name):
    write_as(tmp_path / name, ROWS)
    weigh(name)
    refine(
        tmp_path,
        refinement(2, ["early"], [0.99]),
        refinement(2, ["no", 'so,\n"so"', "yes"], [0.2, 0.7, 0.9], step=2),
        refinement(0, ["of a row that is kept"], [0.99]),
    )
    chosen(use_refined="best")
    best = rows_in(tmp_path / "clean" / name)
    assert best == [ROWS[0], ROWS[1], ROWS[2] | {"completion": "yes"}, ROWS[3]]
    chosen(use_refined="all", output_dir="all")
    assert [row["completion"] for row in rows_in(tmp_path / "all" / name)][2:4] == ["yes", 'so,\n"so"']


def test_responses_that_are_more_likely_wrong_than_right_are_not_taken(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS))
    weigh("a.jsonl")
    refine(tmp_path, refinement(2, ["bad", "worse"], [0.4, 0.3]))
    chosen(use_refined="best")
    assert rows_in(tmp_path / "clean/a.jsonl") == [ROWS[0], ROWS[1], ROWS[3]]


def test_without_a_scout_the_weights_tell_the_best_response(weigh, tmp_path, caplog):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS))
    weigh("a.jsonl")
    record = refinement(2, ["a", "b", "a", "unused"], [None] * 4) | {"response_weights": [0.3, 0.4, 0.3, 0.0]}
    refine(tmp_path, record)
    chosen(use_refined="all")
    assert [row["completion"] for row in rows_in(tmp_path / "clean/a.jsonl")][2:4] == ["a", "b"]
    assert "does not know how likely" in caplog.text


def test_new_responses_keep_the_form_of_a_row(weigh, tmp_path):
    messages = [{"role": "user", "content": "3="}, {"role": "assistant", "content": "33", "weight": 1}]
    sharegpt = [{"from": "human", "value": "3="}, {"from": "gpt", "value": "33"}]
    refined = {"role": "assistant", "content": "new", "weight": 1}
    for name, row, new in (
        ("m", {"messages": messages}, {"messages": [messages[0], refined]}),
        ("s", {"conversations": sharegpt}, {"conversations": [sharegpt[0], {"from": "gpt", "value": "new"}]}),
        ("c", {"prompt": messages[:1], "completion": messages[1:]}, {"prompt": messages[:1], "completion": [refined]}),
    ):
        (tmp_path / f"{name}.jsonl").write_text(json_lines([row] * 2))
        weigh(f"{name}.jsonl", p_right=[0.9, 0.1])
        refine(tmp_path, refinement(1, ["new"], [0.9]))
        chosen(use_refined="best", output_dir=name)
        assert rows_in(tmp_path / name / f"{name}.jsonl") == [row, new]


def test_new_responses_in_a_column_within_an_object(weigh, tmp_path):
    rows = [{"q": str(i), "meta": {"answer": {"text": "x"}, "id": i}} for i in range(2)]
    (tmp_path / "a.jsonl").write_text(json_lines(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        weigh(name, p_right=[0.9, 0.1], prompt_column="q", response_column="meta.answer.text")
        refine(tmp_path, refinement(1, ["new"], [0.9]))
        chosen(use_refined="best", output_dir=name + "-out")
        assert rows_in(tmp_path / f"{name}-out" / name) == [
            rows[0], {"q": "1", "meta": {"answer": {"text": "new"}, "id": 1}},
        ]  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_added_columns_tell_new_responses_from_old_ones(weigh, tmp_path, name):
    write_as(tmp_path / name, ROWS)
    weigh(name)
    refine(tmp_path, refinement(2, ["x", "y"], [0.75, 0.5]))
    chosen(use_refined="all", add_columns=True)
    rows = rows_in(tmp_path / "clean" / name)
    assert [str(row["tamis_refined"]).lower() for row in rows] == ["false", "false", "true", "true", "false"]
    assert [float(row["tamis_p_right"]) for row in rows] == [0.9, 0.7, 0.75, 0.5, 0.8]
    assert [float(row["tamis_weight"]) for row in rows[2:4]] == [0.75, 0.75]
    manifest = json.loads((tmp_path / "clean/manifest.json").read_text())
    assert (manifest["num_kept"], manifest["num_new_responses"]) == (3, 2)


def test_refined_rows_of_a_run_that_has_none(weigh, tmp_path):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS))
    weigh("a.jsonl")
    with pytest.raises(ValueError, match="the run has refined no rows"):
        chosen(use_refined="best")
    refine(tmp_path, refinement(2, ["x"], [0.9]))
    with pytest.raises(ValueError, match="use_refined must be one of best, all, got 'some'"):
        chosen(use_refined="some")
