"""Trials: which scout to send, and what its scores mean, by validation rows that a scout has not seen.

The validation rows are cut into folds. For every learning rate a scout descends the other folds, and at each length is
measured on its own fold and on a sample of the training rows. Each trial (rate, length, with or without the loss of
the base model) is then judged by the evidence that its unseen validation rows are not drawn from the training rows
(`tamis.selection.evidence`). The strongest is sent; no label is needed.
The scout that is sent descends all validation rows, and the trial's unseen rows are placed among its scores by their
rank among the training rows.

Shape suffixes: K folds, R training rows, S of them sampled, V validation rows.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn

from tamis.losses import stop_if_not_finite, trainable_parameters
from tamis.randomness import permutation
from tamis.selection.calibration import FEW_RIGHT, Calibration, expected_auroc, fit, placed
from tamis.selection.evidence import Comparison, belief_in, compare, evidence_by_chance
from tamis.selection.mixture import Array
from tamis.selection.scout import Finding, Scout, ScoutSettings
from tamis.selection.trial_notes import TrialNotes

NUM_FOLDS = 4
MIN_VALIDATION_ROWS = NUM_FOLDS  # of fewer nothing can be learned about rows that were not seen
_SAMPLE_SIZE = 250  # training rows that every trial measures
BASE_COEFFICIENTS = (1.0, 0.0)


@dataclass(frozen=True)
class Measured:
    """What the scouts of one rate and length have measured.

    Attributes:
        loss_V: of each validation row by the scout that has not seen it, nats per token.
        loss_KS: of the sampled training rows by the scout of each fold.
    """

    learning_rate: float
    num_steps: int
    loss_V: Array
    loss_KS: Array


@dataclass(frozen=True)
class Trial:
    """One way of scoring rows, and how well it tells training rows from unseen validation rows.

    Attributes:
        learning_rate, num_steps, base_coefficient: see `tamis.selection.scout.Finding`.
        comparison, evidence: of its training rows and unseen validation rows.
        criterion: probability that a training row has a higher score than an unseen validation row.
        error: its standard error (DeLong et al. 1988).
        rank_V: share of the sampled training rows with a lower score than each unseen validation row.
        rank_VS: the same of the sampled training rows themselves, by the scout that has not seen the validation row.
    """

    learning_rate: float
    num_steps: int
    base_coefficient: float
    comparison: Comparison
    evidence: float
    criterion: float
    error: float
    rank_V: Array
    rank_VS: Array


@dataclass(frozen=True)
class Outcome:
    """What scouting has come to: the chosen scout, all trials, and the training rows (R) as it sees them.

    Attributes:
        evidence_by_chance: what the strongest of as many trials would have if the validation rows were training rows.
        loss_R: by the scout, nats per token, float32.
        score_R: what `p_right_R` follows from: the loss less ``base_coefficient`` times that of the base model, as
            float32.
        p_right_R: probability of being like the validation rows, float32.
        score_V, weight_V: scores of the validation rows, as if the final scout had not seen them, and what each counts.
    """

    finding: Finding
    trials: list[Trial]
    evidence_by_chance: float
    loss_R: Tensor
    score_R: Tensor
    p_right_R: Tensor
    score_V: Array
    weight_V: Array

    def to_dict(self) -> dict[str, Any]:
        """Estimates and trials as plain values; None for what is not known."""
        calibration, auroc = self.finding.calibration, self.finding.expected_auroc
        return {
            "is_believed": calibration.is_believed,
            "share_right": calibration.share_right,
            "share_right_interval_90": list(calibration.share_interval),
            "expected_auroc": _known(auroc),
            "learning_rate": self.finding.learning_rate,
            "num_steps": self.finding.num_steps,
            "base_coefficient": self.finding.base_coefficient,
            "evidence": _known(choose(self.trials).evidence),
            "evidence_by_chance": self.evidence_by_chance,
            "belief": calibration.belief,
            "border": calibration.border(),
            "trials": [
                {
                    "learning_rate": trial.learning_rate,
                    "num_steps": trial.num_steps,
                    "base_coefficient": trial.base_coefficient,
                    "evidence": _known(trial.evidence),
                    "criterion": _known(trial.criterion),
                    "criterion_error": _known(trial.error),
                }
                for trial in self.trials
            ],
        }

    def scores(self, example_ids_R: Tensor) -> dict[str, Any]:
        """Columns of `scout_scores.parquet`: first the training rows, then validation rows, whose example_id is None.

        A training row weighs one.
        """
        return {
            "example_id": [*example_ids_R.tolist(), *[None] * len(self.score_V)],
            "score": np.concatenate([self.score_R.numpy(), self.score_V.astype(np.float32)]),
            "weight": np.concatenate([np.ones(len(self.score_R)), self.weight_V]).astype(np.float32),
        }


def send_scout(
    scout: Scout,
    model: nn.Module,
    validation_dataset: Dataset,
    train_dataset: Dataset,
    settings: ScoutSettings,
    name_of: Callable[[int], str],
) -> Outcome:
    """Try scouts, send the best one, calibrate its scores; the model is put back.

    Args:
        scout: gets the finding, and the parameters where it keeps them.
        model: as accelerate prepared it.
        validation_dataset, train_dataset: the prepared ones; at least `MIN_VALIDATION_ROWS` of the former.
        name_of: the name of a training row, by its place.

    Raises:
        NonFiniteLossError: the loss of a training row is not finite.
        ValueError: all scouts diverge.
    """
    trials = run_trials(scout, model, validation_dataset, train_dataset, settings, name_of)
    best = choose(trials)
    base_R = torch.zeros(len(train_dataset))
    if best.base_coefficient:
        base_R = scout.base_losses(train_dataset, "rows before scouting")
    ids_V = _validation_ids(scout)
    with scout.descent(model, ids_V, settings, best.learning_rate, [best.num_steps], "scouting") as steps:
        list(steps)
        loss_R = scout.present_losses(train_dataset, "rows after scouting")
        if scout.keep:
            scout.parameters = trainable_parameters(scout.model)
    score_R = (loss_R.double() - best.base_coefficient * base_R.double()).numpy()
    stop_if_not_finite(torch.from_numpy(score_R), name_of, step=0)
    by_chance = evidence_by_chance([trial.comparison for trial in trials], _folds(len(ids_V), settings), settings.seed)
    sample, belief = _sample(train_dataset, settings.seed).numpy(), belief_in(best.evidence, by_chance)
    calibration, score_V, weight_V = calibrate(score_R, best, sample, belief, settings.seed)
    p_right_R = calibration.p_right(score_R)
    scout.finding = _finding(best, calibration, expected_auroc(p_right_R, score_R))
    found = {"score_R": torch.from_numpy(score_R).float(), "p_right_R": torch.from_numpy(p_right_R).float()}
    return Outcome(scout.finding, trials, by_chance, loss_R, score_V=score_V, weight_V=weight_V, **found)


@dataclass(frozen=True)
class Work:
    """What scouting amounts to.

    Attributes:
        num_steps: optimizer steps of all descents.
        num_training_rows, num_validation_rows: rows measured by a forward pass, each as often as it is.
    """

    num_steps: int
    num_training_rows: int
    num_validation_rows: int


def work_of(settings: ScoutSettings, num_training: int, num_validation: int) -> Work:
    """At most: `send_scout` may choose a shorter descent, and scores that do without the base model's losses."""
    num_sampled, marks = min(_SAMPLE_SIZE, num_training), settings.num_steps
    num_seen = [num_validation - len(part) for part in torch.arange(num_validation).tensor_split(NUM_FOLDS)]
    num_rates = len(settings.learning_rates)
    return Work(
        num_steps=num_rates * sum(_fold_steps(marks, seen, num_validation)[-1] for seen in num_seen) + marks[-1],
        num_training_rows=(num_rates * NUM_FOLDS * len(marks) + 1) * num_sampled + 2 * num_training,
        num_validation_rows=(num_rates * len(marks) + 1) * num_validation,
    )


def _fold_steps(marks: Sequence[int], num_seen: int, num_validation: int) -> list[int]:
    """The same passes over the validation rows as the scout of all of them, not the same steps."""
    return [max(round(mark * num_seen / num_validation), i + 1) for i, mark in enumerate(marks)]


def run_trials(
    scout: Scout,
    model: nn.Module,
    validation_dataset: Dataset,
    train_dataset: Dataset,
    settings: ScoutSettings,
    name_of: Callable[[int], str],
) -> list[Trial]:
    """All trials of the settings; see the module's docstring, and `send_scout` for the arguments."""
    num_validation = len(validation_dataset)
    fold_V = _folds(num_validation, settings)
    sample = _sample(train_dataset, settings.seed)
    training_rows = train_dataset.select(sample.tolist())
    base_V, base_S = _array(scout.base_losses(validation_dataset)), _array(scout.base_losses(training_rows))
    stop_if_not_finite(torch.from_numpy(base_S), lambda k: name_of(int(sample[k])), step=0)
    notes = TrialNotes(scout.notes, scout.accelerator, settings, {"base_V": base_V, "base_S": base_S})
    trials = []
    for rate in settings.learning_rates:
        for measured in _measure(scout, model, validation_dataset, training_rows, fold_V, settings, rate, notes):
            for coefficient in BASE_COEFFICIENTS:
                score_V = measured.loss_V - coefficient * base_V
                score_KS = measured.loss_KS - coefficient * base_S
                if np.isfinite(score_V).all() and np.isfinite(score_KS).all():  # a high rate may diverge
                    trials.append(judge(measured, coefficient, score_V, score_KS, fold_V))
    if not trials:
        raise ValueError(
            f"scouting at learning rates {', '.join(f'{rate:g}' for rate in settings.learning_rates)} ends in losses "
            "that are not finite: lower `scout_learning_rate`, or check the model on your rows"
        )
    return trials


def _sample(train_dataset: Dataset, seed: int) -> Tensor:
    """Places of the training rows that every trial measures."""
    return permutation(len(train_dataset), seed, epoch=0, level=0)[:_SAMPLE_SIZE].sort().values


def _folds(num_validation: int, settings: ScoutSettings) -> NDArray[np.int64]:
    """The fold of each validation row."""
    fold_V = np.empty(num_validation, dtype=np.int64)
    for k, unseen in enumerate(permutation(num_validation, settings.seed, epoch=0, level=1).tensor_split(NUM_FOLDS)):
        fold_V[unseen.numpy()] = k
    return fold_V


def calibrate(
    score_R: Array, trial: Trial, sample: NDArray[np.int64], belief: float, seed: int
) -> tuple[Calibration, Array, Array]:
    """Of the final scout: first by rank, then with the unseen validation rows where right rows of their rank stand.

    Returns:
        Also the scores of these validation rows, and what each counts.

    Args:
        score_R: of all training rows by the final scout.
        trial: the chosen one.
        sample: places in ``score_R`` of the S training rows that the trial has measured.
        belief: see `tamis.selection.evidence.belief_in`.
        seed: of the interval.
    """
    first = fit(score_R, np.quantile(score_R, trial.rank_V))
    score_S = score_R[sample]
    scores, weights = placed(trial.rank_V, trial.rank_VS, score_S, first.p_right(score_S))
    return fit(score_R, scores, weight_V=weights, belief=belief, interval_seed=seed), scores, weights


def _measure(
    scout: Scout,
    model: nn.Module,
    validation_dataset: Dataset,
    training_rows: Dataset,
    fold_V: NDArray[np.int64],
    settings: ScoutSettings,
    rate: float,
    notes: TrialNotes,
) -> list[Measured]:
    """The scouts of all folds at one rate, measured at each length."""
    ids_V = _validation_ids(scout)
    marks = settings.num_steps
    loss_V = {mark: np.empty(len(ids_V)) for mark in marks}
    loss_KS: dict[int, list[Array]] = {mark: [] for mark in marks}
    for k in range(NUM_FOLDS):
        (seen,), (unseen,) = np.nonzero(fold_V != k), np.nonzero(fold_V == k)
        unseen_rows = validation_dataset.select(unseen)
        num_steps = _fold_steps(marks, len(seen), len(ids_V))
        title = f"trying scouts, rate {rate:g}, fold {k + 1}/{NUM_FOLDS}"
        if (found := notes.find(rate, k)) is None:
            with scout.descent(model, ids_V[torch.from_numpy(seen)], settings, rate, num_steps, title) as steps:
                losses = [[_array(scout.present_losses(rows)) for rows in (unseen_rows, training_rows)] for _ in steps]
            found = notes.add(rate, k, *map(np.stack, zip(*losses, strict=True)))
        for mark, loss_U, loss_S in zip(marks, *found, strict=True):
            loss_V[mark][unseen] = loss_U
            loss_KS[mark].append(loss_S)
    return [Measured(rate, mark, loss_V[mark], np.stack(loss_KS[mark])) for mark in marks]


def judge(measured: Measured, coefficient: float, score_V: Array, score_KS: Array, fold_V: NDArray[np.int64]) -> Trial:
    """Judge one way of scoring: the scores of each fold are centred and scaled, then taken together.

    Args:
        coefficient: of the base model's loss in the scores.
        score_V: of each validation row by the scout that has not seen it.
        score_KS: of the sampled training rows by the scout of each fold.
        fold_V: the fold of each validation row.
    """
    center_K, scale_K = np.median(score_KS, axis=1), score_KS.std(axis=1).clip(min=1e-9)
    z_KS = (score_KS - center_K[:, None]) / scale_K[:, None]
    z_V = (score_V - center_K[fold_V]) / scale_K[fold_V]
    lower_VS = (z_KS[fold_V] < z_V[:, None]) + 0.5 * (z_KS[fold_V] == z_V[:, None])
    rank_V, higher_S = lower_VS.mean(axis=1), 1 - lower_VS.mean(axis=0)
    error = math.sqrt(rank_V.var(ddof=1) / len(rank_V) + higher_S.var() / max(len(higher_S) - 1, 1))
    comparison = compare(z_KS, z_V)
    rank_KS = z_KS.argsort(axis=1).argsort(axis=1) / z_KS.shape[1]
    return Trial(
        measured.learning_rate,
        measured.num_steps,
        coefficient,
        comparison=comparison,
        evidence=comparison.evidence,
        criterion=1 - float(rank_V.mean()),
        error=error,
        rank_V=rank_V,
        rank_VS=rank_KS[fold_V],
    )


def choose(trials: Sequence[Trial]) -> Trial:
    """The trial with the strongest evidence; the first of equals."""
    return max(trials, key=lambda trial: trial.evidence)


def describe(outcome: Outcome, num_validation: int, is_refined_later: bool) -> list[tuple[int, str]]:
    """What scouting has come to, in words: lines with their level of logging."""
    finding, best = outcome.finding, choose(outcome.trials)
    calibration = finding.calibration
    how = "loss over that of the base model" if finding.base_coefficient else "loss"
    others = sorted((trial.evidence for trial in outcome.trials if trial is not best), reverse=True)
    reason = f"the strongest evidence of {len(outcome.trials)} trials ({best.evidence:.1f}"
    reason += f", the next {others[0]:.1f}" if others else ""
    reason += f"; by chance {outcome.evidence_by_chance:.1f})"
    criterion = f"{best.criterion:.3f} +- {best.error:.3f}"
    lines = [
        (
            logging.INFO,
            f"scout: learning rate {finding.learning_rate:g}, {finding.num_steps} steps, rows scored by their {how}: "
            f"{reason}. A training row has a higher score than an unseen validation row with probability {criterion}",
        )
    ]
    if calibration.is_believed:
        low, high = calibration.share_interval
        text = f"about {calibration.share_right:.0%} of the training rows are right ({low:.0%} to {high:.0%})"
        if not math.isnan(finding.expected_auroc):
            text += f"; a right row has a higher weight than a wrong one with probability {finding.expected_auroc:.2f}"
        lines.append((logging.INFO, text))
        if calibration.share_right < FEW_RIGHT:
            lines.append(
                (logging.WARNING, "that is very few: check that the validation rows are of the same kind, and as hard")
            )
        return lines
    cure = "a larger model" if num_validation >= 50 else f"more than {num_validation} validation rows"
    doubt = (
        "the scout cannot tell training rows from validation rows that it has not seen: it decides nothing, all "
        f"weights are one. Either nearly all training rows are right, or try {cure}, or validation rows that are more "
        "like the right training rows"
    )
    lines.append((logging.WARNING, doubt))
    if is_refined_later:
        lines.append((logging.WARNING, "no row is refined: with equal weights there is no lowest"))
    return lines


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finding(trial: Trial, calibration: Calibration, auroc: float) -> Finding:
    return Finding(trial.learning_rate, trial.num_steps, trial.base_coefficient, calibration, auroc)


def _array(losses: Tensor) -> Array:
    return np.asarray(losses.double().numpy())


def _validation_ids(scout: Scout) -> Tensor:
    assert scout.batches.validation is not None, "checked by the settings"
    return scout.batches.validation.ids
