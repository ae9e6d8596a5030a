"""Two ranks are one rank with the double batch: losses, scores, weights, metrics and parameters."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import FAILING, REFINING, RUNS, SAVED, SHARDED, run

SCRIPT = Path(__file__).with_name("distributed_runs.py")


def launch(launcher: list[str], model_dir: str, folder: Path) -> dict[tuple[str, int], dict]:
    """What the script found, by run and rank."""
    folder.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parent), *sys.path])}
    command = [sys.executable, *launcher, str(SCRIPT), model_dir, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks, names = (range(2), [*RUNS, *SHARDED, *FAILING]) if launcher else (range(1), [*RUNS])
    return {(name, rank): json.loads((folder / f"{name}.{rank}.json").read_text()) for name in names for rank in ranks}


@pytest.fixture(scope="module")
def found(model_dir, tmp_path_factory):
    """One rank's runs, and those of two. Each goes on with a run of the other, on one rank in this process."""
    folder = tmp_path_factory.mktemp("distributed")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one = launch([], model_dir, folder / "one")
    two = launch(torchrun, model_dir, folder / "two")
    resumed = SAVED | {"resumes": "two/scouted, refining"}
    one["resumed, of two", 0] = json.loads(json.dumps(run(model_dir, folder / "one" / "resumed, of two", 4, resumed)))
    return one, two


# On one rank, on two.
PAIRS = [*((name, name) for name in RUNS), ("scouted, refining", "fsdp2"), ("lora", "fsdp2, lora")]


@pytest.mark.parametrize(("name", "name_of_two"), PAIRS)
def test_two_ranks_are_one_with_the_double_batch(found, name, name_of_two):
    one, two = found[0][name, 0], found[1][name_of_two, 0]
    assert (one["num_ranks"], two["num_ranks"]) == (1, 2)
    assert len(one["history"]) == len(two["history"])
    for expected, actual in zip(one["history"], two["history"], strict=True):
        assert actual.keys() == expected.keys()
        for metric, value in expected.items():
            assert actual[metric] == pytest.approx(value, abs=1e-5, rel=1e-5), metric
    assert {"training_loss", "validation_loss", "penalty_gap", "ess"} <= one["history"][0].keys()
    assert two["num_updates"] == one["num_updates"] and two["responses"] == one["responses"]
    if name in ("scores follow the steps", "scouted", "tokens, accumulation", "tracked"):
        assert sum(one["num_updates"]) == 38 and (name == "scouted" or set(one["num_updates"]) == {2})
    for part in ("scores", "weights", "p_right", "losses"):
        is_log_odds = part == "scores" and one["trials"]
        tolerance = 1e-3 if is_log_odds else 1e-5
        assert two[part] == pytest.approx(one[part], abs=tolerance, rel=tolerance, nan_ok=True), part
    for parameter, values in one["parameters"].items():
        actual = torch.tensor(two["parameters"][parameter])
        torch.testing.assert_close(actual, torch.tensor(values), atol=1e-5, rtol=0, msg=parameter)


@pytest.mark.parametrize(
    ("num_ranks", "name", "num_ranks_then", "resumed"),
    [
        (1, "scouted, refining", 1, "resumed"),
        (1, "scouted, refining", 2, "resumed"),
        (2, "scouted, refining", 1, "resumed, of two"),
        (2, "fsdp2, adamw", 2, "fsdp2, resumed"),
    ],
)
def test_a_run_goes_on_with_any_number_of_ranks(found, num_ranks, name, num_ranks_then, resumed):
    """As if it had not been stopped after five of its ten steps, with a refresh after that."""
    expected, actual = found[num_ranks - 1][name, 0], found[num_ranks_then - 1][resumed, 0]
    for part in ("scores", "weights", "losses"):
        tolerance = 1e-3 if part == "scores" else 1e-5
        assert actual[part] == pytest.approx(expected[part], abs=tolerance, rel=tolerance, nan_ok=True), part
    assert actual["responses"] == expected["responses"] and actual["num_updates"] == expected["num_updates"]
    for parameter, values in expected["parameters"].items():
        found_values = torch.tensor(actual["parameters"][parameter])
        torch.testing.assert_close(found_values, torch.tensor(values), atol=1e-5, rtol=0, msg=parameter)


def test_in_fp16_shards_skip_the_same_step(found):
    """One rank has the overflow of its shards, and all must know of it; see `fp16_on_cpus`."""
    lines = [line for line in found[1]["fsdp2, fp16", 0]["history"] if "grad_norm" in line]
    assert [math.isfinite(line["grad_norm"]) for line in lines] == [False] + [True] * 9
    assert lines[-1]["loss"] < lines[0]["loss"]
    fp16, fp32 = (found[1][name, 0]["p_right"] for name in ("fsdp2, fp16", "scouted"))
    assert fp16 == pytest.approx(fp32, abs=0.02)


def test_two_ranks_find_the_same_scout(found):
    """Which rows it tells apart, by which trials, and that rows are then visited by it."""
    one, two = found[0]["scouted", 0], found[1]["scouted", 0]
    assert one["p_right"][:10] == pytest.approx([1] * 10, abs=0.5) and max(one["p_right"][10:]) < 0.1
    assert sum(one["num_updates"][10:]) == 0
    assert len(one["trials"]) == len(two["trials"]) == 2
    for expected, actual in zip(one["trials"], two["trials"], strict=True):
        assert actual == pytest.approx(expected, abs=0.06, rel=1e-3), "ranks of rows that are alike may change places"


@pytest.mark.parametrize("name", [*RUNS, *SHARDED])
def test_both_ranks_know_the_same(found, name):
    first, second = (found[1][name, rank] for rank in range(2))
    assert first["p_right"] == second["p_right"] and first["trials"] == second["trials"]
    assert first["scores"] == second["scores"] and first["num_updates"] == second["num_updates"]
    assert first["parameters"] == second["parameters"] and first["responses"] == second["responses"]


@pytest.mark.parametrize("name", ["refining", "scouted, refining", "lora"])
def test_rows_were_refined(found, name):
    responses = found[0][name, 0]["responses"]
    assert responses and len(responses) <= round(REFINING["refine_fraction"] * 19)
    num_generations = RUNS[name]["num_generations"]
    assert all(1 <= len(of_row) <= num_generations for of_row in responses.values())


def test_a_rank_may_be_without_a_refined_row(found):
    refined = zip(*(found[1]["refining", rank]["num_refined"] for rank in range(2)), strict=True)
    assert any(min(both) == 0 < max(both) for both in refined)


def test_a_generator_that_fails_on_one_rank_stops_both(found):
    first, second = (found[1]["generator", rank]["failure"] for rank in range(2))
    words = "the generator failed: RuntimeError: out of order"
    assert first.startswith(f"GenerationError: rank 1: {words}") and second.startswith(f"GenerationError: {words}")
    assert "Stopped after saving checkpoint-0" in first and "Stopped after saving checkpoint-0" in second


def test_a_forward_of_both_ranks_that_fails_on_one_ends_both(found):
    """The other as soon as the process of the first has ended."""
    first, second = (found[1]["fsdp2, forward", rank]["failure"] for rank in range(2))
    words = "a forward of all ranks broke off (RuntimeError: "
    assert first.startswith(f"BrokenForwardError: rank 0: {words}")
    assert second.startswith(f"BrokenForwardError: rank 1: {words}out of order)")
