"""The file of our own state: every part gets back what it gave, and nothing that belongs to another run."""

import pytest
import torch
from safetensors import safe_open

from tamis.answers import Answer, RefineBuffer, Refined
from tamis.checkpoint import STATE_FILE, load_state, refuse_foreign, save_state
from tamis.references import ZeroReference
from tamis.selectors import make_selector


def parts() -> dict:
    buffer = RefineBuffer(response_weighting="bmo", temperature=1.0, ratio_level="token", ratio_clip=5.0, seed=0)
    return {"selector": make_selector("mirror", 6), "reference": ZeroReference(), "refiner": buffer}


def test_every_part_gets_back_its_state(tmp_path):
    first, second = parts(), parts()
    ids, excess = torch.tensor([1, 4, 5]), torch.tensor([0.1, 1 / 3, -2.0])
    for _ in range(2):
        first["selector"].update(ids, excess, excess)
    first["refiner"].questions = {4: Refined(2, -0.1, [Answer([5, 1], -1 / 3), Answer([7], -0.2, -0.3, -0.4, 1.5)])}
    save_state(tmp_path, first, num_tokens=123, fingerprint="abc")
    assert load_state(tmp_path, second) == 123
    for name, part in first.items():
        actual = second[name].state_dict()
        assert actual.keys() == part.state_dict().keys()
        for key, tensor in part.state_dict().items():
            assert actual[key].dtype == tensor.dtype
            assert torch.equal(actual[key].nan_to_num(7), tensor.nan_to_num(7)), f"{name}: {key}"
    assert second["selector"].table.score_N[5] != 0
    refuse_foreign(tmp_path, "abc")
    with pytest.raises(ValueError, match="written while training on other rows"):
        refuse_foreign(tmp_path, "abd")
    assert [path.name for path in tmp_path.iterdir()] == [STATE_FILE]


def test_parts_of_like_names_are_told_apart(tmp_path):
    first = {"a": make_selector("mirror", 3), "ab": make_selector("mirror", 4)}
    first["ab"].restore(torch.tensor([2]), torch.tensor([1.0]))
    save_state(tmp_path, first, num_tokens=0, fingerprint="")
    second = {"a": make_selector("mirror", 3), "ab": make_selector("mirror", 4)}
    load_state(tmp_path, second)
    assert second["a"].table.score_N.tolist() == [0, 0, 0] and second["ab"].table.score_N.tolist() == [0, 0, 1, 0]


def test_a_part_without_state_needs_none(tmp_path):
    save_state(tmp_path, {"selector": make_selector("none", 2)}, num_tokens=0, fingerprint="")
    load_state(tmp_path, {"selector": make_selector("none", 2), "reference": ZeroReference()})
    with pytest.raises(ValueError, match="refiner, selector in one and not the other"):
        load_state(tmp_path, {"refiner": parts()["refiner"]})


def test_an_empty_buffer_is_a_state(tmp_path):
    save_state(tmp_path, parts(), num_tokens=0, fingerprint="")
    second = parts()
    second["refiner"].questions = {4: Refined(2, -0.1, [Answer([5, 1], -1 / 3)])}
    load_state(tmp_path, second)
    assert second["refiner"].questions == {}


def test_nothing_is_pickled(tmp_path):
    save_state(tmp_path, parts(), num_tokens=0, fingerprint="abc")
    with safe_open(tmp_path / STATE_FILE, "pt") as state:
        assert state.metadata() == {"train_dataset": "abc"} and "refiner.numbers_R" in state.keys()  # noqa: SIM118
