"""A progress bar on stderr that shows what matters of a bilevel run, instead of dictionaries on stdout."""

from typing import Any

from transformers import PrinterCallback, Trainer
from transformers import ProgressCallback as _ProgressCallback

_SHOWN = {
    "training_loss": "training",
    "validation_loss": "validation",
    "penalty_gap": "gap",
    "ess_ratio": "ESS/N",
    "eval_loss": "eval",
    "eval_teacher_forced_match": "match",
}


class ProgressCallback(_ProgressCallback):
    """The bar of `transformers` (rate and time left) with losses, penalty gap and ESS/N behind it.

    Args:
        title: what the bar is called.
    """

    def __init__(self, title: str):
        super().__init__()
        self.title = title
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None:
            return
        self._shown |= {_SHOWN[name]: f"{value:.3g}" for name, value in (logs or {}).items() if name in _SHOWN}
        self.training_bar.set_postfix(self._shown)


def use_progress(trainer: Trainer, callback: ProgressCallback) -> None:
    """Replace the callbacks of ``trainer`` that print, unless the user has switched progress off."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(_ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(callback)
