"""Rivals from files to rows of the table: scored once, kept or weighed, trained on."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import ONE_TRIAL, write_jsonl
from task_of_numbers import COMMON, make_task, make_task_of_two_kinds

import tamis.compare.runs
from tamis.compare import rivals
from tamis.compare.methods import compare_methods
from tamis.compare.rivals import BDS, RIVALS, run_rivals, scorer_of
from tamis.compare.runs import TAMIS_SHARE, keep_top
from tamis.compare.task import is_right, run_dir
from tamis.metrics import auroc
from tamis.run import train

SCORED = COMMON | {"max_steps": 20, "learning_rate": 1e-2}


def test_a_rival_is_scored_once_and_trained_on_what_it_keeps(tmp_path, model_dir, monkeypatch):
    task, calls = make_task_of_two_kinds(tmp_path, model_dir), []

    def recorded(data, args, *rest):
        calls.append((data, args))
        return train(data, args, *rest)

    monkeypatch.setattr(tamis.compare.runs, "train", recorded)
    rows = run_rivals(task, tmp_path, SCORED, [0.5, 0.25], ["CoLoR-Filter"])
    names = [f"CoLoR-Filter, top {share}%{mixed}" for share in (50, 25) for mixed in ("", ", mixed")]
    assert [row["method"] for row in rows] == names and {row["group"] for row in rows} == {"CoLoR-Filter"}
    scores = scorer_of(task, tmp_path, SCORED).scores("CoLoR-Filter")
    assert scores.auroc == auroc(scores.score_N, is_right(task)) > 0.97
    assert {(row["selection_auroc"], row["cost_forwards"]) for row in rows} == {(scores.auroc, scores.cost_forwards)}
    assert all(row["seconds"] > scores.seconds > 0 for row in rows)
    kept = keep_top(task, scores.score_N, 0.5, tmp_path / "expected.jsonl").read_text()
    data, args = calls[0]
    assert Path(data.train_dataset[0]).read_text() == kept and args.rho == 0.0 and data.validation_dataset is None
    assert calls[1][0].train_dataset == data.train_dataset and calls[1][0].validation_dataset is not None

    monkeypatch.setattr(rivals, "RIVALS", {})  # nothing is scored again, nothing is trained again
    monkeypatch.setattr(rivals, "make_trainer", None)
    monkeypatch.setitem(rivals.RIVALS, "CoLoR-Filter", RIVALS["CoLoR-Filter"])
    assert run_rivals(task, tmp_path, SCORED, [0.5, 0.25], ["CoLoR-Filter"]) == rows and len(calls) == 4


@pytest.mark.parametrize("change", ["settings", "training rows", "validation rows", "task"])
def test_scores_are_made_again_where_anything_differs(change, tmp_path, model_dir, monkeypatch):
    task, settings, calls = make_task(tmp_path / "task", model_dir), dict(COMMON), []
    original = RIVALS["random"].score
    monkeypatch.setitem(RIVALS, "random", rivals.Rival("", lambda trainer: calls.append(trainer) or original(trainer)))
    first = scorer_of(task, tmp_path, settings).scores("random")
    again = scorer_of(task, tmp_path, settings).scores("random")
    assert len(calls) == 1 and np.array_equal(first.score_N, again.score_N)
    assert vars(first) | {"score_N": 0} == vars(again) | {"score_N": 0}
    if change == "settings":
        settings["seed"] = 5
    elif change == "task":
        task = type(task)(**vars(task) | {"fingerprint": "another"})
    else:
        file = task.train_file if change == "training rows" else task.validation_file
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    scorer_of(task, tmp_path, settings).scores("random")
    assert len(calls) == 2


def test_rows_that_are_too_long_have_the_lowest_score_and_no_weight(tmp_path, model_dir):
    task = make_task(tmp_path, model_dir)
    rows = [json.loads(line) for line in task.train_file.read_text().splitlines()]
    rows[3]["prompt"] = "1" * 60
    write_jsonl(task.train_file, rows)
    settings = COMMON | {"max_length": 50, "max_steps": 2}
    scorer = scorer_of(task, tmp_path, settings)
    score_N = scorer.scores("perplexity filter").score_N
    assert np.flatnonzero(~np.isfinite(score_N)).tolist() == [3]
    read_again = scorer_of(task, tmp_path, settings).scores("perplexity filter").score_N
    assert np.array_equal(read_again, score_N)
    weighed = rivals._write_weights(task, score_N, tmp_path / "weights.jsonl")
    weights = np.array([json.loads(line)["weight"] for line in weighed.read_text().splitlines()])
    others = np.delete(weights, 3)
    assert weights[3] == 0 and others.min() == 0 and others.max() == 1
    assert np.array_equal(np.argsort(others), np.argsort(np.delete(score_N, 3)))


def test_ica_also_weighs_all_rows_as_it_was_published(tmp_path, model_dir):
    task = make_task(tmp_path, model_dir)
    rows = run_rivals(task, tmp_path, COMMON | {"max_steps": 2}, [0.5], ["ICA"])
    assert [row["method"] for row in rows][2:] == ["ICA, as weights", "ICA, as weights, mixed"]
    weights = pq.read_table(run_dir(tmp_path, "ICA, as weights") / "weights.parquet")["weight"].to_numpy()
    score_N = scorer_of(task, tmp_path, COMMON | {"max_steps": 2}).scores("ICA").score_N
    assert np.corrcoef(weights, score_N)[0, 1] == pytest.approx(1.0, abs=1e-4) and weights.mean() == pytest.approx(1)


def test_bds_learns_weights_at_constant_shares_with_both_maps(tmp_path, model_dir, monkeypatch):
    monkeypatch.setattr(rivals, "BDS_RHOS", (0.1,))
    task = make_task(tmp_path, model_dir)
    rows = run_rivals(task, tmp_path, COMMON | {"max_steps": 2}, [], [BDS])
    expected = ["BDS, rho=0.1", "BDS, rho=0.1, sigmoid"]
    assert [row["method"] for row in rows] == expected and {row["group"] for row in rows} == {BDS}
    config = (run_dir(tmp_path, expected[0]) / "config.yaml").read_text()
    assert "selector: softmax" in config and "reference: zero" in config and "rho: 0.1" in config


def test_a_rival_nobody_knows_is_refused_before_anything_runs(tmp_path, model_dir):
    task = make_task(tmp_path, model_dir)
    with pytest.raises(ValueError, match="unknown rival 'LES': choose from random, "):
        run_rivals(task, tmp_path, COMMON, [0.5], ["random", "LES"])
    assert not (tmp_path / "runs").exists()


def test_rivals_stand_beside_the_other_methods(tmp_path, model_dir, monkeypatch):
    """End to end on a tiny world, as a benchmark runs it."""
    monkeypatch.setattr("tamis.selection.scout.SCOUT_VISITS", 64)
    task, names = make_task_of_two_kinds(tmp_path, model_dir), ["DSIR", "gradient cosine"]
    shares = {"seal_shares": [TAMIS_SHARE], "rival_shares": [TAMIS_SHARE]}
    rows = compare_methods(task, tmp_path, SCORED | ONE_TRIAL, rhos=[0.5], rivals=names, **shares)
    groups = list(dict.fromkeys(row["group"] for row in rows))
    assert groups[-4:] == [*names, "tamis", "oracle (right rows)"]
    assert all({"gap_closure", "seconds", "test_accuracy"} <= row.keys() for row in rows)
    cosine = next(row for row in rows if row["group"] == "gradient cosine")
    assert cosine["method"] == f"gradient cosine, {TAMIS_SHARE}" and cosine["selection_auroc"] > 0.97
    assert cosine["cost_forwards"] > 3
