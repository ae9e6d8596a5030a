"""Two ranks are one rank with the double batch: losses, scores, weights, metrics and parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import REFINING, RUNS

SCRIPT = Path(__file__).with_name("distributed_runs.py")


def launch(launcher: list[str], model_dir: str, folder: Path) -> dict[tuple[str, int], dict]:
    """What the script found, by run and rank."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    command = [sys.executable, *launcher, str(SCRIPT), model_dir, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = range(2) if launcher else range(1)
    return {(name, rank): json.loads((folder / f"{name}.{rank}.json").read_text()) for name in RUNS for rank in ranks}


@pytest.fixture(scope="module")
def found(model_dir, tmp_path_factory):
    """One rank's runs, and those of two."""
    folder = tmp_path_factory.mktemp("distributed")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return launch([], model_dir, folder / "one"), launch(torchrun, model_dir, folder / "two")


@pytest.mark.parametrize("name", [name for name in RUNS if "refining" not in name])
def test_two_ranks_are_one_with_the_double_batch(found, name):
    one, two = found[0][name, 0], found[1][name, 0]
    assert (one["num_ranks"], two["num_ranks"]) == (1, 2)
    assert len(one["history"]) == len(two["history"])
    for expected, actual in zip(one["history"], two["history"], strict=True):
        assert actual.keys() == expected.keys()
        for metric, value in expected.items():
            assert actual[metric] == pytest.approx(value, abs=1e-5, rel=1e-5), metric
    assert {"training_loss", "validation_loss", "penalty_gap", "ess"} <= one["history"][0].keys()
    assert two["num_updates"] == one["num_updates"] and sum(one["num_updates"]) == 38
    assert name == "scouted" or set(one["num_updates"]) == {2}
    for part in ("scores", "weights", "p_right"):
        assert two[part] == pytest.approx(one[part], abs=1e-5 if name != "scouted" else 1e-3), part
    for parameter, values in one["parameters"].items():
        actual = torch.tensor(two["parameters"][parameter])
        torch.testing.assert_close(actual, torch.tensor(values), atol=1e-5, rtol=0, msg=parameter)


def test_two_ranks_find_the_same_scout(found):
    """Which rows it tells apart, by which trials, and that rows are then visited by it."""
    one, two = found[0]["scouted", 0], found[1]["scouted", 0]
    assert one["p_right"][:10] == pytest.approx([1] * 10, abs=0.5) and max(one["p_right"][10:]) < 0.1
    assert sum(one["num_updates"][10:]) == 0
    assert len(one["trials"]) == len(two["trials"]) == 2
    for expected, actual in zip(one["trials"], two["trials"], strict=True):
        assert actual == pytest.approx(expected, abs=0.06, rel=1e-3), "ranks of rows that are alike may change places"


@pytest.mark.parametrize("name", RUNS)
def test_both_ranks_know_the_same(found, name):
    first, second = (found[1][name, rank] for rank in range(2))
    assert first["p_right"] == second["p_right"] and first["trials"] == second["trials"]
    assert first["scores"] == second["scores"] and first["num_updates"] == second["num_updates"]
    assert first["parameters"] == second["parameters"] and first["responses"] == second["responses"]


@pytest.mark.parametrize("name", [name for name in RUNS if "refining" in name])
def test_two_ranks_share_the_rows_that_are_refined(found, name):
    one, two = found[0][name, 0]["responses"], found[1][name, 0]["responses"]
    assert two and len(two) <= round(REFINING["refine_fraction"] * 19)
    assert all(1 <= len(responses) <= REFINING["num_generations"] for responses in two.values())
    assert one is not None
