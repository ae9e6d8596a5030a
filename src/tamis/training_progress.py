"""The bar of a training: its steps, with losses and ESS/N behind it."""

import logging
import time
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as _ProgressCallback
from transformers.trainer_utils import has_length

from tamis.progress import CONSOLE, Bar

logger = logging.getLogger(__name__)

_SHOWN = {
    "training_loss": "training loss",
    "validation_loss": "validation loss",
    "ess_ratio": "ESS/N",
    "eval_loss": "held-out loss",
    "eval_teacher_forced_match": "match",
}


class ProgressCallback(TrainerCallback):
    """A bar over the steps with the losses and ESS/N behind it; without a terminal a line for each logging step.

    Args:
        title: what the bar is called.
    """

    def __init__(self, title: str):
        self.title = title
        self._bar: Bar | None = None
        self._evaluation: Bar | None = None
        self._shown: dict[str, str] = {}
        self._started = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The bar begins."""
        self._started = (state.global_step, time.monotonic())
        if state.is_world_process_zero:
            self._bar = Bar(self.title, state.max_steps, is_logged=False)
            self._bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        if self._bar is not None:
            self._bar.advance(state.global_step - self._bar.num_done)

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kw: Any) -> None:
        """An evaluation has a bar of its own, in the place of the other."""
        if not state.is_world_process_zero or not has_length(eval_dataloader):
            return
        if self._evaluation is None:
            self._evaluation = Bar("evaluating", len(eval_dataloader))
        self._evaluation.advance()

    def _end_evaluation(self) -> None:
        if self._evaluation is not None:
            self._evaluation.__exit__()
            self._evaluation = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The bar of the evaluation ends."""
        self._end_evaluation()

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        """The bar of the prediction ends."""
        self._end_evaluation()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """What is shown behind the bar, or on a line."""
        new = {_SHOWN[name]: f"{value:.3g}" for name, value in (logs or {}).items() if name in _SHOWN}
        if not new or "train_runtime" in (logs or {}) or not state.is_world_process_zero:
            return  # the last log sums up the run, and repeats the one before it
        self._shown |= new
        if CONSOLE.is_terminal or CONSOLE.is_jupyter:
            if self._bar is not None:
                self._bar.note(_listed(self._shown))
        else:
            logger.info(f"{self.title} {state.global_step}/{state.max_steps}: {_listed(new)}{self._time_left(state)}")

    def _time_left(self, state: Any) -> str:
        first, started = self._started
        num_steps, num_left = state.global_step - first, state.max_steps - state.global_step
        if num_steps <= 0 or num_left <= 0:
            return ""
        return f", {_duration((time.monotonic() - started) / num_steps * num_left)} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The bar ends."""
        if self._bar is not None:
            self._bar.__exit__()
            self._bar = None


def _listed(shown: dict[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shown.items())


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def use_progress(trainer: Trainer, callback: ProgressCallback) -> None:
    """Replace the callbacks of ``trainer`` that print, unless the user has switched progress off."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(_ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(callback)
