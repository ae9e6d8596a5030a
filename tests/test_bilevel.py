"""The mathematics against hand calculations, finite differences and an exact bilevel problem."""

import math

import pytest
import torch

from tamis.bilevel import (
    effective_sample_size,
    example_losses,
    importance_weights,
    penalty_gap,
    rho_at,
    row_coefficients,
    weight_entropy,
)

F64 = torch.float64


def smoothed_minimum(nll: torch.Tensor, temperature: float) -> torch.Tensor:
    """``-tau * log mean exp(-l / tau)`` over the last dimension: between the minimum and the mean of the losses."""
    return -temperature * (torch.logsumexp(-nll / temperature, dim=-1) - math.log(nll.shape[-1]))


def test_loss_of_a_row_is_the_mean_over_its_own_tokens():
    log_probs_BT = torch.tensor([[0.0, -1.0, -3.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    mask_BT = torch.tensor([[False, True, True], [True, False, False], [False, False, False]])
    nll_B, num_tokens_B = example_losses(log_probs_BT, mask_BT)
    assert nll_B.tolist() == [2.0, 2.0, 0.0]
    assert num_tokens_B.tolist() == [2, 1, 0]
    with pytest.raises(AssertionError, match="shifted once"):
        example_losses(log_probs_BT, mask_BT[:, 1:])


def test_coefficients_are_the_two_means():
    weights_L = torch.tensor([0.5, 1.5])
    coefficients = row_coefficients(weights_L, 0.25, torch.tensor([1 / 2] * 2 + [1 / 4] * 4))
    torch.testing.assert_close(coefficients, torch.tensor([0.1875, 0.5625, 0.0625, 0.0625, 0.0625, 0.0625]))
    assert row_coefficients(weights_L, 1.0, torch.ones(3)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("weights", "size"), [([1, 1, 1, 1], 4), ([0, 5, 0, 0], 1), ([3, 1], 1.6), ([2, 2, 0, 0], 2)])
def test_effective_sample_size(weights, size):
    assert effective_sample_size(torch.tensor(weights, dtype=torch.float32)) == pytest.approx(size)


def test_entropy():
    assert weight_entropy(torch.ones(8)) == pytest.approx(math.log(8))
    assert weight_entropy(torch.tensor([0.0, 7.0])) == 0
    assert weight_entropy(torch.tensor([3.0, 1.0])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_penalty_gap_is_the_weighted_mean():
    assert penalty_gap(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 9.0])).item() == 0.5


def test_smoothed_minimum_lies_between_minimum_and_mean():
    nll = torch.tensor([0.5, 1.0, 4.0], dtype=F64)
    values = [smoothed_minimum(nll, tau).item() for tau in (1e-3, 0.1, 1.0, 1e4)]
    assert values == sorted(values)
    assert values[0] == pytest.approx(0.5, abs=2e-3)
    assert values[-1] == pytest.approx(nll.mean().item(), abs=1e-3)


def test_rho_goes_linearly_and_then_stays():
    assert [rho_at(p, 1.0, 0.2, 0.5) for p in (0, 0.25, 0.5, 0.9, 1)] == pytest.approx([1, 0.6, 0.2, 0.2, 0.2])
    assert rho_at(0.0, 1.0, 0.2, 0.0) == 0.2


class QuadraticProblem:
    """Lower ``l_i = 1/2 (t - a_i)^T H_i (t - a_i)``, upper ``L = 1/2 |t - b|^2``: everything in closed form."""

    def __init__(self, num_rows: int = 5, dim: int = 3):
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(num_rows, dim, generator=generator, dtype=F64)
        self.b = torch.randn(dim, generator=generator, dtype=F64)
        roots = torch.randn(num_rows, dim, dim, generator=generator, dtype=F64)
        self.H = roots @ roots.mT + 0.1 * torch.eye(dim, dtype=F64)
        self.w = torch.rand(num_rows, generator=generator, dtype=F64) + 0.5

    def lower(self, theta):
        d = theta - self.a
        return 0.5 * torch.einsum("nd,nde,ne->n", d, self.H, d)

    def upper(self, theta):
        return 0.5 * (theta - self.b).square().sum()

    def losses(self, theta):
        return torch.cat([self.lower(theta), self.upper(theta)[None]])

    def argmin(self, coefficients):
        """Minimum of ``sum c * l`` over the rows, the upper level last."""
        lower, upper = coefficients[:-1], coefficients[-1]
        A = torch.einsum("n,nde->de", lower, self.H) + upper * torch.eye(len(self.b), dtype=F64)
        return torch.linalg.solve(A, torch.einsum("n,nde,ne->d", lower, self.H, self.a) + upper * self.b)

    def solve(self, w, rho):
        """The penalty objective and the two models that it compares, lower level summed over the rows."""
        share = torch.ones(len(w) + 1, dtype=F64)
        theta = self.argmin(row_coefficients(w, rho, share))
        reference = self.argmin(row_coefficients(w, 0.0, share))
        gap = penalty_gap(w, self.lower(theta) - self.lower(reference)) * len(w)
        return rho * self.upper(theta) + (1 - rho) * gap, theta, reference

    def hypergradient(self):
        """``d L(theta*(w)) / dw`` by the implicit function theorem."""
        star = self.argmin(torch.cat([self.w, torch.zeros(1, dtype=F64)]))
        inverse = torch.linalg.inv(torch.einsum("n,nde->de", self.w, self.H))
        return -torch.einsum("d,de,nef,nf->n", star - self.b, inverse, self.H, star - self.a)


@pytest.mark.parametrize("rho", [0.02, 0.5, 0.9])
def test_excess_loss_is_the_gradient_of_the_penalty_objective(rho):
    problem, step = QuadraticProblem(), 1e-5
    _, theta, reference = problem.solve(problem.w, rho)
    gradient = (1 - rho) * (problem.lower(theta) - problem.lower(reference))
    differences = [
        (problem.solve(problem.w + step * unit, rho)[0] - problem.solve(problem.w - step * unit, rho)[0]) / (2 * step)
        for unit in torch.eye(len(problem.w), dtype=F64)
    ]
    torch.testing.assert_close(gradient, torch.stack(differences), atol=1e-6, rtol=0)
    assert gradient.abs().max() > 1e-3


def test_excess_loss_over_rho_converges_to_the_hypergradient():
    problem = QuadraticProblem()
    exact = problem.hypergradient()
    errors, rhos = [], [1e-2, 1e-3, 1e-4]
    for rho in rhos:
        _, theta, reference = problem.solve(problem.w, rho)
        estimate = (1 - rho) * (problem.lower(theta) - problem.lower(reference)) / rho
        errors.append((estimate - exact).abs().max().item())
    orders = [math.log10(errors[i] / errors[i + 1]) for i in range(2)]
    assert orders == pytest.approx([1, 1], abs=0.1), f"first order in rho / (1 - rho): errors {errors} at {rhos}"
    assert errors[-1] < 1e-3 * exact.abs().max()


class SequencePolicy:
    """All sequences of 3 symbols x 3 places: an autoregressive model whose every probability can be written down."""

    def __init__(self, seed: int, spread: float = 1.0):
        generator = torch.Generator().manual_seed(seed)
        # One row of logits for each prefix: the empty one, 3 of one symbol, 9 of two.
        self.logits = (spread * torch.randn(13, 3, generator=generator, dtype=F64)).requires_grad_()

    def log_probs(self, temperature: float = 1.0) -> torch.Tensor:
        """Of the 27 sequences, every step at this temperature."""
        steps = torch.log_softmax(self.logits / temperature, dim=-1)
        first, second, third = steps[0], steps[1:4], steps[4:].view(3, 3, 3)
        return (first[:, None, None] + second[:, :, None] + third).reshape(27)

    def score_gradients(self) -> torch.Tensor:
        """Gradients (27 x 39) of ``l_y = -log p(y)``, one row for each sequence."""
        losses = -self.log_probs()
        return torch.stack([torch.autograd.grad(loss, self.logits, retain_graph=True)[0].flatten() for loss in losses])

    def penalty_gradient(self, temperature: float) -> torch.Tensor:
        """Gradient (39) of the smoothed minimum over all 27 sequences."""
        return torch.autograd.grad(smoothed_minimum(-self.log_probs(), temperature), self.logits)[0].flatten()


@pytest.mark.parametrize(("tau", "sampling_temperature"), [(0.5, 1.0), (0.5, 1.4), (1.0, 1.0), (1.0, 0.8)])
def test_importance_weights_estimate_the_gradient_of_the_smoothed_minimum(tau, sampling_temperature):
    """Answers of an older policy, drawn at a temperature; the error is what the delta method says, about 1/sqrt(G)."""
    policy, older = SequencePolicy(seed=0), SequencePolicy(seed=1, spread=0.7)
    log_p, log_old = policy.log_probs().detach(), older.log_probs().detach()
    log_q = older.log_probs(sampling_temperature).detach()
    gradients, exact = policy.score_gradients(), policy.penalty_gradient(tau)
    ratios = (log_p / tau - log_q).exp()
    deviations = (gradients - exact).square().sum(dim=1)
    constant = (log_q.exp() * (ratios / (log_q.exp() * ratios).sum()).square() * deviations).sum().sqrt().item()

    generator = torch.Generator().manual_seed(0)
    for num_answers, num_trials in ((400, 400), (40_000, 50)):
        drawn = torch.multinomial(
            log_q.exp().expand(num_trials, 27), num_answers, replacement=True, generator=generator
        )
        weights, _ = importance_weights(log_p[drawn], log_old[drawn], log_q[drawn], temperature=tau)
        per_sequence = torch.zeros(num_trials, 27, dtype=F64).scatter_add_(1, drawn, weights)
        squared = (per_sequence @ gradients - exact).square().sum(dim=1)
        assert squared.mean().sqrt().item() == pytest.approx(constant / math.sqrt(num_answers), rel=0.15)
    assert tau == 1 or squared.mean().sqrt() < 0.1 * exact.norm(), "at tau = 1 it is zero: the score function"


@pytest.mark.parametrize(("tau", "is_zero"), [(1.0, True), (0.5, False)])
def test_fresh_answers_at_temperature_one_have_no_gradient_on_average(tau, is_zero):
    """The score function: over all answers, and over all pairs of answers with self-normalised weights."""
    policy = SequencePolicy(seed=0)
    log_p, gradients = policy.log_probs().detach(), policy.score_gradients()
    plain = (log_p.exp() * (log_p / tau - log_p).exp()) @ gradients
    first, second = torch.cartesian_prod(torch.arange(27), torch.arange(27)).unbind(1)
    pairs = torch.stack([first, second], dim=1)
    weights, _ = importance_weights(log_p[pairs], log_p[pairs], log_p[pairs], temperature=tau)
    probability = (log_p[first] + log_p[second]).exp()
    normalised = torch.einsum("p,pg,pgd->d", probability, weights, gradients[pairs])
    for average in (plain, normalised):
        assert (average.abs().max().item() < 1e-12) is is_zero, "a smaller temperature sharpens"


def test_fresh_answers_at_temperature_one_count_the_same():
    log_p = SequencePolicy(seed=2).log_probs().detach()[:5]
    weights, clipped = importance_weights(log_p, log_p, log_p)
    torch.testing.assert_close(weights, torch.full((5,), 0.2, dtype=F64))
    assert not clipped.any()


def test_importance_weights_on_a_hand_computed_example():
    p, old, q = (torch.tensor(values, dtype=F64) for values in ([0.4, 0.1], [0.2, 0.2], [0.5, 0.25]))
    weights, _ = importance_weights(p.log(), old.log(), q.log(), temperature=0.5)
    torch.testing.assert_close(weights, torch.tensor([0.32, 0.04], dtype=F64) / 0.36)  # p^2 / q
    weights, _ = importance_weights(p.log().expand(3, 2).T, old.log().expand(3, 2).T, q.log().expand(3, 2).T, dim=0)
    torch.testing.assert_close(weights, torch.tensor([[2 / 3], [1 / 3]], dtype=F64).expand(2, 3))  # p / q = 0.8, 0.4


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_only_the_ratio_to_the_older_policy_is_clipped(tau):
    ratios = torch.tensor([10.0, 5.0, 1.0, 0.2, 0.01], dtype=F64)
    old = torch.tensor([0.01, 0.2, 0.3, 0.1, 0.05], dtype=F64)
    q = torch.tensor([0.4, 0.01, 0.2, 0.1, 0.3], dtype=F64)
    log_p = ratios.log() + old.log()
    weights, clipped = importance_weights(log_p, old.log(), q.log(), temperature=tau, ratio_clip=6.0)
    assert clipped.tolist() == [True, False, False, False, True]
    kept = torch.tensor([6.0, 5.0, 1.0, 0.2, 1 / 6], dtype=F64)
    expected = (kept * old) ** (1 / tau) / q
    torch.testing.assert_close(weights, expected / expected.sum())
    weights, clipped = importance_weights(log_p, old.log(), q.log(), temperature=tau, ratio_clip=1.0)
    torch.testing.assert_close(weights, old ** (1 / tau) / q / (old ** (1 / tau) / q).sum())
    assert clipped.tolist() == [True, True, False, True, True]
    unclipped, clipped = importance_weights(log_p, old.log(), q.log(), temperature=tau)
    torch.testing.assert_close(unclipped, (ratios * old) ** (1 / tau) / q / ((ratios * old) ** (1 / tau) / q).sum())
    assert not clipped.any()


def test_importance_weights_are_no_path_for_gradients():
    log_p = torch.tensor([-1.0, -2.0], requires_grad=True)
    weights, clipped = importance_weights(log_p, torch.tensor([-1.5, -1.5]), torch.tensor([-1.0, -1.0]))
    assert not weights.requires_grad and not clipped.requires_grad
    (weights * log_p).sum().backward()
    torch.testing.assert_close(log_p.grad, weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature of the response weights must be positive, got 0"),
        ({"temperature": -1.0}, "temperature of the response weights must be positive"),
        ({"ratio_clip": 0.5}, "ratio_clip must be at least 1, got 0.5"),
    ],
)
def test_importance_weights_refuse_what_has_no_meaning(settings, message):
    with pytest.raises(ValueError, match=message):
        importance_weights(torch.zeros(2), torch.zeros(2), torch.zeros(2), **settings)
