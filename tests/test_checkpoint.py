"""The file of our own state: what was saved comes back, and nothing that belongs to another run."""

import json
import logging
import re
from dataclasses import fields

import pytest
import torch
from conftest import PLAIN
from safetensors import safe_open
from trl import SFTConfig

from tamis import BilevelConfig
from tamis.checkpoint import STATE_FILE, identify, load_state, refuse_foreign, save_state

STATE = {
    "row_weights.score_N": torch.tensor([0.1, 1 / 3, float("nan")]),
    "row_weights.sums": torch.tensor([1 / 3], dtype=torch.float64),
    "reference.parameter.0": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "refiner.token_ids": torch.zeros(0, dtype=torch.int32),
}


ROWS = {"train_dataset": "abc", "validation_dataset": "def", "eval_dataset": "ghi"}


def identity(tmp_path, rows=ROWS, selector="mirror", num_ranks=1, **settings):
    class Config(BilevelConfig):
        world_size = num_ranks

    args = Config(**{"output_dir": str(tmp_path / "run"), "selector": selector} | PLAIN | settings)
    return identify(args, args.resolve(), rows, selector)


def test_the_state_comes_back_bit_for_bit(tmp_path):
    log = {"tr_loss": torch.tensor(1 / 3), "row_weights": torch.tensor([0.1], dtype=torch.float64)}
    save_state(tmp_path, STATE, log, num_tokens=123, identity=identity(tmp_path))
    state, saved_log, num_tokens = load_state(tmp_path)
    assert num_tokens == 123 and state.keys() == STATE.keys() and saved_log == log
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"score_map": "softmax"}, "score_map: bounded -> softmax"),
        ({"selector": "bmo"}, "selector: mirror -> bmo"),
        ({"selector_learning_rate": 1.0}, "selector_learning_rate: 1.75 -> 1.0"),
        ({"reference": "zero"}, "reference: base -> zero"),
        ({"rho": 0.3}, "rho: None -> 0.3"),
        ({"loss_reduction": "token"}, "loss_reduction: example -> token"),
        ({"refine_fraction": 0.5}, "refine_fraction: 0 -> 0.5"),
        ({"seed": 1}, "seed: 42 -> 1"),
        ({"max_length": 12}, "max_length: 1024 -> 12"),
        ({"per_device_train_batch_size": 8}, "training rows a step: 4 -> 8"),
        ({"per_device_validation_batch_size": 1}, "validation rows a step: 4 -> 1"),
        ({"num_ranks": 2}, "training rows a step: 4 -> 8"),
        ({"rows": ROWS | {"train_dataset": "abd"}}, "train_dataset: other rows, or the same in another order"),
        ({"rows": ROWS | {"validation_dataset": "x"}}, "validation_dataset: other rows"),
    ],
)
def test_a_changed_meaning_is_refused_with_what_differs(tmp_path, change, difference):
    save_state(tmp_path, STATE, {}, num_tokens=0, identity=identity(tmp_path))
    with pytest.raises(ValueError, match=re.escape(difference)):
        refuse_foreign(tmp_path, identity(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"scout_epochs": 4.0}, "scout_epochs: None -> 4.0"),
        ({"scout_learning_rate": 1e-2}, "scout_learning_rates: [0.00015, 0.0005, 0.0015] -> [0.01]"),
        ({"learning_rate": 2e-3}, "scout_learning_rates: [0.00015, 0.0005, 0.0015] -> [0.0003, 0.001, 0.003]"),
        ({"refine_fraction": "auto"}, "refine_fraction: 0 -> auto"),
        ({"rho": 0.5}, "rho_start: None -> 0.5"),
        ({"selector": "none"}, "selector: scout -> none"),
    ],
)
def test_what_a_scout_was_is_part_of_the_meaning(tmp_path, change, difference):
    save_state(tmp_path, STATE, {}, num_tokens=0, identity=identity(tmp_path, selector="scout"))
    with pytest.raises(ValueError, match=re.escape(difference)):
        refuse_foreign(tmp_path, identity(tmp_path, **{"selector": "scout"} | change))


@pytest.mark.parametrize(
    ("change", "announced"),
    [
        ({}, []),
        ({"output_dir": "elsewhere"}, []),
        ({"learning_rate": 2e-3}, ["learning_rate: 0.001 -> 0.002"]),
        ({"logging_steps": 5, "max_steps": 9}, ["logging_steps: 1 -> 5", "max_steps: default -> 9"]),
        ({"rows": {n: ROWS[n] for n in ("train_dataset", "validation_dataset")}}, ["eval_dataset: other rows"]),
        ({"num_ranks": 2, "per_device_train_batch_size": 2}, []),
        ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, []),
        ({"refine_on_error": "continue"}, ["refine_on_error: default -> continue"]),
    ],
)
def test_a_harmless_change_is_announced(tmp_path, caplog, change, announced):
    save_state(tmp_path, STATE, {}, num_tokens=0, identity=identity(tmp_path))
    with caplog.at_level(logging.INFO, logger="tamis"):
        refuse_foreign(tmp_path, identity(tmp_path, **change))
    assert len(caplog.messages) == len(announced)
    assert all(text in message for text, message in zip(announced, caplog.messages, strict=True))


def test_every_setting_of_ours_gives_the_state_a_meaning_or_is_said_not_to(tmp_path):
    """A new field must be thought about: by default it may not change."""
    found = identity(tmp_path)
    own = {f.name for f in fields(BilevelConfig)} - {f.name for f in fields(SFTConfig)}
    assert own - found.meaning.keys() - {"per_device_validation_batch_size"} == {
        "refine_on_error", "generation_batch_size", "generator", "vllm_mode", "vllm_server_base_url",
        "vllm_gpu_memory_utilization", "overwrite_output_dir",
    }  # fmt: skip


def test_checkpoints_of_other_makers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not by tamis, and cannot be resumed"):
        refuse_foreign(tmp_path, identity(tmp_path))


def test_nothing_is_pickled(tmp_path):
    save_state(tmp_path, STATE, {}, num_tokens=0, identity=identity(tmp_path))
    with safe_open(tmp_path / STATE_FILE, "pt") as state:
        assert json.loads(state.metadata()["meaning"])["train_dataset"] == "abc"
        assert "refiner.token_ids" in state.keys()  # noqa: SIM118
