"""`tamis demo` end to end on few steps: the files it promises, and that a second call makes nothing again."""

import json
from functools import partial

import pytest

import tamis.compare.runs
import tamis.demo.run
from tamis.cli import main
from tamis.compare.methods import REFINING
from tamis.compare.seal import SEAL
from tamis.demo.language import make_language_world
from tamis.demo.run import MIXING_RHOS
from tamis.demo.world import make_world


@pytest.fixture
def small_world(monkeypatch):
    size = {"num_train": 200, "num_eval": 50, "pretrain_steps": 2}
    monkeypatch.setattr("tamis.selection.scout.SCOUT_VISITS", 64)
    monkeypatch.setattr(tamis.demo.run, "make_world", partial(make_world, **size))
    monkeypatch.setattr(tamis.demo.run, "make_language_world", partial(make_language_world, **size))


@pytest.mark.parametrize("options", [[], ["--scenario", "half_wrong"]])
def test_the_demo_writes_table_and_picture_and_does_not_repeat_itself(
    options, small_world, tmp_path, capfd, monkeypatch
):
    command = ["demo", "--output_dir", str(tmp_path / "demo"), "--max_steps", "6", *options]
    assert main(command) == 0
    table, log = capfd.readouterr()
    assert len(log.splitlines()) <= 16 and "\r" not in log
    rows = json.loads((tmp_path / "demo" / "comparison.json").read_text())
    names = [row["method"] for row in rows]
    is_refined = bool(options)  # the base model of the language has no right responses to give
    assert len(rows) == 7 + is_refined + len(MIXING_RHOS)
    assert {"plain SFT", "trusted rows alone", SEAL, "SEAL, top 80%", "tamis"} < set(names)
    assert (REFINING in names) == is_refined
    assert names[-1] == "oracle (right rows)"
    keys = {"method", "group", "test_loss", "test_accuracy", "gap_closure", "selection_auroc", "seconds"}
    for row in rows:
        assert keys <= set(row)
        assert (row["selection_auroc"] is not None) == (row["method"] in ("tamis", REFINING, SEAL))
        assert row["method"] in table
    assert (tmp_path / "demo" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "demo" / "runs" / "tamis" / "weights.parquet").is_file()
    assert "Losses" in (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    clean = tmp_path / "demo" / "clean" / "train.jsonl"
    assert clean.is_file() == json.loads((tmp_path / "demo/runs/tamis/scout.json").read_text())["is_believed"]
    kept = set(clean.read_text().splitlines() if clean.is_file() else ())
    assert kept <= set((tmp_path / "demo" / "world" / "train.jsonl").read_text().splitlines())

    def no_training(*_):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(tamis.compare.runs, "train", no_training)
    assert main(command) == 0
    assert json.loads((tmp_path / "demo" / "comparison.json").read_text()) == rows
