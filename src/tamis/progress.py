"""One bar on stderr for what a run is doing: live on a terminal, a line of the log now and then everywhere else.

There is never more than one bar: what begins within something else takes its place until it has ended. Log lines are
printed above it, because `tamis.terminal` writes to the same `CONSOLE`.
"""

import atexit
import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers import ProgressCallback as _ProgressCallback
from transformers.trainer_utils import has_length

logger = logging.getLogger(__name__)

CONSOLE = Console(stderr=True)
# Without a terminal, what has no steps to log says where it is this often, in seconds.
LINE_EVERY = 30.0
_SHOWN = {
    "training_loss": "training loss",
    "validation_loss": "validation loss",
    "ess_ratio": "ESS/N",
    "eval_loss": "held-out loss",
    "eval_teacher_forced_match": "match",
}
T = TypeVar("T")


class _Screen:
    """The bars that have begun and not ended; the last of them is on the terminal."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self.tasks: list[TaskID] = []

    def open(self, title: str, total: int) -> TaskID:
        if self.progress is None:
            left = TimeRemainingColumn(compact=True)
            columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), left)
            self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=CONSOLE, transient=True)
            self.progress.start()
        for task in self.tasks:
            self.progress.update(task, visible=False)
        self.tasks.append(self.progress.add_task(title, total=total, note=""))
        return self.tasks[-1]

    def close(self, task: TaskID) -> None:
        if self.progress is None or task not in self.tasks:
            return  # all bars were closed in the meantime
        self.progress.remove_task(task)
        self.tasks.remove(task)
        if self.tasks:
            self.progress.update(self.tasks[-1], visible=True)
        else:
            self.close_all()

    def close_all(self) -> None:
        if self.progress is not None:
            self.progress.stop()
        self.progress, self.tasks = None, []


_SCREEN = _Screen()
close_bars = _SCREEN.close_all
atexit.register(close_bars)  # a terminal whose bar is left open has no cursor


class Bar:
    """One bar, or without a terminal a line every `LINE_EVERY` seconds; nothing at all where ``is_shown`` is False.

    Args:
        title: what is being done.
        total: how many of it there are.
        is_logged: whether lines take its place; not where the caller logs lines of its own.
    """

    def __init__(self, title: str, total: int, *, is_shown: bool = True, is_logged: bool = True):
        is_live = CONSOLE.is_terminal or CONSOLE.is_jupyter
        self.title, self.total, self.num_done = title, total, 0
        self._is_logged = is_shown and is_logged and not is_live
        self._last_line = time.monotonic()
        self._task = _SCREEN.open(title, total) if is_shown and is_live else None

    def advance(self, number: int = 1) -> None:
        """So many more are done."""
        self.num_done += number
        if self._task is not None and _SCREEN.progress is not None:
            _SCREEN.progress.update(self._task, completed=self.num_done)
        elif self._is_logged and time.monotonic() - self._last_line > LINE_EVERY:
            self._last_line = time.monotonic()
            logger.info(f"{self.title}: {self.num_done} of {self.total}")

    def note(self, text: str) -> None:
        """What is written behind the bar."""
        if self._task is not None and _SCREEN.progress is not None:
            _SCREEN.progress.update(self._task, note=text)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            _SCREEN.close(self._task)


def track(items: Iterable[T], title: str, total: int, *, is_shown: bool = True) -> Iterator[T]:
    """The items, with a bar over them."""
    with Bar(title, total, is_shown=is_shown) as bar:
        for item in items:
            yield item
            bar.advance()


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
