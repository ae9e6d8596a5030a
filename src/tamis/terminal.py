"""What a command says while it works: its own lines and real warnings, without the chatter of the libraries below it.

Everything here goes to stderr. `--log_level debug` lets all of it through.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import datasets
from huggingface_hub.utils.tqdm import enable_progress_bars
from rich.text import Text
from transformers.utils import logging as transformers_logging

from tamis.progress import CONSOLE, close_bars
from tamis.settings import FlagFormatter

# The names of `transformers`; there 'passive' leaves the level alone, and so it does with ours, which is info.
_LEVELS = {**transformers_logging.get_log_levels_dict(), "passive": logging.INFO}
LOG_LEVELS = tuple(_LEVELS)
# They write to stderr by handlers of their own, past the bar.
_LIBRARIES = ("transformers", "datasets", "huggingface_hub")
# Of interest to who writes a library, not to who runs it.
_FOR_DEVELOPERS = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)


class _ConsoleHandler(logging.Handler):
    """One line for each record, above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        text = self.format(record)
        if record.levelno >= logging.WARNING:
            CONSOLE.print(Text.assemble((f"{record.levelname.lower()}: ", "bold yellow"), text), soft_wrap=True)
        else:
            CONSOLE.print(Text(text), soft_wrap=True)


@contextmanager
def quiet_terminal(log_level: str, details_of: Sequence[str] = ("tamis",)) -> Iterator[None]:
    """Within it stderr shows the log of tamis from ``log_level`` on, and warnings of others; all bars end with it.

    Args:
        log_level: a name of `LOG_LEVELS`. With debug the bars, warnings and log of the libraries are shown as well.
        details_of: the parts of tamis that are heard at the default level; of the rest only warnings are.
    """
    level, is_debug = _LEVELS[log_level], log_level in ("debug", "detail")
    with ExitStack() as undo:
        undo.callback(close_bars)
        undo.enter_context(_logging(level, is_debug, details_of if log_level == "passive" else ("tamis",)))
        undo.enter_context(warnings.catch_warnings())
        if not is_debug:
            undo.enter_context(_without_bars_of_libraries())
            warnings.showwarning = _log_warning
            if not sys.warnoptions:
                for category in _FOR_DEVELOPERS:
                    warnings.simplefilter("ignore", category)
                warnings.filterwarnings("ignore", ".*pin_memory.*")
        yield


@contextmanager
def _logging(level: int, is_debug: bool, details_of: Sequence[str]) -> Iterator[None]:
    handler, root = _ConsoleHandler(), logging.getLogger()
    handler.setFormatter(FlagFormatter("%(message)s"))
    loggers = [root, *map(logging.getLogger, ("tamis", *details_of, *_LIBRARIES))]
    before = [(logger, logger.level, logger.handlers[:], logger.propagate) for logger in loggers]
    root.setLevel(logging.INFO if is_debug else logging.WARNING)
    logging.getLogger("tamis").setLevel(logging.WARNING)
    for name in details_of:
        logging.getLogger(name).setLevel(level)
    for name in _LIBRARIES:
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, earlier_level, handlers, propagate in before:
            logger.setLevel(earlier_level)
            if logger is not root:
                logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def _without_bars_of_libraries() -> Iterator[None]:
    """Downloads keep theirs on a terminal: a model may take an hour to come."""
    are_shown = not datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    if are_shown[0]:
        datasets.disable_progress_bars()
    if are_shown[1]:
        transformers_logging.disable_progress_bar()  # those of the hub too
    if CONSOLE.is_terminal and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS"):
        enable_progress_bars()
    try:
        yield
    finally:
        if are_shown[0]:
            datasets.enable_progress_bars()
        if are_shown[1]:
            transformers_logging.enable_progress_bar()


def _log_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    logging.getLogger("py.warnings").warning(" ".join(str(message).split()))
