"""How the rows of a step are divided, so that all methods have as many."""

import pytest
from conftest import PLAIN

from tamis import BilevelConfig
from tamis.compare.own.budget import with_trusted_rows


def rows_of(settings: dict, num_training: int, num_validation: int) -> tuple[int, int]:
    """Rows of a step, trusted ones included: of plain SFT, and of the method with trusted rows."""
    plain = BilevelConfig(**PLAIN | settings)
    args = BilevelConfig(**PLAIN | settings | with_trusted_rows(plain, num_training, num_validation))
    resolved = args.resolve(num_training=num_training, num_validation=num_validation)
    return plain.training_rows_per_step, args.training_rows_per_step + resolved.validation_rows_per_step


@pytest.mark.parametrize("num_validation", [16, 200, 1000])
@pytest.mark.parametrize(("size", "accumulation"), [(1, 16), (2, 8), (8, 1), (8, 4), (16, 1), (16, 2)])
def test_a_step_with_the_scouts_trusted_rows_is_as_large_as_one_without(tmp_path, size, accumulation, num_validation):
    """As near as whole rows of a micro-batch allow."""
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": size}
    settings |= {"gradient_accumulation_steps": accumulation}
    plain, ours = rows_of(settings, 1000, num_validation)
    assert abs(ours - plain) <= (accumulation if size > 1 else 1)


@pytest.mark.parametrize(("size", "accumulation"), [(1, 16), (8, 1), (8, 4)])
@pytest.mark.parametrize("rho", [0.1, 0.5, 0.8])
def test_a_step_of_mixing_is_as_large_as_one_without(tmp_path, size, accumulation, rho):
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": size, "selector": "none", "rho": rho}
    plain, ours = rows_of(settings | {"gradient_accumulation_steps": accumulation}, 1000, 64)
    assert ours == plain


def test_a_number_of_trusted_rows_that_was_given_stays(tmp_path):
    args = BilevelConfig(**PLAIN | {"output_dir": str(tmp_path), "per_device_validation_batch_size": 3})
    assert with_trusted_rows(args, 1000, 64) == {}
