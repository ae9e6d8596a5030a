"""Settings that cannot work are refused, and those without effect are warned of, before any model is loaded."""

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from transformers.trainer_utils import IntervalStrategy
from trl.trainer.utils import get_config_model_id

from tamis.config import DEFAULT_SELECTOR_LEARNING_RATE, OWN_FIELDS, REFINING_FIELDS, BilevelConfig, SelectorTraits
from tamis.refining.generation import check_installed
from tamis.selection.selectors import Selector, check_selector
from tamis.settings import choices_of, warn_without_effect
from tamis.trl_options import (
    NO_EFFECT,
    given_loader_settings,
    is_sharded,
    refuse_arguments,
    refuse_engine,
    refuse_options,
)

logger = logging.getLogger(__name__)

_CHOICES = {f.name: choices for f in OWN_FIELDS if (choices := choices_of(f.type))}


def settle_arguments(
    model: Any, args: BilevelConfig | None, selector: str | Selector | None, others: dict[str, Any]
) -> BilevelConfig:
    """The settings of a trainer, which must be there; a selector that is named goes into them.

    Args:
        model: names the output folder where there are no settings, as in [`~trl.SFTTrainer`].
        others: further arguments of the trainer.

    Raises:
        ValueError: they cannot work here, with the remedy; a package of the generator is missing.
    """
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = BilevelConfig(output_dir=f"{name.split('/')[-1]}-tamis")
    if not isinstance(args, BilevelConfig):
        raise ValueError(f"args must be a BilevelConfig, got {type(args).__name__}")
    refuse_arguments(args, others)
    if isinstance(selector, str):
        args.selector = selector  # type: ignore[assignment]
    elif selector is not None:
        check_selector(selector)
    if args.refines:
        check_installed(args.generator)
    if others.get("formatting_func") is not None and args.completion_only_loss:
        raise ValueError("completion_only_loss has no completion to find in the text of formatting_func: leave it out")
    return args


def check_settings(
    args: BilevelConfig, datasets: Mapping[str, Dataset], selector: SelectorTraits | None = None
) -> None:
    """Refuse what cannot work and warn of what has no effect.

    Args:
        datasets: by role; what counts is which there are, and whether the training rows have a column ``weight``.
        selector: an instance that takes the place of the name in the field `selector`.

    Raises:
        ValueError: with the field and the remedy.
    """
    has_validation, has_weight = "validation_dataset" in datasets, "weight" in datasets["train_dataset"].column_names
    has_held_out = any(role.startswith("eval_dataset") for role in datasets)
    _refuse_bad_values(args)
    refuse_options(args)
    name = f"'{args.selector}'" if selector is None else type(selector).__name__
    is_static = args.selector in ("column", "none") if selector is None else not selector.uses_excess
    if not (is_static or args.takes_scores(selector) or has_validation):
        raise ValueError(
            f"selector {name} needs validation rows: give `validation_dataset`, or choose "
            "`selector='column'` (weights from a column) or `selector='none'` (every row counts the same)"
        )
    if (args.rho or args.rho_start) and not has_validation:
        raise ValueError(
            f"rho={args.rho}, rho_start={args.rho_start} weigh the validation rows, but `validation_dataset` is "
            "missing: give it, or leave `rho` and `rho_start` out"
        )
    if args.rho is None and args.rho_start is not None and args.scouts(selector):
        raise ValueError("rho_start goes to a rho that the scout chooses: set `rho` too")
    if args.refines and args.takes_scores(selector):
        raise ValueError(
            "new responses are judged by the scout that has judged the rows, and `scores` has none: leave out `scores` "
            "or `refine_fraction`"
        )
    if args.refine_fraction == "auto" and not args.scouts(selector):
        raise ValueError(
            f"refine_fraction 'auto' is the share of rows that a scout thinks wrong, and selector {name} sends "
            "none: give a number, or choose `selector='scout'`"
        )
    if selector is None and args.selector == "column" and not has_weight:
        raise ValueError(
            "selector 'column' reads a column 'weight' of the training rows: name it by `weight_column`, or rename it"
        )
    if args.refine_fraction == "auto" and args.refine_policy == "random":
        raise ValueError("refine_fraction 'auto' picks the rows that are likely wrong, not random ones: give a number")
    if args.refines and args.refine_policy == "lowest" and selector is None and args.selector == "none":
        raise ValueError("selector 'none' gives all rows one weight: there is no lowest. Set `refine_policy='random'`")
    if (strategy := IntervalStrategy(args.eval_strategy)) != "no" and not has_held_out:
        raise ValueError(f"eval_strategy '{strategy.value}' needs held-out rows: give `eval_dataset`")
    if args.eval_on_start and not has_held_out:
        raise ValueError("eval_on_start needs held-out rows: give `eval_dataset`")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError("save_strategy 'best' compares evaluations: set `eval_strategy` too")
    _refuse_pairs(args, is_static, selector)
    if has_weight and selector is None and args.selector != "column":
        logger.warning(
            f"the training rows have weights of their own, and selector {name} does not read them: to train by them, "
            "choose `selector='column'`"
        )
    given = [*args.given_settings, *given_loader_settings(args)]
    given += ["validation_dataset"] if has_validation else []
    warn_without_effect(given, _inactive(args, name, is_static, selector) | NO_EFFECT)
    if args.push_to_hub:
        rows = ", and refinements.parquet with prompts and responses of rows" if args.refines else ""
        logger.warning(
            f"push_to_hub uploads the whole of output_dir: also config.yaml, weights.parquet, "
            f"inference_example.py with a held-out row{rows}"
        )


def _refuse_bad_values(args: BilevelConfig) -> None:
    for name in ("rho", "rho_start", "rho_decay_ratio", "refine_fraction", "generation_top_p"):
        value = getattr(args, name)
        if name == "refine_fraction":
            value = None if value == "auto" else float(value)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    for name in (
        "selector_learning_rate", "scout_learning_rate", "scout_epochs", "reference_learning_rate",
        "bmo_temperature",
        "per_device_validation_batch_size", "num_generations", "refine_every", "response_temperature",
        "generation_temperature", "generation_top_p", "generation_batch_size", "max_new_tokens",
        "importance_ratio_cap",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if args.refine_start is not None and args.refine_start < 0:
        raise ValueError(f"refine_start must not be negative, got {args.refine_start}")
    for name, choices in _CHOICES.items():
        if getattr(args, name) not in choices:
            known = ", ".join(str(choice) for choice in choices if choice)
            raise ValueError(f"unknown {name} {getattr(args, name)!r}: choose one of {known}")


def _refuse_pairs(args: BilevelConfig, is_static: bool, selector: SelectorTraits | None) -> None:
    """Settings of TRL that work on their own, but not beside what else is set."""
    has_reference = not is_static and args.reference != "zero"
    if is_sharded(args) and has_reference and not args.scouts(selector):
        raise ValueError(
            "a model sharded by FSDP or DeepSpeed has no second copy, and all ranks run each forward together: the "
            "references 'base' and 'tracked' cannot be had. Set `reference='zero'`, or choose `selector='scout'`"
        )
    if args.sends_scout(selector) or args.refines:
        refuse_engine(args)
    if is_sharded(args) and args.refines and args.generator == "vllm":
        raise ValueError("generator 'vllm' is not supported with a sharded model: leave `generator` out")
    if args.fp16 and args.reference == "tracked" and not is_static and not args.scouts(selector):
        raise ValueError("fp16 scales the loss, and the reference 'tracked' has no scaler: set `bf16` instead")
    if args.refines and args.save_only_model and args.refine_on_error == "stop":
        raise ValueError(
            "save_only_model leaves nothing to resume from where a generator fails: set "
            "`refine_on_error='continue'`, or leave it out"
        )
    if args.refines and args.completion_only_loss is False:
        raise ValueError("completion_only_loss false trains on prompts, which have no new responses: leave it out")


def _inactive(
    args: BilevelConfig, selector_name: str, is_static: bool, selector: SelectorTraits | None
) -> dict[str, list[str]]:
    """Names of settings that change nothing in this run, under the reason why; the first reason is the one said."""
    name = args.selector if selector is None else "instance"
    inactive: dict[str, list[str]] = {}

    def add(is_inactive: bool, reason: str, *names: str) -> None:
        if is_inactive:
            inactive.setdefault(reason, []).extend(names)

    not_read = f"selector {selector_name} does not read it"
    add(name not in ("mirror", "bmo"), not_read, "score_map")
    add(name not in DEFAULT_SELECTOR_LEARNING_RATE, not_read, "selector_learning_rate")
    add(name != "bmo", not_read, "bmo_temperature")
    add(name == "instance", f"the trainer was given a selector, {selector_name}", "selector")
    add(is_static or args.scouts(selector), not_read, "reference", "reference_learning_rate")
    add(args.reference != "tracked", f"reference '{args.reference}' is not trained", "reference_learning_rate")
    add(not args.scouts(selector), not_read, "scout_learning_rate", "scout_epochs", "scores")
    add(args.scores is not None, "scores are given, and no scout is sent", "scout_learning_rate", "scout_epochs")
    add(args.rho_start is None, "rho_start is not set", "rho_decay_ratio")
    unused = f"selector {selector_name} with rho {args.rho} uses no validation rows"
    add(not args.uses_validation(selector), unused, "validation_dataset")
    add(args.micro_batches_per_step == 1, "a step has one micro-batch", "train_sampling_strategy")
    add(not args.refines, "refine_fraction is 0", *REFINING_FIELDS[1:])
    uniform = args.response_weighting == "uniform"
    add(uniform, "response_weighting is 'uniform'", "response_temperature", "ratio_level", "importance_ratio_cap")
    add(args.generator == "vllm", "generator is 'vllm'", "generation_batch_size")
    vllm = ("vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization")
    add(args.generator != "vllm", f"generator is '{args.generator}'", *vllm)
    add(args.vllm_mode == "colocate", "vllm_mode is 'colocate'", "vllm_server_base_url")
    add(args.vllm_mode == "server", "vllm_mode is 'server'", "vllm_gpu_memory_utilization")
    return inactive
