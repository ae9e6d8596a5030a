"""One run, from named files to a run directory: what `tamis train`, the demo and the comparisons all go through."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl import ModelConfig, get_peft_config, get_quantization_config

from tamis.config import BilevelConfig
from tamis.data import load_rows
from tamis.prerequisites import check_prerequisites, find_model
from tamis.progress import ProgressCallback, use_progress
from tamis.settings import given_fields, warn_without_effect
from tamis.trainer import BilevelTrainer


@dataclass
class DataArguments:
    """Which rows: files, folders or hub names.

    Attributes:
        train_dataset, validation_dataset, eval_dataset: see `tamis.data.load_rows` for what is read.
        prompt_column, response_column, weight_column: as there.
        train_split, validation_split, eval_split: of hub names and folders with splits.
        run_info: what `config.yaml` tells about the run it came from; ignored.
    """

    train_dataset: str = field(
        metadata={"help": "Doubtful rows: a JSON(L), CSV or Parquet file, a folder, a hub name."}
    )
    validation_dataset: str | None = field(default=None, metadata={"help": "Trusted rows that guide the selection."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out rows, used neither for training nor for selection."}
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Column of the prompts, if not recognised."})
    response_column: str | None = field(default=None, metadata={"help": "Column of the responses, if not recognised."})
    weight_column: str | None = field(default=None, metadata={"help": "Column of weights, for --selector column."})
    train_split: str = field(default="train", metadata={"help": "Split of --train_dataset, where it has several."})
    validation_split: str = field(default="train", metadata={"help": "Split of --validation_dataset."})
    eval_split: str = field(default="train", metadata={"help": "Split of --eval_dataset."})
    run_info: dict[str, Any] | None = field(
        default=None, metadata={"help": "Written by tamis into config.yaml; ignored when read."}
    )

    def load(self) -> dict[str, Any]:
        """The datasets that were named, checked, by the names that `BilevelTrainer` takes them under."""
        columns = {"prompt_column": self.prompt_column, "response_column": self.response_column}
        datasets = {}
        for role, split in (
            ("train_dataset", self.train_split),
            ("validation_dataset", self.validation_split),
            ("eval_dataset", self.eval_split),
        ):
            source = getattr(self, role)
            if source is not None:
                weight_column = self.weight_column if role == "train_dataset" else None
                datasets[role] = load_rows(source, role=role, split=split, weight_column=weight_column, **columns)
        return datasets


def make_trainer(
    data: DataArguments,
    args: BilevelConfig,
    model_args: ModelConfig,
    trainer_class: type[BilevelTrainer] = BilevelTrainer,
) -> BilevelTrainer:
    """The trainer of a run, with its rows loaded and checked; see `train` for arguments and errors."""
    if model_args.model_name_or_path is None:
        raise ValueError("no model: give --model_name_or_path")
    check_prerequisites(args, model_args)
    model = find_model(model_args.model_name_or_path)
    if data.weight_column is not None and args.selector != "column":
        warn_without_effect(["weight_column"], {f"selector '{args.selector}' does not read it": ["weight_column"]})
    datasets = data.load()

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
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )
    trainer.config_settings = given_fields(data) | args.given_settings | given_fields(model_args)
    return trainer


def train(
    data: DataArguments,
    args: BilevelConfig,
    model_args: ModelConfig,
    trainer_class: type[BilevelTrainer] = BilevelTrainer,
) -> dict[str, float]:
    """One run of `tamis train`: loads and checks the rows, trains, saves; returns the metrics of the held-out rows.

    Args:
        trainer_class: another one, where a method of a comparison is more than settings.

    Raises:
        ValueError: an input cannot work; see `tamis.data`, `tamis.rows` and `BilevelConfig.check`.
        NonFiniteLossError: see `BilevelTrainer`.
    """
    output_dir = Path(str(args.output_dir))
    resume = True if args.resume_from_checkpoint in ("last", "true", "True") else args.resume_from_checkpoint
    if not resume and any(
        next(output_dir.glob(trace), None) for trace in ("metrics.jsonl", "checkpoint-*", "*.safetensors")
    ):
        raise ValueError(
            f"{output_dir} holds a run already: choose another --output_dir, or go on with "
            "--resume_from_checkpoint last"
        )
    trainer = make_trainer(data, args, model_args, trainer_class)
    use_progress(trainer, ProgressCallback("training"))
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate() if data.eval_dataset is not None else {}
    trainer.save_model()
    trainer.create_model_card()
    if args.push_to_hub:
        trainer.push_to_hub()
    return metrics
