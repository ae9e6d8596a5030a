"""The mathematics against hand calculations, finite differences and an exact bilevel problem."""

import math

import pytest
import torch

from tamis.bilevel import (
    bmo_weights,
    effective_sample_size,
    example_losses,
    penalty_gap,
    rho_at,
    row_coefficients,
    smoothed_minimum,
    weight_entropy,
)

F64 = torch.float64


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
    coefficients = row_coefficients(weights_L, 0.25, torch.full((2,), 1 / 2), torch.full((4,), 1 / 4))
    torch.testing.assert_close(coefficients, torch.tensor([0.1875, 0.5625, 0.0625, 0.0625, 0.0625, 0.0625]))
    assert row_coefficients(weights_L, 1.0, torch.ones(2), torch.ones(1)).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("weights", "size"), [([1, 1, 1, 1], 4), ([0, 5, 0, 0], 1), ([3, 1], 1.6), ([2, 2, 0, 0], 2)])
def test_effective_sample_size(weights, size):
    assert effective_sample_size(torch.tensor(weights, dtype=torch.float32)) == pytest.approx(size)


def test_entropy():
    assert weight_entropy(torch.ones(8)) == pytest.approx(math.log(8))
    assert weight_entropy(torch.tensor([0.0, 7.0])) == 0
    assert weight_entropy(torch.tensor([3.0, 1.0])) == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_penalty_gap_is_the_weighted_mean():
    assert penalty_gap(torch.tensor([2.0, 0.0]), torch.tensor([0.5, 9.0])).item() == 0.5


def test_bmo_weights_are_the_gradient_of_the_smoothed_minimum():
    nll = torch.tensor([[0.3, 1.0, 2.0], [4.0, 0.1, 0.2]], dtype=F64, requires_grad=True)
    smoothed_minimum(nll, 0.4).sum().backward()
    torch.testing.assert_close(nll.grad, bmo_weights(nll, 0.4))
    assert not bmo_weights(nll, 0.4).requires_grad
    with pytest.raises(ValueError, match="positive"):
        bmo_weights(nll, 0.0)


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
        share = torch.ones_like(w), torch.ones(1, dtype=F64)
        theta = self.argmin(row_coefficients(w, rho, *share))
        reference = self.argmin(row_coefficients(w, 0.0, *share))
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
