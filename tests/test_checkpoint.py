"""The file of our own state: what was saved comes back, and nothing that belongs to another run."""

import pytest
import torch
from safetensors import safe_open

from tamis.checkpoint import STATE_FILE, load_state, refuse_foreign, save_state

STATE = {
    "row_weights.score_N": torch.tensor([0.1, 1 / 3, float("nan")]),
    "row_weights.sums": torch.tensor([1 / 3], dtype=torch.float64),
    "reference.parameter.0": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "refiner.token_ids": torch.zeros(0, dtype=torch.int32),
}


def test_the_state_comes_back_bit_for_bit(tmp_path):
    save_state(tmp_path, STATE, num_tokens=123, fingerprint="abc")
    state, num_tokens = load_state(tmp_path)
    assert num_tokens == 123 and state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_checkpoints_of_other_rows_or_other_makers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="it was not written by tamis"):
        refuse_foreign(tmp_path, "abc")
    save_state(tmp_path, STATE, num_tokens=0, fingerprint="abc")
    refuse_foreign(tmp_path, "abc")
    with pytest.raises(ValueError, match="written while training on other rows"):
        refuse_foreign(tmp_path, "abd")


def test_nothing_is_pickled(tmp_path):
    save_state(tmp_path, STATE, num_tokens=0, fingerprint="abc")
    with safe_open(tmp_path / STATE_FILE, "pt") as state:
        assert state.metadata() == {"train_dataset": "abc"} and "refiner.token_ids" in state.keys()  # noqa: SIM118
