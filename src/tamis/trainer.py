"""`BilevelTrainer`: TRL's `SFTTrainer` with a coefficient on every row.

One forward over the training and validation rows of a micro-batch, per-row losses from TRL's fused LM head, row
coefficients, one backward. Everything else (formats, masks, LoRA, checkpoints, loggers, distribution) is inherited.

Shape suffixes: B rows of a micro-batch, L its training rows, N rows of the training dataset, T tokens.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed
from trl import SFTTrainer

from tamis import checkpoint as checkpoints
from tamis.bilevel import penalty_gap, rho_at, row_coefficients
from tamis.config import BilevelConfig
from tamis.generation import GenerationError, check_installed
from tamis.recorder import Recorder, checkpoint_step, last_complete_checkpoint, run_info
from tamis.references import ZeroReference, fused_forward, make_reference
from tamis.refine import Refiner, make_refiner
from tamis.rows import attach_example_ids, check_overlap, check_rows, fingerprint, report_dropped, row_name, row_table
from tamis.scout import SCOUT_FILE, Scout
from tamis.selectors import make_selector
from tamis.stream import BilevelCollator, make_dataloader, upper_id

logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """A row's loss is NaN or infinite. Raised before the optimizer step: model and checkpoints are as they were."""


class BilevelTrainer(SFTTrainer):
    """Trains on doubtful rows under the guidance of trusted ones, and learns a weight for every doubtful row.

    >>> trainer = BilevelTrainer(
    ...     "Qwen/Qwen3-0.6B",
    ...     args=BilevelConfig(output_dir="run"),
    ...     train_dataset=doubtful_rows,
    ...     validation_dataset=trusted_rows,
    ... )
    >>> trainer.train()  # writes run/weights.parquet

    Args:
        model, processing_class, peft_config, ...: as in [`~trl.SFTTrainer`].
        args: settings; `BilevelConfig` documents what is not TRL's.
        train_dataset: lower level, in any text format of TRL. A column ``weight`` is read by selector ``column``.
        validation_dataset: upper level, the rows that are trusted. May be None only where the selector needs none.
        eval_dataset: held-out rows, never trained on, never used for selection. `eval_loss` is the mean over rows of
            the token-mean loss; `eval_exact_match` the share of rows whose every token is the model's first choice,
            which is what greedy decoding reproduces exactly.

    Raises:
        ValueError: the data or the settings cannot work; said before the model is loaded.
        NonFiniteLossError: while training, see there.
    """

    _tag_names = ["trl", "sft", "tamis"]
    _name = "tamis"
    _paper = {
        "title": "A Unified Understanding of Offline Data Selection and Online Self-refining Generation for "
        "Post-training LLMs",
        "id": "2511.21056",
        "citation": "@article{xiao2025unified, title={A Unified Understanding of Offline Data Selection and Online "
        "Self-refining Generation for Post-training LLMs}, author={Xiao, Quan and Chen, Tianyi}, year={2025}, "
        "eprint={2511.21056}, archivePrefix={arXiv}}",
    }
    args: BilevelConfig
    model: Any
    optimizer: Any
    processing_class: Any
    _signature_columns: Any
    train_dataset: Dataset
    # The coefficients of a step sum over its whole accumulation window: see `row_coefficients`.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    def __init__(
        self,
        model: Any,
        args: BilevelConfig,
        *,
        train_dataset: Dataset,
        validation_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        args.check(has_validation=validation_dataset is not None, has_weight="weight" in train_dataset.column_names)
        if args.refine_fraction:
            check_installed(args.generator)
        self.resolved = args.resolve()
        datasets = {
            "train_dataset": train_dataset,
            "validation_dataset": validation_dataset if args.uses_validation else None,
            "eval_dataset": eval_dataset,
        }
        datasets = {role: dataset for role, dataset in datasets.items() if dataset is not None}
        hashes = {role: check_rows(dataset, role) for role, dataset in datasets.items()}
        if "validation_dataset" in datasets:
            check_overlap(datasets, hashes)
        self._fingerprints = {role: fingerprint(hashes[role]) for role in datasets}

        # Rows are numbered by their place, whatever a column of that name says.
        train_dataset = train_dataset.select_columns([c for c in train_dataset.column_names if c != "example_id"])
        self._train_rows = attach_example_ids(train_dataset)
        self._row_table = row_table(self._train_rows, hashes["train_dataset"])
        super().__init__(model, args, train_dataset=self._train_rows, eval_dataset=eval_dataset, **kwargs)
        report_dropped("train_dataset", self._train_rows, self.train_dataset, args.max_length)
        if isinstance(eval_dataset, Dataset):
            report_dropped("eval_dataset", eval_dataset, self.eval_dataset, args.max_length)
        self._validation_rows = datasets.get("validation_dataset")
        self.validation_dataset = None
        if self._validation_rows is not None:
            self.validation_dataset = self._prepare_validation_dataset(self._validation_rows)
        self.data_collator = BilevelCollator(self.data_collator)

        num_examples = len(self._train_rows)
        weight_N = torch.tensor(self._train_rows["weight"][:]) if args.selector == "column" else None
        self.selector = make_selector(
            args.selector,
            num_examples,
            score_map=self.resolved.score_map or "bounded",
            learning_rate=self.resolved.selector_learning_rate,
            temperature=args.bmo_temperature,
            weight_N=weight_N,
        )
        kept = set(self.train_dataset["example_id"][:])
        self.selector.exclude(torch.tensor([i for i in range(num_examples) if i not in kept], dtype=torch.int64))
        self.reference = ZeroReference()
        if self.selector.uses_excess:
            self.reference = make_reference(
                args.reference,
                self.model,
                num_examples,
                keep_copy=not self.resolved.scout_ratio,
                reduce_gradient=self._sum_over_ranks,
            )
        self.scout: Scout | None = None
        if self.resolved.scout_ratio or (
            args.refine_fraction and args.reference == "base" and self.selector.uses_excess
        ):
            self.scout = Scout(
                self.model,
                args,
                self.data_collator,
                self.accelerator,
                self.processing_class,
                args.reference,
                keep_base=bool(args.refine_fraction),
            )
        self.refiner: Refiner | None = None  # made by `train`, which knows how many steps there are
        # What `config.yaml` gets: the command line adds the model and the files, see `tamis.run`.
        self.config_settings = args.given_settings
        self.recorder = Recorder(str(args.output_dir)) if self.accelerator.is_main_process else None
        self._window: list[tuple[Tensor, ...]] = []

    # --- data -------------------------------------------------------------------------------------------------------

    def _prepare_validation_dataset(self, dataset: Dataset) -> Dataset:
        places = [upper_id(i) for i in range(len(dataset))]
        dataset = dataset.select_columns([c for c in dataset.column_names if c != "example_id"])
        dataset = dataset.add_column("example_id", places)
        prepared = self._prepare_dataset(
            dataset, self.processing_class, self.args, False, self._formatting_func, "validation"
        )
        report_dropped("validation_dataset", dataset, prepared, self.args.max_length)
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "example_id" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "example_id"]

    def get_train_dataloader(self) -> DataLoader:
        """One stream of batches: training rows first, validation rows after them (see `tamis.stream`)."""
        return make_dataloader(
            self.train_dataset,
            self.validation_dataset if self.args.trains_on_validation else None,
            self.data_collator,
            self.args,
            lower_batch_size=self._train_batch_size,
            upper_batch_size=self.resolved.per_device_validation_batch_size,
            epoch=lambda: int(self.state.epoch or 0),
            device=self.accelerator.device,
        )

    def num_examples(self, dataloader: DataLoader) -> int:
        """Rows in one epoch: the training rows. The validation rows only ride along."""
        return (
            len(self.train_dataset)
            if dataloader is self.callback_handler.train_dataloader
            else super().num_examples(dataloader)
        )

    # --- one step ---------------------------------------------------------------------------------------------------

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor | int | None:
        """Count what the two means of one optimizer step run over: rows and tokens of each level, on all ranks."""
        if not batch_samples or "example_ids" not in batch_samples[0]:
            return super()._get_num_items_in_batch(batch_samples, device)
        totals = torch.zeros(4, dtype=torch.int64)
        for batch in batch_samples:
            num_lower, num_tokens = len(batch["example_ids"]), batch["num_tokens"]
            totals += torch.tensor(
                [num_lower, len(num_tokens) - num_lower, sum(num_tokens[:num_lower]), sum(num_tokens[num_lower:])]
            )
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(device), reduction="sum")
        self._window_totals = totals.clamp(min=1).tolist()
        return None

    def current_rho(self) -> float:
        """Share of the upper level in the present step."""
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return rho_at(progress, self.resolved.rho_start, self.args.rho, self.args.rho_decay_ratio)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one micro-batch: ``sum c * l`` over its rows when training, the mean over rows in evaluation."""
        if not self.model.training or "example_ids" not in inputs:
            return self._evaluation_loss(model, inputs, return_outputs, num_items_in_batch)
        example_ids, answers = inputs.pop("example_ids"), inputs.pop("answers")
        ids_L = torch.tensor(example_ids, dtype=torch.int64)
        num_tokens_B, upper_rows = torch.tensor(inputs.pop("num_tokens")), inputs.pop("upper_rows")
        num_lower = len(ids_L)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True

        lower_inputs = {name: tensor[:num_lower] for name, tensor in inputs.items() if torch.is_tensor(tensor)}
        reference_L = torch.zeros(num_lower)
        if self.selector.uses_excess and num_lower:
            known_L = self.refiner.reference_losses(example_ids, answers) if self.refiner else None
            with self.accelerator.autocast():  # a copy of the model does not bring its own, as the model does
                reference_L = self.reference.losses(lower_inputs, ids_L, known_L)
        nll_B, outputs = fused_forward(model, inputs)

        loss_B = nll_B.detach().float().cpu()
        excess_L = loss_B[:num_lower] - reference_L
        self._stop_if_not_finite(torch.cat([excess_L, loss_B[num_lower:]]), ids_L, upper_rows)
        weights_L = self.selector.weights(ids_L, excess_L)
        answers_L, log_prob_L = torch.tensor(answers, dtype=torch.int64), (-loss_B * num_tokens_B)[:num_lower]
        if self.refiner:
            coefficients_L = self.refiner.coefficients(example_ids, answers, log_prob_L.tolist())
            weights_L = weights_L * coefficients_L
            if (answers_L >= 0).any():
                self._metrics["train"]["response_coefficient"] += coefficients_L[answers_L >= 0].tolist()
        rho = self.current_rho()
        lower_share_L = self._share(num_tokens_B[:num_lower], level=0)
        coefficients_B = row_coefficients(weights_L, rho, lower_share_L, self._share(num_tokens_B[num_lower:], level=1))
        self._window.append((ids_L, loss_B[:num_lower], excess_L, answers_L, log_prob_L))
        self._note_metrics(loss_B, excess_L, weights_L)
        self._total_train_tokens += int(num_tokens_B.sum()) * self.accelerator.num_processes

        # DDP averages the gradients over the ranks; the coefficients sum to one over all of them.
        loss = (coefficients_B.to(nll_B.device) * nll_B).sum() * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
        if num_lower:
            self.reference.backward((1.0 - rho) * weights_L * lower_share_L)
        return loss

    def _share(self, num_tokens_R: Tensor, level: int) -> Tensor:
        """What each of R rows counts in the mean over its level (0 lower, 1 upper) of the whole step."""
        if self.args.loss_reduction == "token":
            return num_tokens_R / self._window_totals[2 + level]
        return torch.full((len(num_tokens_R),), 1.0 / self._window_totals[level])

    def _stop_if_not_finite(self, loss_B: Tensor, ids_L: Tensor, upper_rows: list[int]) -> None:
        if loss_B.isfinite().all():
            return
        bad = (~loss_B.isfinite()).nonzero().squeeze(1).tolist()
        places = [(self._train_rows, "train_dataset", int(i)) for i in ids_L]
        places += [(self._validation_rows, "validation_dataset", i) for i in upper_rows]
        names = [row_name(*places[i]) for i in bad]
        raise NonFiniteLossError(
            f"step {self.state.global_step + 1}: the loss is not finite on {', '.join(names[:8])}"
            f"{', ...' if len(names) > 8 else ''}. Stopped before the optimizer step; the last checkpoint is intact. "
            "Look at the named rows; if every row is affected, lower --learning_rate."
        )

    def _note_metrics(self, loss_B: Tensor, excess_L: Tensor, weights_L: Tensor) -> None:
        metrics, num_lower = self._metrics["train"], len(excess_L)
        if num_lower:
            metrics["lower_loss"].append(loss_B[:num_lower].mean().item())
            metrics["weighted_lower_loss"].append((weights_L * loss_B[:num_lower]).mean().item())
            metrics["penalty_gap"].append(penalty_gap(weights_L, excess_L).item())
        if len(loss_B) > num_lower:
            metrics["upper_loss"].append(loss_B[num_lower:].mean().item())

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._commit_step()
        return loss

    def _commit_step(self) -> None:
        """Hand the rows of the step, from all its micro-batches and ranks, to the selector and the refiner."""
        window = [self._window]
        if self.accelerator.num_processes > 1:
            window = gather_object(window)
        parts = (torch.cat(parts) for parts in zip(*(batch for rank in window for batch in rank), strict=True))
        ids, losses, excess, answers, log_probs = parts
        self._window.clear()
        if len(ids):
            self.selector.update(ids, losses, excess)
        if self.refiner:
            self.refiner.commit(ids.tolist(), answers.tolist(), log_probs.tolist())
        self.reference.step(self.args.reference_learning_rate or self._get_learning_rate())

    def _sum_over_ranks(self, tensor: Tensor) -> None:
        if self.accelerator.num_processes > 1:
            tensor.copy_(self.accelerator.reduce(tensor, reduction="sum"))

    def _evaluation_loss(self, model, inputs, return_outputs, num_items_in_batch):
        if return_outputs:  # a user's compute_metrics wants the logits: TRL's own path builds them
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        nll_B, outputs = fused_forward(model, inputs)
        exact_B = (outputs.is_top1.bool() | ~outputs.label_mask).all(dim=1)
        exact_B = self.accelerator.gather_for_metrics(exact_B.float().contiguous())
        self._metrics["eval"]["exact_match"].extend(exact_B.tolist())
        return nll_B.mean()

    # --- what a run leaves behind -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ):
        """Train, and leave `config.yaml`, `metrics.jsonl` and `weights.parquet` in the run directory.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest complete one of `output_dir`.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete_checkpoint(str(self.args.output_dir))
        if resume_from_checkpoint:
            checkpoints.refuse_foreign(resume_from_checkpoint, self._fingerprints["train_dataset"])
        for line in [*self.resolved.announcements, f"reference = {self.reference.description}"]:
            logger.info(line)
        if self.recorder:
            self.recorder.write_config(self.config_settings, run_info(self._fingerprints, self.resolved.announcements))
            self.recorder.rewind(checkpoint_step(resume_from_checkpoint) if resume_from_checkpoint else 0)
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        if (self.scout or self.args.refine_fraction) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "neither scouting nor refining works on a model sharded by DeepSpeed or FSDP: set --scout_ratio 0 and "
                "--refine_fraction 0"
            )
        if self.args.refine_fraction:
            self.refiner = make_refiner(
                self.args,
                self.resolved,
                max_steps,
                model=self.model,
                accelerator=self.accelerator,
                processing_class=self.processing_class,
                train_dataset=self.train_dataset,
                validation_dataset=self.validation_dataset,
                collator=self.data_collator,
                selector=self.selector,
                scout=self.scout,
            )
        if self.scout and self.resolved.scout_ratio and not resume_from_checkpoint:
            self._scout(self.scout, max_steps)
        elif self.scout and self.refiner and self.resolved.scout_ratio:
            run_dirs = Path(str(self.args.output_dir)), Path(str(resume_from_checkpoint)).parent
            self.scout.load(next((d for d in run_dirs if (d / SCOUT_FILE).is_file()), run_dirs[0]) / SCOUT_FILE)
        if not self.refiner:
            self.scout = None  # no more rows to judge: its parameters need not be kept
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._write_weights()
        return output

    def _scout(self, scout: Scout, max_steps: int) -> None:
        """Judge all training rows before the first step: see `tamis.scout`."""
        num_steps = max(1, int(self.resolved.scout_ratio * max_steps))
        logger.info(f"scouting: {num_steps} steps on the validation rows, then all training rows are judged")
        reference_R = scout.reference_losses(self.train_dataset, "rows before scouting")
        scout.descend(
            self.validation_dataset,
            num_steps=num_steps,
            learning_rate=self.resolved.scout_learning_rate,
            batch_size=self.resolved.per_device_validation_batch_size,
        )
        loss_R = scout.losses(self.train_dataset, "rows after scouting")
        example_ids_R = torch.tensor(self.train_dataset["example_id"][:])
        self._stop_if_not_finite(loss_R, example_ids_R, [])
        self.selector.judge(example_ids_R, loss_R, loss_R - reference_R)
        self.reference.remember(example_ids_R, reference_R)
        self._write_weights()
        if self.refiner and self.recorder:
            scout.save(self.recorder.output_dir / SCOUT_FILE)
        # Scouting has drawn from the global generators; the steps that follow are those of a run of their own.
        set_seed(self.args.seed)

    # --- refining ---------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of one step; refined questions come with generated answers.

        Answers are put in here and not by the collator, which works ahead of the steps, in other processes at times: a
        batch would carry the answers of before the refresh, and a resumed run others than an uninterrupted one.
        """
        step, refiner = self.state.global_step, self.refiner
        if refiner:
            if refiner.is_due(step):
                self._refresh(refiner)
            epoch_iterator = (refiner.rewrite(batch, step, device) for batch in epoch_iterator)
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _refresh(self, refiner: Refiner) -> None:
        step = self.state.global_step
        try:
            records = refiner.refresh(step)
        except GenerationError as error:
            if self.args.refine_on_error == "continue":
                logger.warning(f"step {step}: no new answers, training goes on with those there are ({error})")
                refiner.last_refresh = step
                return
            self._save_checkpoint(self.model, trial=None)
            raise GenerationError(
                f"{error}. Stopped after saving checkpoint-{step}: go on with --resume_from_checkpoint last, or with "
                "--refine_on_error continue"
            ) from error
        logger.info(refiner.summary(step))
        if len(refiner.buffer.questions) < len(records) / 2:
            logger.warning(
                "most questions got no usable answer: raise --max_new_tokens, or see to it that the model ends its "
                "answers (--eos_token)"
            )
        self._metrics["train"] |= {name: [value] for name, value in refiner.history.items()}
        if self.recorder:
            self.recorder.add_refinements(records, self._train_rows, self.processing_class)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._metrics["train"]
            metrics["num_tokens"] = [self._total_train_tokens]
            metrics["rho"] = [self.current_rho()]
            metrics["ess"] = [self.selector.effective_sample_size()]
            metrics["ess_ratio"] = [metrics["ess"][0] / len(self._train_rows)]
            metrics["weight_entropy"] = [self.selector.entropy()]
            if self.refiner:
                metrics |= {name: [value] for name, value in self.refiner.buffer.metrics().items()}
        super().log(logs, start_time)
        if self.recorder:
            self.recorder.log({"step": self.state.global_step, **logs})

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self._write_weights()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            fingerprint = self._fingerprints["train_dataset"]
            checkpoints.save_state(output_dir, self._parts(), self._total_train_tokens, fingerprint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._total_train_tokens = checkpoints.load_state(checkpoint, self._parts())

    def _parts(self) -> dict[str, checkpoints.Stateful]:
        parts: dict[str, checkpoints.Stateful] = {"selector": self.selector, "reference": self.reference}
        return parts | ({"refiner": self.refiner} if self.refiner else {})

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self.reference.left_out_of_saving():
            super()._save(output_dir, state_dict)

    def _write_weights(self) -> None:
        if self.recorder:
            own: dict[str, Any] = {}
            if self.refiner:
                own = {"own_score_N": self.refiner.own_scores(), "refined_ids": list(self.refiner.buffer.questions)}
            kept_ids = self.train_dataset["example_id"][:]
            self.recorder.write_weights(self._row_table, self.selector, kept_ids=kept_ids, **own)

    def _send_telemetry(self) -> None:
        """TRL reports every constructed trainer to its makers; a run of tamis is nobody else's business."""
