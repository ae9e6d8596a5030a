"""The mathematics against hand calculations, finite differences and an exact bilevel problem."""

import math

import pytest
import torch

from tamis.bilevel import (
    effective_sample_size,
    example_losses,
    importance_ratio,
    penalty_gap,
    response_weights,
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


@pytest.mark.parametrize(("tau", "sampling_temperature"), [(0.5, 1.0), (0.5, 1.4), (1.0, 0.8), (0.25, 1.0)])
@pytest.mark.parametrize("num_generations", [1, 2])
def test_drawing_and_coefficient_estimate_the_gradient_of_the_smoothed_minimum(
    tau, sampling_temperature, num_generations
):
    """Over all sets of responses of an older policy and all draws among them: exact, for any number of responses.

    Exact is the update times the mean of the weights before normalisation, which a visit leaves out.
    """
    policy, older = SequencePolicy(seed=0), SequencePolicy(seed=1, spread=0.7)
    log_p, log_old = policy.log_probs().detach(), older.log_probs().detach()
    log_q = older.log_probs(sampling_temperature).detach()
    coefficient = importance_ratio(log_p, log_old, temperature=tau, cap=math.inf)
    sets = torch.cartesian_prod(*[torch.arange(27)] * num_generations).reshape(-1, num_generations)
    weights = response_weights(log_old[sets], log_q[sets], temperature=tau)
    before_normalisation = (log_old[sets] / tau - log_q[sets]).exp().mean(dim=1)
    probability = log_q[sets].sum(dim=1).exp()
    per_set = torch.einsum("sg,sgd->sd", weights * coefficient[sets], policy.score_gradients()[sets])
    update = (probability * before_normalisation) @ per_set
    exact = (log_p / tau).exp().sum() * policy.penalty_gradient(tau)
    torch.testing.assert_close(update, exact, atol=1e-12, rtol=1e-9)
    assert exact.abs().max() > 1e-4 or tau == 1


def test_fresh_responses_at_temperature_one_have_no_gradient_on_average():
    """The score function: nothing is learned from responses that are only likely; below one they become likelier."""
    policy = SequencePolicy(seed=0)
    log_p, gradients = policy.log_probs().detach(), policy.score_gradients()
    pairs = torch.cartesian_prod(torch.arange(27), torch.arange(27))
    for tau, is_zero in ((1.0, True), (0.5, False)):
        weights = response_weights(log_p[pairs], log_p[pairs], temperature=tau)
        average = torch.einsum("p,pg,pgd->d", log_p[pairs].sum(dim=1).exp(), weights, gradients[pairs])
        assert (average.abs().max().item() < 1e-12) is is_zero


def test_response_weights_on_a_hand_computed_example():
    old, q = (torch.tensor(values, dtype=F64) for values in ([0.4, 0.1], [0.5, 0.25]))
    weights = response_weights(old.log(), q.log(), temperature=0.5)
    torch.testing.assert_close(weights, torch.tensor([0.32, 0.04], dtype=F64) / 0.36)  # p^2 / q
    weights = response_weights(old.log().expand(3, 2).T, q.log().expand(3, 2).T, temperature=1.0, dim=0)
    torch.testing.assert_close(weights, torch.tensor([[2 / 3], [1 / 3]], dtype=F64).expand(2, 3))  # p / q = 0.8, 0.4


def test_the_importance_ratio_is_capped_and_no_path_for_gradients():
    log_p = torch.tensor([0.3, 0.2, 0.1], dtype=F64).log().requires_grad_()
    old = torch.tensor([0.1, 0.2, 0.2], dtype=F64).log()
    ratio = importance_ratio(log_p, old, temperature=0.5, cap=4.0)
    torch.testing.assert_close(ratio, torch.tensor([4.0, 1.0, 0.25], dtype=F64))  # 9 is capped
    assert not ratio.requires_grad
    assert importance_ratio(log_p, old, temperature=1e-9, cap=1.0).tolist() == [1.0, 1.0, 0.0], "no overflow"
