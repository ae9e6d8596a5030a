"""The help: short and at once, or whole and in groups; names that are nearly right."""

import argparse
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
from trl import ModelConfig

from tamis.cli import main
from tamis.config import BilevelConfig
from tamis.curation.select import SelectArguments
from tamis.help import OPTIONS, short_help
from tamis.parser import did_you_mean
from tamis.run import DataArguments
from tamis.train_parser import make_train_parser

ROOT = Path(__file__).resolve().parents[1]


def test_the_short_help_fits_a_screen_and_begins_with_examples(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 48 and max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert text.index("examples:") < text.index("options, in order of need:")
    assert text.index("--train_dataset FILE") < text.index("--learning_rate LR") < text.index("--log_level LEVEL")
    assert "--help_all" in text and "--config FILE" in text

    monkeypatch.setenv("COLUMNS", "100")
    assert short_help() in (ROOT / "docs" / "first_run.md").read_text(encoding="utf-8")


def test_the_short_help_has_twenty_options_with_their_real_defaults():
    assert len(OPTIONS) == 20
    known = {f.name: f for dataclass in (DataArguments, BilevelConfig, ModelConfig) for f in fields(dataclass)}
    parser = make_train_parser()
    for name, (_, text) in OPTIONS.items():
        assert name in known
        if "[" in text and name != "output_dir":
            shown = text.split("[")[1].rstrip("]").split(":")[0]
            assert shown == str(parser.get_default(name)), name
    args = BilevelConfig(bf16=False)
    assert f"[{args.output_dir}]" in OPTIONS["output_dir"][1]


def test_the_help_of_everything_is_in_groups(capsys):
    assert main(["train", "--help_all"]) == 0
    text = capsys.readouterr().out
    for title in ("data:", "selection and its two levels:", "online refining:", "model and LoRA:", "training:"):
        assert f"\n{title}\n" in text
    assert (
        text.index("--train_dataset TR") < text.index("--scout_learning_rate SC") < text.index("--num_train_epochs N")
    )


@pytest.mark.parametrize("argv", [["--version"], ["train", "--version"]])
def test_the_version(argv, capsys):
    assert main(argv) == 0
    assert capsys.readouterr().out == f"tamis {version('tamis')}\n"


def test_help_and_version_import_no_torch():
    code = "import sys; from tamis.cli import main; main(['train', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nFalse\n")


def test_the_package_is_a_program():
    done = subprocess.run([sys.executable, "-m", "tamis", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: tamis COMMAND [options]")


def test_the_package_has_what_it_names():
    import tamis

    assert all(getattr(tamis, name) for name in tamis.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer'"):
        tamis.Trainer  # noqa: B018


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lerning_rate", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("model", "model_name_or_path"),
        ("batch_size", "per_device_train_batch_size"),
        ("output", "output_dir"),
        ("seeds", "seed"),
        ("xyzzy", None),
    ],
)
def test_the_nearest_name(name, nearest):
    end = did_you_mean(name, make_train_parser().names(), "--")
    assert end == (f"; did you mean --{nearest}?" if nearest else "")


def test_no_option_is_taken_for_another_that_it_begins():
    with pytest.raises(ValueError, match="unknown option --learning; did you mean --learning_rate"):
        make_train_parser().parse_args_and_config(["--train_dataset", "x", "--learning", "1"])


@pytest.mark.parametrize("spelling", [["--config", "a.yaml"], ["--config=a.yaml"]])
def test_settings_from_yaml_are_those_of_flags(spelling, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = ["train_dataset: x", "learning_rate: 1e-3", "max_steps: 7", "use_cpu: true", "bf16: no", "report_to: none"]
    (tmp_path / "a.yaml").write_text("\n".join([*lines, "lora_target_modules: q_proj", "refine_fraction: 0.5"]))
    data, args, model_args = make_train_parser().parse_args_and_config([*spelling, "--max_steps", "8"])
    assert (data.train_dataset, args.learning_rate, args.max_steps, args.bf16) == (["x"], 1e-3, 8, False)
    assert (args.refine_fraction, model_args.lora_target_modules) == ("0.5", "q_proj")


def test_the_short_help_is_made_without_the_parser(monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", None)
    assert short_help().startswith("usage: tamis train")


def test_the_extras_that_the_readme_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"gpu", "vllm", "wandb"} <= set(project["optional-dependencies"])
    assert 'pip install .               # or ".[gpu,vllm,wandb]"' in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_help_of_scoring_has_what_scoring_reads(capsys):
    assert main(["score", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: tamis score") and "tamis select scores" in text and "--validation_dataset" in text
    assert "--max_steps" not in text and "--refine_fraction" not in text and len(text.splitlines()) <= 50


def test_the_help_of_selecting_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: tamis select RUN --output_dir DIR")
    assert all(f"--{field.name}" in text for field in fields(SelectArguments))


def test_the_help_of_checking_is_that_of_training_and_more(capsys):
    assert main(["check", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: tamis check") and all(
        f"--{name}" in text for name in (*OPTIONS, "json", "no_measure")
    )
    assert main(["check", "--help_all"]) == 0
    assert "--no_measure" in capsys.readouterr().out
    assert "--no_measure" not in short_help("train") and "measure" not in make_train_parser("train").names()
