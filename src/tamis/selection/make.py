"""From the name of a selector to its row weights."""

import torch
from torch import Tensor

from tamis.config import DEFAULT_SELECTOR_LEARNING_RATE, ScoreMap
from tamis.selection.adam import AdamWeights
from tamis.selection.row_weights import RowWeights, ScoutWeights, SelectorWeights, StaticWeights
from tamis.selection.selectors import BmoSelector, MirrorSelector, Selector, check_selector


def make_row_weights(
    selector: str | Selector,
    num_examples: int,
    *,
    score_map: ScoreMap = "bounded",
    learning_rate: float | None = None,
    temperature: float = 0.5,
    weight_N: Tensor | None = None,
) -> RowWeights:
    """The row weights by a selector's name (see the table in `tamis.selection.selectors`), or by an instance.

    Args:
        num_examples: N.
        score_map, learning_rate, temperature: for the names that have one; None takes the default of the name.
        weight_N: the column of selector ``column``.

    Raises:
        ValueError: there is no selector of that name, ``column`` without ``weight_N``, or see `check_selector`.
    """
    if not isinstance(selector, str):
        check_selector(selector)
        return SelectorWeights(num_examples, selector)
    if learning_rate is None:
        learning_rate = DEFAULT_SELECTOR_LEARNING_RATE.get(selector, 0.0)
    match selector:
        case "scout":
            return ScoutWeights(num_examples)
        case "mirror":
            return SelectorWeights(num_examples, MirrorSelector(learning_rate, score_map))
        case "bmo":
            return SelectorWeights(num_examples, BmoSelector(temperature, score_map))
        case "softmax":
            return AdamWeights(num_examples, "softmax", learning_rate)
        case "sigmoid":
            return AdamWeights(num_examples, "bounded", learning_rate)
        case "column":
            if weight_N is None:
                raise ValueError("selector 'column' needs weight_N, one weight per training row")
            return StaticWeights(weight_N)
        case "none":
            return StaticWeights(torch.ones(num_examples))
    raise ValueError(f"unknown selector {selector!r}: choose a name of BilevelConfig.selector or give a Selector")
