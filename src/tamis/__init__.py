"""tamis: post-train language models under the guidance of a small trusted validation set."""

from tamis.config import BilevelConfig
from tamis.data import load_rows
from tamis.selectors import Selector, make_selector
from tamis.trainer import BilevelTrainer, NonFiniteLossError

__all__ = ["BilevelConfig", "BilevelTrainer", "NonFiniteLossError", "Selector", "load_rows", "make_selector"]
