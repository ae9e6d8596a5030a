"""What TRL and transformers offer and tamis does not: settings that are refused, and settings without effect.

Every other option works as it does there. `tests/test_trl_options.py` holds the verdict on each.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from accelerate.utils import ParallelismConfig, parse_flag_from_env
from transformers.trainer_pt_utils import AcceleratorConfig
from trl import SFTConfig

_PACKING = "packing joins rows, and a joined row has no weight of its own: set `packing=False`"
_STEPS_IN_BACKWARD = ("lomo", "adalomo")  # and all whose name ends in "layerwise"
_OF_LOADERS = ("dispatch_batches", "even_batches", "use_seedable_sampler")

# By setting: whether a value is refused, and the sentence, in which {value} stands for it.
REFUSED: dict[str, tuple[Callable[[SFTConfig], Any], str]] = {
    "packing": (lambda args: args.packing, _PACKING),
    "eval_packing": (lambda args: args.eval_packing, _PACKING),
    "padding_free": (
        lambda args: args.padding_free and is_sharded(args),
        "padding_free is not checked for models sharded by FSDP or DeepSpeed: leave it off",
    ),
    "loss_type": (
        lambda args: args.loss_type not in ("nll", "chunked_nll"),
        "loss_type '{value}' has no per-row log-likelihood: use `loss_type='nll'`",
    ),
    "label_smoothing_factor": (
        lambda args: args.label_smoothing_factor,
        "label_smoothing_factor changes what a row's loss means: set it to 0",
    ),
    "dataset_kwargs": (
        lambda args: isinstance(args.dataset_kwargs, dict) and args.dataset_kwargs.get("skip_prepare_dataset"),
        "skip_prepare_dataset is not supported: rows are numbered while they are prepared",
    ),
    "train_sampling_strategy": (
        lambda args: args.train_sampling_strategy not in ("random", "batch_rebalance"),
        "train_sampling_strategy '{value}' is not supported: the rows of a step are drawn at random, so that each step "
        "stands for the data. Leave it at random, or choose batch_rebalance, which sorts the rows of a step by length",
    ),
    "auto_find_batch_size": (
        lambda args: args.auto_find_batch_size,
        "auto_find_batch_size starts a run over whose scores have moved: find a `per_device_train_batch_size` that "
        "fits and leave it off",
    ),
    "enable_jit_checkpoint": (
        lambda args: args.enable_jit_checkpoint,
        "enable_jit_checkpoint may save between the step of the scores and that of the model: set `save_steps` instead",
    ),
    "optim": (
        lambda args: _plain(args.optim).endswith("layerwise") or _plain(args.optim) in _STEPS_IN_BACKWARD,
        "optim '{value}' updates the parameters inside the backward pass, where a bad step can no longer be stopped: "
        "choose another, as adamw_torch",
    ),
    "accelerator_config": (
        lambda args: args.accelerator_config.split_batches,  # type: ignore[union-attr]
        "accelerator_config: split_batches gives per_device_train_batch_size a second meaning: leave it off",
    ),
    "activation_offloading": (
        lambda args: args.activation_offloading and args.device.type == "cpu",
        "activation_offloading needs an accelerator, and this run is on the CPU: leave it off",
    ),
}

# Settings of TRL and transformers that are numbers: the least value that means something.
AT_LEAST: dict[str, float] = {
    "learning_rate": 0, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "adam_epsilon": 0, "seed": 0,
    "adam_beta1": 0, "adam_beta2": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "max_length": 1, "dataset_num_proc": 1, "lora_r": 1, "lora_alpha": 1,
    "lora_dropout": 0, "neftune_noise_alpha": 0, "save_steps": 0, "eval_steps": 0,
}  # fmt: skip
_BELOW_ONE = ("adam_beta1", "adam_beta2", "lora_dropout")

# By reason: settings that change nothing.
NO_EFFECT: dict[str, list[str]] = {
    "training rows are collated in the main process, evaluation alone reads it": [
        "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
        "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
    ],
    "training rows reach the collator as input_ids and labels, evaluation alone reads it": ["remove_unused_columns"],
    "the stream of training rows knows its ranks, evaluation alone reads it": [
        f"accelerator_config.{name}" for name in _OF_LOADERS
    ],
    "the rows and tokens of a step are counted over all devices": ["average_tokens_across_devices"],
    "packing is off": ["packing_strategy"],
    "the lengths of rows are counted": ["length_column_name"],
}  # fmt: skip

# Arguments of SFTTrainer.
REFUSED_ARGUMENTS: dict[str, str] = {
    "compute_loss_func": "compute_loss_func replaces the loss of a batch, and the loss of every row is needed: leave "
    "it out",
}


def refuse_options(args: SFTConfig) -> None:
    """Refuse settings that tamis cannot honour.

    Raises:
        ValueError: with the setting and the remedy.
    """
    refuse_out_of_range(args)
    for name, (is_refused, sentence) in REFUSED.items():
        if is_refused(args):
            raise ValueError(sentence.format(value=_plain(getattr(args, name))))
    refuse_parallelism(args.parallelism_config)


def refuse_out_of_range(args: Any) -> None:
    """Refuse numbers that cannot be meant, in settings of a trainer or of a model.

    Raises:
        ValueError: with the setting and the least value.
    """
    for name, least in AT_LEAST.items():
        value = getattr(args, name, None)
        if value is None:
            continue
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if name in _BELOW_ONE and value >= 1:
            raise ValueError(f"{name} must be below 1, got {value}")
    if getattr(args, "max_steps", -1) <= 0 and not getattr(args, "num_train_epochs", 1) > 0:
        raise ValueError(f"num_train_epochs must be positive, got {args.num_train_epochs}; or set `max_steps`")


def refuse_parallelism(parallelism: ParallelismConfig | None) -> None:
    """Refuse what lets ranks share rows: set in the arguments, by `accelerate launch` or in a model that was loaded.

    Raises:
        ValueError: a row, or a batch, would be spread over several ranks.
    """
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError(
            "parallelism_config: with tensor, context or sequence parallelism ranks share rows, but every rank has "
            "rows of its own here: leave it out"
        )


def refuse_arguments(args: SFTConfig, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of the trainer that tamis cannot honour.

    Raises:
        ValueError: with the argument and the remedy.
    """
    for name, sentence in REFUSED_ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(sentence)
    if args.padding_free and arguments.get("data_collator") is not None:
        raise ValueError("padding_free needs the batches of TRL's collator: leave data_collator out")


def is_sharded(args: SFTConfig) -> bool:
    """Whether no rank holds the whole model: FSDP or DeepSpeed, by the settings or by `accelerate launch`."""
    by_launcher = any(parse_flag_from_env(f"ACCELERATE_USE_{kind}") for kind in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed or by_launcher)


def refuse_engine(args: SFTConfig) -> None:
    """Refuse engines under which a run cannot scout and refine: those that have the parameters to themselves.

    Raises:
        ValueError: with the engine and the remedy.
    """
    if args.deepspeed or parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed keeps gradients and optimizer to itself, and a scout descends by an optimizer of its own: shard "
            "the model by FSDP2 (recipes/accelerate/fsdp2.yaml), or score the rows first, by `tamis score` without "
            "DeepSpeed, and give its folder to `scores`, with `refine_fraction=0`"
        )
    if not is_sharded(args):
        return
    by_settings: dict[str, int] = getattr(args, "fsdp_plugin_args", None) or {}
    version = int(by_settings.get("fsdp_version", os.environ.get("FSDP_VERSION", "1")))
    if version != 2:
        raise ValueError("FSDP1 has no parameters that a scout could step: set `fsdp_version: 2` for accelerate")


def given_loader_settings(args: SFTConfig) -> list[str]:
    """Fields of ``accelerator_config`` that are about data loaders and were set, as ``accelerator_config.NAME``."""
    given, default = args.accelerator_config, AcceleratorConfig()
    return [f"accelerator_config.{name}" for name in _OF_LOADERS if getattr(given, name) != getattr(default, name)]


def _plain(value: Any) -> Any:
    """A setting as it is written: transformers turns some into members of an enumeration."""
    return getattr(value, "value", value)
