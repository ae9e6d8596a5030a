"""A run of `tamis train` in a directory that has been used before, and runs without trusted rows."""

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import pairs, write_jsonl
from safetensors.torch import load_file

from tamis.cli import main


@pytest.fixture
def train(model_dir, tmp_path):
    """Run the command on four rows; returns its exit code."""
    rows = [row | {"quality": float(i)} for i, row in enumerate(pairs(4))]
    flags = ["--model_name_or_path", model_dir, "--train_dataset", write_jsonl(tmp_path / "train.jsonl", rows)]
    flags += ["--output_dir", str(tmp_path / "run"), "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]
    flags += ["--use_cpu", "--bf16", "false", "--report_to", "none"]

    def run(*extra: str) -> int:
        return main(["train", *flags, *extra])

    return run


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


STATIC = ("--selector", "none")
LAST = ("--resume_from_checkpoint", "last")


@pytest.mark.parametrize("saving", [("--save_strategy", "epoch"), ("--save_strategy", "no")], ids=lambda s: s[1])
def test_a_finished_run_says_so_and_stays(train, tmp_path, caplog, saving):
    steps = (*STATIC, *saving, "--max_steps", "3")
    assert train(*steps) == 0
    before = contents(tmp_path / "run")
    assert yaml.safe_load(before["config.yaml"])["run_info"]["finished_step"] == 3
    assert train(*steps, *LAST) == 0
    assert "the run is finished, 3 of 3 steps" in caplog.text and "raise `max_steps`" in caplog.text
    assert contents(tmp_path / "run") == before


def test_a_finished_run_may_go_on_for_more_steps(train, tmp_path, caplog):
    saving = (*STATIC, "--save_strategy", "steps", "--save_steps", "1")
    assert train(*saving, "--max_steps", "2") == 0
    assert train(*saving, "--max_steps", "3", *LAST) == 0
    assert "finished" not in caplog.text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["run_info"]["finished_step"] == 3


def test_a_finished_run_without_a_checkpoint_is_not_begun_anew(train, tmp_path, capfd):
    saving = (*STATIC, "--save_strategy", "no")
    assert train(*saving, "--max_steps", "2") == 0
    before = contents(tmp_path / "run")
    assert train(*saving, "--max_steps", "3", *LAST) == 2
    assert "holds no complete checkpoint to resume from" in capfd.readouterr().err
    assert contents(tmp_path / "run") == before


def test_other_rows_are_refused_although_the_run_is_finished(train, tmp_path, capfd):
    saving = (*STATIC, "--save_strategy", "epoch", "--max_steps", "2")
    assert train(*saving) == 0
    write_jsonl(tmp_path / "train.jsonl", pairs(5))
    assert train(*saving, *LAST) == 2
    assert "train_dataset: other rows" in capfd.readouterr().err


def test_a_run_that_was_killed_before_its_model_was_saved(train, tmp_path, caplog):
    steps = (*STATIC, "--save_strategy", "epoch", "--max_steps", "2")
    assert train(*steps) == 0
    model, config = tmp_path / "run" / "model.safetensors", tmp_path / "run" / "config.yaml"
    weights = load_file(model)
    settings = yaml.safe_load(config.read_text())
    del settings["run_info"]["finished_step"]
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    model.unlink()
    assert train(*steps, *LAST) == 0
    again = load_file(model)
    assert all(weights[name].equal(again[name]) for name in weights)


def test_no_steps_give_the_model_as_it_was(train, tmp_path, model_dir):
    assert train(*STATIC, "--max_steps", "0") == 0
    before, after = load_file(f"{model_dir}/model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    assert all(after[name].equal(before[name]) for name in after)
    assert pq.read_table(tmp_path / "run" / "weights.parquet")["num_updates"].to_pylist() == [0] * 4


def test_overwriting_must_be_asked_for(train, tmp_path, capfd):
    assert train(*STATIC, "--max_steps", "2") == 0
    assert train(*STATIC, "--max_steps", "1") == 2
    assert capfd.readouterr().err.endswith("or replace it with --overwrite_output_dir\n")
    assert train(*STATIC, "--max_steps", "1", "--overwrite_output_dir") == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["max_steps"] == 1 and "overwrite_output_dir" not in config, "a replay does not overwrite"


def test_overwriting_has_no_effect_on_a_run_that_goes_on(train, tmp_path, caplog):
    steps = (*STATIC, "--save_strategy", "epoch", "--max_steps", "2")
    assert train(*steps) == 0
    assert train(*steps, *LAST, "--overwrite_output_dir") == 0
    assert "overwrite_output_dir is set but has no effect" in caplog.text


@pytest.mark.parametrize("selector", [("none",), ("column", "--weight_column", "quality")], ids=lambda s: s[0])
def test_static_selectors_need_no_trusted_rows_and_no_rho(train, tmp_path, caplog, selector):
    assert train("--max_steps", "2", "--selector", *selector) == 0
    assert "rho = 0.0 (there are no validation rows)" in caplog.text
    weights = pq.read_table(tmp_path / "run" / "weights.parquet")["weight"].to_pylist()
    assert weights == pytest.approx([1.0] * 4 if selector[0] == "none" else [0.0, 4 / 6, 8 / 6, 2.0])


def test_a_rho_that_was_given_needs_trusted_rows(train, capfd):
    assert train("--selector", "none", "--rho", "0.3") == 2
    assert "rho=0.3" in capfd.readouterr().err


def test_settings_of_adapters_without_an_adapter_are_warned_of(train, caplog):
    assert train(*STATIC, "--max_steps", "1", "--lora_r", "8", "--bnb_4bit_quant_type", "fp4") == 0
    assert "lora_r is set but has no effect: use_peft is not set" in caplog.text
    assert "bnb_4bit_quant_type is set but has no effect: load_in_4bit is not set" in caplog.text
    assert caplog.text.count("has no effect") == 2


def test_responses_that_do_not_end_are_warned_of_once(train, caplog):
    refining = ["--refine_fraction", "1", "--refine_policy", "random", "--refine_every", "1", "--max_new_tokens", "1"]
    assert train(*STATIC, *refining, "--max_steps", "3") == 0
    (first, *others) = [record for record in caplog.records if "rows train on new responses" in record.getMessage()]
    assert first.levelname == "INFO" and all(record.levelname == "DEBUG" for record in others)
    assert caplog.text.count("most rows got no usable response: raise `max_new_tokens`") == 1


@pytest.mark.parametrize(
    ("given", "found"),
    [("q_proj", {"q_proj"}), ("q_proj v_proj", {"q_proj", "v_proj"}), (".*q_proj", {"q_proj"}),
     ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})],
)  # fmt: skip
def test_one_target_module_is_a_name_as_several_are(train, tmp_path, given, found):
    lora = ("--use_peft", "--lora_target_modules", *given.split())
    assert train(*STATIC, "--max_steps", "1", *lora) == 0
    names = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == found
