"""A run that dies, by a kill or by a write that fails, is resumed as if nothing had happened: see `nothing_lost`."""

import errno
import random
import shutil
import sys

import pytest
from nothing_lost import AIMS, SCENARIOS, Death, Runs, forks

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="writes are watched on Linux, by C"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing_lost")
    with forks(folder) as context:
        yield {name: Runs(context, folder / name, *SCENARIOS[name]) for name in ("LoRA with dropout", "refining")}


@pytest.mark.parametrize(
    ("scenario", "aim"),
    [
        ("LoRA with dropout", "while scouting"),
        ("LoRA with dropout", "within a write of the weights"),
        ("refining", "at any moment"),
        ("refining", "within a write of a checkpoint"),
    ],
)
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(runs, scenario, aim):
    of_scenario, dice = runs[scenario], random.Random(0)
    for _ in range(2):
        life = of_scenario.resume(aim, AIMS[aim](of_scenario.whole.writes, dice))
        assert life.exit_code in (-9, 0), life.said
    life = of_scenario.resume(aim)
    assert life.exit_code == 0, life.said
    assert not of_scenario.differences(aim)


@pytest.mark.parametrize(
    ("error", "kind", "name", "words"),
    [
        (errno.EACCES, "open", "config.yaml", "(Permission denied): see to its permissions, then run the same command"),
        (errno.ENOSPC, "rename", "scout_trials.safetensors", "the disk is full"),
        (errno.EIO, "write", "metrics.jsonl", "(Input/output error): see to the disk, then go on with --resume_from"),
        (errno.ENOSPC, "write", "checkpoint/optimizer.pt", "see to the disk, then go on with --resume_from_checkpoint"),
    ],
)
def test_a_write_that_fails_is_named_and_loses_nothing(runs, error, kind, name, words):
    of_scenario, run = runs["refining"], name.replace("/", "-")
    at = next(i for i, write in enumerate(of_scenario.whole.writes, 1) if (write.kind, write.name) == (kind, name))
    life = of_scenario.live(run, death=Death(at, error))
    assert life.exit_code == 1 and "Traceback" not in life.said
    assert words in life.last_words and name.replace("checkpoint/optimizer.pt", "checkpoint-2") in life.last_words
    life = of_scenario.resume(run)
    assert life.exit_code == 0, life.said
    assert not of_scenario.differences(run)
