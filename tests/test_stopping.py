"""Ctrl-C and SIGTERM, as a terminal and a scheduler send them to `tamis train`."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import pairs, read_jsonl, two_kinds, write_jsonl
from safetensors.torch import load_file

from tamis.cli import main
from tamis.stopping import Stopped, StopSignals

# A shell may have started the tests in the background, where Ctrl-C is ignored.
PROGRAM = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
PROGRAM += "from tamis.cli import main; sys.exit(main())"


@pytest.fixture
def command(model_dir, tmp_path):
    right, wrong, trusted = two_kinds()
    files = {"train_dataset": [*right, *wrong], "validation_dataset": trusted, "eval_dataset": pairs(3, 100)}
    flags = ["--model_name_or_path", model_dir, "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
    flags += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--logging_steps", "1"]
    for name, rows in files.items():
        flags += [f"--{name}", write_jsonl(tmp_path / f"{name}.jsonl", rows)]

    def make(output_dir, *extra):
        return ["train", *flags, "--output_dir", str(tmp_path / output_dir), *extra]

    return make


def stopped(arguments: list[str], signum: int, after: Path) -> tuple[int, str]:
    """Exit code and stderr of a process that gets a signal once the file ``after`` has grown."""
    before = after.stat().st_size if after.exists() else 0
    with subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stderr=subprocess.PIPE, text=True) as process:
        while not (after.is_file() and after.stat().st_size > before):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=100)
    return process.returncode, errors


def last_words(errors: str) -> str:
    """The one line of the command, which is not a traceback."""
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("tamis train:")]
    return line


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp") or "lock" in path.name]


SCOUT = ("--scout_epochs", "8", "--scout_learning_rate", "1e-2")


def test_a_run_that_was_stopped_twice_ends_as_if_nothing_had_happened(command, tmp_path):
    steps, run = ("--max_steps", "90", *SCOUT), tmp_path / "run"
    arguments, reached = command("run", *steps), 0
    for signum, exit_code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        code, errors = stopped(arguments, signum, after=run / "metrics.jsonl")
        line = last_words(errors)
        step = int(line.split("after step ")[1].split(":")[0])
        assert code == exit_code and reached < step < 90
        assert (run / f"checkpoint-{step}" / "trainer_state.json").is_file() and not leftovers(run)
        arguments, reached = line.split("go on with tamis ")[1].split(), step
    assert main(arguments) == 0
    assert main(command("whole", *steps)) == 0
    models = [load_file(folder / "model.safetensors") for folder in (run, tmp_path / "whole")]
    assert all(models[0][name].equal(models[1][name]) for name in models[1])
    tables = [pq.read_table(folder / "weights.parquet") for folder in (run, tmp_path / "whole")]
    assert tables[0].equals(tables[1])
    metrics = [
        [line for line in read_jsonl(folder / "metrics.jsonl") if "loss" in line]
        for folder in (run, tmp_path / "whole")
    ]
    assert [line["step"] for line in metrics[0]] == list(range(1, 91)) and metrics[0] == metrics[1]


def test_scouting_that_was_stopped_goes_on(command, tmp_path, caplog):
    long = ("--max_steps", "2", "--scout_epochs", "40", "--scout_learning_rate", "1e-2")
    code, errors = stopped(command("run", *long), signal.SIGINT, after=tmp_path / "run" / "scout_trials.safetensors")
    assert code == 130 and last_words(errors).endswith(
        "stopped by Ctrl-C, before the first step: the same command starts again"
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "scout_trials.safetensors"]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["max_steps"] == 2
    for again in ((), ("--resume_from_checkpoint", "last")):
        shutil.copytree(tmp_path / "run", tmp_path / f"run{len(again)}")
        caplog.clear()
        assert main(command(f"run{len(again)}", *long, *again)) == 0
        assert "scouting goes on: " in caplog.text
    caplog.clear()
    assert main(command("run", "--max_steps", "2", *SCOUT)) == 0
    assert "scouting goes on" not in caplog.text, "it is another scout"
    assert main(command("whole", *long)) == 0
    for name in ("weights.parquet", "scout.json", "scout_trials.safetensors"):
        expected = (tmp_path / "whole" / name).read_bytes()
        assert all((tmp_path / run / name).read_bytes() == expected for run in ("run0", "run2")), name


def test_a_signal_waits_where_it_is_told_to_and_a_second_ctrl_c_does_not(capfd):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with StopSignals() as stop:
        stop.hold()
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM and "SIGTERM: stopping after this step" in capfd.readouterr().err
        with pytest.raises(Stopped) as caught:
            os.kill(os.getpid(), signal.SIGINT)
        assert caught.value.exit_code == 143
        with pytest.raises(Stopped, match="stopped by SIGTERM, here"):
            stop.hint = ", here"
            stop.release()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.received is None
    finally:
        signal.signal(signal.SIGINT, before)
