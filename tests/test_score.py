"""`tamis score`: the weights that `tamis train` would give, without training."""

import json
import re

import pyarrow.parquet as pq
import pytest
from conftest import pairs, write_jsonl

from tamis.cli import main


@pytest.fixture
def bilevel_files(model_dir, tmp_path):
    """Options of a run on wrong and right rows, all but its folder."""
    files = {"train": pairs(12) + pairs(12, 30, wrong=True), "validation": pairs(10, 100)}
    flags = ["--model_name_or_path", model_dir, "--learning_rate", "1e-2", "--scout_epochs", "2"]
    for name, rows in files.items():
        flags += [f"--{name}_dataset", write_jsonl(tmp_path / f"{name}.jsonl", rows)]
    return [*flags, "--use_cpu", "--bf16", "false", "--report_to", "none"]


def test_scoring_gives_the_weights_of_training_and_trains_nothing(bilevel_files, tmp_path, capsys):
    scored, trained = tmp_path / "scores", tmp_path / "run"
    assert main(["score", *bilevel_files, "--output_dir", str(scored)]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"^next +tamis select {scored} --output_dir {scored}-clean$", out, re.MULTILINE)
    assert main(["train", *bilevel_files, "--output_dir", str(trained), "--max_steps", "1"]) == 0
    found, expected = (pq.read_table(folder / "weights.parquet") for folder in (scored, trained))
    for name in ("content_hash", "weight", "p_right", "score", "kept"):
        assert found[name].equals(expected[name]), name
    assert sorted(path.name for path in scored.iterdir()) == [
        "config.yaml", "metrics.jsonl", "scout.json", "scout_scores.parquet", "scout_trials.safetensors",
        "weights.parquet",
    ]  # fmt: skip
    assert (scored / "scout.json").read_bytes() == (trained / "scout.json").read_bytes()


def test_the_scores_that_are_kept_explain_every_decision(bilevel_files, tmp_path):
    scored = tmp_path / "scores"
    assert main(["score", *bilevel_files, "--output_dir", str(scored)]) == 0
    found = json.loads((scored / "scout.json").read_text())
    weights, scores = (pq.read_table(scored / name).to_pydict() for name in ("weights.parquet", "scout_scores.parquet"))
    assert scores["example_id"] == [*range(24), *[None] * (len(scores["score"]) - 24)]
    score_R, score_V, weight_V = scores["score"][:24], scores["score"][24:], scores["weight"][24:]
    assert found["is_believed"] and sum(weight_V) == pytest.approx(10), "as many as validation rows"
    order = sorted(range(24), key=lambda i: score_R[i])
    assert [weights["p_right"][i] for i in order] == sorted(weights["p_right"], reverse=True)
    step = (max(score_R) - min(score_R)) / 1000  # of the grid that the border is looked for on
    for score, kept in zip(score_R, weights["kept"], strict=True):
        assert kept == (score < found["border"]) or abs(score - found["border"]) < step
    below = sum(w for score, w in zip(score_V, weight_V, strict=True) if score < found["border"])
    assert below > 7, "unseen validation rows look right"


def test_a_scoring_is_not_overwritten_and_can_be_replayed_as_a_training(bilevel_files, tmp_path, capsys):
    scored = tmp_path / "scores"
    assert main(["score", *bilevel_files, "--output_dir", str(scored)]) == 0
    assert main(["score", *bilevel_files, "--output_dir", str(scored)]) == 2
    assert "holds a run already" in capsys.readouterr().err
    replayed = ["--config", str(scored / "config.yaml"), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    assert main(["train", *replayed]) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_what_scoring_does_not_do_is_warned_of_or_refused(bilevel_files, tmp_path, caplog, capsys):
    options = ["--max_steps", "7", "--rho", "0.3", "--refine_fraction", "auto", "--output_dir", str(tmp_path / "s")]
    options += ["--eval_on_start", "--save_strategy", "epoch", "--resume_from_checkpoint", "last"]
    assert main(["score", *bilevel_files, *options]) == 0
    for name in ("max_steps", "rho", "refine_fraction", "eval_on_start", "save_strategy", "resume_from_checkpoint"):
        assert f"{name} is set but has no effect: nothing is trained" in caplog.text
    assert main(["score", *bilevel_files, "--selector", "mirror", "--output_dir", str(tmp_path / "t")]) == 2
    assert "selector 'mirror' learns its weights while it trains: choose --selector scout" in capsys.readouterr().err
