"""The recipes are what `tamis train` takes; the memory in their headers is computed; their twins run by them."""

import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

from tamis.checks import check_settings
from tamis.run import peft_config_of
from tamis.train_parser import make_train_parser

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
recipes = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
sys.path.insert(0, str(ROOT / "benchmarks"))

import recipe_memory  # noqa: E402

import recipes as recipe_twins  # noqa: E402


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


@pytest.mark.parametrize("twin", recipe_twins.KINDS)
def test_the_parts_of_a_twin_have_no_prompt_in_common(twin):
    """And the trusted rows are of the right kinds only."""
    if not (recipe_twins.DATA / "alpaca").is_dir():
        pytest.skip(f"the data are not here: {recipe_twins.DATA}")
    parts = recipe_twins.make_parts(twin, recipe_twins.QUICK_SIZES, seed=3)
    prompts = [(row["instruction"], row["input"]) for rows in parts.values() for row in rows]
    assert len(prompts) == len(set(prompts))
    assert {name: {row["is_right"] for row in rows} for name, rows in parts.items()} == {
        "train": {True, False}, "validation": {True}, "right": {True}, "wrong": {False},
    }  # fmt: skip
    assert len({row["kind"] for row in parts["train"]}) == len(recipe_twins.KINDS[twin])


def test_the_smallest_twin_runs_by_the_file_of_the_recipe(tmp_path, monkeypatch):
    if not (recipe_twins.DATA / "safety").is_dir():
        pytest.skip(f"the data are not here: {recipe_twins.DATA}")
    monkeypatch.setattr(recipe_twins, "MAX_CHARACTERS", 100)
    monkeypatch.setattr(recipe_twins, "METHODS", {"direct mixing": recipe_twins.MIXING, "tamis": []})
    recipe_twins.make_model(tmp_path / "model", is_quick=True, seed=3)
    rows = recipe_twins.run_twin("safety", tmp_path / "safety", tmp_path / "model", is_quick=True, seed=3)
    assert [row["method"] for row in rows] == ["base model", "direct mixing", "tamis"]
    losses = [row["right_loss"] for row in rows]
    assert max(losses[1:]) < losses[0], "two steps of training moved nothing"
    config, adapter, recipe = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (
            tmp_path / "safety/tamis/config.yaml",
            tmp_path / "safety/tamis/adapter_config.json",
            ROOT / "recipes/safety_llama3_8b.yaml",
        )
    )
    for name in ("refine_fraction", "num_generations", "num_train_epochs", "gradient_accumulation_steps"):
        assert float(config[name]) == float(recipe[name])
    assert (adapter["r"], sorted(adapter["target_modules"])) == (recipe["lora_r"], recipe["lora_target_modules"])
