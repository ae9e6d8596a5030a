"""One bar on stderr for what a run is doing: live on a terminal, a line of the log now and then everywhere else.

There is never more than one bar: what begins within something else takes its place until it has ended. Log lines are
printed above it, because `tamis.terminal` writes to the same `CONSOLE`.
"""

import atexit
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)

CONSOLE = Console(stderr=True)
# Without a terminal, what has no steps to log says where it is this often, in seconds.
LINE_EVERY = 30.0
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
