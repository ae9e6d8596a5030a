"""From an exception to the one line that a user reads: what went wrong, and what to do."""

import errno
import re
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

from tamis.checkpoint import ResumableError
from tamis.files import WriteError, disk_error
from tamis.losses import NonFiniteLossError
from tamis.output_dir import was_cut_short
from tamis.ranks import BrokenForwardError
from tamis.settings import as_flags

_INSTALL = re.compile(r"pip3? install ['\"]?([\w.\[\],<>=-]*[\w\]])")
_NOT_FOUND = re.compile(r"'([\w.-]*\w)[^']*' distribution was not found")
_DISK_FULL = re.compile("No space left on device|Disk quota exceeded")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_LONGEST = 300  # characters of a library's message


def explain(error: Exception, command: str = "") -> tuple[int, str] | None:
    """The exit code and the line; None for what is no user's mistake, but ours.

    2: the input or the settings cannot work. 1: they can, but the run did not come to its end.

    Args:
        command: of tamis, that ends with it.
    """
    text = " ".join(str(error).split())
    if isinstance(error, NonFiniteLossError | ResumableError | BrokenForwardError):
        return 1, as_flags(text)
    if written := next((cause for cause in _chain(error) if _is_of_writing(cause)), None):
        return 1, _of_writing(written, command)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(text)
    ):
        return 1, (
            "out of memory: lower --per_device_train_batch_size and raise --gradient_accumulation_steps, lower "
            "--max_length, or set --use_peft"
        )
    if _is_of_template(error):
        return 2, (
            f"the chat template cannot render a row ({type(error).__name__}: {text}): give one that can by "
            "--chat_template_path, or take out of the rows what it does not know, such as tools"
        )
    if isinstance(error, ImportError | RuntimeError):
        found = _NOT_FOUND.search(text) or _INSTALL.search(text)
        package = found[1] if found else error.name if isinstance(error, ModuleNotFoundError) else None
        if package and not package.startswith("tamis"):
            return 2, f"a package is missing: pip install {package}"
    if isinstance(error, SafetensorError):
        return 2, f"a file of the model cannot be read ({text}): copy or download it again"
    if isinstance(error, OSError) and error.filename and error.strerror:
        return 2, f"{error.filename}: {error.strerror}"
    if isinstance(error, ValueError | OSError):
        return 2, as_flags(text) if _is_ours(error) else _shortened(text)
    if isinstance(error, TypeError) and "unexpected keyword argument" in text and not _is_ours(error):
        return 2, f"{text}: see the settings whose names end in _kwargs"
    return None


def _is_ours(error: Exception) -> bool:
    """Whether code of tamis has raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)


def _shortened(text: str) -> str:
    """The first sentences: a message of a library may have ten."""
    if len(text) <= _LONGEST:
        return text
    start = text[:_LONGEST]
    return start[: start.rfind(". ") + 1] or f"{start} ..."


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it came from: torch trips once more over a file that it could not write."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _is_of_writing(error: BaseException) -> bool:
    """Also where a library writes for itself; a file that may not be opened is rather one that it wants to read."""
    number = disk_error(error)
    return isinstance(error, WriteError) or number in (0, *_FULL) or _DISK_FULL.search(str(error)) is not None


def _of_writing(error: BaseException, command: str) -> str:
    number, path = disk_error(error), getattr(error, "filename", None)
    folders = Path(path).parents[:2] if path else ()  # a checkpoint is a folder of its own
    can_resume = command == "train" and any(was_cut_short(folder) for folder in folders)
    then = "go on with --resume_from_checkpoint last" if can_resume else "run the same command again"
    if number in _FULL or _DISK_FULL.search(str(error)):
        return f"the disk is full{f' ({path})' if path else ''}: make room, then {then}"
    reason = getattr(error, "strerror", None) or "the disk is full, or does not work"
    remedy = "see to its permissions" if number in _FORBIDDEN else "see to the disk"
    return f"{path or 'a file'} cannot be written ({reason}): {remedy}, then {then}"


def _is_of_template(error: Exception) -> bool:
    """Code that jinja has made of a template says so in place of a file."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TemplateError) or any(frame.filename == "<template>" for frame in frames)
