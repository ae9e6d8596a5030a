"""Selectors against hand-computed examples, torch's own softmax and Adam, and what must hold after any update."""

import math
from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tamis.config import BilevelConfig, ScoreMap
from tamis.selection.adam import AdamWeights
from tamis.selection.make import make_row_weights
from tamis.selection.row_weights import SelectorWeights, StaticWeights
from tamis.selection.scores import ScoreTable
from tamis.selection.selectors import BmoSelector, MirrorSelector

SCORE_MAPS = get_args(ScoreMap)
NAMES = get_args(BilevelConfig.__annotations__["selector"])
DENSE = ("softmax", "sigmoid")  # Adam moves all rows in every step


def batches(num_examples: int, num_steps: int, batch_size: int = 8, seed: int = 0):
    """Distinct rows and their losses, step by step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        ids = torch.randperm(num_examples, generator=generator)[:batch_size]
        yield ids, 2 + torch.randn(len(ids), generator=generator)


def selector_of(name: str, num_examples: int, **settings):
    weight_N = torch.arange(num_examples, dtype=torch.float64) if name == "column" else None
    return make_row_weights(name, num_examples, weight_N=weight_N, **settings)


def snapshot(selector) -> dict[str, torch.Tensor]:
    """A copy of its state, in which NaN (a row not seen yet) equals NaN."""
    return {
        n: t.clone().nan_to_num(-1) if t.is_floating_point() else t.clone() for n, t in selector.state_dict().items()
    }


# --- the score table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_map", SCORE_MAPS)
def test_sums_after_many_updates_are_those_of_the_scores(score_map):
    table = ScoreTable(203, score_map)
    for ids, values in batches(203, num_steps=1000, batch_size=7):
        table.set(ids, table.score_N[ids] + values - 2)  # random walks, far from one another in the end
    f = table.mapped(table.score_N)
    expected = torch.stack([f.sum(), f.square().sum(), torch.special.xlogy(f, f).sum()])
    torch.testing.assert_close(table.sums, expected, rtol=1e-9, atol=0)
    assert 0 < table.num_stale < 203, "between two recomputations"


@pytest.mark.parametrize("score_map", SCORE_MAPS)
def test_incremental_weights_equal_those_of_a_fresh_table(score_map):
    table, fresh = ScoreTable(101, score_map), ScoreTable(101, score_map)
    for step, (ids, values) in enumerate(batches(101, num_steps=500, batch_size=3)):
        table.set(ids, table.score_N[ids] + values - 2)
        if step % 50 == 49:
            fresh.score_N = table.score_N.clone()
            fresh._recompute()
            torch.testing.assert_close(
                table.weights_of(table.score_N), fresh.weights_of(table.score_N), rtol=1e-6, atol=0
            )
            assert table.effective_sample_size() == pytest.approx(fresh.effective_sample_size(), rel=1e-9)
            assert table.entropy() == pytest.approx(fresh.entropy(), rel=1e-9)


def test_softmax_map_is_the_softmax():
    table = ScoreTable(50, "softmax")
    scores = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 5
    table.set(torch.arange(50), scores)
    probabilities = torch.softmax(scores.double(), dim=0)
    torch.testing.assert_close(table.weights_of(scores), (50 * probabilities).float())
    assert table.entropy() == pytest.approx(torch.special.entr(probabilities).sum().item())
    assert table.effective_sample_size() == pytest.approx(1 / probabilities.square().sum().item())


def test_bounded_map_bounds_every_weight():
    table = ScoreTable(100, "bounded")
    table.set(torch.tensor([0]), torch.tensor([1e4]))
    assert table.weights_of(table.score_N).max() < 2
    torch.testing.assert_close(table.weights_of(table.score_N).mean(), torch.tensor(1.0))


@pytest.mark.parametrize("score", [250.0, 5e3, 1e30])
def test_scores_that_overflow_exp(score):
    table = ScoreTable(10, "softmax")
    table.set(torch.tensor([3, 4]), torch.tensor([score, score]))
    expected = torch.zeros(10)
    expected[3:5] = 5
    torch.testing.assert_close(table.weights_of(table.score_N), expected)
    assert table.effective_sample_size() == pytest.approx(2)
    assert table.entropy() == pytest.approx(math.log(2))


@pytest.mark.parametrize("score_map", SCORE_MAPS)
def test_sums_survive_a_row_that_had_all_the_weight_and_lost_it(score_map):
    """The difference of two large sums has no correct digits left: it must not be relied on."""
    low = 0.0 if score_map == "softmax" else -100.0
    table = ScoreTable(1000, score_map)
    table.set(torch.arange(1000), torch.full((1000,), low))
    table.set(torch.tensor([0]), torch.tensor([low + 100]))
    table.set(torch.tensor([0]), torch.tensor([low]))
    torch.testing.assert_close(table.weights_of(table.score_N), torch.ones(1000))


# --- every selector ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("name", NAMES)
def test_update_counts_its_rows_and_keeps_the_mean(name, score_map):
    selector = selector_of(name, 60, score_map=score_map)
    for ids, loss in batches(60, num_steps=40):
        others = torch.ones(60, dtype=torch.bool)
        others[ids] = False
        scores, updates = selector.all_scores()[others], selector.num_updates_N.clone()
        before = snapshot(selector)
        selector.weights(ids, loss)
        assert snapshot(selector).keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in snapshot(selector).items()), "weights() must change nothing"
        selector.update(ids, loss, loss)
        assert name in DENSE or torch.equal(selector.all_scores()[others], scores), "only its rows are scored"
        assert torch.equal(selector.num_updates_N - updates, (~others).int())
        assert torch.equal(selector.last_loss_N[ids], loss)
    weights = selector.all_weights()
    assert weights.dtype == torch.float32 and (weights >= 0).all()
    assert weights.double().mean().item() == pytest.approx(1, abs=1e-6)
    assert selector.effective_sample_size() == pytest.approx(
        (weights.sum() ** 2 / weights.square().sum()).item(), rel=1e-5
    )
    p = weights.double() / 60
    assert selector.entropy() == pytest.approx(torch.special.entr(p).sum().item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_round_trip_is_bit_for_bit(name):
    first, second = (selector_of(name, 40) for _ in range(2))
    steps = list(batches(40, num_steps=30))
    for ids, loss in steps[:15]:
        first.update(ids, loss, loss)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    for ids, loss in steps[15:]:
        assert torch.equal(first.weights(ids, loss), second.weights(ids, loss))
        first.update(ids, loss, loss)
        second.update(ids, loss, loss)
    assert all(torch.equal(t, snapshot(second)[n]) for n, t in snapshot(first).items())
    assert first.effective_sample_size() == second.effective_sample_size()


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_another_number_of_rows_is_refused(name):
    with pytest.raises(ValueError, match="scores 5 training rows, the dataset has 6: resume with the dataset"):
        selector_of(name, 6).load_state_dict(selector_of(name, 5).state_dict())


def test_unknown_selector_is_refused():
    with pytest.raises(ValueError, match="unknown selector 'best'"):
        make_row_weights("best", 3)


class OnlyRowsOfTheBatch(TorchDispatchMode):
    """Fails on any operation that walks over a tensor of N values; reading and writing single rows is allowed."""

    def __init__(self, num_examples: int):
        super().__init__()
        self.num_examples, self.num_operations = num_examples, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.numel() >= self.num_examples]
        name = func.overloadpacket.__name__
        assert not tensors or name in ("index", "index_put_", "index_add_"), (
            f"{name} works on all {self.num_examples} rows"
        )
        self.num_operations += 1
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["mirror", "bmo", "scout"])
def test_a_step_costs_the_batch_and_not_the_dataset(name):
    selector = make_row_weights(name, 10**6)
    steps = [(torch.arange(8 * i, 8 * i + 8), loss) for i, (_, loss) in enumerate(batches(50, num_steps=4))]
    with OnlyRowsOfTheBatch(10**6) as mode:
        for ids, loss in steps:
            selector.weights(ids, loss)
            selector.update(ids, loss, loss)
            selector.effective_sample_size(), selector.entropy()
    assert mode.num_operations > 20
    assert selector.num_updates_N.sum() == 32


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("scout", 12), ("mirror", 12), ("bmo", 12), ("softmax", 20), ("sigmoid", 20)]
)
def test_memory_per_row(name, num_bytes):
    state = make_row_weights(name, 10_000).state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) / 10_000 == pytest.approx(num_bytes, abs=0.01)


# --- mirror -----------------------------------------------------------------------------------------------------------


def test_mirror_on_a_hand_computed_example():
    rule = MirrorSelector(learning_rate=0.5)
    rule.center, rule.scale = 1.0, 0.5
    selector = SelectorWeights(4, rule)
    ids, excess = torch.tensor([2, 0, 3]), torch.tensor([2.0, 0.5, 9.0])
    # z = 2, -1 and 16, which is clipped at 3
    # In the sum each row enters with its new score, and the three others as they were, with sigmoid(0).
    mapped = torch.sigmoid(torch.tensor([-1.0, 0.5, -1.5]))
    weights = 4 * mapped / (3 * 0.5 + mapped)
    torch.testing.assert_close(selector.weights(ids, excess), weights)
    selector.update(ids, excess + 7, excess)
    torch.testing.assert_close(selector.table.score_N, torch.tensor([0.5, 0.0, -1.0, -1.5]))
    mapped = torch.sigmoid(torch.tensor([0.5, 0.0, -1.0, -1.5]))
    torch.testing.assert_close(selector.all_weights(), mapped / mapped.mean())


@pytest.mark.parametrize("batch_size", [1, 8])
def test_mirror_learns_center_and_scale_of_the_excess(batch_size):
    selector = SelectorWeights(500, MirrorSelector(learning_rate=0.1))
    for ids, loss in batches(500, num_steps=200, batch_size=batch_size):
        selector.update(ids, loss, 3 * loss)
    assert selector.selector.center == pytest.approx(6, abs=2)
    assert selector.selector.scale == pytest.approx(3, rel=0.35)


@pytest.mark.parametrize("first", [torch.zeros(4), torch.tensor([2.0, 2.1, 1.9, 2.0])])
def test_mirror_needs_a_scale_before_it_scores(first):
    """Rows whose losses are all alike must not be thrown out because they came before the scale was known."""
    selector = SelectorWeights(12, MirrorSelector(learning_rate=2.5))
    for i, excess in enumerate([first, first + torch.tensor([0.01, -0.01, 0.02, -0.02])]):
        ids = torch.arange(4 * i, 4 * i + 4)
        selector.update(ids, excess, excess)
        assert selector.table.score_N[ids].abs().mean() < 2.5 * 1.5, "not all at the bound of the clip"
        assert selector.table.score_N[ids].mean().abs() < 2.5


# --- the others -------------------------------------------------------------------------------------------------------


def published_weights(logits: torch.Tensor, score_map: str) -> torch.Tensor:
    """Weights as SEAL has them, but for a constant factor of its sigmoid, which Adam does not see."""
    if score_map == "softmax":
        return len(logits) * torch.softmax(logits, dim=0)
    return torch.sigmoid(logits) / torch.sigmoid(logits).mean().detach()


@pytest.mark.parametrize(("score_map", "start"), [("softmax", 0.1), ("softmax", 0.0), ("bounded", 0.0)])
def test_adam_is_that_of_torch_on_all_logits(score_map, start):
    """Batches of 5 of 12 rows; the published logits begin at 0.1, which makes no difference."""
    selector = AdamWeights(12, score_map, learning_rate=0.05)
    logits = torch.full((12,), start, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05, betas=(0.9, 0.95))
    for ids, loss in batches(12, num_steps=60, batch_size=5):
        weights = published_weights(logits, score_map)
        torch.testing.assert_close(selector.all_weights(), weights.detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(selector.weights(ids, loss), weights[ids].detach(), rtol=1e-3, atol=1e-4)
        optimizer.zero_grad()
        (weights[ids] * loss).mean().backward()
        optimizer.step()
        selector.update(ids, loss, loss)
    expected = logits.detach()
    if score_map == "softmax":
        expected = torch.log_softmax(expected, dim=0) + math.log(12)  # the log of the weight
    torch.testing.assert_close(selector.all_scores(), expected, rtol=1e-3, atol=1e-3)
    assert selector.all_weights().max() > 1.2


def test_adam_moves_rows_that_were_in_no_batch():
    selector = AdamWeights(6, "softmax", learning_rate=0.1)
    selector.update(torch.tensor([0, 1]), torch.tensor([2.0, 2.0]), torch.tensor([2.0, 2.0]))
    weights = selector.all_weights()
    assert (weights[2:] > 1).all() and (weights[:2] < 1).all()
    assert selector.num_updates_N.tolist() == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("name", DENSE)
def test_adam_leaves_out_rows_that_are_excluded(name):
    """As if they were not there: the others have the weights of a smaller dataset."""
    selector, smaller = make_row_weights(name, 12), make_row_weights(name, 10)
    selector.exclude(torch.tensor([10, 11]))
    for ids, loss in batches(10, num_steps=30, batch_size=4):
        selector.update(ids, loss, loss)
        smaller.update(ids, loss, loss)
    torch.testing.assert_close(selector.all_weights()[:10], smaller.all_weights())
    assert selector.all_weights()[10:].tolist() == [0, 0]


def test_bmo_is_the_softmax_of_the_last_losses():
    selector = SelectorWeights(20, BmoSelector(0.5))
    last = torch.zeros(20)
    for order in torch.arange(20).view(5, 4), torch.arange(20).flip(0).view(5, 4):
        for ids in order:
            last[ids] = torch.randn(4, generator=torch.Generator().manual_seed(int(ids[0])))
            selector.update(ids, last[ids], last[ids])
    torch.testing.assert_close(selector.all_weights(), 20 * torch.softmax(-last / 0.5, dim=0))


def test_bmo_weights_are_the_gradient_of_the_smoothed_minimum():
    """Of ``-tau log mean exp(-l / tau)``, whose limit for small tau is the penalty of weak Pareto optimality."""
    losses, tau = torch.tensor([0.3, 1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True), 0.4
    (-tau * (torch.logsumexp(-losses / tau, dim=0) - math.log(4))).backward()
    weights = SelectorWeights(4, BmoSelector(tau))
    weights.update(torch.arange(4), losses.detach().float(), losses.detach().float())
    torch.testing.assert_close(weights.all_weights() / 4, losses.grad.float())


def test_no_weight_exceeds_the_number_of_rows():
    """The loss just measured counts already, so the row's own new value belongs into the sum as well."""
    selector = SelectorWeights(1000, BmoSelector(0.1))
    assert selector.weights(torch.arange(2), torch.tensor([-30.0, 1.0])).max() <= 1000


def test_column_is_divided_by_its_mean():
    selector = StaticWeights(torch.tensor([0.0, 3.0, 1.0, 0.0]))
    assert selector.all_weights().tolist() == [0, 3, 1, 0]
    assert StaticWeights(torch.tensor([0.0, 6.0, 2.0, 0.0])).all_weights().tolist() == [0, 3, 1, 0]
    assert selector.weights(torch.tensor([2, 1]), torch.zeros(2)).tolist() == [1, 3]
    assert selector.effective_sample_size() == pytest.approx(1.6)


def test_none_weighs_every_row_alike():
    selector = make_row_weights("none", 5)
    selector.update(torch.arange(5), torch.arange(5.0), torch.arange(5.0))
    assert selector.all_weights().tolist() == [1] * 5
    assert not selector.uses_excess


# --- rows whose response was replaced ---------------------------------------------------------------------------------


def trained(name: str, score_map: str = "bounded"):
    """A selector whose 40 rows have scores of all kinds."""
    selector = selector_of(name, 40, score_map=score_map)
    for ids, loss in batches(40, num_steps=40):
        selector.update(ids, loss, loss)
    return selector


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("name", ["mirror", "bmo", "column", "none", "scout"])
def test_a_refined_row_starts_again_with_weight_one(name, score_map):
    selector = trained(name, score_map)
    ids = selector.all_weights().argsort()[:15]  # those with the lowest weights: they pull the mean of all down
    others = torch.ones(40, dtype=torch.bool)
    others[ids] = False
    scores = selector.scores(torch.arange(40)).clone()
    for _ in range(2):  # again at the next refresh
        selector.restart(ids)
        torch.testing.assert_close(selector.all_weights()[ids], torch.ones(15))
        assert torch.equal(selector.scores(torch.arange(40))[others], scores[others])
    assert not selector.num_updates_N[ids].any()
    assert torch.equal(selector.num_updates_N[others], trained(name, score_map).num_updates_N[others])


@pytest.mark.parametrize("score_map", SCORE_MAPS)
def test_all_refined_rows_have_weight_one(score_map):
    selector = trained("mirror", score_map)
    selector.restart(torch.arange(40))
    torch.testing.assert_close(selector.all_weights(), torch.ones(40))


@pytest.mark.parametrize("score_map", SCORE_MAPS)
@pytest.mark.parametrize("name", NAMES)
def test_a_restored_row_has_its_old_weight(name, score_map):
    selector, ids = trained(name, score_map), torch.tensor([3, 17, 29])
    weights, scores = selector.all_weights().clone(), selector.scores(torch.arange(40)).clone()
    selector.restart(ids)
    selector.restore(ids, scores[ids])
    assert torch.equal(selector.scores(torch.arange(40)), scores)
    torch.testing.assert_close(selector.all_weights(), weights, rtol=1e-6, atol=0)
    torch.testing.assert_close(selector.weights_of(scores), weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DENSE)
def test_adam_forgets_what_it_knew_of_a_refined_row(name):
    """The next step moves it as it moves a row that was in no batch before, by its new gradient alone."""
    selector, ids = trained(name), torch.tensor([4, 8])
    selector.restart(ids)
    assert not selector.first_moment_N[ids].any() and not selector.second_moment_N[ids].any()
    torch.testing.assert_close(selector.all_weights()[ids], torch.ones(2))
    excess = torch.tensor([2.0, -3.0])
    before = selector.scores(ids).clone()
    selector.update(ids, excess, excess)
    moved = selector.scores(ids) - before
    step = 0.1 / math.sqrt(0.05) * selector.learning_rate  # from moments of zero, by 1 - beta; the signs are unlike
    assert (moved[1] - moved[0]).item() == pytest.approx(2 * step, rel=0.15)
    assert selector.num_updates_N[ids].tolist() == [1, 1]


def test_a_score_of_adam_means_the_same_weight_at_any_time():
    """Published logits rise by the learning rate in nearly every step: one put back later would be left behind."""
    selector, row = make_row_weights("softmax", 400), torch.tensor([399])
    score, weight = selector.scores(row), selector.all_weights()[row]
    for ids, loss in batches(399, num_steps=100):
        selector.update(ids, loss, loss)
    assert selector.scores(row) - score > 0.1, "it has gained weight by being left alone"
    selector.restore(row, score)
    torch.testing.assert_close(selector.all_weights()[row], weight, rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["mirror", "bmo", "softmax"])
def test_a_leading_row_starts_again_too(name):
    """The others' weights are lost beside its own in the running sums: their mean must be taken anew."""
    selector = make_row_weights(name, 6, score_map="softmax")
    selector.restore(torch.arange(6), torch.tensor([0.0, -40.0, -41.0, -42.0, -43.0, -40.0]))
    selector.restart(torch.tensor([0]))
    assert selector.all_weights()[0].item() == pytest.approx(1, rel=1e-5)
