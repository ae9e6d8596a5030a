"""Calibration against samples whose truth is known: how many rows are right, which ones, and when to say nothing."""

import json
import math

import numpy as np
import pytest

from tamis.metrics import auroc
from tamis.selection.calibration import Calibration, expected_auroc, fit, placed

NUM_TRAINING, NUM_VALIDATION = 2000, 200
SEEDS = range(3)


def gaussians(share: float, distance: float, seed: int, num_training=NUM_TRAINING, num_validation=NUM_VALIDATION):
    """Scores of right rows from N(0, 1), of wrong ones from N(distance, 1): training, which are right, validation."""
    generator = np.random.default_rng(seed)
    is_right_R = np.arange(num_training) < round(share * num_training)
    training_R = np.where(is_right_R, 0.0, distance) + generator.standard_normal(num_training)
    return training_R, is_right_R, generator.standard_normal(num_validation)


def skewed(share: float, seed: int):
    """Losses of right rows by a gamma density near zero, of wrong ones by a wide one that begins at one."""
    generator = np.random.default_rng(seed)
    is_right_R = np.arange(NUM_TRAINING) < round(share * NUM_TRAINING)
    right_R, wrong_R = generator.gamma(2, 0.25, NUM_TRAINING), 1 + generator.gamma(2, 1.0, NUM_TRAINING)
    return np.where(is_right_R, right_R, wrong_R), is_right_R, generator.gamma(2, 0.25, NUM_VALIDATION)


def brier(p_R, is_right_R) -> float:
    return float(np.mean((p_R - is_right_R) ** 2))


# --- known answers ----------------------------------------------------------------------------------------------------


# Tolerances: about three standard deviations over seeds. The nearer the two kinds are, the less their densities say.
@pytest.mark.parametrize(
    ("distance", "of_share", "of_auroc"), [(2.0, 0.1, 0.05), (3.0, 0.04, 0.015), (4.0, 0.015, 0.005)]
)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_share_and_auroc_are_found_without_a_label(share, distance, of_share, of_auroc):
    for seed in SEEDS:
        training_R, is_right_R, validation_V = gaussians(share, distance, seed)
        calibration = fit(training_R, validation_V)
        assert calibration.is_believed and calibration.share_right == pytest.approx(share, abs=of_share)
        found = expected_auroc(calibration.p_right(training_R), training_R)
        assert found == pytest.approx(auroc(-training_R, is_right_R), abs=of_auroc)


@pytest.mark.parametrize(("distance", "excess"), [(2.0, 0.02), (3.0, 0.006), (4.0, 0.002)])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_probabilities_are_nearly_as_good_as_those_of_the_known_densities(share, distance, excess):
    for seed in SEEDS:
        training_R, is_right_R, validation_V = gaussians(share, distance, seed)
        right_R, wrong_R = (
            share * np.exp(-(training_R**2) / 2),
            (1 - share) * np.exp(-((training_R - distance) ** 2) / 2),
        )
        best = brier(right_R / (right_R + wrong_R), is_right_R)
        found = brier(fit(training_R, validation_V).p_right(training_R), is_right_R)
        assert best - 0.002 < found < best + excess < share * (1 - share), "and better than the share alone"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_skewed_scores_bias_the_share_a_little_and_the_ranking_not_at_all(share):
    """Gaussians do not fit a gamma density: parts of its tail pass for wrong rows, so that the share is low."""
    for seed in SEEDS:
        training_R, is_right_R, validation_V = skewed(share, seed)
        calibration = fit(training_R, validation_V)
        p_right_R = calibration.p_right(training_R)
        assert calibration.is_believed and share - 0.12 < calibration.share_right < share + 0.03
        assert expected_auroc(p_right_R, training_R) == pytest.approx(auroc(-training_R, is_right_R), abs=0.1)
        assert auroc(p_right_R, is_right_R) > 0.98
        assert brier(p_right_R, is_right_R) < 0.6 * share * (1 - share)


def test_few_right_rows_are_found_among_many_wrong_ones():
    training_R, is_right_R, validation_V = gaussians(0.02, 5.0, seed=0)
    calibration = fit(training_R, validation_V)
    assert calibration.share_right == pytest.approx(0.02, abs=0.01)
    assert ((calibration.p_right(training_R) > 0.5) == is_right_R).mean() > 0.99


def test_validation_rows_of_two_kinds_are_right_in_both():
    """Easy and hard right rows, and wrong ones beyond: a row need not be easy to be right.

    Of 300 validation rows 150 +- 9 are easy, and the kind of which there are more by chance sets the share: it is low.
    """
    generator = np.random.default_rng(0)
    kind_R, kind_V = generator.integers(3, size=3000), generator.integers(2, size=300)
    training_R = 6.0 * kind_R + generator.standard_normal(3000)
    calibration = fit(training_R, 6.0 * kind_V + generator.standard_normal(300))
    p_right_R = calibration.p_right(training_R)
    assert 2 / 3 * 150 / (150 + 3 * 9) < calibration.share_right < 2 / 3 + 0.02
    assert p_right_R[kind_R == 1].mean() > 0.8 and p_right_R[kind_R == 2].mean() < 0.1


# --- what must always hold --------------------------------------------------------------------------------------------

CASES = {
    "far apart": gaussians(0.5, 4.0, seed=1),
    "near": gaussians(0.7, 1.0, seed=2),
    "few rows": gaussians(0.5, 3.0, seed=3, num_training=40, num_validation=4),
    "skewed": skewed(0.5, seed=4),
    "nothing wrong": gaussians(1.0, 0.0, seed=5),
    "nothing right": gaussians(0.0, 6.0, seed=6),
    "inverted": gaussians(0.5, -4.0, seed=7),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_the_probability_falls_with_the_score(case):
    training_R, _, validation_V = case
    p_right = fit(training_R, validation_V).p_right(np.linspace(training_R.min() - 9, training_R.max() + 9, 5000))
    assert (np.diff(p_right) <= 1e-12).all() and (p_right >= 0).all() and (p_right <= 1).all()


def test_the_probabilities_average_to_the_share(case):
    """Of the mixture itself they do exactly; rows are where it is dense but for noise and scores that are drawn in."""
    training_R, _, validation_V = case
    calibration = fit(training_R, validation_V)
    assert calibration.p_right(training_R).mean() == pytest.approx(calibration.share_right, abs=0.01)


@pytest.mark.parametrize(("scale", "shift"), [(1e-3, 0.0), (50.0, -7.0)])
def test_the_unit_of_the_score_does_not_matter(case, scale, shift):
    training_R, _, validation_V = case
    expected = fit(training_R, validation_V)
    found = fit(scale * training_R + shift, scale * validation_V + shift)
    assert found.share_right == pytest.approx(expected.share_right, abs=0.03), "but for where the iteration stops"
    p_right_R = found.p_right(scale * training_R + shift)
    np.testing.assert_allclose(p_right_R, expected.p_right(training_R), atol=0.08)


def test_it_comes_back_from_a_file_as_it_was(case):
    training_R, _, validation_V = case
    calibration = fit(training_R, validation_V, interval_seed=0)
    again = Calibration.from_dict(json.loads(json.dumps(calibration.to_dict(), allow_nan=False)))
    assert again == calibration
    np.testing.assert_array_equal(again.p_right(training_R), calibration.p_right(training_R))


def test_scores_may_have_any_shape(case):
    training_R, _, validation_V = case
    calibration = fit(training_R, validation_V)
    p_right = calibration.p_right(training_R[:6].reshape(2, 3))
    np.testing.assert_array_equal(p_right.ravel(), calibration.p_right(training_R[:6]))


def test_the_interval_contains_the_estimate(case):
    training_R, _, validation_V = case
    calibration = fit(training_R, validation_V, interval_seed=0)
    low, high = calibration.share_interval
    assert 0 <= low <= calibration.share_right + 1e-9 and calibration.share_right <= high + 1e-9 and high <= 1


def test_the_interval_contains_the_truth_nine_times_in_ten():
    """Of 20 draws 18 on average; fewer than 14 would have a probability of 1% if it is 90%."""
    num_hits = 0
    for seed in range(20):
        training_R, _, validation_V = gaussians(0.6, 3.0, seed, num_training=800, num_validation=60)
        low, high = fit(training_R, validation_V, interval_seed=seed).share_interval
        assert 0.02 < high - low < 0.3
        num_hits += low <= 0.6 <= high
    assert num_hits >= 14


def test_the_interval_follows_from_the_seed():
    training_R, _, validation_V = gaussians(0.6, 3.0, seed=0, num_training=300, num_validation=30)
    first, again, other = (fit(training_R, validation_V, interval_seed=seed) for seed in (1, 1, 2))
    assert first == again and first.share_interval != other.share_interval
    assert first.share_right == other.share_right
    assert fit(training_R, validation_V).share_interval == (0.0, 1.0)


# --- when to say nothing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1.0, 4.0])
def test_validation_rows_that_are_higher_say_nothing(distance):
    """They cannot be what right rows look like."""
    for seed in SEEDS:
        training_R, _, validation_V = gaussians(1.0, 0.0, seed)
        calibration = fit(training_R, validation_V + distance)
        assert not calibration.is_believed and calibration.share_right == 1
        assert (calibration.p_right(training_R) == 1).all()
        mixed_R, _, _ = gaussians(0.5, 4.0, seed)
        assert not fit(mixed_R, 4 + validation_V + distance).is_believed


@pytest.mark.parametrize("value", [0.0, 2.5, -3.0, 1e6, 1e-12])
@pytest.mark.parametrize("offset", [0.0, -5.0, 5.0])
def test_constant_scores_say_nothing(value, offset):
    calibration = fit(np.full(50, value), np.full(8, value + offset), interval_seed=0)
    assert not calibration.is_believed and calibration.share_right == 1
    assert calibration.p_right(np.array([-9.0, value, 9.0])).tolist() == [1.0] * 3
    assert calibration.share_interval == (1.0, 1.0)


@pytest.mark.parametrize("num_training", [1, 2, 3])
def test_too_few_training_rows_for_two_kinds_say_nothing(num_training):
    calibration = fit(np.arange(float(num_training)), np.array([-1.0, -2.0, 0.0, -1.5]), interval_seed=0)
    assert not calibration.is_believed and calibration.p_right(np.array([0.0, 2.0])).tolist() == [1.0, 1.0]


def test_scores_that_are_nearly_all_the_same():
    for training_R in (np.r_[np.zeros(49), 1.0], np.repeat([0.0, 1.0], 25), np.arange(4.0)):
        calibration = fit(training_R, np.zeros(6), interval_seed=0)
        p_right_R = calibration.p_right(training_R)
        assert np.isfinite(p_right_R).all() and (np.diff(p_right_R[np.argsort(training_R)]) <= 1e-12).all()


def test_an_outlier_is_drawn_in():
    training_R, _, validation_V = gaussians(0.5, 4.0, seed=0)
    expected = fit(training_R, validation_V)
    found = fit(np.r_[training_R, 1e6, -1e6], validation_V)
    assert found.share_right == pytest.approx(expected.share_right, abs=0.01)
    assert found.p_right(np.array([1e6]))[0] < 0.01


# --- validation rows that count differently ---------------------------------------------------------------------------


def test_a_row_that_counts_twice_is_there_twice():
    training_R, _, validation_V = gaussians(0.5, 2.0, seed=0, num_training=500, num_validation=40)
    weight_V = np.arange(40) % 3
    found = fit(training_R, validation_V, weight_V=weight_V.astype(float))
    expected = fit(training_R, np.repeat(validation_V, weight_V))
    assert found.share_right == pytest.approx(expected.share_right, abs=1e-3)
    np.testing.assert_allclose(found.p_right(training_R), expected.p_right(training_R), atol=1e-3)


def test_one_easy_validation_row_does_not_set_the_share():
    """It has a score below nearly all training rows; two Gaussians of 98 in 100 rows tell what is right."""
    training_R, _, validation_V = gaussians(0.5, 4.0, seed=0, num_training=4000, num_validation=64)
    expected = fit(training_R, validation_V)
    found = fit(np.r_[training_R, -9.0 + np.zeros(9)], np.r_[validation_V, -9.0], interval_seed=0)
    assert found.share_right == pytest.approx(expected.share_right, abs=0.03)
    assert found.share_interval[0] > 0.4


def test_the_less_it_is_believed_the_less_rows_differ():
    training_R, _, validation_V = gaussians(0.5, 4.0, seed=0)
    sure, unsure = fit(training_R, validation_V), fit(training_R, validation_V, belief=0.25)
    assert not unsure.is_believed and unsure.mixture_share == sure.mixture_share
    assert unsure.share_right == pytest.approx(0.25 * sure.mixture_share + 0.75)
    p_right_R = unsure.p_right(training_R)
    np.testing.assert_allclose(p_right_R, 0.25 * sure.p_right(training_R) + 0.75, atol=1e-6)
    assert fit(training_R, validation_V, belief=0.5).is_believed


def test_rows_are_placed_where_right_rows_of_their_rank_stand():
    """The final scout sees twice the distance that the weaker one saw: right rows of a rank are found by their rank."""
    generator = np.random.default_rng(0)
    is_right_S = np.arange(500) < 250
    noise_S, noise_V = generator.standard_normal(500), generator.standard_normal(60)
    weak_S, final_S = noise_S + 2.0 * ~is_right_S, noise_S + 4.0 * ~is_right_S
    rank_S = weak_S.argsort().argsort() / 500
    rank_V = (weak_S < noise_V[:, None]).mean(axis=1)
    scores, weights = placed(rank_V, np.tile(rank_S, (60, 1)), final_S, is_right_S.astype(float))
    assert len(scores) == len(weights) and weights.sum() == pytest.approx(60)
    middle_V = scores.reshape(60, -1)[:, 2]
    inner = np.abs(noise_V) < 1.5  # beyond there are few right rows of a rank
    np.testing.assert_allclose(middle_V[inner], noise_V[inner], atol=0.5)
    naive = fit(final_S, np.quantile(final_S, rank_V))
    found = fit(final_S, scores, weight_V=weights, belief=naive.belief)
    assert abs(found.share_right - 0.5) < abs(naive.share_right - 0.5), "by rank alone they stand among wrong rows"
    assert found.share_right == pytest.approx(0.5, abs=0.1)


def test_placed_rows_are_as_many_as_there_are_and_finite():
    """Where no training row is thought right, or all scores are the same."""
    rank_S = np.arange(30) / 30
    for p_right_S in (np.zeros(30), np.ones(30)):
        for score_S in (np.arange(30.0), np.zeros(30)):
            scores, weights = placed(np.array([0.0, 0.5, 1.0]), np.tile(rank_S, (3, 1)), score_S, p_right_S)
            assert np.isfinite(scores).all() and weights.sum() == pytest.approx(3)
            assert (scores >= score_S.min()).all() and (scores <= score_S.max()).all()


def test_the_interval_of_placed_rows_draws_whole_validation_rows():
    """Five scores of one row each are no more certain than the rows they stand for."""
    training_R, _, validation_V = gaussians(0.6, 3.0, seed=0, num_training=800, num_validation=60)
    alone = fit(training_R, validation_V, interval_seed=0)
    placed_V, weight_V = np.repeat(validation_V, 5), np.full(300, 0.2)
    five = fit(training_R, placed_V, weight_V=weight_V, interval_seed=0)
    widths = [np.diff(calibration.share_interval)[0] for calibration in (alone, five)]
    assert widths[1] == pytest.approx(widths[0], rel=0.1)


# --- the area to expect -----------------------------------------------------------------------------------------------


def test_the_expected_area_is_the_area_of_certain_rows():
    generator = np.random.default_rng(0)
    score_R, is_right_R = generator.permutation(60).astype(float), generator.random(60) < 0.4
    assert expected_auroc(is_right_R.astype(float), score_R) == pytest.approx(auroc(-score_R, is_right_R))


def test_the_expected_area_is_that_of_drawn_labels_on_average():
    generator = np.random.default_rng(1)
    score_R = np.sort(generator.standard_normal(200))
    p_right_R = 1 / (1 + np.exp(2 * score_R))
    areas = [auroc(-score_R, generator.random(200) < p_right_R) for _ in range(400)]
    assert expected_auroc(p_right_R, score_R) == pytest.approx(np.mean(areas), abs=4 * np.std(areas) / 20 + 0.002)


def test_there_is_no_area_where_all_rows_are_alike():
    assert math.isnan(expected_auroc(np.ones(5), np.arange(5.0)))
    assert math.isnan(expected_auroc(np.zeros(5), np.arange(5.0)))
    assert expected_auroc(np.full(5, 0.3), np.arange(5.0)) == pytest.approx(0.5)
