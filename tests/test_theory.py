"""The claims of docs/theory.md on problems that are solved exactly, and the counterexamples to those that fail.

Solutions are exact to 1e-10 (`benchmarks/exact_problems.py`); the package's row weights are float32.
"""

import importlib.util
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from tamis.selection.calibration import fit
from tamis.selection.make import make_row_weights

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "exact_problems.py"
_SPEC = importlib.util.spec_from_file_location("exact_problems", _PATH)
exact = sys.modules["exact_problems"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(exact)

EXACT = 1e-10
ONES = np.ones(4)
SEPARABLE = {"two parameters": exact.separable_problem(), **{f"seed {s}": exact.random_problem(s) for s in range(3)}}
separable = pytest.mark.parametrize("problem", SEPARABLE.values(), ids=SEPARABLE.keys())


def useful_rows(problem):
    """Rows that some minimiser of the validation loss fits; that loss can be zero in all problems here."""
    rows = range(len(problem.training_ND))
    return {i for i in rows if problem.validation_loss(problem.best_that_fits([i])) < EXACT}


# --- separable problems -----------------------------------------------------------------------------------------------


@separable
def test_the_problems_are_separable_and_have_rows_of_both_kinds(problem):
    assert problem.losses(problem.best_that_fits(range(4))).max() < EXACT
    assert problem.validation_loss(problem.solve(ONES, 1.0)) < EXACT
    assert useful_rows(problem) == {0, 1}


@separable
def test_bds_and_bmo_have_the_same_value_and_bds_weighs_useful_rows_only(problem):
    values = problem.bds_values()
    assert min(values.values()) == pytest.approx(problem.bmo_value(), abs=EXACT)
    optimal = [set(rows) for rows, value in values.items() if value < EXACT]
    assert optimal and all(rows <= {0, 1} for rows in optimal)


@pytest.mark.parametrize(
    ("name", "settings", "num_steps", "tolerance"),
    [
        # Adam's steps end with the gradients at its epsilon, 1e-8, and so the weights at about 1e-6.
        ("softmax", {"learning_rate": 0.2}, 300, 1e-5),
        ("mirror", {"score_map": "softmax"}, 60, EXACT),
        ("bmo", {"score_map": "softmax", "temperature": 0.02}, 30, EXACT),
    ],
)
@separable
def test_the_selectors_weigh_useful_rows_only_and_reach_the_minimum(problem, name, settings, num_steps, tolerance):
    weight_N, theta = exact.select(problem, make_row_weights(name, 4, **settings), 0.5, num_steps)
    assert weight_N[2:].max() < tolerance
    assert weight_N.sum() == pytest.approx(4, abs=1e-5)
    assert problem.population_loss(theta) < tolerance


def test_the_smoothed_minimum_leaves_useless_rows_what_their_loss_says():
    problem = exact.separable_problem()
    row_weights = make_row_weights("bmo", 4, score_map="softmax", temperature=0.5)
    weight_N, theta = exact.select(problem, row_weights, 0.5, 100)
    share_N = np.exp(-problem.losses(theta) / 0.5)
    np.testing.assert_allclose(weight_N, 4 * share_N / share_N.sum(), rtol=1e-5)
    assert weight_N[2:].sum() > 0.01


def test_bmo_over_responses_reaches_the_model_of_bds():
    start, rho = np.array([0.4, 0.3, 0.2, 0.1]), 0.3
    for num_steps in (1, 10, 60):  # at tau = 1 the probability of the others shrinks by 1 - rho a step
        missing = 1 - exact.refine(start, trusted=2, rho=rho, num_steps=num_steps)[2]
        assert missing == pytest.approx((1 - start[2]) * (1 - rho) ** num_steps, abs=1e-9)
    # BDS over the same rows: the lower level's solution is the weights themselves, validation asks for the row 2.
    grid = [w for w in product(np.linspace(0, 1, 11), repeat=4) if sum(w) == pytest.approx(1)]
    assert max(grid, key=lambda w: w[2]) == (0, 0, 1, 0)
    np.testing.assert_allclose(exact.refine(start, 2, rho, 100), [0, 0, 1, 0], atol=1e-9)
    # Without the validation row nothing is learned at tau = 1.
    np.testing.assert_allclose(exact.refine(start, 2, 0.0, 10), start, atol=1e-12)


# --- direct mixing ----------------------------------------------------------------------------------------------------


@separable
def test_no_mixture_below_rho_one_reaches_the_validation_loss_of_bds(problem):
    useful = np.array([2.0, 2.0, 0.0, 0.0])
    found = [problem.validation_loss(problem.solve(ONES, rho)) for rho in (0.0, 0.1, 0.5, 0.9, 0.99, 0.999)]
    assert min(found) > 1e-9 > problem.validation_loss(problem.solve(useful, 0.5))
    assert found == sorted(found, reverse=True)


def test_mixing_comes_as_near_as_you_like_in_validation_loss_and_not_in_population_loss():
    """So "no rho reaches it" is false at rho = 1, and false of the infimum: what mixing misses are the useful rows."""
    problem = exact.separable_problem()
    near_one, one = (problem.solve(ONES, rho) for rho in (1 - 1e-6, 1.0))
    assert problem.validation_loss(near_one) < 1e-11 and problem.validation_loss(one) < EXACT
    population = [problem.population_loss(problem.solve(ONES, rho)) for rho in np.linspace(0, 1, 201)]
    assert min(population) > 0.035 and problem.population_loss(near_one) > 0.039
    assert problem.population_loss(problem.solve(np.array([2.0, 2.0, 0.0, 0.0]), 0.5)) < EXACT


def test_in_least_squares_mixing_reaches_the_model_of_bds_in_the_limit():
    """Useless rows are constant on the solutions of the validation rows there, and so cannot choose among them."""
    generator = np.random.default_rng(0)
    truth, validation, useful = np.ones(5), generator.standard_normal((2, 5)), generator.standard_normal((3, 5))
    useless = np.array([[0.5, 0.5]]) @ validation  # in the span of the validation rows, with another target
    x = np.concatenate([validation, useful, useless])
    target = np.concatenate([validation @ truth, useful @ truth, useless @ truth + 1])
    distances = []
    for rho in (0.9, 0.99, 0.999):
        scale = np.sqrt(np.array([rho / 2] * 2 + [(1 - rho) / 4] * 4))
        theta = np.linalg.lstsq(x * scale[:, None], target * scale, rcond=None)[0]
        distances.append(np.linalg.norm(theta - truth))
    assert distances[0] > 5 * distances[1] > 25 * distances[2] > 0


# --- what the theorems do not say -------------------------------------------------------------------------------------


def test_where_no_row_is_useful_bds_on_the_simplex_weighs_useless_ones():
    problem = exact.MarginProblem(np.eye(2), np.array([[-1.0, -1.0], [-1.0, 0.0]]))
    assert useful_rows(problem) == set()
    assert min(problem.bds_values().values()) > 0.9  # the validation rows alone reach 0


def test_rows_may_be_useful_one_by_one_and_not_together():
    problem = exact.MarginProblem(np.array([[1.0, 1.0]]), np.array([[-1.0, 0.0], [0.0, -1.0]]))
    values = problem.bds_values()
    assert useful_rows(problem) == {0, 1}
    assert values[0, 1] == pytest.approx((1 + 2) ** 2 / 2, abs=EXACT)  # both parameters at -1


def test_with_memory_for_each_row_all_rows_are_useful_and_only_the_scout_tells_them_apart():
    problem, row_weights = exact.problem_of_memory(), make_row_weights("softmax", 2)
    assert useful_rows(problem) == {0, 1}  # row 1 is the validation row turned round
    weight_N, theta = exact.select(problem, row_weights, 0.5, 20)
    assert weight_N.tolist() == [1, 1] and problem.losses(theta).max() < EXACT
    scout = problem.solve(np.ones(2), 1.0)
    np.testing.assert_allclose(problem.losses(scout), [0, 2], atol=EXACT)


def test_positive_weights_do_not_change_what_fits_all_rows():
    problem = exact.separable_problem()
    alike, unlike = (problem.solve(np.array(w), 0.0) for w in ([1.0] * 4, [1.98, 1.98, 0.02, 0.02]))
    np.testing.assert_allclose(alike, unlike, atol=1e-9)
    assert np.abs(problem.solve(np.array([2.0, 2.0, 0.0, 0.0]), 0.0) - alike).max() > 0.1


# --- not separable ----------------------------------------------------------------------------------------------------


def test_for_convex_losses_bds_and_bmo_have_the_same_models():
    theta_X = np.linspace(-2, 2, 401)
    loss_2X = exact.squared_losses(theta_X)
    is_between_X = (theta_X > -1e-9) & (theta_X < 1 + 1e-9)
    assert (exact.weakly_pareto(loss_2X) == is_between_X).all()
    assert (exact.minimise_a_sum(loss_2X) == is_between_X).all()


def test_otherwise_weights_do_not_reach_all_of_the_front():
    theta_X = np.linspace(-2, 2, 2001)
    loss_2X = exact.saturating_losses(theta_X)
    pareto_X, weighted_X = exact.weakly_pareto(loss_2X), exact.minimise_a_sum(loss_2X)
    assert (pareto_X == (np.abs(theta_X) < 1 + 1e-9)).all()
    assert not (weighted_X & ~pareto_X).any()  # BDS is never below BMO
    assert np.abs(theta_X[weighted_X]).min() > 0.95 and np.abs(theta_X[pareto_X]).min() < EXACT


def test_useless_rows_have_weight_where_they_cannot_be_fitted_together():
    """Targets 0 and 1, validation 0.4: fitting either row misses it, and BDS needs both."""
    targets, row_weights = np.array([0.0, 1.0]), make_row_weights("softmax", 2, learning_rate=0.02)
    share_N, theta = exact.select_mean(targets, 0.4, row_weights, 0.5, 600, "tracked")
    np.testing.assert_allclose(share_N, [0.6, 0.4], atol=2e-3)  # Adam's constant rate keeps it moving
    assert theta == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "settings", "reference", "taken"),
    [
        ("softmax", {"learning_rate": 0.1}, "zero", 0),
        ("bmo", {"score_map": "softmax", "temperature": 0.02}, "zero", 0),
        ("softmax", {"learning_rate": 0.1}, "base", 1),  # the base model is at -1: row 1 improves most on it
    ],
)
@pytest.mark.parametrize("rho", [0.5, 0.1])
def test_a_reference_that_does_not_follow_the_weights_leads_to_one_row(name, settings, reference, taken, rho):
    row_weights = make_row_weights(name, 2, **settings)
    share_N, theta = exact.select_mean(np.array([0.0, 1.0]), 0.4, row_weights, rho, 300, reference)
    assert share_N[taken] > 0.999 and theta == pytest.approx(0.4 * rho + taken * (1 - rho), abs=1e-3)


def test_weights_of_single_rows_fit_the_noise_of_the_validation_rows():
    """Right rows at 0.8 and 1, a wrong one at 3, validation rows that happen to average 1.2."""
    of_first, of_wrong = np.meshgrid(np.linspace(0, 1, 101), np.linspace(0, 1, 101))
    of_second = 1 - of_first - of_wrong
    theta = 0.8 * of_first + 1.0 * of_second + 3.0 * of_wrong
    is_bds = (of_second > -1e-9) & (np.abs(theta - 1.2) < 1e-9)  # the lower level's solution is the weighted mean
    assert of_wrong[is_bds].min() == pytest.approx((1.2 - 1) / (3 - 1))


# --- weights as probabilities -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share_right", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_calibrated_probabilities_are_the_posterior(share_right):
    """Within what 200 validation rows tell: a share has a deviation of at most 0.5 / sqrt(200) = 0.035."""
    pair = exact.SCORE_PAIRS["Gaussian, three deviations apart"]
    score_R, is_right_R, score_V = pair.draw(share_right, 4000, 200, seed=0)
    calibration = fit(score_R, score_V)
    posterior_R = pair.posterior(score_R, share_right)
    assert calibration.is_believed
    assert calibration.share_right == pytest.approx(share_right, abs=0.07)
    assert np.abs(calibration.p_right(score_R) - posterior_R).mean() < 0.05
    assert posterior_R.mean() == pytest.approx(is_right_R.mean(), abs=0.02)


def test_the_gradient_of_the_mixture_likelihood_weighs_rows_by_their_posterior():
    """Fisher's identity: -d log(pi p + (1 - pi) wrong) = posterior * dl, for a tabular policy."""
    generator = torch.Generator().manual_seed(0)
    logit_Y = torch.randn(5, generator=generator, dtype=torch.float64).requires_grad_()
    wrong_Y = torch.softmax(torch.randn(5, generator=generator, dtype=torch.float64), 0)
    share, response_N = 0.3, torch.tensor([0, 2, 2, 4, 1])
    p_N = torch.softmax(logit_Y, 0)[response_N]
    mixture_N = share * p_N + (1 - share) * wrong_Y[response_N]
    posterior_N = (share * p_N / mixture_N).detach()
    (actual,) = torch.autograd.grad(-mixture_N.log().sum(), logit_Y, retain_graph=True)
    (expected,) = torch.autograd.grad(-(posterior_N * p_N.log()).sum(), logit_Y)
    torch.testing.assert_close(actual, expected, atol=1e-14, rtol=0)


def test_bmo_at_temperature_one_is_the_posterior_of_which_one_row_is_right():
    """If one of the rows comes from the model and the others from the reference, each as likely beforehand."""
    p_N, reference_N = np.array([0.5, 0.2, 0.3]), np.array([0.25, 0.4, 0.3])
    excess_N = torch.from_numpy(-np.log(p_N) + np.log(reference_N)).float()
    bmo = make_row_weights("bmo", 3, score_map="softmax", temperature=1.0)
    bmo.update(torch.arange(3), excess_N, excess_N)
    likelihood_N = [p_N[i] * np.delete(reference_N, i).prod() for i in range(3)]
    np.testing.assert_allclose(bmo.all_weights().numpy() / 3, likelihood_N / np.sum(likelihood_N), rtol=1e-6)


def test_the_error_of_a_weighted_gradient_is_that_over_all_ways_to_be_right():
    noise = exact.GradientNoise(noise=0.7, agreeing=2.0, scattered=0.4)
    share_N, p_N = np.array([0.5, 0.2, 0.3]), np.array([0.9, 0.6, 0.1])
    expected = 0.0
    for is_right in product([True, False], repeat=3):
        is_wrong = ~np.array(is_right)
        probability = np.where(is_wrong, 1 - p_N, p_N).prod()
        bias = 2.0 * (share_N @ is_wrong) ** 2
        expected += probability * (bias + share_N**2 @ (0.7 + 0.4 * is_wrong))
    assert noise.error(share_N, p_N) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("variance", [0.001, 1.0, 30.0, 1000.0])
def test_the_best_weights_are_best_and_a_function_of_the_posterior(variance):
    noise, generator = exact.GradientNoise(variance, agreeing=1.0), np.random.default_rng(0)
    p_N = np.repeat(generator.uniform(size=100), 2)
    best_N = noise.best_shares(p_N)
    np.testing.assert_array_equal(best_N[::2], best_N[1::2])
    assert (np.diff(best_N[np.argsort(p_N)]) >= 0).all()
    # First-order conditions of a convex problem: one slope wherever there is weight, no smaller one elsewhere.
    wrong_N = 1 - p_N
    slope_N = 2 * (best_N @ wrong_N) * wrong_N + 2 * best_N * (variance + wrong_N * p_N)
    has_weight_N = best_N > 0
    level = slope_N[has_weight_N].mean()
    np.testing.assert_allclose(slope_N[has_weight_N], level, rtol=1e-9)
    assert (slope_N[~has_weight_N] >= level * (1 - 1e-9)).all()


def test_the_shape_of_the_best_weights_follows_noise_and_mistakes():
    p_N = np.random.default_rng(0).uniform(size=200)
    uniform = exact.GradientNoise(1e9, agreeing=1.0).best_shares(p_N)
    np.testing.assert_allclose(uniform, 1 / 200, rtol=1e-5)
    assert (exact.GradientNoise(1.0, agreeing=1.0).best_shares(p_N)[p_N < 0.5] == 0).all()
    scattered = exact.GradientNoise(1.0, agreeing=0.0, scattered=3.0).best_shares(p_N)
    np.testing.assert_allclose(scattered * (1 + 3 * (1 - p_N)), scattered.max() * (1 + 3 * (1 - p_N.max())), rtol=1e-9)


@pytest.mark.parametrize("gap", [1e-3, 1.0, 100.0])
def test_even_surely_wrong_rows_have_some_weight_at_best(gap):
    """With known labels: s / (s + v + num_wrong * D) of a right row's weight. Dropping them is the limit."""
    p_N = np.array([1.0] * 30 + [0.0] * 20)
    best_N = exact.GradientNoise(noise=2.0, agreeing=gap, scattered=0.5).best_shares(p_N)
    assert best_N[-1] / best_N[0] == pytest.approx(2.0 / (2.0 + 0.5 + 20 * gap), rel=1e-9)


@pytest.mark.parametrize("rule", ["p", "p^2", "cut", "all alike"])
def test_no_fixed_rule_is_best_at_every_noise(rule):
    p_N = np.random.default_rng(0).uniform(size=200)
    weight_N = {"p": p_N, "p^2": p_N**2, "cut": (p_N > 0.5) * 1.0, "all alike": np.ones(200)}[rule]
    ratios = []
    for variance in (1.0, 30.0, 1000.0):
        noise = exact.GradientNoise(variance, agreeing=1.0)
        ratios.append(noise.error(weight_N / weight_N.sum(), p_N) / noise.error(noise.best_shares(p_N), p_N))
    assert min(ratios) >= 1 - EXACT and max(ratios) > 1.2


def test_a_step_of_least_gradient_error_has_the_least_expected_loss():
    """Quadratic loss of curvature h, step 1 / h: expected loss = best loss + error / (2 h), whatever the bias."""
    generator, h = np.random.default_rng(0), 3.0
    theta, estimates = generator.standard_normal(4), generator.standard_normal((50, 4))
    loss_after = h / 2 * ((theta - estimates / h) ** 2).sum(axis=1).mean()
    error = ((estimates - h * theta) ** 2).sum(axis=1).mean()
    assert loss_after == pytest.approx(error / (2 * h), rel=1e-12)
