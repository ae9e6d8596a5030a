"""tamis: post-train language models under the guidance of a small trusted validation set."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tamis.config import BilevelConfig
    from tamis.data import load_rows
    from tamis.losses import NonFiniteLossError
    from tamis.selection.selectors import Selector
    from tamis.trainer import BilevelTrainer

__all__ = ["BilevelConfig", "BilevelTrainer", "NonFiniteLossError", "Selector", "load_rows"]

# Imported when asked for: torch and its friends take seconds, and `tamis --help` needs none of them.
_HOMES = {
    "BilevelConfig": "tamis.config",
    "BilevelTrainer": "tamis.trainer",
    "NonFiniteLossError": "tamis.losses",
    "Selector": "tamis.selection.selectors",
    "load_rows": "tamis.data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tamis' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
