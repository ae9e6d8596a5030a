"""examples/custom_selector.py: a stranger's rule works along the steps, also with refining."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import pairs

from tamis import Selector

RIGHT = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(12)]
WRONG = [{"prompt": f"{i}=", "completion": "b" * (1 + i % 3)} for i in range(12)]
TRUSTED = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(20, 28)]
REFINING = {"refine_fraction": 0.5, "refine_every": 2, "num_generations": 2, "max_new_tokens": 4}


def threshold_selector(**settings) -> Selector:
    path = Path(__file__).parents[1] / "examples" / "custom_selector.py"
    spec = importlib.util.spec_from_file_location("custom_selector", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ThresholdSelector(**settings)


@pytest.mark.parametrize("settings", [{}, REFINING], ids=["along the steps", "with refining"])
def test_a_rule_of_a_stranger_works(bilevel, settings):
    trainer = bilevel(
        WRONG + RIGHT, TRUSTED, selector=threshold_selector(limit=-0.1), max_steps=24, learning_rate=1e-2, **settings
    )
    trainer.train()
    weighting = trainer.weighting
    scores = weighting.refiner.original_scores() if weighting.refiner else weighting.row_weights.all_scores()
    assert scores[:12].mean() < scores[12:].mean()
    assert (scores % 2 == 0).all(), "steps of two, and nothing else"
    if weighting.refiner:
        refined = sorted(weighting.refiner.buffer.rows)
        assert refined and scores[refined].mean() < scores.mean()
    assert weighting.scouting.outcome is None and trainer.current_rho() == 0.5, "no scout was sent"


class Broken(Selector):
    def __init__(self, next_scores):
        self._next = next_scores

    def next_scores(self, score_B, excess_B):
        return self._next(score_B, excess_B)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (Broken, "is a class: give an instance"),
        (object(), "neither a name nor a tamis.Selector"),
        (Broken(lambda score, excess: score.sum()), "one finite score for each of 2 rows"),
        (Broken(lambda score, excess: score / 0), "one finite score for each of 2 rows"),
        (Broken(lambda score, excess: [0.0, 0.0]), "one finite score for each of 2 rows"),
        (Broken(lambda score, excess: score.add_(1)), "must change nothing"),
        (Broken(lambda score, excess: torch.rand(2)), "must change nothing"),
    ],
)
def test_what_does_not_work_is_refused_before_the_model_loads(bilevel, selector, message):
    with pytest.raises(ValueError, match=message):
        bilevel(pairs(8), pairs(4, 95), model="there is no such model", selector=selector)


def test_a_name_is_taken_too(bilevel):
    trainer = bilevel(pairs(8), pairs(4, 95), selector="bmo")
    assert type(trainer.weighting.row_weights.selector).__name__ == "BmoSelector"
