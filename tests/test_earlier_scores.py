"""`scores`: the probabilities of an earlier `tamis score` or run take the place of scouting."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import pairs, write_jsonl

from tamis.cli import main
from tamis.earlier_scores import read_scores
from tamis.report.charts import score_histogram
from tamis.report.run_folder import read_run

TRAIN = pairs(12) + pairs(12, 30, wrong=True)
SCOUT = ["--scout_epochs", "8", "--scout_learning_rate", "1e-2"]


@pytest.fixture
def options(model_dir, tmp_path):
    """Of a run on wrong and right rows, all but its folder."""
    flags = ["--model_name_or_path", model_dir, "--learning_rate", "1e-2"]
    flags += ["--train_dataset", write_jsonl(tmp_path / "train.jsonl", TRAIN)]
    flags += ["--validation_dataset", write_jsonl(tmp_path / "validation.jsonl", pairs(10, 100))]
    return [*flags, "--max_steps", "4", "--logging_steps", "1", "--use_cpu", "--bf16", "false", "--report_to", "none"]


@pytest.fixture
def scored(options, tmp_path):
    """Folder of a scoring of these rows."""
    folder = tmp_path / "scores"
    assert main(["score", *options, *SCOUT, "--output_dir", str(folder)]) == 0
    assert json.loads((folder / "scout.json").read_text())["is_believed"]
    return folder


def losses(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"], r["rho"], r["ess"]) for r in records if "loss" in r]


def change(path, **columns):
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values, from_pandas=True))
    pq.write_table(table, path)


def test_a_run_with_the_scores_of_its_own_model_is_the_run_that_scouts(options, scored, tmp_path):
    """Bit for bit, from the folder of a scoring or of the run, or from the file alone."""
    scouted = tmp_path / "scouted"
    assert main(["train", *options, *SCOUT, "--output_dir", str(scouted)]) == 0
    for k, given in enumerate((scored, scouted, scored / "weights.parquet")):
        run = tmp_path / f"run{k}"
        assert main(["train", *options, "--scores", str(given), "--output_dir", str(run)]) == 0
        assert losses(run) == losses(scouted) and len(losses(run)) == 4
        assert (run / "model.safetensors").read_bytes() == (scouted / "model.safetensors").read_bytes()
        found, expected = (pq.read_table(folder / "weights.parquet") for folder in (run, scouted))
        for name in ("content_hash", "weight", "p_right", "score", "kept", "num_updates"):
            assert found[name].equals(expected[name]), name
        for name in ("scout.json", "scout_scores.parquet"):  # so that its report explains the decisions
            assert (run / name).read_bytes() == (scored / name).read_bytes()


def test_a_run_goes_on_with_its_scores_and_with_no_others(options, scored, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = [*options, "--scores", str(scored), "--save_steps", "2"]
    for run, steps in ((whole, "4"), (cut, "2")):
        assert main(["train", *options, "--max_steps", steps, "--lr_scheduler_type", "constant",
                     "--output_dir", str(run)]) == 0  # fmt: skip
    moved = tmp_path / "moved"
    shutil.copytree(scored, moved)
    again = [*options, "--scores", str(moved), "--lr_scheduler_type", "constant", "--output_dir", str(cut)]
    assert main(["train", *again, "--resume_from_checkpoint", "last"]) == 0
    assert (cut / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    change(moved / "weights.parquet", score=pq.read_table(moved / "weights.parquet")["score"].to_numpy()[::-1])
    assert main(["train", *again, "--max_steps", "6", "--resume_from_checkpoint", "last"]) == 2
    assert "scores: other probabilities, or a scout in place of them" in capsys.readouterr().err


def test_the_weights_are_of_the_scoring_and_no_validation_rows_are_needed(options, scored, tmp_path):
    place = options.index("--validation_dataset")
    run = tmp_path / "run"
    alone = [*options[:place], *options[place + 2 :], "--scores", str(scored)]
    assert main(["train", *alone, "--output_dir", str(run)]) == 0
    assert {rho for _, _, rho, _ in losses(run)} == {0.0}
    found, expected = (pq.read_table(folder / "weights.parquet") for folder in (run, scored))
    assert found["weight"].equals(expected["weight"])
    visits = found["num_updates"].to_numpy()
    assert visits[:12].sum() > 3 * visits[12:].sum()


def test_a_scoring_that_was_not_believed_gives_all_rows_one_weight(options, scored, tmp_path, caplog):
    change(scored / "weights.parquet", p_right=np.full(24, np.nan, np.float32))
    run = tmp_path / "run"
    assert main(["train", *options, "--scores", str(scored), "--output_dir", str(run)]) == 0
    assert "was not believed: all weights are one" in caplog.text
    table = pq.read_table(run / "weights.parquet")
    assert table["weight"].to_pylist() == [1.0] * 24 and table["p_right"].null_count == 24
    assert {rho for _, _, rho, _ in losses(run)} == {4 / (4 + 8)}  # 10 validation rows for 24: 4 beside 8


def test_rows_that_the_scoring_left_out_are_as_likely_right_as_the_others_on_average(options, scored, tmp_path, caplog):
    p_right = pq.read_table(scored / "weights.parquet")["p_right"].to_numpy().copy()
    p_right[[3, 20]] = np.nan
    change(scored / "weights.parquet", p_right=p_right)
    run = tmp_path / "run"
    assert main(["train", *options, "--scores", str(scored), "--output_dir", str(run)]) == 0
    assert "has no probability for 2 rows" in caplog.text
    found = pq.read_table(run / "weights.parquet")["p_right"].to_numpy()
    assert found[[3, 20]] == pytest.approx(np.nanmean(p_right), abs=1e-6)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--output_dir", "SCORED", "--overwrite_output_dir"],
            "--scores are in --output_dir, which the run would replace",
        ),
        (["--scores", "UNSCOUTED"], r"unscouted has no scout\.json: no scout has scored its rows"),
        (["--refine_fraction", "0.5"], "leave out --scores or --refine_fraction"),
        (["--train_dataset", "SWAPPED"], r"swapped\.jsonl, row 0 \(line 1\) is not what .*weights\.parquet has in its"),
        (["--train_dataset", "SHORT"], "has 24 rows, and train_dataset has 23"),
        (["--scores", "NOWHERE"], "nowhere: no such file. Give a run directory, or its weights.parquet, to --scores"),
        (["--scores", "TEXT"], r"text\.parquet: cannot be read as Parquet"),
        (["--scores", "OTHER"], 'other.parquet: no column "p_right": it was not written by this version'),
    ],
)
def test_what_cannot_be_taken_over_is_refused_before_the_model_is_loaded(
    options, scored, tmp_path, capsys, flags, message, monkeypatch
):
    files = {
        "SWAPPED": write_jsonl(tmp_path / "swapped.jsonl", [TRAIN[1], TRAIN[0], *TRAIN[2:]]),
        "SHORT": write_jsonl(tmp_path / "short.jsonl", TRAIN[:-1]),
        "NOWHERE": str(tmp_path / "nowhere"),
        "TEXT": write_jsonl(tmp_path / "text.parquet", TRAIN),
        "OTHER": str(tmp_path / "other.parquet"),
        "SCORED": str(scored),
        "UNSCOUTED": str(tmp_path / "unscouted"),
    }
    shutil.copytree(scored, files["UNSCOUTED"])
    (tmp_path / "unscouted" / "scout.json").unlink()
    pq.write_table(pa.table({"content_hash": ["a"] * 24}), files["OTHER"])
    monkeypatch.setattr("trl.SFTTrainer.__init__", lambda *args, **kwargs: pytest.fail("the model is loaded"))
    before = {path: path.read_bytes() for path in scored.iterdir()}
    given = ["--output_dir", str(tmp_path / "run"), *options, "--scores", str(scored)]
    assert main(["train", *given, *(files.get(flag, flag) for flag in flags)]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "run").exists()
    assert {path: path.read_bytes() for path in scored.iterdir()} == before


def test_scores_are_not_scored_and_other_selectors_do_not_read_them(options, scored, tmp_path, caplog, capsys):
    assert main(["score", *options, "--scores", str(scored), "--output_dir", str(tmp_path / "again")]) == 2
    assert "leave it out" in capsys.readouterr().err
    held_out = options[options.index("--validation_dataset") + 1]
    compared = ["--eval_dataset", held_out, "--output_dir", str(tmp_path / "comparison")]
    assert main(["compare", *options, "--scores", str(scored), *compared]) == 2
    assert "a comparison scores the rows for each of its seeds: leave out --scores" in capsys.readouterr().err
    options = [*options, "--scores", str(scored)]
    assert main(["train", *options, "--selector", "none", "--output_dir", str(tmp_path / "mixed")]) == 0
    assert "scores is set but has no effect: selector 'none' does not read it" in caplog.text
    assert main(["train", *options, *SCOUT, "--output_dir", str(tmp_path / "run")]) == 0
    for name in ("scout_learning_rate", "scout_epochs"):
        assert f"{name} is set but has no effect: scores are given, and no scout is sent" in caplog.text


def test_every_row_is_compared_across_batches(tmp_path):
    """Batches of the file and of the rows need not have the same borders."""
    num_rows = 25_003
    hashes = [f"{k:016x}" for k in range(num_rows)]
    score = np.linspace(-5, 5, num_rows, dtype=np.float32)
    scores = pa.table({"content_hash": hashes, "p_right": 1 / (1 + np.exp(-score)), "score": score})
    pq.write_table(scores, tmp_path / "weights.parquet", row_group_size=7_001)
    rows = pa.chunked_array([hashes[:9_999], hashes[9_999:]])
    (tmp_path / "scout.json").write_text("{}")
    found = read_scores(str(tmp_path), tmp_path / "run", rows, "train_dataset, row {}".format)
    assert np.array_equal(found.score_N, score)
    other = pa.chunked_array([[*hashes[:24_000], "0" * 16, *hashes[24_001:]]])
    with pytest.raises(ValueError, match="train_dataset, row 24000 is not what"):
        read_scores(str(tmp_path), tmp_path / "run", other, "train_dataset, row {}".format)


def test_a_check_takes_no_scout_into_account_and_writes_nothing(options, scored, tmp_path, capsys):
    assert main(["check", *options, "--scores", str(scored), "--output_dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "rho = from the scores" in out and "scouting at most" not in out and "scout_learning_rates" not in out
    assert not (tmp_path / "run").exists()


def test_the_report_on_a_run_explains_the_decisions_of_the_scoring(options, scored, tmp_path):
    """Also where a row that was scored is left out here: its prompt is cut off by a shorter `max_length`."""
    long = {"prompt": "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9=", "completion": "4"}
    train = write_jsonl(tmp_path / "longer.jsonl", [long, *TRAIN])
    longer, run = tmp_path / "longer_scores", tmp_path / "run"
    options = [*options, "--train_dataset", train]
    assert main(["score", *options, *SCOUT, "--output_dir", str(longer)]) == 0
    assert main(["train", *options, "--scores", str(longer), "--max_length", "30", "--output_dir", str(run)]) == 0
    table = pq.read_table(run / "weights.parquet")
    assert table["p_right"].to_pylist()[0] is None and table["weight"].to_pylist()[0] == 0
    assert table["p_right"].null_count == 1
    picture = score_histogram(read_run(str(run)))
    assert picture is not None and "nan" not in picture.lower()
    assert main(["select", str(run), "--output_dir", str(tmp_path / "clean")]) == 0
    assert main(["report", str(longer)]) == 0
    assert f"--scores {longer} --output_dir {longer}-trained" in (longer / "report.html").read_text(encoding="utf-8")
