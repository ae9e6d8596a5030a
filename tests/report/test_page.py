"""The page on a run holds every row, whatever is in it, and needs nothing from outside."""

import base64
import gzip
import html.parser
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from weighed_files import ROWS, json_lines, weigh_files, write_as

from tamis.cli import main
from tamis.output_dir import mark_finished
from tamis.report.page import packed_rows, render
from tamis.report.rows import grouped, prompt_and_response, read_texts, shown_rows
from tamis.report.run_folder import read_run
from tamis.report.similar import nearest
from tamis.report.words import findings

HOSTILE = [
    {"prompt": "<script>window.hit = 1</script>", "completion": "</script><script>window.hit = 2</script>"},
    {"prompt": '<img src=x onerror="window.hit = 3">', "completion": "<!-- --> ]]> & \\u2028 \u2028 \u202e מימין"},
    {"prompt": "{{ 7 * 7 }} {% raw %}", "completion": "x" * 5000},
    {"prompt": "4=", "completion": "44"},
]


class Elements(html.parser.HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def scouted(folder, rows, p_right, is_finished=True, **scout):
    """A scoring of these rows, in the folder ``run``."""
    (folder / "a.jsonl").write_text(json_lines(rows), encoding="utf-8")
    (folder / "trusted.jsonl").write_text(json_lines(ROWS[3:] * 2), encoding="utf-8")
    weigh_files(folder, str(folder / "a.jsonl"), p_right=p_right, validation_dataset=str(folder / "trusted.jsonl"))
    found = {"is_believed": True, "share_right": 0.69, "expected_auroc": 0.96, "base_coefficient": 1.0, "border": 0.4}
    (folder / "run/scout.json").write_text(json.dumps(found | scout))
    ids = [*range(len(rows)), *[None] * 40]
    scores = np.concatenate([1 - np.array(p_right), np.linspace(0, 0.4, 40)]).astype(np.float32)
    table = pa.table({"example_id": pa.array(ids, pa.int64()), "score": scores, "weight": np.ones(len(ids), "f4")})
    pq.write_table(table, folder / "run/scout_scores.parquet")
    if is_finished:
        mark_finished(str(folder / "run"), 0)
    return folder / "run"


def data_of(page):
    text = page.split('id="data">')[1].split("</script>")[0]
    return json.loads(gzip.decompress(base64.b64decode(text)))


def test_the_page_says_what_was_learned(tmp_path):
    run = scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8])
    page = render(read_run(str(run)))
    assert "About 31% of 4 rows look wrong." in page and "96 times in 100" in page
    assert f"tamis select {run} --output_dir {run}-clean" in page
    for title in ("Why rows are dropped", "By length of the response", "Rows"):
        assert f"<h2>{title}" in page
    assert 'id="scores-figure_1"' in page, "the histogram"


def test_every_row_is_in_the_page(tmp_path):
    run = scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8])
    found = data_of(render(read_run(str(run))))
    columns, weights = found["columns"], pq.read_table(run / "weights.parquet").to_pydict()
    assert columns["prompt"] == [row["prompt"] for row in ROWS]
    assert columns["response"] == [row["completion"] for row in ROWS]
    assert columns["hash"] == weights["content_hash"] and columns["row"] == weights["row"]
    assert columns["kept"] == [1, 1, 0, 1] and columns["p_right"] == [0.9, 0.7, 0.1, 0.8]
    assert columns["score"] == pytest.approx([0.1, 0.3, 0.9, 0.2]) and found["sources"] == ["a.jsonl"]
    assert columns["length"] == [len(row["completion"]) for row in ROWS]
    assert found["trusted"][found["neighbours"]["3"][0]] == ["4=", "44"]


def test_rows_are_inert_and_nothing_is_loaded(tmp_path):
    run = scouted(tmp_path, HOSTILE, [0.9, 0.7, 0.1, 0.8])
    page = render(read_run(str(run)))
    assert "window.hit" not in page, "rows are packed"
    elements = Elements(page)
    assert sum(tag == "script" for tag, _ in elements.found) == 4, "two of data, two of code"
    for tag, attributes in elements.found:
        assert tag not in ("img", "link", "iframe", "object") and "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#") and attributes.get("xlink:href", "#").startswith("#")
    assert data_of(page)["columns"]["response"][:2] == [row["completion"] for row in HOSTILE[:2]]


def test_refined_rows_show_old_and_new_escaped(tmp_path):
    run = scouted(tmp_path, HOSTILE, [0.9, 0.7, 0.1, 0.8])
    new = {"example_id": 0, "step": 5, "responses": ["<b>new</b>", "other"], "response_weights": [0.75, 0.25]}
    pq.write_table(
        pa.Table.from_pylist([new | {"is_refined": True, "response_p_right": [0.9, None]}]), run / "refinements.parquet"
    )
    page = render(read_run(str(run)))
    assert "&lt;b&gt;new&lt;/b&gt;" in page and "weight 0.75, right with probability 0.90" in page
    assert "&lt;/script&gt;&lt;script&gt;window.hit = 2" in page and "<b>new" not in page
    assert "<script>window.hit" not in page


def test_texts_are_cut_as_far_as_the_page_needs(tmp_path):
    rows = [{"prompt": f"{i}", "completion": np.random.default_rng(i).bytes(900).hex()} for i in range(50)]
    run = read_run(str(scouted(tmp_path, rows, np.linspace(0.01, 0.99, 50))))
    shown = shown_rows(run)
    texts = read_texts(run, shown)
    whole, cut = packed_rows(run, shown, texts), packed_rows(run, shown, texts, max_bytes=20_000)
    assert len(cut) <= 20_000 < len(whole)
    found = json.loads(gzip.decompress(base64.b64decode(cut)))
    assert {len(text) for text in found["columns"]["response"]} == {found["limit"]} and found["limit"] < 600


def test_of_many_rows_the_extremes_and_the_border_are_shown(tmp_path):
    p_right = np.linspace(0.001, 0.999, 900)
    run = read_run(str(scouted(tmp_path, [{"prompt": str(i), "completion": "x"} for i in range(900)], p_right)))
    shown = shown_rows(run, max_shown=120)
    assert len(shown) == 120 == len(set(shown.tolist())) and (np.diff(shown) > 0).all()
    score = pq.read_table(run.path / "weights.parquet")["score"].to_numpy()
    border = np.argsort(np.abs(score))[:40]
    assert set(range(20)) | set(range(880, 900)) | set(border.tolist()) <= set(shown.tolist())
    assert (shown_rows(run, max_shown=120) == shown).all()


def test_rows_that_have_changed_have_no_text(tmp_path):
    run = scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8])
    (tmp_path / "a.jsonl").write_text(json_lines([ROWS[0], ROWS[1] | {"completion": "other"}, *ROWS[2:]]))
    page = render(read_run(str(run)))
    assert "1 rows no longer say what they said" in page
    assert data_of(page)["columns"]["response"] == ["11", None, "33", "44"]
    (tmp_path / "a.jsonl").unlink()
    page = render(read_run(str(run)))
    assert "The training rows cannot be read: " in page and "no such file" in page
    assert data_of(page)["columns"]["response"] == [None] * 4


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.parquet", "saved"])
def test_rows_of_every_format(tmp_path, name):
    write_as(tmp_path / name, ROWS)
    weigh_files(tmp_path, str(tmp_path / name))
    texts = read_texts(read_run(str(tmp_path / "run")), np.arange(4), "note")
    assert [texts.content[i] for i in range(4)] == [(row["prompt"], row["completion"]) for row in ROWS]
    assert texts.label_N == [row["note"] for row in ROWS] and texts.problem is None


def test_a_scout_that_is_not_believed_is_said(tmp_path):
    run = scouted(tmp_path, ROWS, [1.0] * 4, is_believed=False, expected_auroc=None, share_right=1.0, border=None)
    found = findings(read_run(str(run)))
    assert "cannot be told from trusted rows" in found.learned[0] and "--validation_dataset" in found.warnings[0]
    assert "Why rows are dropped" in render(read_run(str(run))), "what the scout saw is shown all the same"


def test_a_run_that_goes_on(tmp_path):
    run = scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8], is_finished=False)
    (run / "weights.parquet").unlink()
    (run / "metrics.jsonl").write_text('{"step": 1, "training_loss": 2.0}\n{"step": 2, "training_lo')
    page = render(read_run(str(run)))
    assert "has not weighed its rows yet" in page and "state after step 1" in page
    assert "--resume_from_checkpoint last" in page and 'id="table"' not in page


@pytest.mark.parametrize(
    ("selector", "said"), [("none", "same weight"), ("column", "given in a column"), ("mirror", "mirror has weighed")]
)
def test_other_selectors(tmp_path, selector, said):
    (tmp_path / "a.jsonl").write_text(json_lines(ROWS), encoding="utf-8")
    weigh_files(tmp_path, str(tmp_path / "a.jsonl"), selector=selector)
    (tmp_path / "run/metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "training_loss": 1 / i, "ess_ratio": 0.5, "eval_loss": 1.0}) + "\n" for i in (1, 2)
        )
    )
    page = render(read_run(str(tmp_path / "run")))
    assert said in page and "<h2>Losses" in page and "<h2>Weights" in page
    assert ("<h2>Effective share" in page) == (selector == "mirror")


def test_the_command_writes_the_same_bytes_twice(tmp_path, capsys):
    run = scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8])
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    first = (run / "report.html").read_bytes()
    assert main(["report", str(run), "--output", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == first
    assert main(["report", str(run)]) == 0, "its own page is replaced"
    (tmp_path / "mine.html").write_text("<title>mine</title>")
    assert main(["report", str(run), "--output", str(tmp_path / "mine.html")]) == 2
    assert "is no page of tamis" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "<title>mine</title>"


def test_a_setting_without_effect_is_said(tmp_path, capsys):
    run = scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8])
    assert main(["report", str(run), "--port", "9999"]) == 0
    assert "port is set but has no effect: serve is not set" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none"], "none: no such folder. Give a run directory"),
        (["."], "is no run directory"),
        (["run", "--label_column", "kind"], 'a.jsonl: there is no column "kind". Check --label_column'),
        (["run", "--output", "run"], "run is a folder: give a file to --output"),
        (["run", "--outptu", "x"], "unknown option --outptu; did you mean --output?"),
        ([], "the following arguments are required: --run"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, monkeypatch, options, message, capsys):
    monkeypatch.chdir(tmp_path)
    scouted(tmp_path, ROWS, [0.9, 0.7, 0.1, 0.8])
    assert main(["report", *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("tamis report: ") and message in error[0]


def test_prompts_of_all_layouts_become_text():
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    answer = [{"role": "assistant", "content": "ho"}]
    assert prompt_and_response({"messages": chat + answer}) == ("system: be kind\nuser: hi", "ho")
    assert prompt_and_response({"messages": chat + answer + chat[1:]})[1] == "ho", "the answer that select replaces"
    assert prompt_and_response({"prompt": chat[1:], "completion": answer}) == ("hi", "ho")
    assert prompt_and_response({"text": "abc"}) == ("", "abc")
    row = {"prompt": "p", "completion": "c", "prompt_input": "i", "system": "s", "history": [["a", "b"]]}
    assert prompt_and_response(row) == ("s\nuser: a\nassistant: b\np\ni", "c")


def test_the_nearest_texts_are_those_that_share_words():
    trusted = ["how to bake bread", "the capital of France", "zzz"]
    assert nearest(["what is the capital of Spain", "baking bread at home"], trusted, 1) == [[1], [0]]
    assert nearest(["qqq"], trusted) == [[]] and nearest(["a"], []) == [[]] and nearest([], trusted) == []


def test_rare_labels_are_shown_together():
    without = grouped(pa.chunked_array([pa.array(["a", None, None]).dictionary_encode()]))
    assert [(name, mask.tolist()) for name, mask in without] == [
        ("None", [False, True, True]), ("a", [True, False, False]),
    ]  # fmt: skip
    groups = grouped(pa.chunked_array([[*"aaabbc"], [*"defg"]]), most=3)
    assert [(name, mask.sum()) for name, mask in groups] == [("a", 3), ("b", 2), ("all others", 5)]
