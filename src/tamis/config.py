"""Settings of a run: `BilevelConfig`, an `SFTConfig` with the fields of tamis.

Each field's help text is its documentation, for `tamis train --help` and for `help(BilevelConfig)`. What is left open
is filled in by `BilevelConfig.resolve`; what cannot work is refused by `tamis.checks`, before a model is loaded.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from trl import SFTConfig

from tamis.settings import as_number, given_fields, setting

# Scouts are tried at these multiples of the learning rate: no single one ranks best everywhere (LOG.md).
SCOUT_LEARNING_RATE_RATIOS = (0.15, 0.5, 1.5)
# A scout of default length sees so many validation rows, but none more often than this.
SCOUT_VISITS, MAX_SCOUT_EPOCHS = 2000, 40
# Share of the validation loss where nothing is known of the training rows.
DEFAULT_RHO = 0.5
# Step size of the scores: logits per standard deviation of the excess loss for `mirror`, logits for the Adam rules (the
# rate of SEAL's example, for either map).
DEFAULT_SELECTOR_LEARNING_RATE = {"mirror": 1.75, "softmax": 5e-3, "sigmoid": 5e-3}

ScoreMap = Literal["bounded", "softmax"]


class SelectorTraits(Protocol):
    """What the settings must know of a selector: `tamis.Selector` documents the attribute."""

    uses_excess: ClassVar[bool]


class Resolved:
    """Settings after what was left open has been filled in: attributes, and `announcements`, one line each."""

    score_map: ScoreMap | None = None
    selector_learning_rate: float | None = None
    scout_learning_rates: tuple[float, ...] = ()
    rho: float | None
    rho_start: float | None
    validation_rows_per_step: int  # of an optimizer step, over all micro-batches and ranks
    generation_batch_size: int
    refine_start: float
    response_temperature: float
    prompts: str | None = None  # see `tamis.prompts`
    refine_fraction: float | None  # None: as many as are likely to be wrong

    def __init__(self) -> None:
        self.announcements: list[str] = []

    def set(self, name: str, given: Any, default: Any, reason: str) -> None:
        """Take the given value, or else the default."""
        setattr(self, name, default if given is None else given)
        if getattr(self, name) is not None:
            self.announcements.append(f"{name} = {getattr(self, name)} ({reason if given is None else 'as given'})")


@dataclass
class BilevelConfig(SFTConfig):
    """Configuration of [`BilevelTrainer`]: everything of [`~trl.SFTConfig`], and the fields below."""

    # None tells a name that is set from one that is not: see `__post_init__`. A bare flag means True.
    gradient_checkpointing: bool | None = setting(  # type: ignore[assignment]
        None, "Deprecated: use --activation_checkpointing.", nargs="?", const=True
    )
    activation_checkpointing: bool | None = setting(
        None,
        "Compute activations again in the backward pass: less memory, about 20%% slower. Default: on.",
        nargs="?",
        const=True,
    )

    assistant_only_loss: bool | None = setting(  # type: ignore[assignment]
        None,
        "Train on the answers in messages alone. Default: every answer where the chat template marks them with "
        "{%% generation %%}, else the last one. false: on every token.",
        nargs="?",
        const=True,
    )

    # > Parameters that control the run
    overwrite_output_dir: bool = setting(
        False, "Replace the run that --output_dir holds: its checkpoints, model and files. Files of yours stay."
    )

    # > Parameters that control the selection
    selector: Literal["scout", "mirror", "softmax", "sigmoid", "bmo", "column", "none"] = setting(
        "scout",
        "How rows get weights. Before training: 'scout' (the probability of being like the validation rows). Along the "
        "training steps: 'mirror', 'softmax' and 'sigmoid' (SEAL's rule: Adam on the logits of all "
        "rows), 'bmo' (closed form). Given: 'column' (a column of weights, no validation dataset needed), 'none' "
        "(direct mixing).",
    )
    score_map: ScoreMap | None = setting(
        None,
        "How scores become weights: 'bounded' (default of 'mirror': a row can lose its weight but not take all of it) "
        "or 'softmax' (default of 'bmo'). Only these two selectors have the choice.",
    )
    selector_learning_rate: float | None = setting(
        None,
        "Step size of the scores: logits per standard deviation of the excess loss for 'mirror' (default 1.75), "
        "logits for 'softmax' and 'sigmoid' (default 0.005).",
    )
    bmo_temperature: float = setting(0.5, "Temperature of the selector 'bmo', in nats per token; smaller is sharper.")
    reference: Literal["zero", "base", "tracked"] = setting(
        "base",
        "What the selectors that follow the steps compare a loss with: 'zero', 'base' (the model before training) or "
        "'tracked' (a model that follows the training rows alone).",
    )
    scout_learning_rate: float | None = setting(
        None,
        "Learning rate of the scout. Default: the best of 0.15, 0.5 and 1.5 times --learning_rate, as validation rows "
        "that the scout has not seen tell.",
    )
    scout_epochs: float | None = setting(
        None,
        "Passes of the scout over the validation rows. Default: as many as make 2000 rows, at most 40, or half "
        "or a quarter of that, whichever is best.",
    )
    scores: str | None = setting(
        None,
        "Folder of a `tamis score` or an earlier run on the same rows in the same order, with this or another model: "
        "its probabilities are taken over, and no scout is sent. Resuming needs it too.",
    )
    reference_learning_rate: float | None = setting(
        None, "Constant learning rate of the reference 'tracked'. When not set it follows the model's schedule."
    )

    # > Parameters that control the two levels
    rho: float | None = setting(
        None,
        "Share of the validation loss in the objective, in [0, 1]. Default: with 'scout' such that a validation row "
        "counts as much as a training row that is surely right, or as any row of its step if the scout is not "
        "believed; else 0.5.",
    )
    rho_start: float | None = setting(
        None, "Share at the first step, from where it goes linearly to --rho. Constant when not set."
    )
    rho_decay_ratio: float = setting(1.0, "Part of the training steps over which --rho_start decays to --rho.")
    per_device_validation_batch_size: int | None = setting(
        None,
        "Validation rows per device and micro-batch, beside --per_device_train_batch_size training rows. Default: with "
        "'scout' as many in a step as their share of the data, at least one; else the same number.",
    )
    loss_reduction: Literal["example", "token"] = setting(
        "example", "'example': every row counts the same. 'token': every token does, as in SFTTrainer."
    )

    # > Parameters that control the refining
    refine_fraction: str = setting(
        "0",
        "Part of the rows that get new responses from the model; 'auto': those that are more likely wrong than right "
        "(selector 'scout'). 0: no refining.",
    )
    refine_start: float | None = setting(
        None,
        "First refresh: an optimizer step, or below 1 a part of all steps. Default: 0 where the weights are settled "
        "before training ('scout', 'column') or do not matter ('random'), so that bad responses are never trained on; "
        "else 0.25.",
    )
    refine_every: float = setting(
        0.25, "From one refresh to the next: optimizer steps (1: every step), or below 1 a part of all steps."
    )
    num_generations: int = setting(4, "New responses to each refined row's prompt (G).")
    refine_policy: Literal["lowest", "random"] = setting(
        "lowest",
        "'lowest': the rows whose original responses have the lowest weights, picked anew at every refresh; 'random': "
        "the same random rows at every refresh.",
    )
    refine_on_error: Literal["stop", "continue"] = setting(
        "stop", "When the generator fails: save and 'stop', or 'continue' with the responses there are."
    )
    response_weighting: Literal["bmo", "uniform"] = setting(
        "bmo", "How the responses to a prompt share its weight: 'bmo' (importance ratios) or 'uniform'."
    )
    response_temperature: float | None = setting(
        None,
        "Temperature tau of 'bmo': responses count p^(1/tau)/q. Smaller is sharper. Default: 1 with selector 'scout', "
        "which tells right responses from wrong ones, else 0.15.",
    )
    ratio_level: Literal["token", "sequence"] = setting(
        "token", "Importance ratios of a token on average (geometric mean), or of the whole response."
    )
    importance_ratio_cap: float = setting(
        2.0,
        "Largest coefficient of a generated response, which is (p / p_generator)^(1/tau): by how much it can gain as "
        "the model moves towards it.",
    )

    # > Parameters that control the generation
    generator: Literal["transformers", "vllm"] = setting(
        "transformers", "What writes the responses: the training model itself ('transformers') or 'vllm'."
    )
    generation_temperature: float = setting(1.0, "Sampling temperature of new responses.")
    generation_top_p: float = setting(1.0, "Nucleus of the sampling; 1 is all tokens.")
    max_new_tokens: int = setting(256, "A response not ended by then is not trained on.")
    generation_batch_size: int | None = setting(
        None,
        "Responses drawn at a time and device by 'transformers'. The rows of a training micro-batch when not set: "
        "more is faster and takes more memory.",
    )
    vllm_mode: Literal["colocate", "server"] = setting(
        "colocate", "vLLM in this process, or the server of `trl vllm-serve`."
    )
    vllm_server_base_url: str = setting("http://127.0.0.1:8000", "Address of the server, for --vllm_mode server.")
    vllm_gpu_memory_utilization: float = setting(0.3, "Part of the GPU memory that vLLM takes in this process.")

    def __post_init__(self) -> None:
        if str(self.refine_fraction) != "auto":
            self.refine_fraction = as_number("refine_fraction", self.refine_fraction)
        if self.scores is not None:
            self.scores = str(self.scores)  # a path
        # Before the parent classes resolve fields of their own: this is what a replay needs.
        self.given_settings = given_fields(self)
        if self.bf16 is None and not torch.accelerator.is_available():
            self.bf16 = False  # TRL's default is bf16, which transformers refuses on a machine with a CPU only
        if self.activation_checkpointing is None and self.gradient_checkpointing is None:
            self.activation_checkpointing = True  # TRL's default, by the name that transformers has not deprecated
        super().__post_init__()

    def __getstate__(self) -> dict[str, Any]:
        """Without the login: transformers pickles the settings beside every model, and uploads them with it."""
        return {**vars(self), "hub_token": None}

    def __copy__(self) -> "BilevelConfig":
        """With the login, unlike what is pickled."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    # --- what was left open -----------------------------------------------------------------------------------------

    def resolve(
        self, selector: SelectorTraits | None = None, *, num_training: int = 1, num_validation: int = 1
    ) -> Resolved:
        """Fill in what was left open, each with the reason.

        Args:
            selector: an instance that takes the place of the name in the field `selector`.
            num_training, num_validation: rows; of the latter there may be none.
        """
        resolved = Resolved()
        scouts = self.scouts(selector)
        if selector is None:
            default_map, reason = {
                "mirror": ("bounded", "a row can lose its weight but not take all of it"),
                "bmo": ("softmax", "the closed form"),
            }.get(self.selector, (None, ""))
            resolved.set("score_map", self.score_map if default_map else None, default_map, reason)
            resolved.set(
                "selector_learning_rate",
                self.selector_learning_rate,
                DEFAULT_SELECTOR_LEARNING_RATE.get(self.selector),
                f"default of selector '{self.selector}'",
            )
        if self.sends_scout(selector):
            given = None if self.scout_learning_rate is None else (self.scout_learning_rate,)
            rates = tuple(float(f"{ratio * self.learning_rate:.6g}") for ratio in SCOUT_LEARNING_RATE_RATIOS)
            reason = f"{', '.join(map(str, SCOUT_LEARNING_RATE_RATIOS))} times learning_rate: unseen rows choose"
            resolved.set("scout_learning_rates", given, rates, reason)
        if num_validation:
            resolved.set("rho", self.rho, None if scouts else DEFAULT_RHO, "half of the objective")
        else:
            resolved.set("rho", self.rho, 0.0, "there are no validation rows")
        resolved.set("rho_start", self.rho_start, resolved.rho, "constant rho")
        size, num_micro_batches = self.per_device_validation_batch_size, self.micro_batches_per_step
        num_given = None if size is None else size * num_micro_batches
        default, reason = self._validation_rows_per_step(scouts, num_training, num_validation)
        resolved.set("validation_rows_per_step", num_given, default, reason)
        resolved.refine_fraction = None if self.refine_fraction == "auto" else float(self.refine_fraction)
        if self.refines:
            num_rows = self.per_device_train_batch_size
            num_rows += math.ceil(resolved.validation_rows_per_step / num_micro_batches)
            reason = "the rows of a training micro-batch, so that it fits where training fits"
            resolved.set("generation_batch_size", self.generation_batch_size, num_rows, reason)
            reason = "the scout tells responses apart" if scouts else "likely responses become likelier"
            resolved.set("response_temperature", self.response_temperature, 1.0 if scouts else 0.15, reason)
            is_column = selector is None and self.selector == "column"
            if scouts or is_column or self.refine_policy == "random":
                start, reason = 0.0, "the rows to refine are known before the first step"
            else:
                start, reason = 0.25, "the scores need steps to tell rows apart"
            resolved.set("refine_start", self.refine_start, start, reason)
        return resolved

    @property
    def micro_batches_per_step(self) -> int:
        """Micro-batches of an optimizer step, over all ranks."""
        return int(self.gradient_accumulation_steps * self.world_size)

    @property
    def training_rows_per_step(self) -> int:
        """Training rows of an optimizer step, over all micro-batches and ranks."""
        return self.per_device_train_batch_size * self.micro_batches_per_step

    def _validation_rows_per_step(self, scouts: bool, num_training: int, num_validation: int) -> tuple[int, str]:
        """How many there are by default, and why.

        At the scout's rho a validation row counts as much as a right training row. So it needs no more visits than one:
        as many validation rows as training rows would double the work of a step (LOG.md, 2026-11-26).
        """
        size = self.training_rows_per_step
        if not scouts or self.rho is not None:
            return size, "as many as training rows"
        return validation_rows_beside(size, num_training, num_validation), "their share of the data, at least one"

    @property
    def refines(self) -> bool:
        """Whether rows may get new responses."""
        return self.refine_fraction == "auto" or float(self.refine_fraction) > 0

    @property
    def trains_on_validation(self) -> bool:
        """Whether any step descends the validation loss."""
        return self.rho is None or max(self.rho, self.rho_start or 0.0) > 0

    def scouts(self, selector: SelectorTraits | None = None) -> bool:
        """Whether rows are weighed by what a scout finds before training, in this run or in an earlier one."""
        return selector is None and self.selector == "scout"

    def takes_scores(self, selector: SelectorTraits | None = None) -> bool:
        """Whether what the scout of an earlier run has found is taken over."""
        return self.scouts(selector) and self.scores is not None

    def sends_scout(self, selector: SelectorTraits | None = None) -> bool:
        """Whether a scout scores the rows in this run."""
        return self.scouts(selector) and self.scores is None

    def uses_validation(self, selector: SelectorTraits | None = None) -> bool:
        """Whether validation rows take any part in the run: in its steps or in scouting."""
        return self.trains_on_validation or self.sends_scout(selector)


def validation_rows_beside(num_rows: int, num_training: int, num_validation: int) -> int:
    """How many validation rows go with so many training rows in the proportion of the data: at least one, at most all.

    Args:
        num_training, num_validation: rows of the data.
    """
    return min(max(math.ceil(num_rows * num_validation / max(num_training, 1)), 1), num_rows)


OWN_FIELDS = [f for f in fields(BilevelConfig) if f.name in BilevelConfig.__annotations__]
_NAMES = [f.name for f in OWN_FIELDS]
REFINING_FIELDS = _NAMES[_NAMES.index("refine_fraction") :]
BilevelConfig.__doc__ = f"{BilevelConfig.__doc__}\n    Parameters:\n" + "".join(
    f"        {f.name} (`{f.type}`, defaults to `{f.default!r}`): {f.metadata['help']}\n" for f in OWN_FIELDS
)
