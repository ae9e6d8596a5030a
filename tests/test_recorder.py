"""What a run leaves behind, and that a run cut short continues as if nothing had happened."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import Kill, Killed, assert_close, lora, pairs, parameters, read_jsonl, two_kinds, worth
from datasets import Dataset

from tamis import BilevelConfig
from tamis import hashes as hashes_module
from tamis.hashes import hex_digits
from tamis.recorder import (
    FORMAT_VERSION,
    Recorder,
    checkpoint_step,
    end_rotation,
    last_complete_checkpoint,
    write_atomically,
)
from tamis.rows import check_rows
from tamis.selection.calibration import fit
from tamis.selection.evidence import compare
from tamis.selection.scout import Finding
from tamis.selection.trials import Outcome, Trial

RIGHT, WRONG, LIKE_RIGHT = two_kinds()
TRAIN, TRUSTED, HELD_OUT = [*RIGHT[:6], *WRONG[:6]], LIKE_RIGHT, pairs(3, 100)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"], "and nothing beside it"


def test_metrics_are_strict_json(tmp_path):
    recorder = Recorder(tmp_path / "run")
    values = {"nan": float("nan"), "infinite": float("inf"), "negative": float("-inf"), "loss": 1.5, "text": "é"}
    recorder.log({"step": 1, **values})
    recorder.log({"step": 2})
    nothing = {"nan": None, "infinite": None, "negative": None}
    assert read_jsonl(tmp_path / "run" / "metrics.jsonl") == [{"step": 1, **values, **nothing}, {"step": 2}]


def test_rewind_cuts_to_the_step_of_the_checkpoint(tmp_path):
    recorder, path = Recorder(tmp_path), tmp_path / "metrics.jsonl"
    recorder.rewind(3, 1)
    for step in (1, 2, 2, 2, 3):
        recorder.log({"step": step})
    path.write_text(path.read_text() + '{"step": 4, "lo')
    recorder.rewind(2, 2)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2, 2]
    recorder.rewind(2, 0)
    assert [line["step"] for line in read_jsonl(path)] == [1]


def test_weights_name_every_row_of_the_user(bilevel, tmp_path):
    too_long = {"prompt": "1" * 40, "completion": "2"}
    rows = [row | {"source": "a.jsonl", "row": 10 + i} for i, row in enumerate([*TRAIN[:3], too_long, *TRAIN[3:]])]
    trainer = bilevel(rows, TRUSTED, max_length=20, max_steps=3, selector="mirror")
    trainer.train()
    table = pq.read_table(tmp_path / "run" / "weights.parquet")
    assert {field.name: str(field.type) for field in table.schema} == {
        "example_id": "int64",
        "source": "string",
        "row": "int64",
        "content_hash": "string",
        "weight": "float",
        "p_right": "float",
        "score": "float",
        "num_updates": "int32",
        "last_loss": "float",
        "kept": "bool",
        "refined": "bool",
    }
    assert table.schema.metadata[b"tamis_format_version"] == str(FORMAT_VERSION).encode()
    columns = table.to_pydict()
    assert columns["example_id"] == list(range(13)) and columns["row"] == list(range(10, 23))
    assert columns["content_hash"] == hex_digits(check_rows(Dataset.from_list(rows), "train_dataset"))
    assert [i for i, kept in enumerate(columns["kept"]) if not kept] == [3]
    assert columns["weight"][3] == 0 and columns["num_updates"][3] == 0 and columns["last_loss"][3] is None
    assert (
        columns["num_updates"] == trainer.weighting.row_weights.num_updates_N.tolist()
        and sum(columns["num_updates"]) == 12
    )
    weights = trainer.weighting.row_weights.all_weights().tolist()
    assert [w for i, w in enumerate(columns["weight"]) if i != 3] == [w for i, w in enumerate(weights) if i != 3]
    assert set(columns["source"]) == {"a.jsonl"}
    assert columns["p_right"] == [None] * 13, "of a selector that follows the steps"
    assert not (tmp_path / "run" / "scout.json").exists()


def test_weights_of_a_scout_tell_how_likely_a_row_is_right(bilevel, tmp_path):
    too_long = {"prompt": "1" * 40, "completion": "2"}
    trainer = bilevel([*RIGHT, too_long, *WRONG], LIKE_RIGHT, max_length=20, max_steps=2)
    trainer.train()
    columns = pq.read_table(tmp_path / "run" / "weights.parquet").to_pydict()
    p_right, others = columns["p_right"], [i for i in range(25) if i != 12]
    assert p_right[12] is None and columns["score"][12] is None and columns["weight"][12] == 0
    assert not columns["kept"][12] and columns["last_loss"][12] is None and columns["num_updates"][12] == 0
    assert [columns["kept"][i] for i in others] == [p_right[i] >= 0.5 for i in others] == [True] * 12 + [False] * 12
    expected = worth(torch.tensor([p_right[i] for i in others]))
    torch.testing.assert_close(torch.tensor([columns["weight"][i] for i in others]), expected / expected.mean())
    assert torch.sigmoid(torch.tensor([columns["score"][i] for i in others])).tolist() == pytest.approx(
        [p_right[i] for i in others], abs=1e-6
    )
    assert sum(columns["num_updates"]) == 8 and not any(columns["num_updates"][13:]), "no wrong row was visited"
    assert all(loss > 0 for i, loss in enumerate(columns["last_loss"]) if i != 12), "all rows have been measured"


@pytest.mark.parametrize("num_validation", [3, 12])
def test_where_nothing_is_known_a_row_is_kept_that_is_trained_on(bilevel, tmp_path, num_validation):
    """Too few validation rows, and some of both kinds."""
    trainer = bilevel([*RIGHT, *WRONG], [*WRONG, *RIGHT][6 : 6 + num_validation], max_steps=1)
    trainer.train()
    columns = pq.read_table(tmp_path / "run" / "weights.parquet").to_pydict()
    assert columns["p_right"] == [None] * 24 and columns["kept"] == [True] * 24 and columns["weight"] == [1.0] * 24


# --- what scouting has found ------------------------------------------------------------------------------------------


def scout_json(folder) -> dict:
    """It must be strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return json.loads((folder / "scout.json").read_text(encoding="utf-8"), parse_constant=refuse)


TRIAL = {"learning_rate", "num_steps", "base_coefficient", "evidence", "criterion", "criterion_error"}


def test_scout_json_says_what_was_found(bilevel, tmp_path):
    trainer = bilevel(
        [*RIGHT, *WRONG], LIKE_RIGHT, max_steps=1, scout_epochs=4, scout_learning_rate=None, learning_rate=1e-2
    )
    trainer.train()
    found, outcome = scout_json(tmp_path / "run"), trainer.weighting.scouting.outcome
    assert found["format_version"] == FORMAT_VERSION and found["is_believed"] is True
    assert found["share_right"] == pytest.approx(0.5, abs=0.15)
    low, high = found["share_right_interval_90"]
    assert 0 <= low <= found["share_right"] <= high <= 1
    assert found["expected_auroc"] > 0.9
    assert len(found["trials"]) == 6 and all(trial.keys() == TRIAL for trial in found["trials"])
    chosen = max(found["trials"], key=lambda trial: trial["evidence"])
    assert all(found[name] == chosen[name] for name in ("learning_rate", "num_steps", "base_coefficient"))
    assert [t["learning_rate"] for t in found["trials"]] == pytest.approx([1.5e-3] * 2 + [5e-3] * 2 + [1.5e-2] * 2)
    assert found["belief"] == outcome.finding.calibration.belief
    assert found["evidence"] == chosen["evidence"] > found["evidence_by_chance"] == outcome.evidence_by_chance > 0


def test_scout_json_is_strict_where_nothing_was_found(bilevel, tmp_path):
    trainer = bilevel(RIGHT, LIKE_RIGHT, max_steps=1)
    trainer.train()
    found = scout_json(tmp_path / "run")
    assert found["is_believed"] is False and found["share_right"] > 0.5
    assert trainer.weighting.row_weights.p_right_N().isnan().all()


def test_numbers_that_are_none_are_null_in_scout_json(tmp_path):
    calibration = fit(np.full(9, 1.0), np.full(4, 1.0))
    trial = Trial(
        1e-3,
        4,
        1.0,
        compare(np.ones((4, 9)), np.ones(4)),
        float("nan"),
        0.5,
        float("inf"),
        np.zeros(4),
        np.zeros((4, 9)),
    )
    finding = Finding(1e-3, 4, 1.0, calibration, float("nan"))
    outcome = Outcome(finding, [trial], 0.0, *[torch.ones(9)] * 3, np.zeros(2), np.full(2, 0.5))
    Recorder(tmp_path).write_scout(outcome.to_dict(), outcome.scores(torch.arange(9)))
    found = scout_json(tmp_path)
    assert found["expected_auroc"] is None and found["share_right"] == 1 and found["is_believed"] is False
    assert found["border"] is None
    scores = pq.read_table(tmp_path / "scout_scores.parquet").to_pydict()
    assert scores["example_id"] == [*range(9), None, None] and scores["weight"] == [1] * 9 + [0.5] * 2
    assert found["trials"][0]["evidence"] is None and found["trials"][0]["criterion_error"] is None


def test_rows_are_hashed_once_in_a_run(bilevel, monkeypatch):
    """Not for the fingerprints, the overlap and every checkpoint anew: a million rows take seconds each time."""
    hashed, digest = [], hashes_module._digest
    monkeypatch.setattr(hashes_module, "_digest", lambda text: hashed.append(text) or digest(text))
    trainer = bilevel(TRAIN, TRUSTED, HELD_OUT, max_steps=4, save_strategy="steps", save_steps=1, selector="mirror")
    trainer.train()
    rows = [text for text in hashed if text.startswith("{")]
    assert sorted(rows) == sorted(json.dumps(row, sort_keys=True) for row in [*TRAIN, *TRUSTED, *HELD_OUT])
    assert len(hashed) == len(rows) + 3, "and what the tokens of each data set are known by"


def test_weights_are_written_without_reading_rows(bilevel, monkeypatch, tmp_path):
    trainer = bilevel(TRAIN, TRUSTED, max_steps=1, selector="mirror")

    def refuse(dataset):
        raise AssertionError("a million rows, one after the other")

    monkeypatch.setattr(Dataset, "__iter__", refuse)
    trainer._write_weights()
    assert pq.read_table(tmp_path / "run" / "weights.parquet")["kept"].to_pylist() == [True] * len(TRAIN)


def test_a_run_leaves_its_settings_and_metrics(bilevel, tmp_path):
    settings = {"rho": 0.25, "max_steps": 3, "selector": "mirror", "eval_strategy": "steps", "eval_steps": 3}
    trainer = bilevel(TRAIN, TRUSTED, HELD_OUT, **settings)
    trainer.train()
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    info = config.pop("run_info")
    assert config.items() >= settings.items() and "bmo_temperature" not in config
    assert BilevelConfig(**config, overwrite_output_dir=True).to_dict() == trainer.args.to_dict()
    assert info["format_version"] == FORMAT_VERSION and info["versions"].keys() >= {"torch", "trl", "tamis"}
    assert info["dataset_fingerprints"].keys() == {"train_dataset", "validation_dataset", "eval_dataset"}
    assert len(set(info["dataset_fingerprints"].values())) == 3
    assert any(line.startswith("score_map = bounded") for line in info["resolved"])

    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 3]
    shown = {
        "loss",
        "training_loss",
        "weighted_training_loss",
        "validation_loss",
        "penalty_gap",
        "rho",
        "ess",
        "ess_ratio",
    }
    assert all(line.keys() >= shown | {"weight_entropy", "num_tokens"} for line in lines[:3])
    assert lines[3].keys() >= {"eval_loss", "eval_teacher_forced_match"} and lines[4].keys() >= {"train_runtime"}
    assert all(0 < line["ess_ratio"] <= 1 for line in lines[:3])
    assert not [path for path in (tmp_path / "run").rglob("*.tmp")]


# --- resuming ---------------------------------------------------------------------------------------------------------


def timeless(path: Path) -> list[dict]:
    """Metrics without what the clock says."""
    lines = read_jsonl(path / "metrics.jsonl")
    return [
        {k: v for k, v in line.items() if "runtime" not in k and "per_second" not in k}
        for line in lines
        if "train_runtime" not in line
    ]


RUNS = {
    "scouted": {},
    "scouted, accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "accumulation": {"selector": "mirror", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "tracked": {"selector": "mirror", "reference": "tracked"},
    "lora dropout, scouted": {"peft_config": True, "scout_epochs": 20, "scout_learning_rate": 3e-2},
    "lora dropout, tracked": {"peft_config": True, "selector": "mirror", "reference": "tracked"},
}
# Three steps make an epoch: killed after step 3, a run resumes in the middle of the first.
SETTINGS = {
    "max_steps": 5,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "learning_rate": 1e-2,
}


@pytest.fixture
def run(bilevel, tmp_path):
    def make(name, *, train=TRAIN, kill=None, **settings):
        settings = SETTINGS | {"output_dir": str(tmp_path / name)} | settings
        if settings.pop("peft_config", None):
            settings["peft_config"] = lora(lora_dropout=0.3)
        return bilevel(train, TRUSTED, HELD_OUT, callbacks=[Kill(kill)] if kill else None, **settings)

    return make


def cut_short(run, name="cut", kill=3, **settings):
    with pytest.raises(Killed):
        run(name, kill=kill, **settings).train()


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, tmp_path, name):
    whole = run("whole", **RUNS[name])
    whole.train()
    cut_short(run, **RUNS[name])
    resumed = run("cut", **RUNS[name])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    assert whole.weighting.row_weights.all_weights().std() > 0.1 or "tracked" in name

    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
    for part in ("row_weights", "reference"):
        expected = getattr(whole.weighting, part).state_dict()
        actual = getattr(resumed.weighting, part).state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(t.nan_to_num(-1), expected[n].nan_to_num(-1)) for n, t in actual.items())
    assert (resumed.weighting.visits() is None) == ("scouted" not in name)
    tables = [pq.read_table(tmp_path / folder / "weights.parquet") for folder in ("cut", "whole")]
    assert tables[0].equals(tables[1])
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")


def test_a_checkpoint_at_the_end_of_an_epoch(run, tmp_path):
    settings = {"selector": "mirror", "save_steps": 3, "eval_steps": 3}
    whole = run("whole", **settings)
    whole.train()
    cut_short(run, kill=4, **settings)
    resumed = run("cut", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)


@pytest.mark.parametrize("state", [None, '{"global_step": 4, "epo'])
def test_a_half_written_checkpoint_is_passed_over(run, tmp_path, state, caplog):
    cut_short(run)
    folder = tmp_path / "cut"
    half = folder / "checkpoint-4"
    shutil.copytree(folder / "checkpoint-2", half)
    (half / "model.safetensors").write_bytes(b"half")
    (half / "trainer_state.json").unlink()
    if state is not None:
        (half / "trainer_state.json").write_text(state)
    assert last_complete_checkpoint(folder) == str(folder / "checkpoint-2")
    assert f"{half} was cut off while it was written: skipped" in caplog.text
    assert checkpoint_step(folder / "checkpoint-2") == 2
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [(None, None, [2, 4, 6, 8]), (2, None, [4, 6, 8]), (2, 2, [2, 6, 8]), (1, 4, [4, 6, 8]), (1, None, [6, 8])],
)
def test_what_was_being_removed_when_a_run_was_killed_does_not_count(tmp_path, limit, best, kept):
    """Killed while checkpoint-2 was removed, and once more while checkpoint-8 was written; it goes on from step 6."""
    best_folder = best and str(tmp_path / f"checkpoint-{best}")
    for step in (4, 6, 8, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        if step in (4, 6):
            state = {"global_step": step, "best_model_checkpoint": best_folder}
            (folder / "trainer_state.json").write_text(json.dumps(state))
    end_rotation(str(tmp_path / "checkpoint-6"), limit)
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{k}" for k in kept]


def test_there_is_nothing_to_resume_from(run, tmp_path):
    with pytest.raises(ValueError, match="no complete checkpoint to resume from"):
        run("empty").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "train", [TRAIN[:-1], [*TRAIN[1:], TRAIN[0]], [*TRAIN[:-1], {"prompt": "5=", "completion": "q"}]]
)
def test_another_dataset_is_refused_and_nothing_is_lost(run, tmp_path, train):
    """Fewer rows, another order, or another row: the scores would belong to other rows than they were learned from."""
    cut_short(run)
    before = {
        name: (tmp_path / "cut" / name).read_bytes() for name in ("metrics.jsonl", "config.yaml", "weights.parquet")
    }
    with pytest.raises(ValueError, match="dataset"):
        run("cut", train=train).train(resume_from_checkpoint=True)
    assert {name: (tmp_path / "cut" / name).read_bytes() for name in before} == before


def test_a_checkpoint_of_another_trainer_is_refused(run, tmp_path):
    cut_short(run)
    (tmp_path / "cut" / "checkpoint-2" / "tamis.safetensors").unlink()
    with pytest.raises(ValueError, match="not by tamis, and cannot be resumed"):
        run("cut").train(resume_from_checkpoint=True)


def test_checkpoints_hold_no_pickle_of_ours(run, tmp_path):
    cut_short(run)
    own = {path.name for path in (tmp_path / "cut" / "checkpoint-2").iterdir() if "tamis" in path.name}
    assert own == {"tamis.safetensors"}
    assert json.loads((tmp_path / "cut" / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
