"""`BilevelTrainer`: TRL's `SFTTrainer` with a coefficient on every row.

One forward over the training and validation rows of a micro-batch, per-row losses from TRL's fused LM head, row
coefficients, one backward. What a training row counts is asked of `tamis.weighting.RowWeighting`, which is treated as
an optimizer is; everything else (formats, masks, LoRA, checkpoints, loggers, distribution) is inherited.

Shape suffixes: B rows of a micro-batch, training rows first; L its training rows.
"""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from copy import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.trainer_utils import TrainOutput

from tamis import checkpoint as checkpoints
from tamis.bilevel import rho_at, row_coefficients
from tamis.boundaries import one_warning, tokenized_apart
from tamis.checks import check_settings, settle_arguments
from tamis.config import BilevelConfig
from tamis.earlier_scores import read_scores
from tamis.evaluation import RowEvaluation
from tamis.files import writing
from tamis.forms import has_customary_columns, is_in_tokens
from tamis.hashes import fingerprint
from tamis.inference import describe
from tamis.inputs import check_datasets, held_out_datasets, named_datasets, without_repeats
from tamis.joined_rows import JoinedRows
from tamis.lengths import check_lengths, with_num_tokens
from tamis.losses import fused_forward, stop_if_not_finite
from tamis.output_dir import announce_users_files, claimed, refuse_earlier_run, remove_earlier_run, users_card_kept
from tamis.prerequisites import refuse_unreachable
from tamis.prompts import Prompts, check_template
from tamis.recorder import Recorder, checkpoint_state, end_rotation, find_checkpoint, run_info
from tamis.resuming import ResumableTrainer
from tamis.rows import attach_example_ids, row_name, row_table
from tamis.selection.selectors import Selector
from tamis.stream import Batches, BatchRows, MicroBatch, PreparedRows, make_stream
from tamis.trl_options import refuse_parallelism
from tamis.weighting import RowWeighting

logger = logging.getLogger(__name__)


class BilevelTrainer(RowEvaluation, ResumableTrainer, JoinedRows):
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
        args: settings; `BilevelConfig` documents what is not TRL's. None: its defaults, in a folder ``MODEL-tamis``.
        train_dataset: the rows to weigh, in any text format of TRL, with customary columns such as Alpaca's, or as
            ``input_ids``; of a `DatasetDict` the split ``train``. A column ``weight`` is read by ``column``.
        validation_dataset: the rows that are trusted, of a `DatasetDict` the split ``validation``. May be None only
            where the selector needs none, or ``scores`` are given.
        eval_dataset: held-out rows, never trained on, never used for selection; or a dict of several such data sets,
            by name. `tamis.evaluation.RowEvaluation` documents the metrics.
        formatting_func: makes the text of a row, as in [`~trl.SFTTrainer`].
        selector: a name of `BilevelConfig.selector`, or a `tamis.Selector` of your own; that of ``args`` when None.
        prompt_template: what writes the prompts of rows without roles: ``auto``, ``chat``, ``plain``, ``alpaca`` or a
            jinja file, see `tamis.prompts.Prompts`. None: rows with TRL's columns stay as they are, as in
            [`~trl.SFTTrainer`], and it is ``auto`` for others.

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
    train_dataset: Dataset
    # The coefficients of a step sum over its whole accumulation window: see `row_coefficients`.
    loss_is_scaled_for_ga = True  # type: ignore[assignment]

    def __init__(
        self,
        model: Any,
        args: BilevelConfig | None = None,
        *,
        train_dataset: Dataset | DatasetDict,
        validation_dataset: Dataset | DatasetDict | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        selector: str | Selector | None = None,
        prompt_template: str | None = None,
        **kwargs: Any,
    ):
        args = settle_arguments(model, args, selector, kwargs)
        selector = None if isinstance(selector, str) else selector
        check_template(prompt_template)
        formatting_func = kwargs.pop("formatting_func", None)
        if prompt_template is None and formatting_func is None and has_customary_columns(train_dataset):
            prompt_template = "auto"
        datasets = named_datasets(train_dataset, validation_dataset, eval_dataset, formatting_func)
        check_settings(args, datasets, selector)
        self.resolved = args.resolve(
            selector,
            num_training=len(datasets["train_dataset"]),
            num_validation=len(datasets.get("validation_dataset", ())),
        )
        if not args.uses_validation(selector):
            datasets.pop("validation_dataset", None)
        hashes = check_datasets(datasets, args)
        self._fingerprints = {role: fingerprint(hashes[role]) for role in datasets}
        if (role := "validation_dataset") in datasets:
            datasets[role] = without_repeats(datasets[role], hashes[role], role)
        refuse_unreachable(model, args)
        self.prompts = Prompts(prompt_template, args, datasets, model, kwargs.get("processing_class"))
        self.prompts.announce(self.resolved)
        if self.prompts.assistant_only_loss and not args.assistant_only_loss:
            args = copy(args)  # of these rows alone
            args.assistant_only_loss = True
        datasets = {role: attach_example_ids(_without_ids(dataset)) for role, dataset in self.prompts.datasets.items()}
        self._train_rows, self._validation_rows = datasets["train_dataset"], datasets.get("validation_dataset")
        self._row_table = row_table(self._train_rows, hashes["train_dataset"])
        self._earlier_scores = None
        if args.takes_scores(selector):
            name_of = partial(row_name, self._train_rows, "train_dataset")
            hash_N = self._row_table["content_hash"]
            self._earlier_scores = read_scores(str(args.scores), str(args.output_dir), hash_N, name_of)
            self._fingerprints["scores"] = self._earlier_scores.fingerprint
        kwargs["processing_class"] = self.prompts.processing_class
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: datasets[f"eval_dataset[{name!r}]"] for name in eval_dataset}
        else:
            eval_dataset = datasets.get("eval_dataset")
        super().__init__(model, args, train_dataset=self._train_rows, eval_dataset=eval_dataset, **kwargs)
        refuse_parallelism(self.accelerator.parallelism_config)
        self._prepare_validation_rows(datasets)
        # What the run directory gets: the command line adds the model, the files and their bad rows, see `tamis.run`.
        self.config_settings = args.given_settings
        self.skipped_rows: list[dict[str, Any]] = []
        self.recorder = Recorder(self._output_dir) if self.accelerator.is_main_process else None
        self._make_batches()
        self._make_weighting(selector)

    def _prepare_validation_rows(self, datasets: dict[str, Dataset]) -> None:
        """Prepare them as TRL has prepared the others, and say what became of the rows of all data sets."""
        self.validation_dataset = None
        if self._validation_rows is not None:
            self.validation_dataset = self._prepare_dataset(
                self._validation_rows, self.processing_class, self.args, False, self._formatting_func, "validation"
            )
        prepared = {"train_dataset": self.train_dataset, "validation_dataset": self.validation_dataset}
        for role, dataset in (prepared | held_out_datasets(self.eval_dataset)).items():
            if dataset is not None:
                check_lengths(role, datasets[role], dataset, self.args.max_length, self.model.config.get_text_config())

    def _make_batches(self) -> None:
        rows = PreparedRows(self.train_dataset)
        validation_rows = None if self.validation_dataset is None else PreparedRows(self.validation_dataset)
        self.batches = Batches(rows, validation_rows, self.data_collator, self.accelerator, self.args.loss_reduction)

    def _make_weighting(self, selector: Selector | None) -> None:
        args = self.args
        self.weighting = RowWeighting(
            args,
            self.resolved,
            selector,
            model=self.model,
            accelerator=self.accelerator,
            processing_class=self._tokenizer,
            train_rows=self._train_rows,
            train_dataset=self.train_dataset,
            validation_dataset=self.validation_dataset,
            batches=self.batches,
            earlier_scores=self._earlier_scores,
            recorder=self.recorder,
        )
        self.weighting.plan(self.num_steps())
        name = args.selector if selector is None else type(selector).__name__
        self._identity = checkpoints.identify(args, self.resolved, self._fingerprints, name)

    def num_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    @property
    def _output_dir(self) -> str:
        return str(self.args.output_dir)

    # --- data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """See [`~trl.SFTTrainer`]; `num_tokens` says how long each row was before it was cut to ``max_length``."""
        uncut = copy(args)
        uncut.max_length, uncut.shuffle_dataset = None, False
        with one_warning(dataset):
            whole = super()._prepare_dataset(dataset, processing_class, uncut, packing, formatting_func, dataset_name)
        if not is_in_tokens(dataset):
            whole = tokenized_apart(dataset_name, whole, self._tokenizer, self.completion_only_loss)
        whole = with_num_tokens(whole)
        return super()._prepare_dataset(whole, processing_class, args, packing, None, dataset_name)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The stream of ids of the rows of each micro-batch; `get_batch_samples` turns them into tensors."""
        return make_stream(
            self.batches.training,
            self.batches.validation if self.args.trains_on_validation else None,
            self.args,
            training_batch_size=self._train_batch_size,
            validation_rows_per_step=self.resolved.validation_rows_per_step,
            visits=lambda: self.weighting.visits(),
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[MicroBatch], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], None]:
        """The micro-batches of one optimizer step, collated once the responses of the step are chosen."""
        step, batches = self.state.global_step, list(islice(epoch_iterator, num_batches))
        try:
            batches = self.weighting.before_step(step, batches)
        except checkpoints.ResumableError as error:
            self._save_checkpoint(self.model, trial=None)
            hint = f"Stopped after saving checkpoint-{step}: go on with `resume_from_checkpoint='last'`"
            raise type(error)(f"{error}. {hint}") from error
        return self.batches.collate(batches), None

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Rows in one epoch: the training rows. The validation rows only ride along."""
        is_stream = dataloader is self.callback_handler.train_dataloader
        return len(self.train_dataset) if is_stream else super().num_examples(dataloader)

    # --- one step ---------------------------------------------------------------------------------------------------

    def current_rho(self) -> float:
        """Share of the validation loss in the present step."""
        rho, rho_start = self.resolved.rho, self.resolved.rho_start
        if rho is None or rho_start is None:
            return self.weighting.rho()
        progress = self.state.global_step / max(self.state.max_steps, 1)
        return rho_at(progress, rho_start, rho, self.args.rho_decay_ratio)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Loss of one micro-batch in training: ``sum c * l`` over its rows. For evaluation see `RowEvaluation`."""
        rows: BatchRows = inputs.pop("rows")
        if self.aux_loss_enabled:
            inputs["output_router_logits"] = True
        nll_B, outputs = fused_forward(model, inputs)
        loss_B = nll_B.detach().float().cpu()
        stop_if_not_finite(loss_B, lambda place: self._row_name(rows, place), self.state.global_step)
        weights_L = self.weighting.weights(rows, inputs, loss_B)
        coefficients_B = row_coefficients(weights_L, self.current_rho(), rows.share_B)
        # DDP averages the gradients over the ranks; the coefficients sum to one over all of them.
        loss: Tensor = (coefficients_B.to(nll_B.device) * nll_B).sum() * self.accelerator.num_processes
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / self.current_gradient_accumulation_steps
            aux_losses = self.accelerator.gather_for_metrics(outputs.aux_loss.detach())
            self._metrics["train"]["aux_loss"].append(aux_losses.mean().item())
        self.weighting.backward(coefficients_B[: rows.num_training])
        return loss

    def _row_name(self, rows: BatchRows, place: int) -> str:
        if place < rows.num_training:
            return row_name(self._train_rows, "train_dataset", rows.training_ids[place])
        assert self._validation_rows is not None, "the batch has rows of it"
        example_id = rows.validation_ids[place - rows.num_training]
        return row_name(self._validation_rows, "validation_dataset", example_id)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """See [`~transformers.Trainer`]; after the last micro-batch of a step the weighting is updated."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            metrics = self.weighting.commit(self._get_learning_rate())
            self._total_train_tokens += int(metrics.pop("num_tokens"))
            for name, value in metrics.items():
                self._metrics["train"][name].append(value)
        return loss

    @property
    def row_weights(self) -> dict[str, list[Any] | np.ndarray[Any, Any]]:
        """What is known of every training row, in order, for `pandas.DataFrame` and the like.

        Columns: ``row`` and ``source`` (its place and file, or its place in the data set and None), ``weight`` (mean
        one) and ``p_right`` (NaN where it is not known). `weights.parquet` has more.
        """
        columns = self.weighting.columns()
        names = {name: self._row_table[name].to_pylist() for name in ("row", "source")}
        return names | {name: columns[name] for name in ("weight", "p_right")}

    # --- what a run leaves behind -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, and leave `config.yaml`, `metrics.jsonl` and `weights.parquet` in the run directory.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True or "last" for the newest complete one of `output_dir`.
                From the last one of a finished run nothing is trained: the model is loaded.

        Raises:
            ValueError: see `checkpoint_to_resume`; or `output_dir` is in use, or holds a run that would be overwritten.
        """
        with claimed(self._output_dir) if self.recorder else nullcontext():
            checkpoint = self.checkpoint_to_resume(resume_from_checkpoint)
            replaces = self.args.overwrite_output_dir or (bool(resume_from_checkpoint) and not checkpoint)
            return self._train(checkpoint, replaces, trial, ignore_keys_for_eval)

    def checkpoint_to_resume(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint that `train` would go on from; None where it begins at the first step.

        Raises:
            ValueError: there is none, or it belongs to a run that means something else.
        """
        if not resume_from_checkpoint:
            return None
        checkpoint = find_checkpoint(self._output_dir, resume_from_checkpoint)
        if checkpoint is not None:
            checkpoints.refuse_foreign(checkpoint, self._identity)
        return checkpoint

    def _train(self, resume: str | None, replaces: bool, *others: Any) -> TrainOutput:
        announcements = [*self.resolved.announcements, *self.weighting.announcements]
        for line in announcements:
            logger.info(line)
        if self.recorder:
            if not resume or Path(resume).resolve().parent != Path(self._output_dir).resolve():
                if not replaces:
                    refuse_earlier_run(self._output_dir)
                remove_earlier_run(self._output_dir, keeps_trials=not self.args.overwrite_output_dir)
            else:
                end_rotation(resume, self.args.save_total_limit)
            announce_users_files(self._output_dir)
            self.recorder.write_config(self.config_settings, run_info(self._fingerprints, announcements))
            self.recorder.write_skipped(self.skipped_rows)
            if resume:
                state = checkpoint_state(resume)
                step = state["global_step"]
                self.recorder.rewind(step, sum(record["step"] == step for record in state["log_history"]))
        output = super().train(resume, *others)
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best and not self.args.save_only_model:
            self.weighting.load_state_dict(checkpoints.load_state(best)[0])  # the model is that of this checkpoint
        self._write_weights()
        return output

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self.weighting.begin(prepared[0], max_steps, resume_from_checkpoint)
        if not resume_from_checkpoint:
            self._write_weights()
        return prepared

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.weighting.remember_base()
        super()._load_from_checkpoint(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log also the share of the validation loss and how the weights stand; append to `metrics.jsonl`."""
        if self.model.training:
            found = {"num_tokens": self._total_train_tokens, "rho": self.current_rho(), **self.weighting.metrics()}
            self._metrics["train"] |= {name: [value] for name, value in found.items()}
        super().log(logs, start_time)
        if self.recorder:
            self.recorder.log({"step": self.state.global_step, **logs})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._write_weights()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        log = self.log_state()
        if self.args.should_save:
            state = self.weighting.state_dict()
            checkpoints.save_state(output_dir, state, log, self._total_train_tokens, self._identity)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state, self.resumed_log, self._total_train_tokens = checkpoints.load_state(checkpoint)
            self.weighting.load_state_dict(state)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = output_dir or self._output_dir
        with self.weighting.left_out_of_saving(), users_card_kept(folder), writing(Path(folder)):
            super()._save(output_dir, state_dict)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """See [`~trl.SFTTrainer`]; the card says how this model is asked, and a `README.md` of the user stays."""
        if self.recorder:
            card = Path(self._output_dir) / "README.md"
            with users_card_kept(self._output_dir), writing(card):
                super().create_model_card(*args, **kwargs)
                describe(self, card)

    def _write_weights(self) -> None:
        if self.recorder:
            self.recorder.write_weights(self._row_table, self.weighting.columns())

    def _send_telemetry(self) -> None:
        """TRL reports every constructed trainer to its makers; a run of tamis is nobody else's business."""


def _without_ids(dataset: Dataset) -> Dataset:
    """Rows are numbered by their place, whatever a column ``example_id`` says."""
    return dataset.select_columns([column for column in dataset.column_names if column != "example_id"])
