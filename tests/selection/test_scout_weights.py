"""`ScoutWeights`: what a row is worth becomes how often it is visited, and nothing but that."""

import math

import pytest
import torch
from conftest import worth

from tamis.selection.make import make_row_weights
from tamis.selection.row_weights import ScoutWeights

P_RIGHT = torch.tensor([0.9, 0.1, 0.5, 0.0, 1.0, 0.75])
WORTH = torch.tensor([0.81, 0.01, 0.25, 0.0, 1.0, 0.5625])  # p squared


def settled(p_right=P_RIGHT, num_examples=None) -> ScoutWeights:
    """Weights after scouting; rows beyond those of ``p_right`` were left out of training."""
    num_known = len(p_right)
    row_weights = ScoutWeights(num_examples or num_known)
    row_weights.exclude(torch.arange(num_known, len(row_weights)))
    row_weights.settle(torch.arange(num_known), p_right)
    return row_weights


def test_the_name_of_the_default_makes_them():
    assert isinstance(make_row_weights("scout", 3), ScoutWeights)


def test_weights_are_the_squared_probabilities_over_their_mean():
    row_weights = settled()
    torch.testing.assert_close(row_weights.all_weights(), WORTH / WORTH.mean(), atol=1e-6, rtol=0)
    torch.testing.assert_close(row_weights.p_right_N(), P_RIGHT, atol=1e-6, rtol=0)
    assert row_weights.num_useful() == pytest.approx(2.6325, abs=1e-6)
    assert row_weights.effective_sample_size() == pytest.approx(2.6325**2 / WORTH.square().sum().item(), rel=1e-5)


def test_before_scouting_nothing_is_known():
    row_weights = ScoutWeights(4)
    assert row_weights.visits_N() is None and row_weights.num_useful() is None
    assert row_weights.p_right_N().isnan().all() and row_weights.all_weights().tolist() == [1.0] * 4


@pytest.mark.parametrize("p_right", [0.0, 1e-9, 0.3])
def test_rows_that_are_all_wrong_are_worth_next_to_nothing_and_alike(p_right):
    row_weights = settled(torch.full((5,), p_right))
    torch.testing.assert_close(row_weights.visits_N(), torch.ones(5))
    assert row_weights.num_useful() == pytest.approx(5 * p_right**2, rel=1e-6, abs=1e-20)
    assert row_weights.effective_sample_size() == pytest.approx(5) and row_weights.entropy() == pytest.approx(
        math.log(5)
    )


def test_a_score_is_the_log_odds_and_rises_without_end_no_more():
    row_weights = settled()
    scores = row_weights.scores_of(torch.tensor([[0.5, 0.9], [0.0, 1.0]]))
    expected = torch.tensor([[0.0, math.log(9)], [-30.0, 30.0]])
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    assert row_weights.all_scores().isfinite().all(), "minus infinity is for rows that are never trained on"


def test_a_visit_counts_one_whatever_the_weight():
    row_weights = settled()
    assert row_weights.weights(torch.tensor([1, 4, 4]), torch.tensor([9.0, -9.0, 0.0])).tolist() == [1.0] * 3
    assert not row_weights.uses_excess


def test_losses_of_the_steps_change_no_weight():
    row_weights = settled()
    weights, visits = row_weights.all_weights(), row_weights.visits_N()
    row_weights.update(torch.tensor([0, 3]), torch.tensor([50.0, 0.0]), torch.tensor([50.0, 0.0]))
    assert torch.equal(row_weights.all_weights(), weights) and row_weights.visits_N() is visits
    assert row_weights.last_loss_N[[0, 3]].tolist() == [50.0, 0.0]


def test_repeated_visits_of_a_step_are_all_counted():
    row_weights = settled()
    loss_B = torch.tensor([2.0, 1.0, 2.0, 2.0])
    row_weights.update(torch.tensor([4, 0, 4, 4]), loss_B, loss_B)
    row_weights.update(torch.tensor([4]), torch.tensor([1.5]), torch.tensor([1.5]))
    assert row_weights.num_updates_N.tolist() == [1, 0, 0, 0, 4, 0]
    assert row_weights.last_loss_N[[0, 4]].tolist() == [1.0, 1.5]


def test_visits_are_the_weights_and_the_same_tensor_until_one_changes():
    row_weights = settled()
    visits = row_weights.visits_N()
    assert torch.equal(visits, row_weights.all_weights()) and row_weights.visits_N() is visits
    assert visits.mean().item() == pytest.approx(1, abs=1e-6)
    row_weights.restore(torch.tensor([3]), row_weights.scores_of(torch.tensor([1.0])))
    renewed = row_weights.visits_N()
    assert renewed is not visits and row_weights.visits_N() is renewed
    now = worth(torch.tensor([0.9, 0.1, 0.5, 1.0, 1.0, 0.75]))
    torch.testing.assert_close(renewed, now / now.mean(), atol=1e-6, rtol=0)
    assert row_weights.num_useful() == pytest.approx(now.sum().item(), abs=1e-6)
    row_weights.restart(torch.tensor([0]))
    assert row_weights.visits_N() is not renewed


def test_rows_that_are_left_out_are_never_visited():
    row_weights = settled(num_examples=9)
    visits = row_weights.visits_N()
    assert visits[6:].tolist() == [0.0] * 3
    torch.testing.assert_close(visits[:6], WORTH / WORTH.mean(), atol=1e-6, rtol=0)
    assert row_weights.num_useful() == pytest.approx(2.6325, abs=1e-6)
    assert row_weights.p_right_N()[6:].tolist() == [0.0] * 3


def test_equal_probabilities_are_equal_weights():
    for p_right in (1e-3, 0.37, 1.0):
        torch.testing.assert_close(settled(torch.full((7,), p_right)).visits_N(), torch.ones(7))


@pytest.mark.parametrize("is_known", [False, True])
def test_the_state_comes_back_with_whether_anything_is_known(is_known):
    first = settled() if is_known else ScoutWeights(6)
    first.update(torch.tensor([1, 1]), torch.ones(2), torch.ones(2))
    second = settled(torch.full((6,), 0.9))
    old_visits = second.visits_N()
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert second.is_known is is_known and second.num_useful() == first.num_useful()
    assert second.visits_N() is not old_visits
    if is_known:
        assert torch.equal(second.visits_N(), first.visits_N())
    else:
        assert second.visits_N() is None
    assert torch.equal(second.all_scores(), first.all_scores())
    assert torch.equal(second.num_updates_N, first.num_updates_N)
