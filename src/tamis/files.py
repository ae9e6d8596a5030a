"""Writing files so that a reader never meets half of one."""

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ours, and those of safetensors, which does the same.
_TEMPORARY = re.compile(r"\..+\.\w{8}\.tmp|\.tmp\w{6}")


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it: ``path`` is old or new, never half."""
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
