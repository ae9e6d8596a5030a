"""Scores of all rows before the first step: by a scout of this run, or those of an earlier one.

Shape suffixes: R prepared rows.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn

from tamis.config import BilevelConfig, Resolved
from tamis.earlier_scores import SCOUT_REPORT, EarlierScores
from tamis.output_dir import SCOUT_TRIALS
from tamis.recorder import SCOUT_SCORES, Recorder
from tamis.selection.row_weights import RowWeights, ScoutWeights
from tamis.selection.scout import SCOUT_FILE, Scout, ScoutSettings, settings_of_run
from tamis.selection.trials import MIN_VALIDATION_ROWS, Outcome, describe, send_scout
from tamis.stream import Batches

logger = logging.getLogger(__name__)


class Scouting:
    """What settles the weights of rows before training, where the selector is `scout`.

    Args:
        args, resolved: settings.
        model: to be trained, before its first step.
        row_weights: that are settled.
        train_dataset, validation_dataset: the prepared ones.
        batches: of the trainer.
        earlier_scores: what takes the place of a scout.
        recorder: of the main process; None elsewhere.
        row_name: of a training row, by its example id.

    Attributes:
        scout: None where no row is scored by one, and no generated response is compared with the base model.
        outcome: what it has found; None before.
    """

    def __init__(
        self,
        args: BilevelConfig,
        resolved: Resolved,
        *,
        model: nn.Module,
        row_weights: RowWeights,
        train_dataset: Dataset,
        validation_dataset: Dataset | None,
        batches: Batches,
        earlier_scores: EarlierScores | None,
        recorder: Recorder | None,
        row_name: Callable[[int], str],
    ):
        self.args, self.resolved, self.row_weights = args, resolved, row_weights
        self.train_dataset, self.validation_dataset, self.batches = train_dataset, validation_dataset, batches
        self.earlier_scores, self.recorder, self._row_name = earlier_scores, recorder, row_name
        self.outcome: Outcome | None = None
        self.scout: Scout | None = None
        measures_responses = args.refines and row_weights.uses_excess and args.reference == "base"
        if measures_responses or (isinstance(row_weights, ScoutWeights) and earlier_scores is None):
            self.scout = Scout(
                model,
                batches,
                batch_size=2 * args.per_device_train_batch_size,  # no gradients are kept: twice the rows fit
                keep=args.refines,
                show_progress=not args.disable_tqdm,
                notes=recorder.output_dir / SCOUT_TRIALS if recorder else None,
            )

    def begin(self, model: nn.Module, resume: str | None) -> None:
        """Settle the weights, or, where a checkpoint has them, take over the files that say how they came about.

        Args:
            model: as accelerate prepared it.
            resume: the checkpoint that the run goes on from.

        Raises:
            ValueError: the scout of the earlier run is missing, or all scouts diverge.
        """
        if isinstance(self.row_weights, ScoutWeights):
            if resume is not None:
                self._take_over(Path(resume).parent)
            elif self.earlier_scores is not None:
                self._take_scores(self.earlier_scores, self.row_weights)
            elif self.scout is not None:
                self._send(self.scout, self.row_weights, model)
        if not self.args.refines:
            self.scout = None  # no more rows to score: its parameters need not be kept

    def remember_base(self) -> None:
        """Before training, and before a checkpoint is loaded: keep what new responses are compared with."""
        if self.scout:
            self.scout.remember_base()

    @property
    def is_possible(self) -> bool:
        """Whether there are enough validation rows for a scout."""
        return self.validation_dataset is not None and len(self.validation_dataset) >= MIN_VALIDATION_ROWS

    def settings(self) -> ScoutSettings:
        """How scouts descend the validation rows of this run."""
        assert self.validation_dataset is not None, "checked by the settings"
        return settings_of_run(self.args, self.resolved.scout_learning_rates, len(self.validation_dataset))

    def _take_over(self, earlier: Path) -> None:
        """The scout of the run that this one goes on from; it may be resumed from here too."""
        if self.args.refines and self.scout and self.is_possible:
            self.scout.load(earlier / SCOUT_FILE)
        if self.recorder:
            self.recorder.take_over(earlier, SCOUT_REPORT, SCOUT_SCORES, SCOUT_FILE)

    def _take_scores(self, earlier: EarlierScores, row_weights: ScoutWeights) -> None:
        """Weights by what another run has found, and its files that say how."""
        ids_R = self.batches.training.ids
        score_R = earlier.of(ids_R.numpy())
        if score_R is not None:
            row_weights.settle_scores(ids_R, torch.from_numpy(score_R))
        if self.recorder:
            self.recorder.take_over(earlier.path.parent, SCOUT_REPORT, SCOUT_SCORES)

    def _send(self, scout: Scout, row_weights: ScoutWeights, model: nn.Module) -> None:
        """Score all rows, and settle their weights: see `tamis.selection.trials`."""
        assert self.validation_dataset is not None, "checked by the settings"
        num_validation = len(self.validation_dataset)
        if not self.is_possible:
            logger.warning(
                f"{num_validation} validation rows are too few to tell what a right row looks like: all weights are "
                f"one. Give at least {MIN_VALIDATION_ROWS}, ideally 50"
            )
            return
        ids_R = self.batches.training.ids
        self.outcome = send_scout(
            scout,
            model,
            self.validation_dataset,
            self.train_dataset,
            self.settings(),
            name_of=lambda k: self._row_name(int(ids_R[k])),
        )
        if self.outcome.finding.calibration.is_believed:
            row_weights.settle(ids_R, self.outcome.p_right_R)
        row_weights.last_loss_N[ids_R] = self.outcome.loss_R
        is_refined_later = self.args.refines and self.args.refine_policy == "lowest"
        for level, line in describe(self.outcome, num_validation, is_refined_later):
            logger.log(level, line)
        if self.recorder:
            self.recorder.write_scout(self.outcome.to_dict(), self.outcome.scores(ids_R))
        if self.args.refines:
            scout.save(Path(str(self.args.output_dir)) / SCOUT_FILE)
