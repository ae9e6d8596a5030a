"""Which scout is sent: trials judged by validation rows that a scout has not seen, and what is said of them."""

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from conftest import assert_close, parameters
from scouting import RIGHT, TRUSTED, WRONG, losses_one_by_one, scout_of, settings_of

from tamis.losses import NonFiniteLossError
from tamis.metrics import auroc
from tamis.randomness import permutation
from tamis.selection import trials as trials_module
from tamis.selection.calibration import Calibration, expected_auroc, fit, placed
from tamis.selection.evidence import belief_in, compare
from tamis.selection.scout import Finding, descend, put_back
from tamis.selection.trials import Measured, Outcome, Trial, choose, describe, run_trials, send_scout, work_of

TRAIN = WRONG + RIGHT
FEW = WRONG[:5] + RIGHT[:6]


def run(trainer, scout=None, **settings):
    """All trials of a scout."""
    rows = (trainer.validation_dataset, trainer.train_dataset)
    return run_trials(scout or scout_of(trainer), trainer.model, *rows, settings_of(trainer, **settings), str)


def send(trainer, name_of=str, **settings) -> Outcome:
    rows = (trainer.validation_dataset, trainer.train_dataset)
    return send_scout(scout_of(trainer), trainer.model, *rows, settings_of(trainer, **settings), name_of)


def folds_of(num_validation: int, seed: int = 0):
    return permutation(num_validation, seed, epoch=0, level=1).tensor_split(4)


# --- rows that a scout has not seen -----------------------------------------------------------------------------------


@pytest.mark.parametrize("num_validation", [4, 7, 12])
def test_a_scout_has_never_seen_the_rows_it_is_judged_by(bilevel, num_validation):
    """Whatever goes through the collator in a descent, and whatever is measured within it."""
    trainer = bilevel(TRAIN, TRUSTED[:num_validation])
    scout, log = scout_of(trainer), []
    collate, present_losses, descent = trainer.batches.collate, scout.present_losses, scout.descent
    trainer.batches.collate = lambda batches: (
        log.append(("seen", [i for b in batches for i in b.validation_ids])) or collate(batches)
    )
    scout.present_losses = lambda rows, title="": (
        log.append(("measured", [tuple(ids) for ids in rows["input_ids"]])) or present_losses(rows, title)
    )
    scout.descent = lambda *args: log.append(("descent", args[3])) or descent(*args)
    run(trainer, scout, learning_rates=(1e-2, 3e-3), num_steps=(4, 8))
    ids_of = {tuple(row["input_ids"]): row["example_id"] for row in trainer.validation_dataset}
    starts = [k for k, (what, _) in enumerate(log) if what == "descent"]
    assert [log[k][1] for k in starts] == [1e-2] * 4 + [3e-3] * 4
    unseen_by_rate = {1e-2: [], 3e-3: []}
    for start, end in zip(starts, [*starts[1:], len(log)], strict=True):
        seen = {i for what, ids in log[start:end] if what == "seen" for i in ids}
        found = [found for what, found in log[start:end] if what == "measured"]
        measured = [{ids_of[row] for row in rows if row in ids_of} for rows in found]
        unseen = set().union(*measured)
        assert unseen and not unseen & seen and unseen | seen == set(range(num_validation))
        assert [m for m in measured if m] == [unseen, unseen], "at both lengths the same rows"
        unseen_by_rate[log[start][1]] += sorted(unseen)
    assert all(sorted(unseen) == list(range(num_validation)) for unseen in unseen_by_rate.values()), "each row once"


def test_of_repeated_validation_rows_one_is_used(bilevel, caplog):
    """Else the scout that has not seen the one has seen the other, and every training row looks worse than both."""
    once, twice = bilevel(TRAIN, TRUSTED[:8]), bilevel(TRAIN, TRUSTED[:8] + TRUSTED[2:6])
    assert caplog.messages.count("validation_dataset: 4 of 12 rows repeat another row and are left out") == 1
    assert twice.validation_dataset["input_ids"] == once.validation_dataset["input_ids"]
    assert len(twice.train_dataset) == len(TRAIN)


def test_the_evidence_by_hand(bilevel):
    """Train on three folds, measure the fourth beside the training rows; scores of a fold in its own unit."""
    trainer = bilevel(FEW, TRUSTED)
    settings = settings_of(trainer, num_steps=(4, 8), batch_size=3)
    found = run(trainer, num_steps=(4, 8), batch_size=3)
    base_R, base_V = (losses_one_by_one(trainer.model, d) for d in (trainer.train_dataset, trainer.validation_dataset))
    ids_V, folds = trainer.batches.validation.ids, folds_of(12)
    assert [(t.num_steps, t.base_coefficient) for t in found] == [(4, 1.0), (4, 0.0), (8, 1.0), (8, 0.0)]
    for trial in found:
        z_V, z_R, rank_V = np.empty(12), [], np.empty(12)
        for unseen in folds:
            seen = torch.cat([fold for fold in folds if fold is not unseen]).sort().values
            with put_back(trainer.model):
                how = {"learning_rate": 1e-2, "num_steps": [trial.num_steps * 9 // 12], "title": ""}
                list(descend(trainer.model, trainer.batches, ids_V[seen], settings, **how))
                loss_R = losses_one_by_one(trainer.model, trainer.train_dataset) - trial.base_coefficient * base_R
                loss_V = losses_one_by_one(trainer.model, trainer.validation_dataset) - trial.base_coefficient * base_V
            center, scale = np.median(loss_R), loss_R.numpy().std()
            z_R.append((loss_R.numpy() - center) / scale)
            for i in unseen.tolist():
                z_V[i] = (loss_V[i].item() - center) / scale
                rank_V[i] = (loss_R < loss_V[i]).double().mean()
        evidence = compare(np.stack(z_R), z_V).evidence
        assert trial.evidence == pytest.approx(evidence, rel=2e-3) and evidence > 1
        np.testing.assert_allclose(trial.rank_V, rank_V, atol=1 / 20)
        assert trial.rank_VS.shape == (12, 11)
        for i in range(12):
            of_fold = next(k for k, unseen in enumerate(folds) if i in unseen.tolist())
            np.testing.assert_allclose(trial.rank_VS[i], z_R[of_fold].argsort().argsort() / 11, atol=0.1)
        assert trial.criterion == pytest.approx(1 - rank_V.mean(), abs=0.01)


def test_only_a_sample_of_many_training_rows_is_measured(bilevel, monkeypatch):
    monkeypatch.setattr(trials_module, "_SAMPLE_SIZE", 10)
    trainer = bilevel(TRAIN, TRUSTED)
    scout, sizes = scout_of(trainer), []
    present_losses = scout.present_losses
    scout.present_losses = lambda rows, title="": sizes.append(len(rows)) or present_losses(rows, title)
    run(trainer, scout)
    assert sizes == [12, 10] + [3, 10] * 4, "the base model, then each fold"


def test_the_trials_are_all_that_the_settings_ask_for(bilevel):
    trials = run(bilevel(FEW, TRUSTED), learning_rates=(1e-3, 1e-2), num_steps=(3, 6))
    combinations = [(rate, length, c) for rate in (1e-3, 1e-2) for length in (3, 6) for c in (1.0, 0.0)]
    assert [(t.learning_rate, t.num_steps, t.base_coefficient) for t in trials] == combinations
    assert all(t.rank_VS.shape == (12, 11) and (np.sort(t.rank_VS) == np.arange(11) / 11).all() for t in trials)
    assert all(len(t.rank_V) == 12 and ((t.rank_V >= 0) & (t.rank_V <= 1)).all() for t in trials)
    assert all(math.isfinite(t.error) and 0 <= t.criterion <= 1 for t in trials)


def test_the_error_is_that_of_repeated_draws():
    """Two Gaussians a standard deviation apart: the area is known, and so is how much it varies."""
    generator = np.random.default_rng(0)
    areas, errors, fold_V = [], [], np.arange(40) % 4
    for _ in range(80):
        score_V, score_S = generator.standard_normal(40), generator.standard_normal(60) + 1
        trial = trials_module.judge(
            Measured(1e-3, 4, score_V, np.tile(score_S, (4, 1))), 0.0, score_V, np.tile(score_S, (4, 1)), fold_V
        )
        area = auroc(np.r_[score_S, score_V], np.arange(100) < 60)
        assert trial.criterion == pytest.approx(area, abs=1e-9)
        areas.append(trial.criterion)
        errors.append(trial.error)
    assert np.mean(areas) == pytest.approx(0.760, abs=0.02)
    assert np.mean(errors) == pytest.approx(np.std(areas), rel=0.25)


def test_folds_are_compared_in_their_own_units():
    """A scout that has gone further has higher losses on all rows: that is no sign of a wrong row."""
    generator = np.random.default_rng(0)
    score_S, score_V, fold_V = generator.standard_normal(200) + 1, generator.standard_normal(40), np.arange(40) % 4
    scale_K, shift_K = np.array([1.0, 5.0, 0.2, 2.0]), np.array([0.0, 30.0, -4.0, 1.0])

    def trial(scale_K, shift_K):
        score_KS = score_S * scale_K[:, None] + shift_K[:, None]
        scores_V = score_V * scale_K[fold_V] + shift_K[fold_V]
        return trials_module.judge(Measured(1e-3, 4, scores_V, score_KS), 0.0, scores_V, score_KS, fold_V)

    expected, found = trial(np.ones(4), np.zeros(4)), trial(scale_K, shift_K)
    assert found.evidence == pytest.approx(expected.evidence) and found.criterion == expected.criterion
    np.testing.assert_array_equal(found.rank_V, expected.rank_V)


# --- the best one -----------------------------------------------------------------------------------------------------


NOTHING = compare(np.zeros((4, 9)), np.zeros(4))


def trial_of(evidence: float, **values) -> Trial:
    defaults = {"learning_rate": 1e-3, "num_steps": 4, "base_coefficient": 1.0, "criterion": 0.7, "error": 0.05}
    return Trial(
        **defaults
        | {"rank_V": np.zeros(4), "rank_VS": np.zeros((4, 9)), "evidence": evidence, "comparison": NOTHING}
        | values
    )


def test_the_strongest_evidence_is_chosen():
    trials = [trial_of(evidence) for evidence in (1.0, 9.0, 3.0)]
    assert choose(trials) is trials[1]
    equal = [trial_of(0.0), trial_of(0.0)]
    assert choose(equal) is equal[0], "the first of equals"


def test_the_scout_that_is_sent_is_the_best_of_the_trials(bilevel):
    """At its rate and length, over all validation rows."""
    trainer = bilevel(TRAIN, TRUSTED)
    outcome = send(trainer, learning_rates=(3e-3, 1e-2), num_steps=(2, 8))
    best, settings, finding = choose(outcome.trials), settings_of(trainer), outcome.finding
    assert len(outcome.trials) == 8 and best.evidence > 5
    for name in ("learning_rate", "num_steps", "base_coefficient"):
        assert getattr(finding, name) == getattr(best, name)
    base_R = losses_one_by_one(trainer.model, trainer.train_dataset)
    with put_back(trainer.model):
        how = {"learning_rate": best.learning_rate, "num_steps": [best.num_steps], "title": ""}
        list(descend(trainer.model, trainer.batches, trainer.batches.validation.ids, settings, **how))
        loss_R = losses_one_by_one(trainer.model, trainer.train_dataset)
    torch.testing.assert_close(outcome.loss_R, loss_R, atol=1e-4, rtol=1e-4)
    score_R = (outcome.loss_R - best.base_coefficient * base_R).double().numpy()
    belief = belief_in(best.evidence, outcome.evidence_by_chance)
    assert belief > 0.99
    first = fit(score_R, np.quantile(score_R, best.rank_V))
    scores, weights = placed(best.rank_V, best.rank_VS, score_R, first.p_right(score_R))
    calibration = fit(score_R, scores, weight_V=weights, belief=belief)
    torch.testing.assert_close(
        outcome.p_right_R, torch.from_numpy(calibration.p_right(score_R)).float(), atol=1e-3, rtol=0
    )
    assert finding.expected_auroc == pytest.approx(
        expected_auroc(outcome.p_right_R.double().numpy(), score_R), abs=1e-2
    )


def test_a_rate_that_diverges_is_left_out(bilevel):
    trainer = bilevel(TRAIN, TRUSTED)
    before = parameters(trainer.model)
    outcome = send(trainer, learning_rates=(1e30, 1e-2))
    assert {t.learning_rate for t in outcome.trials} == {1e-2} and outcome.finding.learning_rate == 1e-2
    assert_close(parameters(trainer.model), before, atol=0)


def test_if_all_rates_diverge_there_is_a_remedy(bilevel):
    trainer = bilevel(TRAIN, TRUSTED)
    before = parameters(trainer.model)
    with pytest.raises(ValueError, match=r"at learning rates 1e\+30, 1e\+31 .* lower `scout_learning_rate`"):
        send(trainer, learning_rates=(1e30, 1e31))
    assert_close(parameters(trainer.model), before, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", ["before the scouts", "by the one that is sent"])
def test_a_row_whose_loss_is_not_finite_is_named(bilevel, bad, when):
    trainer = bilevel(TRAIN, TRUSTED)
    scout, before = scout_of(trainer), parameters(trainer.model)
    present_losses, target = scout.present_losses, tuple(trainer.train_dataset[5]["input_ids"])

    def spoiled(rows, title=""):
        losses = present_losses(rows, title)
        if when == "before the scouts" or title == "rows after scouting":
            losses[[k for k, ids in enumerate(rows["input_ids"]) if tuple(ids) == target]] = bad
        return losses

    scout.present_losses = spoiled
    rows = (trainer.validation_dataset, trainer.train_dataset)
    with pytest.raises(NonFiniteLossError, match=r"the loss is not finite on row five\. "):
        send_scout(scout, trainer.model, *rows, settings_of(trainer), {5: "row five"}.__getitem__)
    assert_close(parameters(trainer.model), before, atol=0)


def test_a_training_row_alone_says_nothing(bilevel):
    outcome = send(bilevel(RIGHT[:1], TRUSTED))
    assert not outcome.finding.calibration.is_believed and outcome.p_right_R.tolist() == [1.0]
    assert all(math.isfinite(trial.error) for trial in outcome.trials)


# --- in words ---------------------------------------------------------------------------------------------------------

SURE = fit(np.r_[np.zeros(50), 9 + np.zeros(50)] + np.linspace(-1, 1, 100), np.linspace(-1, 0.9, 20), interval_seed=0)
UNSURE = dataclasses.replace(SURE, belief=0.2)


def lines_of(calibration: Calibration, *, auroc=0.987, evidence=(21.5, 3.25), num_validation=20, refines=False):
    finding = Finding(0.0015, 250, 1.0, calibration, auroc)
    trials = [trial_of(e, learning_rate=0.0015, num_steps=250, criterion=0.812, error=0.031) for e in evidence]
    outcome = Outcome(finding, trials, 1.75, *[torch.zeros(3)] * 3, np.zeros(2), np.ones(2))
    return describe(outcome, num_validation, refines)


def test_what_was_found_is_said():
    (level, how), (other_level, what) = lines_of(SURE)
    assert level == other_level == logging.INFO
    for part in (
        "learning rate 0.0015, 250 steps",
        "their loss over that of the base model",
        "of 2 trials (21.5, the next 3.2; by chance 1.8)",
        "0.812 +- 0.031",
    ):
        assert part in how
    low, high = SURE.share_interval
    assert SURE.share_right == pytest.approx(0.5, abs=0.05)
    assert f"about {SURE.share_right:.0%} of the training rows are right ({low:.0%} to {high:.0%})" in what
    assert "with probability 0.99" in what


def test_what_is_not_known_is_not_said():
    (_, how), (_, what) = lines_of(SURE, auroc=math.nan, evidence=(21.5,))
    assert (
        "of 1 trials (21.5; by chance 1.8)" in how
        and "next" not in how
        and "probability" not in what
        and "nan" not in what
    )


def test_doubt_is_a_warning_with_a_remedy():
    (_, _), (level, doubt) = lines_of(UNSURE)
    assert level == logging.WARNING and "all weights are one" in doubt and "more than 20 validation rows" in doubt
    assert "a larger model" in lines_of(UNSURE, num_validation=50)[1][1]
    assert not any("refined" in line for _, line in lines_of(UNSURE))
    assert lines_of(UNSURE, refines=True)[2] == (
        logging.WARNING,
        "no row is refined: with equal weights there is no lowest",
    )
    assert len(lines_of(SURE, refines=True)) == 2


# --- what scouting amounts to -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_validation", "num_steps"), [(4, (3,)), (7, (1, 2, 4)), (12, (4, 8))])
def test_the_work_of_scouting_is_that_which_is_done(bilevel, monkeypatch, num_validation, num_steps):
    trainer = bilevel(TRAIN, TRUSTED[:num_validation])
    scout, settings = scout_of(trainer), settings_of(trainer, learning_rates=(1e-2, 3e-3), num_steps=num_steps)
    collated, measured, collate, present_losses = [], [], trainer.batches.collate, scout.present_losses
    monkeypatch.setattr(trainer.batches, "collate", lambda batches: collated.append(1) or collate(batches))
    scout.present_losses = lambda rows, title="": measured.append(len(rows)) or present_losses(rows, title)
    # The longest descent, and scores that need the losses of the base model: the most that there may be.
    longest = dataclasses.replace(settings, num_steps=num_steps[-1:])
    monkeypatch.setattr(
        trials_module, "choose", lambda trials: max(trials, key=lambda t: (t.num_steps, t.base_coefficient))
    )
    send_scout(scout, trainer.model, trainer.validation_dataset, trainer.train_dataset, settings, str)
    work = work_of(settings, len(TRAIN), num_validation)
    assert len(collated) == work.num_steps
    assert sum(measured) == work.num_training_rows + work.num_validation_rows
    assert work_of(longest, len(TRAIN), num_validation).num_steps == work.num_steps
