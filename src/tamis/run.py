"""One run, from named files to a run directory: what `tamis train`, the demo and the comparisons all go through."""

import logging
import re
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import ModelConfig, get_peft_config, get_quantization_config

from tamis.config import REFINING_FIELDS, BilevelConfig
from tamis.data import load_rows
from tamis.inference import show_row, write_example
from tamis.output_dir import claimed, config_path, finished_step, mark_finished, refuse_busy, refuse_earlier_run
from tamis.prerequisites import check_prerequisites, find_model
from tamis.recorder import LAST, checkpoint_step, find_checkpoint
from tamis.settings import given_fields, warn_without_effect
from tamis.sources import load_sources
from tamis.stopping import Stopped, StopSignals
from tamis.trainer import BilevelTrainer
from tamis.training_progress import ProgressCallback, use_progress

logger = logging.getLogger(__name__)

# What `score` has no use for, besides the settings of refining.
_OF_TRAINING = (
    "eval_dataset", "num_train_epochs", "max_steps", "rho", "rho_start", "eval_on_start", "eval_strategy",
    "save_strategy", "load_best_model_at_end", "push_to_hub", "resume_from_checkpoint",
)  # fmt: skip


@dataclass
class DataArguments:
    """Which rows: files, folders or hub names.

    Attributes:
        train_dataset: one source or several, see `tamis.sources.load_sources`.
        source_weights: one for each of them, for the selector `column`.
        validation_dataset, eval_dataset: see `tamis.data.load_rows` for what is read.
        skip_bad_rows: leave out rows that cannot be trained on; `skipped_rows.jsonl` of the run directory has them.
        prompt_column, response_column, weight_column: as there.
        prompt_template: see `tamis.prompts.Prompts`.
        train_split, validation_split, eval_split: of hub names and folders with splits.
        run_info: what `config.yaml` tells about the run it came from; ignored.
    """

    train_dataset: list[str] = field(
        metadata={
            "help": "Doubtful rows: JSON(L), CSV or Parquet files, patterns such as 'data/*.jsonl', folders, hub names."
        }
    )
    validation_dataset: str | None = field(default=None, metadata={"help": "Trusted rows that guide the selection."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows, used neither for training nor for selection."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts, if not recognised."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the responses, if not recognised."})
    weight_column: str | None = field(default=None, metadata={"help": "Column of weights, for --selector column."})
    prompt_template: str = field(
        default="auto",
        metadata={
            "help": "What writes the prompts of rows without roles: 'chat' (the model's chat template), 'plain' (the "
            "text as it is), 'alpaca', or a jinja file with a chat template. 'auto': 'chat' where the model has one, "
            "else 'plain'."
        },
    )
    source_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weight of the rows of each source of --train_dataset, in order, for --selector column."},
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows that cannot be trained on, and list them in skipped_rows.jsonl."},
    )
    train_split: str = field(default="train", metadata={"help": "Split of --train_dataset, where it has several."})
    validation_split: str = field(default="train", metadata={"help": "Split of --validation_dataset."})
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    run_info: dict[str, Any] | None = field(
        default=None, metadata={"help": "Written by tamis into config.yaml; ignored when read."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.train_dataset, str):  # in a YAML file one source needs no list
            self.train_dataset = [self.train_dataset]
        if not isinstance(self.train_dataset, list) or not all(isinstance(name, str) for name in self.train_dataset):
            raise ValueError(f"`train_dataset` takes names of files or data sets, got {self.train_dataset!r}")
        if not self.train_dataset:
            raise ValueError("no training rows: give `train_dataset`")

    def load(self, skipped: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """The datasets that were named, checked, by the names that `BilevelTrainer` takes them under.

        Args:
            skipped: gets the bad rows, see `tamis.data.load_rows`.
        """
        options: dict[str, Any] = {
            "prompt_column": self.prompt_column,
            "response_column": self.response_column,
            "skipped": skipped,
        }
        train = load_sources(
            self.train_dataset,
            role="train_dataset",
            source_weights=self.source_weights,
            split=self.train_split,
            weight_column=self.weight_column,
            **options,
        )
        datasets = {"train_dataset": train}
        for role, source, split in (
            ("validation_dataset", self.validation_dataset, self.validation_split),
            ("eval_dataset", self.eval_dataset, self.eval_split),
        ):
            if source is not None:
                datasets[role] = load_rows(source, role=role, split=split, **options)
        return datasets


def make_trainer(
    data: DataArguments,
    args: BilevelConfig,
    model_args: ModelConfig,
    trainer_class: type[BilevelTrainer] = BilevelTrainer,
    datasets: dict[str, Any] | None = None,
) -> BilevelTrainer:
    """The trainer of a run, with its rows loaded and checked; see `train` for arguments and errors.

    Args:
        datasets: the rows, where `DataArguments.load` has loaded them already.
    """
    if model_args.model_name_or_path is None:
        raise ValueError("no model: give `model_name_or_path`")
    check_prerequisites(args, model_args)
    model = find_model(model_args.model_name_or_path)
    _warn_of_inactive(data, args, model_args)
    skipped: list[dict[str, Any]] | None = [] if data.skip_bad_rows else None
    datasets = data.load(skipped) if datasets is None else datasets
    datasets = without_unread_weights(datasets, args)
    given = args.model_init_kwargs
    assert not isinstance(given, str), "a JSON string is parsed by the config"
    args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(given or {}),
    }
    trainer = trainer_class(
        model,
        args,
        **datasets,
        prompt_template=data.prompt_template,
        quantization_config=get_quantization_config(model_args),
        peft_config=peft_config_of(model_args),
    )
    trainer.skipped_rows = skipped or []
    trainer.config_settings = given_fields(data) | args.given_settings | given_fields(model_args)
    return trainer


def peft_config_of(model_args: ModelConfig) -> PeftConfig | None:
    """TRL's `get_peft_config`, where one target module is a name as several are.

    TRL makes text of a list of one, for ``all-linear``; PEFT takes text for a pattern of a module's whole path.
    """
    config: Any = get_peft_config(model_args)
    name = getattr(config, "target_modules", None)
    if isinstance(name, str) and re.fullmatch(r"[\w.]+", name):
        config.target_modules = {name}
    return config  # type: ignore[no-any-return]


def without_unread_weights(datasets: dict[str, Any], args: BilevelConfig) -> dict[str, Any]:
    """The data sets of a run without the column `weight`, where the selector does not read it."""
    train = datasets["train_dataset"]
    if args.selector == "column" or "weight" not in train.column_names:
        return datasets
    return datasets | {"train_dataset": train.remove_columns("weight")}


def _warn_of_inactive(data: DataArguments, args: BilevelConfig, model_args: ModelConfig) -> None:
    """The settings of the data and of the model that change nothing; `tamis.checks` has the others."""
    given, inactive = [*given_fields(data), *given_fields(model_args)], dict[str, list[str]]()
    if args.selector != "column":
        inactive[f"selector '{args.selector}' does not read it"] = ["weight_column", "source_weights"]
    if Path(str(model_args.model_name_or_path)).is_dir():
        inactive["the model is a folder"] = ["model_revision"]
    if not model_args.use_peft:
        inactive["use_peft is not set"] = [name for name in given if name.startswith(("lora_", "use_rs", "use_dora"))]
    if not model_args.load_in_4bit:
        inactive["load_in_4bit is not set"] = [name for name in given if name.startswith("bnb_4bit_")]
    warn_without_effect(given, inactive)


def train(
    data: DataArguments,
    args: BilevelConfig,
    model_args: ModelConfig,
    trainer_class: type[BilevelTrainer] = BilevelTrainer,
    *,
    stop: StopSignals | None = None,
    shows_row: bool = False,
) -> dict[str, float]:
    """One run of `tamis train`: loads and checks the rows, trains, saves; returns the metrics of the held-out rows.

    A run that is finished already is left as it is.

    Args:
        trainer_class: another one, where a method of a comparison is more than settings.
        stop: the signals that end the run after a step, with a checkpoint.
        shows_row: print the first training row to stderr, as the model sees it.

    Raises:
        ValueError: an input cannot work; see `tamis.data`, `tamis.rows` and `tamis.checks`.
        NonFiniteLossError: see `BilevelTrainer`.
        Stopped: by a signal.
    """
    output_dir, stop = str(args.output_dir), stop or StopSignals()
    resume = True if args.resume_from_checkpoint in LAST else args.resume_from_checkpoint
    is_main_process = args.process_index == 0
    refuse_occupied(args, resume)
    if resume and (resume is not True or finished_step(output_dir) is None):
        find_checkpoint(output_dir, resume)
    trainer = make_trainer(data, args, model_args, trainer_class)
    if resume and _is_finished(trainer, resume):
        return {}
    if shows_row and is_main_process:
        show_row(trainer)
    use_progress(trainer, ProgressCallback("training"))
    stop.hint = ", before the first step: the same command starts again"
    trainer.add_callback(StopAfterStep(trainer, stop))
    with claimed(output_dir) if is_main_process else nullcontext():
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model()
        trainer.create_model_card(model_name=Path(output_dir).name)
        stop.hint = ", after the model was saved"
        stop.release()
        metrics = trainer.evaluate() if data.eval_dataset is not None else {}
        if is_main_process:
            write_example(trainer)
        if args.push_to_hub:
            trainer.push_to_hub()
        if is_main_process:
            mark_finished(output_dir, trainer.state.global_step)
    return metrics


def score(
    data: DataArguments, args: BilevelConfig, model_args: ModelConfig, *, stop: StopSignals | None = None
) -> None:
    """One run of `tamis score`: what `train` does before its first step, which weighs every row, and no more.

    Leaves `config.yaml`, `metrics.jsonl`, `scout.json` and `weights.parquet`. The weights are those that `train` would
    give.

    Raises:
        ValueError: see `train`; or the selector does not score rows before training.
        Stopped: by a signal.
    """
    if not args.scouts():
        raise ValueError(f"selector '{args.selector}' learns its weights while it trains: choose `selector='scout'`")
    if args.scores is not None:
        raise ValueError("the rows are scored here, and `scores` takes them over from a scoring: leave it out")
    given = [*given_fields(data), *args.given_settings]
    given += ["resume_from_checkpoint"] if args.resume_from_checkpoint else []
    warn_without_effect(given, {"nothing is trained": [*_OF_TRAINING, *REFINING_FIELDS]})
    data, args = replace(data, eval_dataset=None), copy(args)
    args.rho = args.rho_start = None
    args.refine_fraction, args.eval_strategy, args.save_strategy = "0", "no", "no"
    args.eval_on_start = args.load_best_model_at_end = args.push_to_hub = False
    output_dir, stop = str(args.output_dir), stop or StopSignals()
    refuse_occupied(args)
    trainer = make_trainer(data, args, model_args)
    use_progress(trainer, ProgressCallback("training"))
    stop.hint = ": the same command starts again"
    trainer.args.max_steps = 0
    with claimed(output_dir) if args.process_index == 0 else nullcontext():
        trainer.train()
        if args.process_index == 0:
            mark_finished(output_dir, 0)


def refuse_occupied(args: BilevelConfig, resume: str | bool | None = None) -> None:
    """Say before a model is loaded that another run writes into the output directory, or would be overwritten.

    Raises:
        ValueError: so it is.
    """
    if args.process_index != 0:
        return
    refuse_busy(str(args.output_dir))
    if resume:
        given = ["overwrite_output_dir"] if args.overwrite_output_dir else []
        warn_without_effect(given, {"the run goes on from a checkpoint": ["overwrite_output_dir"]})
    elif not args.overwrite_output_dir:
        refuse_earlier_run(str(args.output_dir))


def _is_finished(trainer: BilevelTrainer, resume: str | bool) -> bool:
    """Whether the run in the output directory has made all of its steps, and its model is saved; says so."""
    output_dir, num_steps = str(trainer.args.output_dir), trainer.num_steps()
    step = finished_step(output_dir)
    if step is None or step < num_steps:
        return False
    if resume is not True or any(Path(output_dir).glob("checkpoint-*")):
        checkpoint = trainer.checkpoint_to_resume(resume)
        if resume is not True and checkpoint_step(str(checkpoint)) < num_steps:
            return False
    logger.info(
        f"{output_dir}: the run is finished, {step} of {num_steps} steps, and nothing was trained. To train on, raise "
        "`max_steps` or `num_train_epochs`"
    )
    return True


class StopAfterStep(TrainerCallback):
    """Ends the training that a signal has asked to stop: after the optimizer step, with a checkpoint.

    Args:
        trainer: whose callbacks are told of the end.
        stop: the signals. All ranks stop after the same step, if any of them has got one.
    """

    def __init__(self, trainer: BilevelTrainer, stop: StopSignals):
        self._trainer, self._stop, self._signum = trainer, stop, 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._stop.hint = ", within a step: go on from the last checkpoint with --resume_from_checkpoint last"
        self._stop.hold()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._signum = self._stop.received or 0
        if args.world_size > 1:
            received = torch.tensor(self._signum, device=args.device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self._signum = int(received)
        if self._signum:
            control.should_save = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._signum:
            return
        self._trainer.callback_handler.on_train_end(args, state, control)  # progress bars and loggers close
        hint = f", after step {state.global_step}"
        if not args.save_only_model:
            hint += f": go on with tamis train --config {config_path(args.output_dir)} --resume_from_checkpoint last"
        raise Stopped(self._signum, hint)
