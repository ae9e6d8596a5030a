"""Marks of a person go before what the run says; marks of other rows are refused."""

import json

import pyarrow.parquet as pq
import pytest
from weighed_files import ROWS, chosen, json_lines, rows_in

from tamis.cli import main


def mark(weights, place, keep, **changes):
    row = weights.slice(place, 1).to_pylist()[0]
    return {name: row[name] for name in ("source", "row", "content_hash")} | {"keep": keep} | changes


def test_a_person_overrides_the_run(weigh, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS))
    (tmp_path / "b.jsonl").write_text(json_lines(ROWS[:2]))
    weigh("a.jsonl", "b.jsonl")
    weights = pq.read_table(tmp_path / "run/weights.parquet")
    marks = [mark(weights, 0, False), mark(weights, 2, True), mark(weights, 5, False)]
    (tmp_path / "marks.jsonl").write_text(json_lines(marks) + "\n")
    options = ["--overrides", "marks.jsonl", "--add_columns", "--dropped_dir", "dropped"]
    assert main(["select", "run", "--output_dir", "clean", *options]) == 0
    assert "3 rows changed" in capsys.readouterr().out
    kept = rows_in(tmp_path / "clean/a.jsonl")
    assert [row["prompt"] for row in kept] == ["2=", "3=", "4="]
    assert (kept[1]["tamis_weight"], kept[1]["tamis_p_right"]) == (1, 1)
    assert [row["prompt"] for row in rows_in(tmp_path / "clean/b.jsonl")] == ["1="]
    assert [row["tamis_weight"] for row in rows_in(tmp_path / "dropped/a.jsonl")] == [0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (lambda w: ["{"], r"marks.jsonl, line 1: not valid JSON"),
        (lambda w: [json.dumps(mark(w, 0, "yes"))], r'line 1: "keep" is missing or of another kind'),
        (lambda w: ["[]"], r'line 1: "source" is missing'),
        (lambda w: [json.dumps(mark(w, 0, True, row=9))], r"a.jsonl, row 9 \(line 10\) was not weighed by this run"),
        (lambda w: [json.dumps(mark(w, 0, True, content_hash="0" * 16))], r"row 0 \(line 1\) said something else"),
        (lambda w: [json.dumps(mark(w, 0, keep)) for keep in (True, False)], r"line 2: an earlier line says otherwise"),
        (lambda w: None, r"marks.jsonl: no such file"),
    ],
)
def test_marks_that_cannot_be_meant(weigh, tmp_path, lines, message):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS))
    weigh("a.jsonl")
    found = lines(pq.read_table(tmp_path / "run/weights.parquet"))
    if found is not None:
        (tmp_path / "marks.jsonl").write_text("\n".join(found))
    with pytest.raises(ValueError, match=message):
        chosen(overrides="marks.jsonl")
    assert not (tmp_path / "clean").exists()
