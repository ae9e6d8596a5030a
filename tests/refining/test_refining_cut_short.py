"""Refining in runs that are cut short: a resumed one is the whole one, and a generator that fails loses nothing."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Kill, Killed, assert_close, lora, parameters, read_jsonl, two_kinds
from scripted import letters
from test_trainer_refining import REFINING, refinements, spy_on_steps

from tamis.losses import trainable_parameters
from tamis.recorder import last_complete_checkpoint
from tamis.refining.generation import GenerationError
from tamis.selection.calibration import fit
from tamis.selection.scout import Finding

RIGHT, WRONG, TRUSTED = two_kinds("xy")
TRAIN = [*RIGHT[:6], *WRONG[:6]]  # a scout tells them apart


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(bilevel, talkative_model, tmp_path):
    """Make a trainer with its own folder; killed in a step, it leaves the checkpoint of the step before."""

    def make(name, *, trusted=TRUSTED, kill=None, **settings):
        settings = REFINING | {"max_steps": 6, "learning_rate": 1e-2, "output_dir": str(tmp_path / name)} | settings
        if settings.pop("peft_config", None):
            settings["peft_config"] = lora(lora_dropout=0.3)
        if kill:
            settings = {"save_strategy": "steps", "save_steps": kill - 1, "callbacks": [Kill(kill)]} | settings
        return bilevel(TRAIN, trusted, model=talkative_model, **settings)

    return make


def timeless(folder) -> list[dict]:
    """Metrics without what the clock says."""
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "train_runtime" not in line]
    return [{k: v for k, v in line.items() if "seconds" not in k and "per_second" not in k} for line in lines]


def assert_same_state(actual, expected) -> None:
    first, second = actual.weighting.state_dict(), expected.weighting.state_dict()
    assert first.keys() == second.keys()
    assert {name.split(".")[0] for name in first} >= {"row_weights", "refiner"}
    for name, tensor in first.items():
        assert torch.equal(tensor.nan_to_num(-1), second[name].nan_to_num(-1)), name


# Three steps make an epoch and two lie between refreshes: one is due at step 2, none at step 3.
RUNS = {
    "scouted": {},
    "scouted, accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "scouted, random rows": {"refine_fraction": 0.5, "refine_policy": "random"},
    "scores follow the steps": {
        "selector": "mirror",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
    "tracked, lora dropout": {"selector": "mirror", "reference": "tracked", "peft_config": True},
    "scouted, lora dropout": {"peft_config": True, "scout_epochs": 20, "scout_learning_rate": 3e-2},
}


# In an epoch and at its end, before a refresh and after one.
STEPS = {
    "scouted": (2, 3, 5),
    "scouted, accumulation": (5,),
    "scouted, random rows": (5,),
    "scores follow the steps": (3,),
    "tracked, lora dropout": (2,),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(run, generated, tmp_path, name):
    whole = run("whole", **RUNS[name])
    whole.train()
    assert generated == [6, 6, 6] and (whole.weighting.visits() is not None) == ("scouted" in name)
    for step in STEPS.get(name, (2, 3)):
        folder = f"cut-{step}"
        with pytest.raises(Killed):
            run(folder, kill=step + 1, **RUNS[name]).train()
        generated.clear()
        resumed = run(folder, **RUNS[name])
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert generated == [6] * {2: 2, 3: 1, 5: 0}[step], "nothing is generated again within an interval"
        assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
        assert_same_state(resumed, whole)
        for table in ("weights.parquet", "refinements.parquet"):
            assert pq.read_table(tmp_path / folder / table).equals(pq.read_table(tmp_path / "whole" / table)), table
        assert timeless(tmp_path / folder) == timeless(tmp_path / "whole")


def test_a_refresh_at_the_end_of_an_epoch(run, generated):
    settings = {"refine_every": 3, "peft_config": True, "selector": "mirror"}
    whole = run("whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        run("cut", kill=4, **settings).train()
    generated.clear()
    resumed = run("cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert generated == [6]
    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
    assert_same_state(resumed, whole)


def test_refinements_of_steps_that_run_again_are_replaced(run, tmp_path):
    """Killed after the refreshes before steps 3 and 5; taken up from a checkpoint before either."""
    with pytest.raises(Killed):
        run("cut", kill=5, save_steps=1, selector="mirror").train()
    path = tmp_path / "cut" / "refinements.parquet"
    table = pq.read_table(path)
    assert table["step"].to_pylist() == [0] * 6 + [2] * 6 + [4] * 6
    marked = pa.array([-1.0] * 18)
    pq.write_table(table.set_column(table.schema.get_field_index("original_weight"), "original_weight", marked), path)
    run("cut", selector="mirror").train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-1"))
    again = pq.read_table(path)
    assert again["step"].to_pylist() == table["step"].to_pylist()
    assert [weight == -1 for weight in again["original_weight"].to_pylist()] == [True] * 6 + [False] * 12


@pytest.mark.parametrize("is_on_first", [True, False])
def test_refining_cannot_be_switched_on_resuming(run, is_on_first):
    """The scores of refined rows are those of their new responses: without these they would be wrong weights."""
    on, off = {"selector": "mirror"}, {"selector": "mirror", "refine_fraction": 0.0}
    first, second = (on, off) if is_on_first else (off, on)
    with pytest.raises(Killed):
        run("cut", kill=3, **first).train()
    with pytest.raises(ValueError, match=r"refine_fraction: 0(\.5)? -> 0(\.5)?"):
        run("cut", **second).train(resume_from_checkpoint=True)


def test_resuming_needs_the_scout(run, tmp_path):
    with pytest.raises(Killed):
        run("cut", kill=3).train()
    scout = tmp_path / "cut" / "scout.safetensors"
    assert scout.is_file()
    scout.unlink()
    with pytest.raises(ValueError, match=r"scout.safetensors is missing: .* start the run anew"):
        run("cut").train(resume_from_checkpoint=True)


def test_the_scout_goes_along_to_another_folder(run, tmp_path):
    with pytest.raises(Killed):
        run("first", kill=3).train()
    files = ("scout.safetensors", "scout.json")
    scout = [(tmp_path / "first" / name).read_bytes() for name in files]
    with pytest.raises(Killed):
        run("second", kill=5).train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert [(tmp_path / "second" / name).read_bytes() for name in files] == scout
    resumed = run("second")
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_a_scout_of_another_model_is_refused(run, tmp_path):
    trainer, adapter, scores = run("full"), run("lora", peft_config=True).weighting.scouting.scout, np.arange(9.0)
    full = trainer.weighting.scouting.scout
    full.parameters = trainable_parameters(trainer.model)
    full.finding = Finding(1e-3, 4, 1.0, fit(scores, scores), 0.9)
    full.save(tmp_path / "scout.safetensors")
    full.load(tmp_path / "scout.safetensors")
    assert_close(full.parameters, trainable_parameters(trainer.model), atol=0)
    with pytest.raises(ValueError, match=r"scout.safetensors belongs to another model"):
        adapter.load(tmp_path / "scout.safetensors")


def test_a_run_with_too_few_rows_for_a_scout_is_resumed_without_one(run, tmp_path):
    settings = {"trusted": TRUSTED[:3], "refine_policy": "random"}
    whole = run("whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        run("cut", kill=3, **settings).train()
    assert not (tmp_path / "cut" / "scout.safetensors").exists()
    resumed = run("cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
    assert_same_state(resumed, whole)


def test_without_scouting_there_is_no_scout_to_keep(run, tmp_path):
    run("whole", selector="mirror", max_steps=1).train()
    assert not (tmp_path / "whole" / "scout.safetensors").exists()


# --- a generator that fails -------------------------------------------------------------------------------------------

FAILURES = {
    "its own error": GenerationError("the generator has no memory left"),
    "connection lost": ConnectionError("the server is gone"),
    "too few completions": None,
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_stops_with_a_checkpoint_and_a_remedy(bilevel, script, tmp_path, name):
    script(fails_at=2, error=FAILURES[name])
    trainer = bilevel(TRAIN, TRUSTED, max_steps=4, selector="mirror", **REFINING)
    remedies = (
        r"; `refine_on_error='continue'` goes on without new responses\. "
        r"Stopped after saving checkpoint-2: go on with `resume_from_checkpoint='last'`$"
    )
    with pytest.raises(GenerationError, match=remedies):
        trainer.train()
    assert trainer.state.global_step == 2
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize(("fails_at", "step", "selector"), [(1, 0, "scout"), (2, 2, "mirror")])
def test_a_run_that_stopped_goes_on_as_if_nothing_had_happened(bilevel, script, tmp_path, fails_at, step, selector):
    script()
    settings = REFINING | {"max_steps": 4, "selector": selector}
    whole = bilevel(TRAIN, TRUSTED, output_dir=str(tmp_path / "whole"), **settings)
    whole.train()
    script(fails_at=fails_at)
    stopped = bilevel(TRAIN, TRUSTED, **settings)
    with pytest.raises(GenerationError, match=f"checkpoint-{step}: go on with"):
        stopped.train()
    generator = script()
    resumed = bilevel(TRAIN, TRUSTED, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4 and generator.num_calls == 3 - fails_at
    assert_close(parameters(resumed.model), parameters(whole.model), atol=0)
    assert_same_state(resumed, whole)


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_said_and_training_goes_on(bilevel, script, caplog, tmp_path, name):
    """With the responses there are, until the next refresh."""
    generator = script(
        lambda prompt, j, call: "_uvw"[call] + letters(prompt, j, call), fails_at=2, error=FAILURES[name]
    )
    trainer = bilevel(TRAIN, TRUSTED, max_steps=6, refine_on_error="continue", selector="mirror", **REFINING)
    seen = spy_on_steps(trainer)
    with caplog.at_level(logging.WARNING, logger="tamis"):
        trainer.train()
    warnings = [record.message for record in caplog.records if "no new responses" in record.message]
    assert len(warnings) == 1 and warnings[0].startswith("step 2: ")
    assert generator.num_calls == 3 and trainer.state.global_step == 6
    for batch in seen:
        assert len(batch["refined"]) == 6
        for refined in batch["refined"].values():
            assert refined.step == {0: 0, 1: 0, 2: 0, 3: 0, 4: 4, 5: 4}[batch["step"]]
    assert {record["step"] for record in refinements(tmp_path / "run")} == {0, 4}


def test_a_failure_at_the_first_refresh_leaves_the_original_responses(bilevel, script):
    script(fails_at=1)
    trainer = bilevel(TRAIN, TRUSTED, max_steps=2, refine_on_error="continue", selector="mirror", **REFINING)
    trainer.train()
    script()
    plain = bilevel(TRAIN, TRUSTED, max_steps=2, selector="mirror")
    plain.train()
    assert trainer.weighting.refiner.buffer.rows == {}
    assert_close(parameters(trainer.model), parameters(plain.model), atol=0)


def test_a_dataset_without_prompts_is_refused_when_the_trainer_is_made(bilevel, script):
    script()
    texts = [[{"text": row["prompt"] + row["completion"]} for row in rows] for rows in (TRAIN, TRUSTED)]
    with pytest.raises(ValueError, match="no training row is a prompt with one response"):
        bilevel(*texts, **REFINING)
