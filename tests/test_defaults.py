"""The settings that the suite was measured with (docs/results.md, `benchmarks/suite.py`).

They were chosen before it, on all tasks together. Whoever changes one measures the suite again, and then this test.
"""

from tamis import config
from tamis.config import BilevelConfig
from tamis.selection import calibration, evidence, scout, trials
from tamis.selection.row_weights import ScoutWeights

METHOD = {
    "selector": "scout",
    "score_map": None,
    "selector_learning_rate": None,
    "bmo_temperature": 0.5,
    "reference": "base",
    "scout_learning_rate": None,
    "scout_epochs": None,
    "rho": None,
    "rho_start": None,
    "rho_decay_ratio": 1.0,
    "loss_reduction": "example",
    "refine_fraction": "0",
    "refine_start": None,
    "refine_every": 0.25,
    "num_generations": 4,
    "refine_policy": "lowest",
    "response_weighting": "bmo",
    "response_temperature": None,
    "ratio_level": "token",
    "importance_ratio_cap": 2.0,
    "generation_temperature": 1.0,
    "generation_top_p": 1.0,
}


def test_the_method_is_that_of_the_suite(tmp_path):
    args = BilevelConfig(str(tmp_path))
    assert {name: getattr(args, name) for name in METHOD} == METHOD


def test_scouts_are_those_of_the_suite():
    assert config.SCOUT_LEARNING_RATE_RATIOS == (0.15, 0.5, 1.5)
    assert trials.BASE_COEFFICIENTS == (1.0, 0.0) and trials.NUM_FOLDS == 4 and trials._SAMPLE_SIZE == 250
    assert scout.scout_lengths(64, 16, None) == (31, 62, 125)
    assert scout.scout_lengths(16, 16, None) == (10, 20, 40), "no validation row is seen more than 40 times"


def test_calibration_is_that_of_the_suite():
    assert (evidence._NUM_DRAWS, evidence._NUM_ITERATIONS) == (100, 60)
    assert (calibration._MIN_ROWS, calibration._RANK_WIDTH) == (3.0, 0.03)
    assert ScoutWeights(4).table.score_map == "squared"
