"""The ready configurations of recipes/accelerate are what `accelerate launch` takes."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parent.parent / "recipes" / "accelerate"
ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_parses_it(path):
    found = load_config_from_file(str(path))  # refuses keys that it does not know
    assert found.distributed_type == DistributedType(ENGINES[path.stem])
    assert found.mixed_precision == "bf16" and found.num_processes > 1


def test_each_engine_has_its_own_settings():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == ENGINES.keys()
    assert load_config_from_file(str(FOLDER / "fsdp2.yaml")).fsdp_config["fsdp_version"] == 2
    for stage in (2, 3):
        assert load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config["zero_stage"] == stage
