"""Problems that are solved exactly, for `benchmarks/theory.py` and `tests/test_theory.py`.

All of it is float64 but for the package's own row weights. Shape suffixes: V validation rows, N training rows, D
parameters, Y responses of a prompt, X models.

`MarginProblem` is separable: a linear model, and the squared hinge ``l = max(0, 1 - x . theta)^2 / 2``. The loss of a
softmax only approaches zero; this one gets there, as the theorems ask. It is convex and has a continuous gradient.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import torch
from numpy.typing import NDArray

from tamis.bilevel import row_coefficients
from tamis.refining.responses import RefinedRow, Response, ResponseBuffer
from tamis.selection.row_weights import RowWeights

Array = NDArray[np.float64]


# --- separable: linear model, squared hinge ---------------------------------------------------------------------------


def minimise(x_ND: Array, margin_N: Array, weight_N: Array, ridge: float = 0.0) -> Array:
    """A minimiser of ``ridge / 2 |theta|^2 + sum_i weight_i / 2 max(0, margin_i - x_i theta)^2``, by Newton."""

    def value(theta: Array) -> float:
        short_N = np.maximum(margin_N - x_ND @ theta, 0.0)
        return float(ridge / 2 * theta @ theta + weight_N @ short_N**2 / 2)

    theta = np.zeros(x_ND.shape[1])
    for _ in range(200):
        short_N = np.maximum(margin_N - x_ND @ theta, 0.0)
        gradient = ridge * theta - x_ND.T @ (weight_N * short_N)
        if np.abs(gradient).max() < 1e-15 * (1 + weight_N.max()):
            break
        curved_N = weight_N * (short_N > 0)
        hessian = ridge * np.eye(len(theta)) + (x_ND.T * curved_N) @ x_ND
        step, size, before = np.linalg.lstsq(hessian, -gradient, rcond=None)[0], 1.0, value(theta)
        while value(theta + size * step) > before + 1e-4 * size * (gradient @ step) and size > 1e-9:
            size /= 2
        if size <= 1e-9:  # as good as float64 can tell
            break
        theta = theta + size * step
    return theta


def minimise_where_fitted(x_ND: Array, weight_N: Array, fitted_MD: Array, margin_M: Array, ridge: float = 0.0) -> Array:
    """The same, margins one, among the ``theta`` with ``fitted theta >= margin``: by the method of multipliers."""
    penalty, multiplier_M = 1e4, np.zeros(len(fitted_MD))
    x, weight = np.concatenate([x_ND, fitted_MD]), np.concatenate([weight_N, np.full(len(fitted_MD), penalty)])
    for _ in range(500):
        shifted_M = margin_M + multiplier_M / penalty
        theta = minimise(x, np.concatenate([np.ones(len(x_ND)), shifted_M]), weight, ridge)
        before, multiplier_M = multiplier_M, penalty * np.maximum(shifted_M - fitted_MD @ theta, 0.0)
        if np.abs(multiplier_M - before).max() < 1e-9 * (1 + multiplier_M.max()):
            break
    return theta


@dataclass(frozen=True)
class MarginProblem:
    """Rows ``x`` that a linear model fits exactly where ``x . theta >= 1``; the base model is ``theta = 0``."""

    validation_VD: Array
    training_ND: Array

    def losses(self, theta: Array) -> Array:
        """Of the N training rows."""
        return np.maximum(1 - self.training_ND @ theta, 0.0) ** 2 / 2

    def validation_loss(self, theta: Array) -> float:
        """Mean over the validation rows."""
        return float(np.mean(np.maximum(1 - self.validation_VD @ theta, 0.0) ** 2 / 2))

    def minimise(self, weight_N: Array, rho: float) -> Array:
        """A minimiser of ``rho * validation loss + (1 - rho) * mean(w * l)``."""
        x, coefficient = self._weighted_rows(weight_N, rho)
        return minimise(x, np.ones(len(x)), coefficient)

    def solve(self, weight_N: Array, rho: float) -> Array:
        """Of all its minimisers the one nearest the base model.

        All of them leave each row of positive coefficient the same loss (it is strictly convex in ``x . theta`` where
        it is not zero), so they are a polyhedron, onto which the base model is projected.
        """
        x, _ = self._weighted_rows(weight_N, rho)
        fitted = np.minimum(x @ self.minimise(weight_N, rho), 1.0)  # below one where the row keeps a loss: an equation
        is_equation = fitted < 1 - 1e-9
        polyhedron, margins = np.concatenate([x, -x[is_equation]]), np.concatenate([fitted, -fitted[is_equation]])
        return minimise_where_fitted(x[:0], np.zeros(0), polyhedron, margins, ridge=1.0)

    def _weighted_rows(self, weight_N: Array, rho: float) -> tuple[Array, Array]:
        num_training, num_validation = len(self.training_ND), len(self.validation_VD)
        share = torch.tensor([1 / num_training] * num_training + [1 / num_validation] * num_validation).double()
        coefficient = row_coefficients(torch.from_numpy(weight_N), rho, share).numpy()
        x = np.concatenate([self.training_ND, self.validation_VD])
        return x[coefficient > 0], coefficient[coefficient > 0]

    def population_loss(self, theta: Array) -> float:
        """Mean over right rows, half of them like the validation rows, half like training rows 0 and 1."""
        return (self.validation_loss(theta) + float(self.losses(theta)[:2].mean())) / 2

    def best_that_fits(self, rows: Sequence[int]) -> Array:
        """The model of lowest validation loss among those that fit these training rows exactly."""
        weight_V = np.full(len(self.validation_VD), 1 / len(self.validation_VD))
        return minimise_where_fitted(self.validation_VD, weight_V, self.training_ND[list(rows)], np.ones(len(rows)))

    def bds_values(self) -> dict[tuple[int, ...], float]:
        """Lowest validation loss for each set of rows with positive weight: the whole upper level of BDS.

        On separable data the lower level's solutions depend on the weights by this set only: they fit its rows.
        """
        rows = range(len(self.training_ND))
        supports = chain.from_iterable(combinations(rows, size + 1) for size in rows)
        return {rows: self.validation_loss(self.best_that_fits(rows)) for rows in supports}

    def bmo_value(self) -> float:
        """Lowest validation loss among weakly Pareto optimal models: on separable data those that fit some row."""
        return min(self.validation_loss(self.best_that_fits([i])) for i in range(len(self.training_ND)))


def separable_problem() -> MarginProblem:
    """Two validation rows, two useful training rows (0 and 1), two useless ones (2 and 3), two parameters.

    Validation asks for both parameters to be at least one, which rows 2 and 3 exclude; all four rows fit at (0, -4).
    """
    return MarginProblem(np.eye(2), np.array([[1.0, -0.5], [1.0, -0.25], [-0.4, -0.8], [-0.2, -0.6]]))


def problem_of_memory() -> MarginProblem:
    """One validation row; a right row (0) and its opposite (1), each with a parameter that nothing else depends on."""
    return MarginProblem(np.array([[1.0, 0, 0]]), np.array([[1.0, 1, 0], [-1.0, 0, 1]]))


def random_problem(seed: int) -> MarginProblem:
    """Six parameters, three validation rows, two rows of any direction, two that contradict the validation rows."""
    generator = np.random.default_rng(seed)
    validation_VD = generator.standard_normal((3, 6))
    useless_ND = -generator.dirichlet(np.ones(3), size=2) @ validation_VD
    return MarginProblem(validation_VD, np.concatenate([generator.standard_normal((2, 6)), useless_ND]))


def select(problem: MarginProblem, row_weights: RowWeights, rho: float, num_steps: int) -> tuple[Array, Array]:
    """The package's weights (mean one) and the model, each step exactly solved for the weights of the step before.

    The reference is zero: exact here, where the lower level can always be fitted.
    """
    example_ids = torch.arange(len(problem.training_ND))
    for _ in range(num_steps):
        loss_N = problem.losses(problem.minimise(row_weights.all_weights().double().numpy(), rho))
        losses = torch.from_numpy(loss_N).float()
        row_weights.update(example_ids, losses, losses)
    weight_N = row_weights.all_weights().double().numpy()
    return weight_N, problem.solve(weight_N, rho)


# --- not separable ----------------------------------------------------------------------------------------------------


def select_mean(
    target_N: Array, validation_target: float, row_weights: RowWeights, rho: float, num_steps: int, reference: str
) -> tuple[Array, float]:
    """Shares of the rows and the model, for ``l_i = (theta - target_i)^2 / 2``: one parameter, rows that disagree.

    Args:
        reference: ``tracked`` (the exact solution of the weighted lower level), ``base`` (a model at -1) or ``zero``.
    """

    def solve() -> tuple[Array, float, float]:
        share_N = row_weights.all_weights().double().numpy() / len(target_N)
        lower = float(share_N @ target_N / share_N.sum())
        return share_N, lower, rho * validation_target + (1 - rho) * lower

    for _ in range(num_steps):
        _, lower, theta = solve()
        loss_N, of_reference = (theta - target_N) ** 2 / 2, {"tracked": lower, "base": -1.0}
        excess_N = loss_N - (of_reference[reference] - target_N) ** 2 / 2 if reference != "zero" else loss_N
        losses, excess = torch.from_numpy(loss_N).float(), torch.from_numpy(excess_N).float()
        row_weights.update(torch.arange(len(target_N)), losses, excess)
    share_N, _, theta = solve()
    return share_N, theta


def squared_losses(theta_X: Array) -> Array:
    """``(theta - t)^2 / 2`` for the targets 0 and 1, shape (2, X): convex."""
    return np.stack([theta_X**2, (theta_X - 1) ** 2]) / 2


def saturating_losses(theta_X: Array) -> Array:
    """``1 - exp(-(theta - t)^2)`` for the targets 1 and -1, shape (2, X): not convex."""
    return np.stack([1 - np.exp(-((theta_X - 1) ** 2)), 1 - np.exp(-((theta_X + 1) ** 2))])


def weakly_pareto(loss_2X: Array) -> NDArray[np.bool_]:
    """Which of the X models no other one beats on both losses."""
    beaten_XX = (loss_2X[:, None, :] < loss_2X[:, :, None]).all(axis=0)
    return ~beaten_XX.any(axis=1)


def minimise_a_sum(loss_2X: Array, num_shares: int = 2001) -> NDArray[np.bool_]:
    """Which of the X models minimise ``s l_0 + (1 - s) l_1`` for one of these shares of [0, 1]; all of a tie."""
    total_SX = np.linspace(0, 1, num_shares)[:, None] * (loss_2X[0] - loss_2X[1]) + loss_2X[1]
    return np.asarray((total_SX < total_SX.min(axis=1, keepdims=True) + 1e-12).any(axis=0))


# --- responses: one kind of prompt, a tabular policy ------------------------------------------------------------------


def refine(policy_Y: Array, trusted: int, rho: float, num_steps: int, temperature: float = 1.0) -> Array:
    """The policy after steps that solve exactly for the coefficients which the package gives all Y responses.

    The buffer holds every response once; its weights and importance ratios are the package's, the cap is left out. For
    coefficients ``a`` under stop-gradient, ``rho l_trusted + (1 - rho) sum_y a_y l_y`` has the minimiser
    ``p = rho [y = trusted] + (1 - rho) a`` over its sum.
    """
    buffer = ResponseBuffer(response_weighting="bmo", temperature=temperature, ratio_level="sequence", cap=1e9, seed=0)
    uniform = -math.log(len(policy_Y))
    responses = [Response([y], uniform, math.log(p)) for y, p in enumerate(policy_Y)]
    buffer.rows[0] = RefinedRow(0, 0.0, responses)
    drawn_Y = buffer.weights(0).numpy()
    for _ in range(num_steps):
        ratio_Y = np.array([buffer.coefficient(0, y, math.log(max(p, 1e-300))) for y, p in enumerate(policy_Y)])
        policy_Y = (1 - rho) * drawn_Y * ratio_Y
        policy_Y[trusted] += rho
        policy_Y = policy_Y / policy_Y.sum()
    return policy_Y


# --- weights that make the best estimate of the gradient --------------------------------------------------------------


@dataclass(frozen=True)
class GradientNoise:
    """What makes the mean gradient of weighted rows differ from that of right rows, in squared norms.

    Attributes:
        noise: variance of the gradient of a right row.
        agreeing: of the mean difference between wrong and right rows: mistakes that agree.
        scattered: further variance of the gradient of a wrong row: mistakes that do not.
    """

    noise: float
    agreeing: float
    scattered: float = 0.0

    def error(self, share_N: Array, p_right_N: Array) -> float:
        """Expected squared error of ``sum_i share_i g_i``; shares sum to one, rows are right independently."""
        wrong_N = 1 - p_right_N
        return float(self.agreeing * (share_N @ wrong_N) ** 2 + share_N**2 @ self._variance(wrong_N))

    def _variance(self, wrong_N: Array) -> Array:
        return self.noise + self.scattered * wrong_N + self.agreeing * wrong_N * (1 - wrong_N)

    def best_shares(self, p_right_N: Array) -> Array:
        """The non-negative shares of least error: ``max(0, 1 - kappa (1 - p)) / variance(p)`` over their sum."""
        wrong_N = 1 - p_right_N

        def unscaled(kappa: float) -> Array:
            return np.maximum(0.0, 1 - kappa * wrong_N) / self._variance(wrong_N)

        low, high = 0.0, self.agreeing * float(unscaled(0.0) @ wrong_N)
        for _ in range(200):  # kappa = agreeing * sum(unscaled * wrong): the right side falls with kappa
            kappa = (low + high) / 2
            low, high = (kappa, high) if self.agreeing * (unscaled(kappa) @ wrong_N) > kappa else (low, kappa)
        found_N = unscaled(low)
        return found_N / found_N.sum()


# --- scores of known distribution -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScorePair:
    """Scores of right and wrong rows from two known distributions."""

    draw_right: Callable[[np.random.Generator, int], Array]
    draw_wrong: Callable[[np.random.Generator, int], Array]
    log_ratio: Callable[[Array], Array]  # log density of wrong less that of right

    def draw(self, share_right: float, num_training: int, num_validation: int, seed: int) -> tuple[Array, ...]:
        """Scores of training rows, whether they are right, and scores of unseen validation rows."""
        generator = np.random.default_rng(seed)
        is_right_R = np.arange(num_training) < round(share_right * num_training)
        right, wrong = self.draw_right(generator, num_training), self.draw_wrong(generator, num_training)
        return np.where(is_right_R, right, wrong), is_right_R, self.draw_right(generator, num_validation)

    def posterior(self, scores: Array, share_right: float) -> Array:
        """Exact probability that a row with this score is right."""
        odds_wrong = (1 - share_right) / share_right * np.exp(np.minimum(self.log_ratio(scores), 700.0))
        return 1 / (1 + odds_wrong)


SCORE_PAIRS = {
    "Gaussian, three deviations apart": ScorePair(
        lambda g, n: g.standard_normal(n), lambda g, n: 3 + g.standard_normal(n), lambda s: 3 * s - 4.5
    ),
    "Gaussian, two deviations apart": ScorePair(
        lambda g, n: g.standard_normal(n), lambda g, n: 2 + g.standard_normal(n), lambda s: 2 * s - 2
    ),
    "skewed (gamma, shapes 2 and 8)": ScorePair(
        lambda g, n: g.gamma(2.0, size=n), lambda g, n: g.gamma(8.0, size=n),
        lambda s: 6 * np.log(np.maximum(s, 1e-300)) + math.lgamma(2) - math.lgamma(8),
    ),
}  # fmt: skip
