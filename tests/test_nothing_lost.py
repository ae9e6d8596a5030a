"""A run that dies, by a kill or by a write that fails, is resumed as if nothing had happened: see `nothing_lost`."""

import errno
import random
import shutil
import sys

import pytest
from nothing_lost import AIMS, ERRORS, OTHER_COMMANDS, SCENARIOS, SIGKILL, Death, Runs, forks, write_sites

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None, reason="writes are watched on Linux, by C"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nothing_lost")
    with forks(folder) as context:
        runs = {name: Runs(context, folder / name, *SCENARIOS[name]) for name in ("LoRA with dropout", "refining")}
        for name, options in OTHER_COMMANDS.items():
            runs[name] = Runs(context, folder / name, *options, command=name)
        yield runs


@pytest.mark.parametrize(
    ("scenario", "aim"),
    [
        ("LoRA with dropout", "while scouting"),
        ("LoRA with dropout", "within a write of the weights"),
        ("refining", "at any moment"),
        ("refining", "within a write of a checkpoint"),
        ("refining", "while checkpoints are removed"),
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


def test_a_scoring_that_fails_or_is_killed_is_ended_by_the_same_command(runs):
    scoring = runs["score"]
    sites = [*write_sites(scoring.whole.writes)][::9]
    deaths = {f"{error} {at}": Death(at, ERRORS[error]) for error, at in sites}
    deaths |= {"killed at the end": Death(len(scoring.whole.writes), SIGKILL)}
    deaths |= {"killed in the metrics": Death(2, SIGKILL, of="metrics.jsonl")}
    for name, death in deaths.items():
        life = scoring.live(name, death=death)
        assert life.exit_code in (1, -9) and "Traceback" not in life.said
        assert life.exit_code == -9 or life.last_words.endswith("then run the same command again"), life.said
        life = scoring.resume(name)
        assert life.exit_code == 0, (name, life.said)
        assert not scoring.differences(name), name


@pytest.mark.parametrize(
    ("error", "kind", "name", "words"),
    [
        ("ENOSPC", "write", "comparison.json", "the disk is full"),
        ("EIO", "write", "runs/base_model/result.json", "see to the disk, then run the same command again"),
        ("EACCES", "open", "seed_0/runs/less_scores/scores.json", "LESS, kept, seed 0 failed: "),
        ("ENOSPC", "write", "seed_0/runs/tamis/weights.parquet", "tamis, seed 0 failed: "),
    ],
)
def test_a_comparison_goes_on_after_a_write_that_failed(runs, error, kind, name, words):
    comparison, folder = runs["compare"], name.replace("/", "-")
    writes = comparison.whole.writes
    at = next(i for i, write in enumerate(writes, 1) if (write.kind, write.name) == (kind, name))
    life = comparison.live(folder, death=Death(at, ERRORS[error]))
    assert life.exit_code == 1 and "Traceback" not in life.said and words in life.said, life.said
    life = comparison.resume(folder)
    assert life.exit_code == 0, life.said
    assert not comparison.differences(folder)
