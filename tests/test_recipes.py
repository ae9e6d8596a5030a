"""The recipes are what `tamis train` takes, and the memory that their headers name is computed."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset

from tamis.checks import check_settings
from tamis.run import peft_config_of
from tamis.train_parser import make_train_parser

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipe_memory  # noqa: E402


def test_both_experiments_are_there_for_both_models():
    names = {f"{experiment}_{model}" for experiment in ("quality", "safety") for model in ("llama3_8b", "pythia_1b")}
    assert {path.stem for path in RECIPES} == names


@recipes
def test_the_parser_and_the_checks_take_it_without_a_warning(path, caplog):
    """bf16 needs a GPU as the settings are made; the rest is as it is."""
    options = ["--config", str(path), "--bf16", "false"]
    data, args, model_args = make_train_parser().parse_args_and_config(options)
    rows = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    check_settings(args, {"train_dataset": rows, "validation_dataset": rows, "eval_dataset": rows})
    assert caplog.text == ""
    assert data.validation_dataset and data.eval_dataset
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 32
    is_quality = path.stem.startswith("quality")
    assert args.num_train_epochs == (3 if is_quality else 2)
    assert (float(args.refine_fraction), args.num_generations) == (0.1, 10 if is_quality else 1)
    lora = peft_config_of(model_args)
    modules = {"q_proj", "v_proj"} if "llama" in path.stem else {"query_key_value"}
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (16, 16, modules)


@recipes
def test_the_header_has_the_command_and_the_hardware(path):
    header = path.read_text(encoding="utf-8").partition("model_name_or_path")[0]
    assert f"#   tamis train --config recipes/{path.name}\n" in header and "# Hardware: one GPU of " in header


@pytest.mark.parametrize("model", ["llama3_8b", "pythia_1b"])
def test_the_memory_in_the_headers_is_computed(model):
    found = f"# Memory: {recipe_memory.memory_of(ROOT / 'recipes' / f'quality_{model}.yaml') / 1e9:.0f} GB "
    assert all(found in path.read_text(encoding="utf-8") for path in RECIPES if path.stem.endswith(model))
