"""Whose an output directory is: one process, one run, and files of the user that stay as they are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import lora, message_of, pairs, parameters, read_jsonl
from safetensors.torch import load_file

from tamis.cli import main
from tamis.output_dir import LOCK_FILE, claimed, refuse_busy

MIXING = {"selector": "none", "rho": 0.0}
HOLDER = """
import sys
from tamis.output_dir import claimed
with claimed(sys.argv[1]):
    print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed ``tmp_path``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_is_dead(holder, bilevel, tmp_path):
    trainer = bilevel(pairs(4), **MIXING, output_dir=str(tmp_path), max_steps=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    for claim in (lambda: refuse_busy(tmp_path), trainer.train):
        message = message_of(claim)
        assert f"in use by another run (process {holder.pid})" in message and "choose another `output_dir`" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    holder.kill()
    holder.wait()
    trainer.train()
    assert not (tmp_path / LOCK_FILE).exists()


def test_the_command_is_refused_before_it_reads_anything(holder, tmp_path, capfd):
    settings = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false", "--selector", "none"]
    for extra in ([], ["--resume_from_checkpoint", "last"], ["--overwrite_output_dir"]):
        rows = ["--train_dataset", "none.jsonl", "--model_name_or_path", "no/such-model"]
        assert main(["train", *rows, *settings, *extra]) == 2
        assert f"in use by another run (process {holder.pid})" in capfd.readouterr().err


def test_a_directory_may_be_claimed_within_its_claim(tmp_path):
    with claimed(tmp_path / "run"):
        with claimed(tmp_path / "run"):
            refuse_busy(tmp_path / "run")
        assert (tmp_path / "run" / LOCK_FILE).read_text() == str(os.getpid())
    refuse_busy(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_what_a_killed_process_left_in_the_middle_of_a_write_is_cleared_away(tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    kept = [tmp_path / "README.md", tmp_path / "checkpoint-2" / "notes.tmp"]
    left = [tmp_path / ".weights.parquet.abcdefgh.tmp", tmp_path / ".tmpa1B2c3", tmp_path / "checkpoint-2/.tmpa1B2c3"]
    for path in (*left, *kept, tmp_path / ".README.md.kept"):
        path.write_text(path.name)
    with claimed(tmp_path):
        assert not any(path.exists() for path in left) and all(path.exists() for path in kept)
    assert kept[0].read_text() == ".README.md.kept", "it was put aside while a library wrote its own"


def test_only_the_main_process_claims(bilevel, tmp_path, monkeypatch):
    trainer = bilevel(pairs(4), **MIXING, output_dir=str(tmp_path / "run"), max_steps=1)
    trainer.recorder = None
    monkeypatch.setattr("tamis.trainer.claimed", None)
    trainer.train()


# --- one run ----------------------------------------------------------------------------------------------------------


def test_a_run_is_not_overwritten_in_python(bilevel, tmp_path):
    settings = MIXING | {"max_steps": 1, "overwrite_output_dir": False}
    bilevel(pairs(4), **settings).train()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    message = message_of(bilevel(pairs(4), **settings).train)
    assert "holds a run already" in message and "overwrite_output_dir" in message and "--" not in message
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["weights.parquet", "scout.json", "config.json", "inference_example.py"])
def test_files_of_the_user_with_names_of_ours_are_not_overwritten(bilevel, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("mine")
    settings = MIXING | {"max_steps": 1}
    message = message_of(bilevel(pairs(4), **settings, overwrite_output_dir=False).train)
    assert f"run holds {name}, which a run would write over" in message
    assert {path.name for path in (tmp_path / "run").iterdir()} == {name}
    assert (tmp_path / "run" / name).read_text() == "mine"


def test_a_run_that_ended_before_its_first_step_is_begun_again(bilevel, tmp_path):
    settings = MIXING | {"max_steps": 1, "overwrite_output_dir": False}
    trainer = bilevel(pairs(4), **settings)
    trainer.recorder.write_config({}, {"version": "0"})
    (tmp_path / "run" / "weights.parquet").write_text("of that run")
    trainer.train()
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_overwriting_leaves_nothing_of_the_earlier_run_and_all_of_the_user(bilevel, tmp_path):
    run = tmp_path / "run"
    steps = {"save_strategy": "steps", "save_steps": 1}
    first = bilevel(pairs(4), **MIXING, **steps, max_steps=3, peft_config=lora())
    first.train()
    first.save_model()
    (run / "notes.txt").write_text("mine")
    (run / "checkpoint-old").mkdir()
    second = bilevel(pairs(4), **MIXING, **steps, max_steps=1)
    second.train()
    second.save_model()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-old"]
    assert not list(run.glob("adapter_*")) and (run / "notes.txt").read_text() == "mine"
    assert {line["step"] for line in read_jsonl(run / "metrics.jsonl")} == {1}


def test_a_run_elsewhere_is_not_overwritten_by_one_that_goes_on_from_another(bilevel, tmp_path):
    settings = MIXING | {"save_strategy": "steps", "save_steps": 1, "overwrite_output_dir": False}
    bilevel(pairs(4), **settings, max_steps=1).train()
    other = bilevel(pairs(4), **settings, max_steps=1, output_dir=str(tmp_path / "other"))
    other.train()
    again = bilevel(pairs(4), **settings, max_steps=2, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="holds a run already"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


# --- a run that has made its steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_steps", [3, 4])
def test_a_finished_run_is_not_trained_on(bilevel, tmp_path, max_steps):
    """Two steps make an epoch: also where the last one is in the middle of an epoch."""
    settings = MIXING | {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "max_steps": max_steps}
    first = bilevel(pairs(8), **settings)
    first.train()
    resumed = bilevel(pairs(8), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == max_steps
    for name, parameter in parameters(first.model).items():
        assert parameter.equal(parameters(resumed.model)[name]), name


def test_no_steps_train_nothing(bilevel):
    trainer = bilevel(pairs(8), **MIXING, max_steps=0, learning_rate=1e-2)
    before = parameters(trainer.model)
    trainer.train()
    assert trainer.state.global_step == 0
    assert all(parameter.equal(before[name]) for name, parameter in parameters(trainer.model).items())


# --- files of the user ------------------------------------------------------------------------------------------------

CONFIG = "selector: none # mine\n"
CARD = "---\nlicense: mit\n---\n# My project\n"


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_files_of_the_user_stay(bilevel, tmp_path, peft_config, caplog):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(CONFIG)
    (run / "README.md").write_text(CARD)
    settings = MIXING | {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    for resume in (None, True):
        trainer = bilevel(pairs(4), **settings, peft_config=peft_config)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.create_model_card()
        assert (run / "config.yaml").read_text() == CONFIG and (run / "README.md").read_text() == CARD
        assert yaml.safe_load((run / "tamis_config.yaml").read_text())["max_steps"] == 2
        assert "fine-tuned" in (run / "MODEL_CARD.md").read_text()
        assert not [path for path in run.iterdir() if path.name.startswith(".")]
    for name in ("config.yaml", "README.md"):
        assert f"{name} was not written by tamis and stays as it is" in caplog.text
    assert sum("stays as it is" in message for message in caplog.messages) == 4


def test_a_card_that_a_kill_has_left_empty_is_ours(bilevel, tmp_path, caplog):
    """TRL opens it, and then writes: found by benchmarks/kills.py."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "README.md").touch()
    trainer = bilevel(pairs(4), **MIXING, max_steps=1)
    trainer.train()
    trainer.create_model_card()
    assert "fine-tuned" in (run / "README.md").read_text() and not (run / "MODEL_CARD.md").exists()
    assert "stays as it is" not in caplog.text


def test_a_config_that_a_user_has_edited_stays(bilevel, tmp_path):
    path = Path(tmp_path / "run" / "config.yaml")
    bilevel(pairs(4), **MIXING, max_steps=1).train()
    edited = "# learned on Monday\n" + path.read_text()
    path.write_text(edited)
    bilevel(pairs(4), **MIXING, max_steps=2).train()
    assert path.read_text() == edited
    assert yaml.safe_load((tmp_path / "run" / "tamis_config.yaml").read_text())["max_steps"] == 2


def test_our_own_files_are_replaced(bilevel, tmp_path):
    for max_steps in (1, 2):
        trainer = bilevel(pairs(4), **MIXING, max_steps=max_steps, peft_config=lora())
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert not names & {"tamis_config.yaml", "MODEL_CARD.md"}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == 2
    assert load_file(tmp_path / "run" / "adapter_model.safetensors")
