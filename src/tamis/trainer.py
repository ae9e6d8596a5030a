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
from datasets import Dataset, concatenate_datasets
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import set_seed
from trl import SFTTrainer

from tamis._compat import prepare_data_loader
from tamis.bilevel import penalty_gap, rho_at, row_coefficients
from tamis.config import BilevelConfig
from tamis.data import attach_example_ids, check_overlap, check_rows, fingerprint, row_name
from tamis.recorder import Recorder, checkpoint_step, last_complete_checkpoint, run_info, write_atomically
from tamis.references import ZeroReference, fused_forward, make_reference
from tamis.scout import judge_rows
from tamis.selectors import make_selector
from tamis.stream import BilevelBatchSampler, BilevelCollator, upper_id

logger = logging.getLogger(__name__)

_STATE_FILE = "tamis.safetensors"


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
        self.resolved = args.resolve()
        datasets = {
            "train_dataset": train_dataset,
            "validation_dataset": validation_dataset if args.uses_validation else None,
            "eval_dataset": eval_dataset,
        }
        datasets = {role: dataset for role, dataset in datasets.items() if dataset is not None}
        for role, dataset in datasets.items():
            check_rows(dataset, role)
        if "validation_dataset" in datasets:
            check_overlap(train_dataset, datasets["validation_dataset"], eval_dataset)
        self._fingerprints = {role: fingerprint(dataset) for role, dataset in datasets.items()}

        # Rows are numbered by their place, whatever a column of that name says.
        train_dataset = train_dataset.select_columns([c for c in train_dataset.column_names if c != "example_id"])
        self._train_rows = attach_example_ids(train_dataset)
        super().__init__(model, args, train_dataset=self._train_rows, eval_dataset=eval_dataset, **kwargs)
        self._report_dropped("train_dataset", self._train_rows, self.train_dataset)
        if isinstance(eval_dataset, Dataset):
            self._report_dropped("eval_dataset", eval_dataset, self.eval_dataset)
        self._validation_rows = datasets.get("validation_dataset")
        self.validation_dataset = None
        if self._validation_rows is not None:
            self.validation_dataset = self._prepare_validation_dataset(self._validation_rows)
        self.data_collator = BilevelCollator(self.data_collator)

        num_examples = len(self._train_rows)
        weight_N = torch.tensor(self._train_rows["weight"]) if args.selector == "column" else None
        self.selector = make_selector(
            args.selector,
            num_examples,
            score_map=self.resolved.score_map or "bounded",
            learning_rate=self.resolved.selector_learning_rate,
            temperature=args.bmo_temperature,
            weight_N=weight_N,
        )
        kept = set(self.train_dataset["example_id"])
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
        self._report_dropped("validation_dataset", dataset, prepared)
        return prepared

    def _report_dropped(self, role: str, rows: Dataset, prepared: Dataset) -> None:
        """Say how many rows TRL left out: those whose prompt alone fills `max_length`."""
        num_dropped = len(rows) - len(prepared)
        too_long = f"their prompt alone is longer than max_length={self.args.max_length}"
        if num_dropped == len(rows):
            raise ValueError(f"{role}: all {len(rows)} rows are left out, {too_long}. Raise --max_length")
        if num_dropped:
            shown = ""
            if "example_id" in prepared.column_names:
                kept = set(prepared["example_id"])
                lost = [i for i, example_id in enumerate(rows["example_id"]) if example_id not in kept]
                shown = f" (first: {row_name(rows, role, lost[0])})"
            logger.warning(f"{role}: {num_dropped} of {len(rows)} rows dropped, {too_long}{shown}. Raise --max_length")

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "example_id" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "example_id"]

    def get_train_dataloader(self) -> DataLoader:
        """One stream of batches: training rows first, validation rows after them (see `tamis.stream`)."""
        columns = ["input_ids", "labels", "example_id"]
        stream = self.train_dataset.select_columns(columns)
        num_upper = 0
        if self.validation_dataset is not None and self.args.trains_on_validation:
            upper = self.validation_dataset.select_columns(columns)
            stream, num_upper = concatenate_datasets([stream, upper.cast(stream.features)]), len(upper)
        sampler = BilevelBatchSampler(
            num_lower=len(self.train_dataset),
            num_upper=num_upper,
            lower_batch_size=self._train_batch_size,
            upper_batch_size=self.resolved.per_device_validation_batch_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
            drop_last=self.args.dataloader_drop_last,
        )
        dataloader = DataLoader(
            stream,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )
        # num_processes=1: the sampler has already taken this rank's share.
        return prepare_data_loader(
            dataloader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
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
        ids_L = torch.tensor(inputs.pop("example_ids"), dtype=torch.int64)
        num_tokens_B, upper_rows = torch.tensor(inputs.pop("num_tokens")), inputs.pop("upper_rows")
        num_lower = len(ids_L)
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True

        lower_inputs = {name: tensor[:num_lower] for name, tensor in inputs.items() if torch.is_tensor(tensor)}
        reference_L = torch.zeros(num_lower)
        if self.selector.uses_excess and num_lower:
            with self.accelerator.autocast():  # a copy of the model does not bring its own, as the model does
                reference_L = self.reference.losses(lower_inputs, ids_L)
        nll_B, outputs = fused_forward(model, inputs)

        loss_B = nll_B.detach().float().cpu()
        excess_L = loss_B[:num_lower] - reference_L
        self._stop_if_not_finite(torch.cat([excess_L, loss_B[num_lower:]]), ids_L, upper_rows)
        weights_L = self.selector.weights(ids_L, excess_L)
        rho = self.current_rho()
        lower_share_L = self._share(num_tokens_B[:num_lower], level=0)
        coefficients_B = row_coefficients(weights_L, rho, lower_share_L, self._share(num_tokens_B[num_lower:], level=1))
        self._window.append((ids_L, loss_B[:num_lower], excess_L))
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
        """Hand the rows of the step, from all its micro-batches and ranks, to the selector."""
        window = [self._window]
        if self.accelerator.num_processes > 1:
            window = gather_object(window)
        parts = (torch.cat(parts) for parts in zip(*(batch for rank in window for batch in rank), strict=True))
        ids, losses, excess = parts
        self._window.clear()
        if len(ids):
            self.selector.update(ids, losses, excess)
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
            self._refuse_foreign_checkpoint(resume_from_checkpoint)
        for line in [*self.resolved.announcements, f"reference = {self.reference.description}"]:
            logger.info(line)
        if self.recorder:
            self.recorder.write_config(self.config_settings, run_info(self._fingerprints, self.resolved.announcements))
            self.recorder.rewind(checkpoint_step(resume_from_checkpoint) if resume_from_checkpoint else 0)
        if self.resolved.scout_ratio and not resume_from_checkpoint:
            self._scout()
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        self._write_weights()
        return output

    def _scout(self) -> None:
        """Judge all training rows before the first step: see `tamis.scout`."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("scouting cannot put back a model sharded by DeepSpeed or FSDP: set --scout_ratio 0")
        *_, max_steps = self.set_initial_training_values(self.args, self.get_train_dataloader())
        num_steps = max(1, int(self.resolved.scout_ratio * max_steps))
        logger.info(f"scouting: {num_steps} steps on the validation rows, then all training rows are judged")
        loss_R, reference_R = judge_rows(
            self.model,
            self.args,
            self.train_dataset,
            self.validation_dataset,
            self.processing_class,
            self.data_collator,
            self.accelerator,
            reference=self.args.reference,
            num_steps=num_steps,
            learning_rate=self.resolved.scout_learning_rate,
            batch_size=self.resolved.per_device_validation_batch_size,
        )
        example_ids_R = torch.tensor(self.train_dataset["example_id"])
        self._stop_if_not_finite(loss_R, example_ids_R, [])
        self.selector.judge(example_ids_R, loss_R, loss_R - reference_R)
        self.reference.remember(example_ids_R, reference_R)
        self._write_weights()
        # Scouting has drawn from the global generators; the steps that follow are those of a run of their own.
        set_seed(self.args.seed)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            metrics = self._metrics["train"]
            metrics["num_tokens"] = [self._total_train_tokens]
            metrics["rho"] = [self.current_rho()]
            metrics["ess"] = [self.selector.effective_sample_size()]
            metrics["ess_ratio"] = [metrics["ess"][0] / len(self._train_rows)]
            metrics["weight_entropy"] = [self.selector.entropy()]
        super().log(logs, start_time)
        if self.recorder:
            self.recorder.log({"step": self.state.global_step, **logs})

    def _save_checkpoint(self, model, trial) -> None:
        super()._save_checkpoint(model, trial)
        self._write_weights()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {f"selector.{name}": tensor for name, tensor in self.selector.state_dict().items()}
            state |= {f"reference.{name}": tensor for name, tensor in self.reference.state_dict().items()}
            state["num_tokens"] = torch.tensor(self._total_train_tokens)
            state = {name: tensor.contiguous() for name, tensor in state.items()}
            metadata = {"train_dataset": self._fingerprints["train_dataset"]}
            write_atomically(Path(output_dir) / _STATE_FILE, lambda path: save_file(state, path, metadata))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = load_file(Path(checkpoint) / _STATE_FILE)
        self._total_train_tokens = int(state["num_tokens"])
        for part in ("selector", "reference"):
            own = {name.removeprefix(f"{part}."): t for name, t in state.items() if name.startswith(f"{part}.")}
            getattr(self, part).load_state_dict(own)

    def _refuse_foreign_checkpoint(self, checkpoint: str | Path) -> None:
        path = Path(checkpoint) / _STATE_FILE
        if not path.is_file():
            raise ValueError(f"{checkpoint} has no {_STATE_FILE}: it was not written by tamis, start a new run from it")
        with safe_open(path, "pt") as state:
            if state.metadata()["train_dataset"] != self._fingerprints["train_dataset"]:
                raise ValueError(
                    f"{checkpoint} was written while training on other rows, or on the same in another order: "
                    "resume with the train_dataset the run was started with"
                )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with self.reference.left_out_of_saving():
            super()._save(output_dir, state_dict)

    def _write_weights(self) -> None:
        if self.recorder:
            self.recorder.write_weights(self._train_rows, self.selector, kept_ids=self.train_dataset["example_id"])

    def _send_telemetry(self) -> None:
        """TRL reports every constructed trainer to its makers; a run of tamis is nobody else's business."""
