"""Writing files so that a reader never meets half of one, and that an error says which could not be written."""

import errno
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Ours, and those of safetensors, which does the same.
_TEMPORARY = re.compile(r"\..+\.\w{8}\.tmp|\.tmp\w{6}")
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM, errno.EROFS)
# How libraries in other languages pass on the number of an error, and how torch says that it could not write.
_NUMBER = re.compile(r"\((?:os error|errno) (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)
_WORDS = re.compile("failed with strerror: ([^.\n]+)")
_OF_TORCH = re.compile(
    "PytorchStreamWriter failed|basic_ios::clear: iostream error|File .* cannot be opened|unexpected pos"
)


class WriteError(OSError):
    """A file of ours could not be written. What was there before is whole."""


@contextmanager
def writing(path: Path, target: Path | None = None) -> Iterator[None]:
    """Within it whatever a library says of a write that has failed becomes a `WriteError` that names the file.

    Args:
        path: what is written; of a folder, any file in it.
        target: what it will become, if a user knows it by that.

    Raises:
        WriteError: so it was.
    """
    try:
        yield
    except WriteError:
        raise
    except Exception as error:
        number, name, known = disk_error(error), getattr(error, "filename", None), path.resolve()
        named = Path(name).resolve() if isinstance(name, str) else known
        if number is None or not (named.is_relative_to(known.parent) or known.is_relative_to(named)):
            raise
        is_within = path.is_dir() and named.is_relative_to(known)
        file = named if is_within or named in known.parent.parents else path  # or a folder above it, to be made
        reason = os.strerror(number) if number else "the disk is full, or does not work"
        raise WriteError(number, reason, str(target or file)) from error


def disk_error(error: BaseException) -> int | None:
    """The errno with which a write has failed, 0 where a library keeps it to itself; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1] or found[2])
    if number is None and (said := _WORDS.search(str(error))):
        number = next((known for known in _OF_A_DISK if os.strerror(known) == said[1].strip()), None)
    if number is None and isinstance(error, RuntimeError) and _OF_TORCH.search(str(error)):
        return 0
    return number if number in _OF_A_DISK else None


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: ``path`` is old or new, never half.

    Raises:
        WriteError: the old one stays.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        try:
            write(Path(temporary))
            # mkstemp makes private files; artefacts are as readable as any other file of the user.
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that processes have left here which were killed while they wrote."""
    for path in folder.iterdir():
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()
