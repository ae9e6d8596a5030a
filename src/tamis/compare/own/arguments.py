"""The options of `tamis compare` beside those of `tamis train`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tamis.compare.own.contenders import DEFAULT_METHODS, METHODS
from tamis.compare.own.metrics import EVAL_LOSS, find_metrics
from tamis.settings import given_fields, warn_without_effect


@dataclass
class CompareArguments:
    """What is compared, and by what.

    Attributes:
        methods: names of `tamis.compare.own.contenders.METHODS`; ``all`` is every one of them.
        seeds: of the runs of each method; three, the least from which a spread can be told.
        rhos: of direct mixing.
        keep_share: part of the rows that `random` and the rivals keep; None: as many as tamis takes for right.
        metric: what the methods are judged by, the first one first; see `tamis.compare.own.metrics`.
        max_tokens: of a run; None: what plain SFT sees in ``num_train_epochs``, or in ``max_steps``.
        max_minutes: the same as time, which is measured; scouting and scoring come on top.
    """

    methods: list[str] = field(
        default_factory=lambda: list(DEFAULT_METHODS),
        metadata={"help": f"Methods to compare, or 'all': {', '.join(METHODS)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds: a run of each method each."})
    rhos: list[float] = field(
        default_factory=lambda: [0.1, 0.3, 0.8], metadata={"help": "Shares of the validation loss in direct mixing."}
    )
    keep_share: float | None = field(
        default=None,
        metadata={"help": "Part of the rows that random and the rivals keep. Default: as many as tamis."},
    )
    metric: list[str] = field(
        default_factory=lambda: [EVAL_LOSS],
        metadata={
            "help": "eval_loss; exact_match of greedy answers; module:function, which gives a number for each row, "
            "higher is better; or lm_eval:TASK. Several may be given: the first one decides."
        },
    )
    max_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens that a run sees. Default: those of plain SFT in --num_train_epochs or --max_steps."},
    )
    max_minutes: float | None = field(
        default=None, metadata={"help": "The same as minutes of training, by measured steps. Scouting comes on top."}
    )

    def check(self, given: Iterable[str]) -> None:
        """Refuse what cannot be compared, and warn of what has no effect.

        Args:
            given: names of the other settings that the user has set.

        Raises:
            ValueError: an unknown method or metric, or a number out of range.
        """
        if "all" in self.methods:
            self.methods = list(METHODS)
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"unknown method {unknown[0]!r} in `methods`: choose from {', '.join(METHODS)}, or all")
        for name in ("methods", "seeds", "rhos"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}: give at least one, and each once, got {values}")
        if not all(0 < rho < 1 for rho in self.rhos):
            raise ValueError(f"rhos: mixing takes shares between 0 and 1, got {self.rhos}")
        if self.keep_share is not None and not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share must be above 0 and at most 1, got {self.keep_share}")
        for name in ("max_tokens", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.max_tokens and self.max_minutes:
            raise ValueError("`max_tokens` and `max_minutes` are both a budget: give one")
        ask_tamis = [name for name in self.methods if METHODS[name].asks_tamis(self.keep_share)]
        if ask_tamis and "tamis" not in self.methods:
            raise ValueError(
                f"{ask_tamis[0]} keeps the rows, or as many rows, as tamis does: add tamis to `methods`"
                + ("" if ask_tamis[0] == "select_then_sft" else ", or give `keep_share`")
            )
        find_metrics(self.metric)
        self._warn(given)

    def _warn(self, given: Iterable[str]) -> None:
        kept = [name for name in self.methods if METHODS[name].keeps]
        inactive = {} if kept else {"no method keeps a part of the rows": ["keep_share"]}
        if "mixing" not in self.methods:
            inactive["mixing is not among the methods"] = ["rhos"]
        warn_without_effect(given_fields(self), inactive)
        inactive = {"`seeds` has those of the runs": ["seed", "data_seed"]}
        inactive["no model is kept"] = [
            "save_strategy", "save_steps", "save_total_limit", "load_best_model_at_end", "push_to_hub",
            "resume_from_checkpoint", "hub_model_id",
        ]  # fmt: skip
        if self.max_tokens or self.max_minutes:
            name = "max_tokens" if self.max_tokens else "max_minutes"
            inactive[f"`{name}` is the budget"] = ["max_steps", "num_train_epochs"]
        if not any(name.startswith("tamis") for name in self.methods):
            inactive["tamis is not among the methods"] = ["selector", "rho"]
        warn_without_effect(given, inactive)
