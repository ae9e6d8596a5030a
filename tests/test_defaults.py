"""The defaults that `benchmarks/suite.py` was measured with.

They are chosen on all scenarios together. Who changes one runs the suite again, commits its results, and then changes
this list.
"""

import pytest

from tamis import BilevelConfig, config
from tamis.config import OWN_FIELDS
from tamis.selection import calibration, evidence, mixture, trials

NOT_MEASURED = {
    "activation_checkpointing", "gradient_checkpointing", "assistant_only_loss", "overwrite_output_dir", "generator",
    "generation_batch_size", "vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization",
}  # fmt: skip
DEFAULTS = {
    "selector": "scout",
    "score_map": None,
    "selector_learning_rate": None,
    "bmo_temperature": 0.5,
    "reference": "base",
    "scout_learning_rate": None,
    "scout_epochs": None,
    "scores": None,
    "reference_learning_rate": None,
    "rho": None,
    "rho_start": None,
    "rho_decay_ratio": 1.0,
    "per_device_validation_batch_size": None,
    "loss_reduction": "example",
    "refine_fraction": "0",
    "refine_start": None,
    "refine_every": 0.25,
    "num_generations": 4,
    "refine_policy": "lowest",
    "refine_on_error": "stop",
    "response_weighting": "bmo",
    "response_temperature": None,
    "ratio_level": "token",
    "importance_ratio_cap": 2.0,
    "generation_temperature": 1.0,
    "generation_top_p": 1.0,
    "max_new_tokens": 256,
}
CONSTANTS = {
    config: {
        "SCOUT_LEARNING_RATE_RATIOS": (0.15, 0.5, 1.5),
        "SCOUT_VISITS": 2000,
        "MAX_SCOUT_EPOCHS": 40,
        "DEFAULT_RHO": 0.5,
        "DEFAULT_SELECTOR_LEARNING_RATE": {"mirror": 1.75, "softmax": 5e-3, "sigmoid": 5e-3},
    },
    trials: {"NUM_FOLDS": 4, "BASE_COEFFICIENTS": (1.0, 0.0), "_SAMPLE_SIZE": 250},
    calibration: {
        "FEW_RIGHT": 0.05, "_TOLERANCE": 0.25, "_MIN_ROWS": 3.0,
        "_RANK_WIDTH": 0.03, "_NUM_BISECTIONS": 8, "_NUM_RESAMPLES": 60,
    },
    evidence: {"_NUM_DRAWS": 100, "_NUM_ITERATIONS": 60},
    mixture: {
        "_NUM_BINS": 100, "_CLIP": 0.002, "_MIN_DEVIATION": 0.05, "_MAX_ITERATIONS": 400, "_MAX_CAPPED_ITERATIONS": 50,
    },
}  # fmt: skip


def test_the_settings_are_those_of_the_suite():
    assert {field.name: field.default for field in OWN_FIELDS if field.name not in NOT_MEASURED} == DEFAULTS


@pytest.mark.parametrize("module", CONSTANTS, ids=lambda module: module.__name__)
def test_the_constants_are_those_of_the_suite(module):
    assert {name: getattr(module, name) for name in CONSTANTS[module]} == CONSTANTS[module]


@pytest.mark.parametrize(
    ("selector", "resolved"),
    [
        ("scout", {"scout_learning_rates": (1.5e-5, 5e-5, 1.5e-4), "rho": None, "validation_rows_per_step": 2}),
        ("mirror", {"score_map": "bounded", "rho": 0.5, "validation_rows_per_step": 16, "refine_start": 0.25}),
        ("bmo", {"score_map": "softmax", "rho": 0.5, "validation_rows_per_step": 16, "response_temperature": 0.15}),
    ],
)
def test_what_is_left_open_is_resolved_as_in_the_suite(tmp_path, selector, resolved):
    args = BilevelConfig(
        output_dir=str(tmp_path), bf16=False, selector=selector, learning_rate=1e-4, per_device_train_batch_size=16,
        refine_fraction="auto",
    )  # fmt: skip
    found = args.resolve(num_training=1000, num_validation=64)
    assert {name: getattr(found, name) for name in resolved} == resolved
