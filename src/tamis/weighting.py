"""`RowWeighting`: the one object between TRL's training loop and the rules that weigh rows.

The trainer calls it as it would call an optimizer, and knows nothing of what is behind it:

    begin                 scout, or take up what an earlier scout found
    before_step           refresh generated responses where they are due; choose one for each refined row
    weights, backward     once per micro-batch
    commit                once per optimizer step: gather over the ranks, update
    state_dict, load_state_dict

Shape suffixes: B rows of a micro-batch, L its training rows, N rows of the training dataset, R prepared rows.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from tamis.bilevel import effective_sample_size, penalty_gap
from tamis.config import BilevelConfig, Resolved
from tamis.earlier_scores import EarlierScores
from tamis.losses import stop_if_not_finite
from tamis.recorder import Recorder
from tamis.refining.generation import GenerationError, make_generator
from tamis.refining.refiner import Refiner, make_refiner
from tamis.rows import row_name
from tamis.scouting import Scouting
from tamis.selection.make import make_row_weights
from tamis.selection.references import ZeroReference, make_reference
from tamis.selection.row_weights import RowWeights, ScoutWeights
from tamis.selection.selectors import Selector
from tamis.stream import Batches, BatchRows, MicroBatch

logger = logging.getLogger(__name__)


class RowWeighting:
    """What every training row counts, from the losses that the trainer measures.

    Args:
        args, resolved: settings.
        selector: of the user, in place of the name in ``args``.
        model: to be trained, before its first step.
        train_rows: the N training rows as they were given.
        train_dataset, validation_dataset: the prepared ones.
        batches: of the trainer: the prepared rows by id, and what makes tensors of them.
        earlier_scores: what takes the place of scouting.
        recorder: of the main process, for generated responses; None elsewhere.

    Raises:
        ValueError: the settings cannot work with this model or these rows.
    """

    def __init__(
        self,
        args: BilevelConfig,
        resolved: Resolved,
        selector: Selector | None,
        *,
        model: nn.Module,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        train_rows: Dataset,
        train_dataset: Dataset,
        validation_dataset: Dataset | None,
        batches: Batches,
        earlier_scores: EarlierScores | None,
        recorder: Recorder | None,
    ):
        self.args, self.resolved = args, resolved
        self.accelerator, self.batches = accelerator, batches
        self.processing_class, self.recorder = processing_class, recorder
        self.train_rows, self.validation_dataset = train_rows, validation_dataset
        self.row_weights: RowWeights = make_row_weights(
            selector or args.selector,
            len(train_rows),
            score_map=resolved.score_map or "bounded",
            learning_rate=resolved.selector_learning_rate,
            temperature=args.bmo_temperature,
            weight_N=torch.tensor(train_rows["weight"][:]) if selector is None and args.selector == "column" else None,
        )
        self.is_kept_N = torch.zeros(len(train_rows), dtype=torch.bool)
        self.is_kept_N[batches.training.ids] = True
        self.row_weights.exclude((~self.is_kept_N).nonzero().squeeze(1))
        self.reference = ZeroReference()
        if self.row_weights.uses_excess:
            self.reference = make_reference(
                args.reference,
                model,
                len(train_rows),
                reduce_gradient=self._sum_over_ranks,
                max_grad_norm=args.max_grad_norm,
            )
        self.scouting = Scouting(
            args,
            resolved,
            model=model,
            row_weights=self.row_weights,
            train_dataset=train_dataset,
            validation_dataset=validation_dataset,
            batches=batches,
            earlier_scores=earlier_scores,
            recorder=recorder,
            row_name=self._row_name,
        )
        self.refiner: Refiner | None = None
        if args.refines:
            generator = make_generator(model, accelerator, processing_class, args, resolved.generation_batch_size)
            scout = self.scouting.scout
            self.refiner = make_refiner(args, resolved, generator, model, batches, self.row_weights, scout)
        self._visits_N: Tensor | None = None
        self._visits_R: Tensor | None = None
        self._step = 0
        self._window: list[tuple[Tensor, ...]] = []
        self._refresh_metrics: dict[str, float] = {}
        self._is_short_of_responses = self._has_told_refresh = False  # each is said once

    @property
    def announcements(self) -> list[str]:
        """How it was set up, one line each."""
        return [f"reference = {self.reference.description}"] if self.row_weights.uses_excess else []

    # --- before training --------------------------------------------------------------------------------------------

    def plan(self, max_steps: int) -> None:
        """Fix what depends on the number of optimizer steps.

        Raises:
            ValueError: the first refresh would come after the last step.
        """
        if self.refiner:
            self.refiner.plan(max_steps)

    def begin(self, model: nn.Module, max_steps: int, resume: str | None) -> None:
        """Score all training rows before the first step, where the settings ask for it.

        Args:
            model: as accelerate prepared it.
            max_steps: optimizer steps of the run.
            resume: the checkpoint that the run goes on from; its state is loaded by `load_state_dict`.

        Raises:
            ValueError: see `plan` and `tamis.scouting.Scouting.begin`.
        """
        self.plan(max_steps)
        self.remember_base()
        self.scouting.begin(model, resume)

    def remember_base(self) -> None:
        """Before training, and before a checkpoint is loaded: keep what new responses are compared with."""
        self.scouting.remember_base()

    def rho(self) -> float:
        """Share of the validation loss where none is given: a validation row counts as a surely right training row.

        Where the scout is not believed it counts as any other row of its step. A larger share on so few rows is noise:
        with half of the objective on one row of 17 the run was worse than plain SFT (LOG.md, 2026-11-27).
        """
        num_useful = self.row_weights.num_useful() if isinstance(self.row_weights, ScoutWeights) else None
        if num_useful is None or self.validation_dataset is None:
            num_rows = self.resolved.validation_rows_per_step
            return num_rows / (num_rows + self.args.training_rows_per_step)
        return len(self.validation_dataset) / (len(self.validation_dataset) + num_useful)

    def visits(self) -> Tensor | None:
        """How often each prepared training row is to be visited in an epoch; None for each row once."""
        visits_N = self.row_weights.visits_N()
        if visits_N is not self._visits_N:
            self._visits_N = visits_N
            self._visits_R = None if visits_N is None else visits_N[self.batches.training.ids]
        return self._visits_R

    # --- one optimizer step -----------------------------------------------------------------------------------------

    def before_step(self, step: int, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """Refresh responses where they are due, and choose one for each refined row of the step's micro-batches.

        Raises:
            GenerationError: no responses could be had and the settings say to stop. The state is as before the call.
        """
        self._step, self._window = step, []  # what a failed step has left is void
        if self.refiner is None:
            return list(batches)
        if self.refiner.is_due(step):
            self._refresh(self.refiner, step)
        return [self.refiner.substitute(batch, step) for batch in batches]

    def _refresh(self, refiner: Refiner, step: int) -> None:
        try:
            records = refiner.refresh(step)
        except GenerationError as error:
            if self.args.refine_on_error == "stop":
                raise GenerationError(f"{error}; `refine_on_error='continue'` goes on without new responses") from error
            logger.warning(f"step {step}: no new responses, training goes on with those there are ({error})")
            refiner.last_refresh = step
            return
        logger.log(logging.DEBUG if self._has_told_refresh else logging.INFO, refiner.summary(step))
        self._has_told_refresh = True  # the metrics have the later ones
        if len(refiner.buffer.rows) < len(records) / 2 and not self._is_short_of_responses:
            self._is_short_of_responses = True
            logger.warning(
                "most rows got no usable response: raise `max_new_tokens`, or see to it that the model ends its "
                "responses (`eos_token`)"
            )
        self._refresh_metrics = refiner.history
        if self.recorder:
            self.recorder.add_refinements(records, self.train_rows, self.processing_class)

    def weights(self, rows: BatchRows, inputs: dict[str, Any], loss_B: Tensor) -> Tensor:
        """Weights (L, mean one over the dataset) of the training rows of a micro-batch.

        Args:
            rows: of the micro-batch, training rows first.
            inputs: its tensors.
            loss_B: its losses, detached, nats per token, float32, on the CPU.

        Raises:
            NonFiniteLossError: the loss of the reference is not finite.
        """
        num_training, ids_L = rows.num_training, rows.ids_L
        loss_L, reference_L = loss_B[:num_training], torch.zeros(num_training)
        if self.row_weights.uses_excess and num_training:
            known_L = self.refiner.reference_losses(rows) if self.refiner else torch.full((num_training,), torch.nan)
            tensors = {name: tensor[:num_training] for name, tensor in inputs.items() if torch.is_tensor(tensor)}
            with self.accelerator.autocast():  # a copy of the model does not bring its own, as the model does
                reference_L = self.reference.losses(tensors, ids_L, known_L)
        excess_L = loss_L - reference_L
        stop_if_not_finite(excess_L, lambda k: self._row_name(rows.training_ids[k]), self._step)
        coefficient_L = torch.ones(num_training)
        if self.refiner:
            coefficient_L = self.refiner.coefficients(rows, -loss_L * rows.num_tokens_B[:num_training])
        weights_L = self.row_weights.weights(ids_L, excess_L) * coefficient_L
        of_training = (ids_L, loss_L, excess_L, weights_L, rows.responses_L, coefficient_L)
        self._window.append((*of_training, loss_B[num_training:], rows.num_tokens_B))
        return weights_L

    def backward(self, coefficients_L: Tensor) -> None:
        """Once per micro-batch, with what its training rows count in the objective: for references that learn."""
        if len(coefficients_L):
            self.reference.backward(coefficients_L)

    def commit(self, learning_rate: float) -> dict[str, float]:
        """End an optimizer step: update by the rows of all its micro-batches and ranks; returns their metrics.

        Losses are means over the rows of the step; ``num_tokens`` is how many tokens it trained on.

        Args:
            learning_rate: of the model in this step.
        """
        window = [self._window]
        if self.accelerator.num_processes > 1:
            window = gather_object(window)
        parts = [torch.cat(part) for part in zip(*(batch for rank in window for batch in rank), strict=True)]
        self._window = []
        ids, loss, excess, weights, responses, coefficient, validation_loss, num_tokens = parts
        metrics, self._refresh_metrics = self._refresh_metrics | {"num_tokens": int(num_tokens.sum())}, {}
        if len(ids):
            self.row_weights.update(ids, loss, excess)
            metrics = metrics | {
                "training_loss": loss.mean().item(),
                "weighted_training_loss": (weights * loss).mean().item(),
                "penalty_gap": penalty_gap(weights, excess).item(),
            }
        if len(validation_loss):
            metrics["validation_loss"] = validation_loss.mean().item()
        if self.refiner:
            coefficient = coefficient[responses >= 0]
            if len(coefficient):
                metrics["response_coefficient"] = coefficient.mean().item()
                metrics["response_ess"] = effective_sample_size(coefficient) / len(coefficient)
        self.reference.step(self.args.reference_learning_rate or learning_rate)
        return metrics

    # --- what is known ----------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """How the weights stand: effective sample size and entropy."""
        ess = self.row_weights.effective_sample_size()
        return {"ess": ess, "ess_ratio": ess / len(self.row_weights), "weight_entropy": self.row_weights.entropy()}

    def columns(self) -> dict[str, np.ndarray[Any, Any]]:
        """What is known of all N rows, as `weights.parquet` has it (see `tamis.recorder.Recorder.write_weights`).

        Weight and score are those of a row's original response: where it trains on generated ones (``refined``), they
        come from before it was refined. ``last_loss`` and ``num_updates`` of a refined row are those of its generated
        responses. ``kept`` is whether a row is more likely right than wrong (``p_right`` at least one half), or, where
        that is not known, whether it is trained on. Rows that never enter training have weight 0.
        """
        row_weights, is_kept_N = self.row_weights, self.is_kept_N
        score_N, weight_N, p_right_N = row_weights.all_scores(), row_weights.all_weights(), row_weights.p_right_N()
        is_refined_N = torch.zeros(len(row_weights), dtype=torch.bool)
        if self.refiner:  # the present mean of one is over the scores of generated responses
            score_N = self.refiner.original_scores()
            p_right_N = torch.where(p_right_N.isnan(), p_right_N, torch.sigmoid(score_N))
            weight_N = row_weights.weights_of(score_N)
            weight_N = weight_N * (is_kept_N.sum() / weight_N.sum())
            is_refined_N[list(self.refiner.buffer.rows)] = True
        columns = {
            "weight": weight_N,
            "p_right": torch.where(is_kept_N, p_right_N, torch.nan),
            "score": torch.where(is_kept_N, score_N, torch.nan),
            "num_updates": row_weights.num_updates_N,
            "last_loss": row_weights.last_loss_N,
            "kept": is_kept_N & ~(p_right_N < 0.5),
            "refined": is_refined_N,
        }
        return {name: tensor.numpy() for name, tensor in columns.items()}

    def left_out_of_saving(self) -> AbstractContextManager[None]:
        """Within it, saving the model saves nothing of the weighting: that is in `state_dict`."""
        return self.reference.left_out_of_saving()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        parts = self._parts()
        return {f"{part}.{name}": t for part, owner in parts.items() for name, t in owner.state_dict().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`.

        Raises:
            ValueError: the state has other parts: its run had other settings.
        """
        saved, parts = {name.split(".")[0] for name in state}, self._parts()
        if mismatch := saved ^ {part for part, owner in parts.items() if owner.state_dict()}:
            raise ValueError(
                f"the checkpoint was written with other settings ({', '.join(sorted(mismatch))} in one and not the "
                "other): resume with the settings the run was started with"
            )
        for part, owner in parts.items():
            own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            try:
                owner.load_state_dict(own)
            except KeyError as error:
                raise ValueError(
                    f"the checkpoint was written with other settings (no {error} of the {part}): resume with the "
                    "settings the run was started with"
                ) from error

    def _parts(self) -> dict[str, RowWeights | ZeroReference | Refiner]:
        parts: dict[str, RowWeights | ZeroReference | Refiner] = {
            "row_weights": self.row_weights,
            "reference": self.reference,
        }
        return parts | ({"refiner": self.refiner} if self.refiner else {})

    def _row_name(self, example_id: int) -> str:
        return row_name(self.train_rows, "train_dataset", example_id)

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            tensor.copy_(self.accelerator.reduce(tensor, reduction="sum"))
