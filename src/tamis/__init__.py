"""tamis: post-train language models under the guidance of a small trusted validation set."""

from tamis.config import BilevelConfig
from tamis.data import load_rows
from tamis.losses import NonFiniteLossError
from tamis.selection.selectors import Selector
from tamis.trainer import BilevelTrainer

__all__ = ["BilevelConfig", "BilevelTrainer", "NonFiniteLossError", "Selector", "load_rows"]
