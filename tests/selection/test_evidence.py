"""Evidence that validation rows differ from training rows: its size by hand, and how seldom chance passes for it."""

import numpy as np
import pytest

from tamis.selection.evidence import Comparison, belief_in, compare, evidence_by_chance, evidence_of


def scores(generator, *, share=1.0, distance=3.0, num_training=250, num_validation=50, num_trials=1, common=0.7):
    """Of trials that have part of their noise in common: folds, and (training_KS, validation_V) of each trial."""
    fold_V = generator.permutation(num_validation) % 4
    wrong_S = distance * (np.arange(num_training) >= share * num_training)
    common_S, common_V = generator.standard_normal(num_training), generator.standard_normal(num_validation)
    own = np.sqrt(1 - common**2)
    trials = []
    for _ in range(num_trials):
        noise_KS, noise_V = generator.standard_normal((4, num_training)), generator.standard_normal(num_validation)
        trials.append((wrong_S + common * common_S + own * noise_KS, common * common_V + own * noise_V))
    return fold_V, trials


def belief(fold_V, trials, seed=0) -> float:
    comparisons = [compare(*trial) for trial in trials]
    strongest = max(comparison.evidence for comparison in comparisons)
    return belief_in(strongest, evidence_by_chance(comparisons, fold_V, seed))


def test_evidence_by_hand():
    """Two kinds that cannot be mistaken: the likeliest shares are the counts."""
    share_J, good, bad = np.array([0.4, 0.6]), [1 / 0.4, 0.0], [0.0, 1 / 0.6]
    ratio_BVJ = np.array([[good] * 3 + [bad], [good] * 4])
    by_hand = [2 * (3 * np.log(0.75 / 0.4) + np.log(0.25 / 0.6)), 8 * np.log(1 / 0.4)]
    np.testing.assert_allclose(evidence_of(ratio_BVJ, share_J), by_hand)


def test_higher_scores_are_no_evidence():
    ratio_VJ = np.array([[1 / 0.4, 0.0]] + [[0.0, 1 / 0.6]] * 9)
    assert evidence_of(ratio_VJ[None], np.array([0.4, 0.6])).tolist() == [0.0]
    generator = np.random.default_rng(0)
    _, ((training_KS, validation_V),) = scores(generator)
    assert compare(training_KS, validation_V + 1.5).evidence == 0


@pytest.mark.parametrize("num_trials", [1, 9])
def test_rows_that_do_not_differ_are_seldom_believed_however_many_scouts_are_tried(num_trials):
    """By Akaike's count of parameters half of these were, with nine trials; of 60 draws 10 would be 17%."""
    generator = np.random.default_rng(0)
    beliefs = [belief(*scores(generator, num_trials=num_trials)) for _ in range(60)]
    assert sum(found >= 0.5 for found in beliefs) <= 10 and np.mean(beliefs) < 0.4


def test_more_trials_ask_for_stronger_evidence():
    by_chance = []
    for num_trials in (1, 12):
        fold_V, trials = scores(np.random.default_rng(0), num_trials=num_trials, common=0.2)
        by_chance.append(evidence_by_chance([compare(*trial) for trial in trials], fold_V, seed=0))
    assert 0.2 < by_chance[0] < 2 < by_chance[1]


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_wrong_rows_that_can_be_told_apart_are_believed(share):
    generator = np.random.default_rng(0)
    for _ in range(5):
        assert belief(*scores(generator, share=share, num_trials=6)) > 0.9


def test_the_more_rows_the_surer():
    found = [
        np.mean(
            [
                belief(*scores(np.random.default_rng(seed), share=0.8, num_validation=num_validation))
                for seed in range(8)
            ]
        )
        for num_validation in (4, 16, 100)
    ]
    assert found[0] < 0.6 < 0.95 < found[2] and found == sorted(found)


def test_belief_is_the_weight_of_akaike_where_chance_is_a_number_of_parameters():
    """One parameter by which nothing is explained: evidence of chi-squared, one on average."""
    assert belief_in(2.0, 1.0) == pytest.approx(0.5) and belief_in(12.0, 1.0) == pytest.approx(1 / (1 + np.exp(-5)))
    assert belief_in(0.0, 0.0) == 0.0 and belief_in(1e9, 3.0) == 1.0 and belief_in(1e-9, 1e9) < 1e-99


def test_draws_are_of_the_own_fold_and_never_twice():
    """A comparison that knows each row: the evidence by chance is that of the row that is drawn."""
    fold_V = np.arange(8) % 4
    for extreme in range(3):
        training_KSJ = np.ones((4, 3, 2))
        training_KSJ[0, extreme] = [2.0, 0.0]  # as the scout of the first fold sees it
        comparison = Comparison(np.array([0.5, 0.5]), training_KSJ, np.ones((8, 2)))
        # Rows 0 and 4 are of that fold: two places for two of five rows, so the extreme one is drawn in 2 of 5 draws.
        once = evidence_of(np.array([[[2.0, 0.0]] + [[1.0, 1.0]] * 7]), comparison.share_J)[0]
        assert evidence_by_chance([comparison], fold_V, seed=0) == pytest.approx(0.4 * once, rel=0.3)


def test_it_follows_from_the_seed_and_scores_that_are_all_the_same_say_nothing():
    fold_V, trials = scores(np.random.default_rng(0), num_trials=2)
    comparisons = [compare(*trial) for trial in trials]
    first, again, other = (evidence_by_chance(comparisons, fold_V, seed) for seed in (1, 1, 2))
    assert first == again != other
    nothing = compare(np.zeros((4, 9)), np.ones(5))
    assert nothing.evidence == 0 and evidence_by_chance([nothing], np.arange(5) % 4, seed=0) == 0
