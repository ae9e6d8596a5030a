"""`tamis train` as a user runs it: what it leaves behind, and one-line errors before a model is loaded."""

import json

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import pairs, write_jsonl

from tamis.cli import main
from tamis.train_parser import make_train_parser

NO_MODEL = "there/is-no-such-model"  # loading it would fail with another message


@pytest.fixture
def files(tmp_path):
    return {
        "train_dataset": write_jsonl(tmp_path / "train.jsonl", pairs(12) + pairs(12, 30, wrong=True)),
        "validation_dataset": write_jsonl(tmp_path / "validation.jsonl", pairs(4, 100)),
        "eval_dataset": write_jsonl(tmp_path / "eval.jsonl", pairs(6, 200)),
    }


def command(files, output_dir, model=NO_MODEL, *extra):
    flags = ["--model_name_or_path", str(model), "--output_dir", str(output_dir)]
    for name, path in files.items():
        flags += [f"--{name}", str(path)]
    cheap = [
        "--scout_epochs",
        "8",
        "--max_steps",
        "4",
        "--per_device_train_batch_size",
        "4",
        "--use_cpu",
        "--bf16",
        "false",
        "--report_to",
        "none",
    ]
    return ["train", *flags, *cheap, *extra]


def error_of(capfd, arguments) -> str:
    """The only line on stderr that is an error; the command must exit with 2."""
    assert main(arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("tamis train:")]
    assert len(lines) == 1
    return lines[0]


def test_a_run_leaves_a_complete_run_directory(files, model_dir, tmp_path, capfd):
    run = tmp_path / "run"
    assert main(command(files, run, model_dir)) == 0
    output = capfd.readouterr().out
    assert output.startswith("held-out loss ")
    assert "it/s" not in output, "progress bars belong on stderr"

    weights = pq.read_table(run / "weights.parquet")
    assert weights["row"].to_pylist() == list(range(24))
    assert set(weights["source"].to_pylist()) == {"train.jsonl"}
    assert sum(weights["weight"].to_pylist()) == pytest.approx(24, rel=1e-5)
    assert (run / "model.safetensors").is_file()
    assert (run / "scout.json").is_file()
    assert (run / "README.md").is_file()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)


def test_a_config_replays_its_run(files, model_dir, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(command(files, first, model_dir, "--seed", "7")) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--output_dir", str(second)]) == 0
    assert pq.read_table(first / "weights.parquet").equals(pq.read_table(second / "weights.parquet"))
    settings = yaml.safe_load((second / "config.yaml").read_text())
    assert settings["seed"] == 7
    assert settings["run_info"]["versions"]["tamis"]


def test_lora_from_flags(files, model_dir, tmp_path):
    extra = ["--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--lora_r", "2"]
    assert main(command(files, tmp_path / "run", model_dir, *extra)) == 0
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_a_finished_run_is_not_overwritten(files, tmp_path, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert "holds a run already" in error_of(capfd, command(files, tmp_path / "run"))


def broken_line(path):
    with open(path, "a") as file:
        file.write('{"prompt": "1=", "comp\n')
    return "train.jsonl", "line 25"


def missing_column(path):
    write_jsonl(path, [{"prompt": "1="}])
    return "train.jsonl", "response_column"


def null_response(path):
    write_jsonl(path, [*pairs(3), {"prompt": "9=", "completion": None}])
    return "train.jsonl", "row 3", "completion"


def empty_response(path):
    write_jsonl(path, [*pairs(2), {"prompt": "9=", "completion": "  "}])
    return "train.jsonl", "row 2", "completion"


def empty_file(path):
    path.write_text("")
    return ("train.jsonl",)


def missing_file(path):
    path.unlink()
    return ("train.jsonl",)


@pytest.mark.parametrize(
    "spoil",
    [broken_line, missing_column, null_response, empty_response, empty_file, missing_file],
    ids=lambda f: f.__name__,
)
def test_a_bad_training_file_is_named(spoil, files, tmp_path, capfd):
    expected = spoil(tmp_path / "train.jsonl")
    message = error_of(capfd, command(files, tmp_path / "run"))
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_an_empty_validation_file(files, tmp_path, capfd):
    (tmp_path / "validation.jsonl").write_text("")
    assert "validation.jsonl" in error_of(capfd, command(files, tmp_path / "run"))


def test_validation_missing_where_the_selector_needs_one(files, tmp_path, capfd):
    del files["validation_dataset"]
    assert "--validation_dataset" in error_of(capfd, command(files, tmp_path / "run"))


def test_a_row_in_validation_and_eval_is_an_error_and_in_training_a_warning(files, model_dir, tmp_path, capfd, caplog):
    write_jsonl(tmp_path / "eval.jsonl", pairs(1, 100))
    message = error_of(capfd, command(files, tmp_path / "run"))
    assert "validation.jsonl" in message and "eval.jsonl" in message

    write_jsonl(tmp_path / "eval.jsonl", pairs(2, 200))
    write_jsonl(tmp_path / "validation.jsonl", pairs(3, 100) + pairs(1))
    assert main(command(files, tmp_path / "run", model_dir)) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("validation.jsonl" in warning and "train.jsonl" in warning for warning in warnings)


def test_a_weight_that_is_not_a_number(files, tmp_path, capfd):
    rows = [row | {"quality": 1.0} for row in pairs(4)]
    rows[2]["quality"] = float("nan")
    write_jsonl(tmp_path / "train.jsonl", rows)
    extra = ["--selector", "column", "--weight_column", "quality", "--rho", "0"]
    message = error_of(capfd, command(files, tmp_path / "run", NO_MODEL, *extra))
    assert "train.jsonl" in message and "row 2" in message and "quality" in message


def test_prompts_longer_than_max_length_are_dropped_and_counted(files, model_dir, tmp_path, caplog):
    long = {"prompt": "7" * 60 + "=", "completion": "1"}
    write_jsonl(tmp_path / "train.jsonl", [*pairs(8), long])
    assert main(command(files, tmp_path / "run", model_dir, "--max_length", "32")) == 0
    assert "train_dataset: 1 of 9 rows dropped" in caplog.text
    weights = pq.read_table(tmp_path / "run" / "weights.parquet")
    p_right = weights["p_right"].to_pylist()
    assert p_right[8] is None and weights["weight"].to_pylist()[8] == 0
    assert weights["kept"].to_pylist() == [p is None or p >= 0.5 for p in p_right[:8]] + [False]


@pytest.mark.parametrize(
    ("flags", "is_on"),
    [
        ([], True),
        (["--activation_checkpointing"], True),
        (["--activation_checkpointing", "false"], False),
        (["--gradient_checkpointing", "false"], False),
        (["--gradient_checkpointing"], True),
    ],
)
def test_activation_checkpointing_by_both_of_its_flags(tmp_path, flags, is_on):
    options = ["--train_dataset", "train.jsonl", "--output_dir", str(tmp_path), "--use_cpu", "true", *flags]
    _, args, _ = make_train_parser().parse_args_and_config(options)
    assert args.activation_checkpointing is is_on
