"""What trials of scouts have measured, kept in a file: scouting that was cut short goes on where it was.

Shape suffixes: M lengths of a descent, U unseen validation rows of a fold, S sampled training rows.
"""

import json
import logging
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tamis.files import write_atomically
from tamis.selection.mixture import Array
from tamis.selection.scout import ScoutSettings

logger = logging.getLogger(__name__)


class TrialNotes:
    """The losses that the scout of a fold has measured at one rate, at each length.

    What the file holds is taken over where it was written with the same settings and the base model has the same
    losses now as then, on validation rows and sampled training rows: then models and rows are the same.

    Args:
        path: the file, of the main process; None: nothing is kept.
        base: losses of the base model by name.
    """

    def __init__(self, path: Path | None, accelerator: Accelerator, settings: ScoutSettings, base: dict[str, Array]):
        self._path, self._base = path, base
        self._settings = json.dumps({"tamis": version("tamis"), **asdict(settings)})
        read = [self._read()]
        if accelerator.num_processes > 1:
            broadcast_object_list(read)
        self._measured = read[0]
        if self._measured:
            logger.info(f"scouting goes on: {len(self._measured) // 2} scouts were tried before it was cut short")

    def find(self, rate: float, fold: int) -> tuple[Array, Array] | None:
        """Losses of unseen validation rows (M, U) and of sampled training rows (M, S), where they were measured."""
        names = self._names(rate, fold)
        return (self._measured[names[0]], self._measured[names[1]]) if names[0] in self._measured else None

    def add(self, rate: float, fold: int, loss_MU: Array, loss_MS: Array) -> tuple[Array, Array]:
        """Keep them; returns what `find` would."""
        self._measured |= dict(zip(self._names(rate, fold), (loss_MU, loss_MS), strict=True))
        if self._path:
            metadata = {"settings": self._settings}
            write_atomically(self._path, lambda path: save_file(self._base | self._measured, path, metadata))
        return loss_MU, loss_MS

    def _read(self) -> dict[str, Array]:
        if self._path is None or not self._path.is_file():
            return {}
        with safe_open(self._path, "numpy") as file:
            settings = (file.metadata() or {}).get("settings")
        found = load_file(self._path)
        base = {name: found.pop(name, np.empty(0)) for name in self._base}
        is_same = all(
            base[name].shape == loss.shape and np.allclose(base[name], loss, rtol=1e-3)
            for name, loss in self._base.items()
        )
        return found if settings == self._settings and is_same else {}

    @staticmethod
    def _names(rate: float, fold: int) -> tuple[str, str]:
        return f"rate {rate!r}, fold {fold}, unseen", f"rate {rate!r}, fold {fold}, sampled"
