"""Settings of a bilevel run: `BilevelConfig`, an `SFTConfig` with a few more fields."""

import logging
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any, Literal

import torch

from tamis.references import REFERENCE_NAMES
from tamis.refine_config import REFINE_CHOICES, REFINE_POSITIVE, REFINE_SHARES, RefineConfig
from tamis.scores import SCORE_MAPS
from tamis.selectors import DEFAULT_LEARNING_RATE, SELECTOR_NAMES, STATIC_SELECTORS

logger = logging.getLogger(__name__)

# Gentle, so that the model learns what the validation rows want and keeps what it knew (LOG.md: on SIGMORPHON, trained
# at 2e-3, a scout at 3e-4 ranked rows with AUROC 0.91, at 1e-3 with 0.84).
_SCOUT_LEARNING_RATE_RATIO = 0.15
# Not for a replay: a secret, where an earlier run was taken up, and what `config.yaml` tells of the run it came from.
_NOT_REPLAYED = ("hub_token", "resume_from_checkpoint", "run_info")
_CHOICES = {
    "selector": SELECTOR_NAMES,
    "score_map": (None, *SCORE_MAPS),
    "reference": REFERENCE_NAMES,
    "loss_reduction": ("example", "token"),
    **REFINE_CHOICES,
}


def given_fields(arguments: Any) -> dict[str, Any]:
    """The plain values of a dataclass that differ from their defaults, as `--config` reads them."""
    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(arguments)
    }
    given = {n: getattr(arguments, n) for n in defaults}
    given = {n: v.value if isinstance(v, Enum) else v for n, v in given.items()}
    given = {n: v for n, v in given.items() if v != defaults[n] and n not in _NOT_REPLAYED}
    return {n: v for n, v in given.items() if isinstance(v, bool | int | float | str | list | dict | None)}


class Resolved:
    """Settings after what was left open has been filled in: attributes, and `announcements`, one line each."""

    score_map: str | None
    selector_learning_rate: float | None
    scout_ratio: float
    scout_learning_rate: float = 0.0
    rho_start: float
    per_device_validation_batch_size: int
    generation_batch_size: int
    refine_start: float

    def __init__(self) -> None:
        self.announcements: list[str] = []

    def set(self, name: str, given: Any, default: Any, reason: str) -> None:
        """Take the given value, or else the default."""
        setattr(self, name, default if given is None else given)
        if getattr(self, name) is not None:
            self.announcements.append(f"{name} = {getattr(self, name)} ({reason if given is None else 'as given'})")


@dataclass
class BilevelConfig(RefineConfig):
    r"""
    Configuration of [`BilevelTrainer`]: everything of [`~trl.SFTConfig`], and the fields below.

    Parameters:
        > Parameters that control the selection

        selector (`str`, *optional*, defaults to `"mirror"`):
            How losses become row weights: `"mirror"`, `"softmax"` and `"sigmoid"` (the published Adam-on-logits rules),
            `"bmo"` (closed form), `"column"` (a static `weight` column, no validation dataset needed) or `"none"`
            (direct mixing).
        score_map (`str`, *optional*):
            How scores become weights: `"bounded"` (sigmoid: a row can lose its say but not take everyone's; default of
            `"mirror"`) or `"softmax"` (default of `"bmo"`). Only these two selectors have the choice.
        selector_learning_rate (`float`, *optional*):
            Step size of the scores: logits per standard deviation of the excess loss for `"mirror"` (default 1.75),
            logits for `"softmax"` and `"sigmoid"` (default 0.1).
        bmo_temperature (`float`, *optional*, defaults to `0.5`):
            Temperature of `"bmo"` in nats per token; smaller is sharper.
        reference (`str`, *optional*, defaults to `"base"`):
            What the loss of a row is compared with: `"zero"`, `"base"` (the model before training) or `"tracked"` (a
            model that follows the training rows alone).
        scout_ratio (`float`, *optional*):
            Steps of scouting before training, as a part of the training steps: the model descends the validation loss
            alone, judges every training row before it was trained on any, and is put back. The scores are settled by
            it. 0: the scores follow the training steps instead. Defaults to 0.25 for `"mirror"` with references
            `"zero"` and `"base"`, else 0.
        scout_learning_rate (`float`, *optional*):
            Learning rate of those steps. Defaults to 0.15 times `learning_rate`.
        reference_learning_rate (`float`, *optional*):
            Constant learning rate of the reference `"tracked"`. When not set it follows the schedule of the model.

        > Parameters that control the two levels

        rho (`float`, *optional*, defaults to `0.5`):
            Share of the validation loss in the objective, in [0, 1].
        rho_start (`float`, *optional*):
            Share at the first step, from where it goes linearly to `rho`. Constant when not set.
        rho_decay_ratio (`float`, *optional*, defaults to `1.0`):
            Part of the training steps over which `rho_start` decays to `rho`.
        per_device_validation_batch_size (`int`, *optional*):
            Validation rows per device and micro-batch, beside `per_device_train_batch_size` training rows. The same
            number when not set.
        loss_reduction (`str`, *optional*, defaults to `"example"`):
            `"example"`: every row counts the same. `"token"`: every token does, as in `SFTTrainer`.

        and those of [`RefineConfig`], which control the refining.
    """

    # TRL turns checkpointing on by a name that transformers has deprecated: the same default by the new name.
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Deprecated: use --activation_checkpointing."}
    )
    activation_checkpointing: bool | None = field(
        default=True,
        metadata={"help": "Compute activations again in the backward pass: less memory, about 20%% slower."},
    )

    selector: Literal["mirror", "softmax", "sigmoid", "bmo", "column", "none"] = field(
        default="mirror",
        metadata={
            "help": "How losses become row weights: 'mirror', 'softmax' and 'sigmoid' (the published Adam-on-logits "
            "rules), 'bmo' (closed form), 'column' (a static weight column, no validation dataset needed) or 'none' "
            "(direct mixing)."
        },
    )
    score_map: Literal["bounded", "softmax"] | None = field(
        default=None,
        metadata={
            "help": "How scores become weights: 'bounded' (default of selector 'mirror': a row can lose its say but "
            "not take everyone's) or 'softmax' (default of 'bmo')."
        },
    )
    selector_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Step size of the scores: logits per standard deviation of the excess loss for 'mirror' (default "
            "1.75), logits for 'softmax' and 'sigmoid' (default 0.1)."
        },
    )
    bmo_temperature: float = field(
        default=0.5, metadata={"help": "Temperature of the selector 'bmo', in nats per token; smaller is sharper."}
    )
    reference: Literal["zero", "base", "tracked"] = field(
        default="base",
        metadata={
            "help": "What the loss of a row is compared with: 'zero', 'base' (the model before training) or 'tracked' "
            "(a model that follows the training rows alone)."
        },
    )
    scout_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Steps of scouting before training, as a part of the training steps: the model descends the "
            "validation loss alone, judges every training row, and is put back. 0: scores follow the training steps "
            "instead. Default: 0.25 for 'mirror' with references 'zero' and 'base', else 0."
        },
    )
    scout_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the scouting steps. Default: 0.15 times --learning_rate."}
    )
    rho: float = field(default=0.5, metadata={"help": "Share of the validation loss in the objective, in [0, 1]."})
    rho_start: float | None = field(
        default=None,
        metadata={"help": "Share at the first step, from where it goes linearly to --rho. Constant when not set."},
    )
    rho_decay_ratio: float = field(
        default=1.0, metadata={"help": "Part of the training steps over which --rho_start decays to --rho."}
    )
    per_device_validation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Validation rows per device and micro-batch, beside --per_device_train_batch_size training rows. "
            "The same number when not set."
        },
    )
    loss_reduction: Literal["example", "token"] = field(
        default="example",
        metadata={"help": "'example': every row counts the same. 'token': every token does, as in SFTTrainer."},
    )
    reference_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Constant learning rate of the reference 'tracked'. When not set it follows the model's schedule."
        },
    )

    def resolve(self) -> "Resolved":
        """Fill in what was left open, each with the reason."""
        resolved = Resolved()
        scouts = self.selector == "mirror" and self.reference != "tracked"
        default_map, reason = {
            "mirror": ("bounded", "a row can lose its say but not take everyone's"),
            "bmo": ("softmax", "the closed form"),
        }.get(self.selector, (None, ""))
        resolved.set("score_map", self.score_map if default_map else None, default_map, reason)
        resolved.set(
            "selector_learning_rate",
            self.selector_learning_rate,
            DEFAULT_LEARNING_RATE.get(self.selector),
            f"default of selector '{self.selector}'",
        )
        resolved.set(
            "scout_ratio",
            self.scout_ratio,
            0.25 if scouts else 0.0,
            "rows are judged before they are trained on" if scouts else "scores follow the training steps",
        )
        if resolved.scout_ratio:
            resolved.set(
                "scout_learning_rate",
                self.scout_learning_rate,
                _SCOUT_LEARNING_RATE_RATIO * self.learning_rate,
                f"{_SCOUT_LEARNING_RATE_RATIO} * learning_rate, gentle to keep what the model knows",
            )
        resolved.set("rho_start", self.rho_start, self.rho, "constant rho")
        resolved.set(
            "per_device_validation_batch_size",
            self.per_device_validation_batch_size,
            self.per_device_train_batch_size,
            "as many as training rows",
        )
        if self.refine_fraction:
            num_rows = self.per_device_train_batch_size + resolved.per_device_validation_batch_size
            reason = "the rows of a training micro-batch, so that it fits where training fits"
            resolved.set("generation_batch_size", self.generation_batch_size, num_rows, reason)
            if resolved.scout_ratio or self.selector == "column" or self.refine_policy == "random":
                start, reason = 0.0, "the questions to rewrite are known before the first step"
            else:
                start, reason = 0.25, "the scores need steps to tell rows apart"
            resolved.set("refine_start", self.refine_start, start, reason)
        return resolved

    def __post_init__(self) -> None:
        # Before the parent classes resolve fields of their own: this is what a replay needs.
        self.given_settings = given_fields(self)
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's default is bf16, which transformers refuses on a machine with a CPU only
        super().__post_init__()

    @property
    def trains_on_validation(self) -> bool:
        """Whether any step descends the validation loss."""
        return max(self.rho, self.rho_start or 0.0) > 0

    @property
    def uses_validation(self) -> bool:
        """Whether validation rows take any part in the run: in its steps or in scouting."""
        return self.trains_on_validation or self.resolve().scout_ratio > 0

    def check(self, *, has_validation: bool, has_weight: bool) -> None:
        """Refuse what cannot work and warn of what has no effect, before any model is loaded.

        Raises:
            ValueError: with the field and the remedy.
        """
        self._refuse_bad_values()
        self._refuse_what_sft_offers()
        if self.selector not in STATIC_SELECTORS and not has_validation:
            raise ValueError(
                f"selector '{self.selector}' needs trusted rows: give --validation_dataset, or choose --selector "
                "column (weights from a column) or --selector none (every row counts the same)"
            )
        if self.uses_validation and not has_validation:
            raise ValueError(
                f"rho={self.rho}, rho_start={self.rho_start} weigh the validation rows, but --validation_dataset is "
                "missing; or set --rho 0 and leave --rho_start out"
            )
        if self.scout_ratio and (self.selector not in ("mirror", "bmo") or self.reference == "tracked"):
            raise ValueError(
                "scouting settles the scores before training, so it needs selector 'mirror' or 'bmo' and reference "
                "'zero' or 'base': leave --scout_ratio out"
            )
        if self.selector == "column" and not has_weight:
            raise ValueError(
                "selector 'column' reads a column 'weight' of the training rows: name it by --weight_column"
            )
        if self.refine_fraction and self.refine_policy == "lowest" and self.selector == "none":
            raise ValueError(
                "selector 'none' gives all questions one weight: there is no lowest. Set --refine_policy random"
            )
        self._warn_of_settings_without_effect(has_validation)

    def _refuse_bad_values(self) -> None:
        for name in ("rho", "rho_start", "rho_decay_ratio", "scout_ratio", *REFINE_SHARES):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {value}")
        for name in (
            "selector_learning_rate",
            "scout_learning_rate",
            "reference_learning_rate",
            "bmo_temperature",
            "per_device_validation_batch_size",
            *REFINE_POSITIVE,
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.ratio_clip < 1:
            raise ValueError(f"ratio_clip must be at least 1, got {self.ratio_clip}")
        if self.refine_start is not None and self.refine_start < 0:
            raise ValueError(f"refine_start must not be negative, got {self.refine_start}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice) for choice in choices if choice)
                raise ValueError(f"unknown {name} {getattr(self, name)!r}: choose one of {known}")

    def _refuse_what_sft_offers(self) -> None:
        if self.packing or self.eval_packing:
            raise ValueError("packing joins rows, and a joined row has no weight of its own: set --packing false")
        if self.padding_free:
            raise ValueError("padding_free joins the rows of a batch, and the losses of rows are needed: leave it off")
        if self.loss_type not in ("nll", "chunked_nll"):
            raise ValueError(f"loss_type '{self.loss_type}' has no per-row log-likelihood: use --loss_type nll")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor changes what a row's loss means: set it to 0")
        if isinstance(self.dataset_kwargs, dict) and self.dataset_kwargs.get("skip_prepare_dataset"):
            raise ValueError("skip_prepare_dataset is not supported: rows are numbered while they are prepared")

    def _warn_of_settings_without_effect(self, has_validation: bool) -> None:
        without_effect = {
            "score_map": self.score_map is not None and self.selector not in ("mirror", "bmo"),
            "selector_learning_rate": self.selector_learning_rate is not None
            and self.selector not in DEFAULT_LEARNING_RATE,
            "bmo_temperature": self.bmo_temperature != 0.5 and self.selector != "bmo",
            "reference": self.reference != "base" and self.selector in STATIC_SELECTORS,
            "scout_learning_rate": self.scout_learning_rate is not None and not self.resolve().scout_ratio,
            "reference_learning_rate": self.reference_learning_rate is not None and self.reference != "tracked",
            "rho_decay_ratio": self.rho_decay_ratio != 1.0 and self.rho_start is None,
            "validation_dataset": has_validation and not self.uses_validation,
        }
        for name, unused in without_effect.items():
            if unused:
                logger.warning(f"{name} is set but has no effect with selector '{self.selector}', rho {self.rho}")
        self.warn_of_refining_without_effect(given_fields(self))
