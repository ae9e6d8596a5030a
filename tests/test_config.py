"""Every setting of tamis that is refused or has no effect, and what is filled in; TRL's are in test_trl_options."""

import logging

import pytest
import torch
import yaml
from conftest import PLAIN, message_of, pairs
from datasets import Dataset

from tamis import BilevelConfig, BilevelTrainer
from tamis.checks import check_settings
from tamis.selection.selectors import BmoSelector
from tamis.train_parser import make_train_parser


def config(tmp_path, **settings) -> BilevelConfig:
    return BilevelConfig(**{"output_dir": str(tmp_path)} | PLAIN | settings)


def check(config, *, has_validation=True, has_weight=False, has_held_out=True) -> None:
    rows = Dataset.from_list([{"prompt": "1", "completion": "2"} | ({"weight": 1.0} if has_weight else {})])
    roles = {"train_dataset": True, "validation_dataset": has_validation, "eval_dataset": has_held_out}
    check_settings(config, {role: rows for role, is_there in roles.items() if is_there})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rho": 1.5}, "rho must lie between 0 and 1, got 1.5"),
        ({"rho": -0.1}, "rho must lie between 0 and 1"),
        ({"rho_start": 2.0}, "rho_start must lie between 0 and 1, got 2.0"),
        ({"rho_decay_ratio": 1.1}, "rho_decay_ratio must lie between 0 and 1"),
        ({"selector_learning_rate": 0.0}, "selector_learning_rate must be positive"),
        ({"bmo_temperature": 0.0}, "bmo_temperature must be positive"),
        ({"scout_epochs": 0.0}, "scout_epochs must be positive, got 0"),
        ({"rho_start": 0.9}, "rho_start goes to a rho that the scout chooses: set `rho` too"),
        ({"selector": "column"}, "name it by `weight_column`"),
        ({"refine_fraction": 1.5}, "refine_fraction must lie between 0 and 1, got 1.5"),
        ({"refine_fraction": -0.1}, "refine_fraction must lie between 0 and 1"),
        ({"refine_fraction": "1.5"}, "refine_fraction must lie between 0 and 1, got 1.5"),
        ({"refine_fraction": "nan"}, "refine_fraction must lie between 0 and 1"),
        ({"refine_fraction": "auto", "selector": "mirror"}, "selector 'mirror' sends none: give a number"),
        ({"refine_fraction": "auto", "selector": "column"}, "selector 'column' sends none: give a number"),
        ({"refine_fraction": "auto", "selector": "none", "refine_policy": "random"}, "choose `selector='scout'`"),
        ({"refine_every": 0.0}, "refine_every must be positive, got 0"),
        ({"refine_start": -1.0}, "refine_start must not be negative, got -1"),
        ({"importance_ratio_cap": 0.0}, "importance_ratio_cap must be positive, got 0"),
        ({"generation_top_p": 1.1}, "generation_top_p must lie between 0 and 1, got 1.1"),
        ({"refine_fraction": 0.5, "selector": "none"}, "there is no lowest. Set `refine_policy='random'`"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        check(config(tmp_path, **settings))


@pytest.mark.parametrize("settings", [{}, {"selector": "bmo"}, {"selector": "sigmoid"}, {"rho": 0.0}])
def test_learning_selectors_need_a_validation_dataset(tmp_path, settings):
    with pytest.raises(ValueError, match="needs validation rows: give `validation_dataset`"):
        check(config(tmp_path, **settings), has_validation=False)


@pytest.mark.parametrize("settings", [{"rho": 0.3}, {"rho": 0.0, "rho_start": 0.5}, {"rho_start": 0.5}])
def test_a_rho_that_was_given_needs_a_validation_dataset(tmp_path, settings):
    with pytest.raises(ValueError, match=r"weigh the validation rows, but .*validation_dataset` is missing"):
        check(config(tmp_path, selector="none", **settings), has_validation=False)


@pytest.mark.parametrize("settings", [{}, {"rho": 0.0}])
def test_static_selectors_need_no_validation_dataset(tmp_path, settings):
    for selector in ("none", "column"):
        args = config(tmp_path, selector=selector, **settings)
        check(args, has_validation=False, has_weight=True)
        assert args.resolve(num_validation=0).rho == 0 and args.resolve().rho == settings.get("rho", 0.5)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"score_map": "softmax", "selector": "sigmoid"}, "score_map"),
        ({"score_map": "softmax"}, "score_map"),
        ({"selector_learning_rate": 0.1}, "selector_learning_rate"),
        ({"selector_learning_rate": 0.1, "selector": "bmo"}, "selector_learning_rate"),
        ({"bmo_temperature": 0.1}, "bmo_temperature"),
        ({"reference": "zero", "selector": "none"}, "reference"),
        ({"reference": "zero"}, "reference"),
        ({"scout_learning_rate": 1e-5, "selector": "mirror"}, "scout_learning_rate"),
        ({"scout_learning_rate": 1e-5, "selector": "none"}, "scout_learning_rate"),
        ({"scout_epochs": 5.0, "selector": "bmo"}, "scout_epochs"),
        ({"scout_epochs": 5.0, "selector": "softmax"}, "scout_epochs"),
        ({"reference_learning_rate": 1e-5, "selector": "mirror"}, "reference_learning_rate"),
        ({"rho_decay_ratio": 0.5}, "rho_decay_ratio"),
        ({"rho": 0.0, "selector": "none"}, "validation_dataset"),
        ({"refine_every": 100}, "refine_every"),
        ({"refine_start": 10}, "refine_start"),
        ({"refine_policy": "random"}, "refine_policy"),
        ({"refine_on_error": "continue"}, "refine_on_error"),
        ({"num_generations": 8}, "num_generations"),
        ({"response_weighting": "uniform"}, "response_weighting"),
        ({"response_temperature": 0.5}, "response_temperature"),
        ({"ratio_level": "sequence"}, "ratio_level"),
        ({"importance_ratio_cap": 3.0}, "importance_ratio_cap"),
        ({"generation_temperature": 0.7}, "generation_temperature"),
        ({"generation_top_p": 0.9}, "generation_top_p"),
        ({"max_new_tokens": 16}, "max_new_tokens"),
        ({"generation_batch_size": 16}, "generation_batch_size"),
        ({"generator": "vllm"}, "generator"),
        (
            {"refine_fraction": 0.5, "response_weighting": "uniform", "importance_ratio_cap": 3.0},
            "importance_ratio_cap",
        ),
        ({"refine_fraction": 0.5, "response_weighting": "uniform", "ratio_level": "sequence"}, "ratio_level"),
        ({"refine_fraction": 0.5, "vllm_mode": "server"}, "vllm_mode"),
        ({"refine_fraction": 0.5, "vllm_server_base_url": "http://127.0.0.1:9"}, "vllm_server_base_url"),
        ({"refine_fraction": 0.5, "vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization"),
        ({"refine_fraction": 0.5, "generator": "vllm", "generation_batch_size": 16}, "generation_batch_size"),
        ({"refine_fraction": 0.5, "generator": "vllm", "vllm_server_base_url": "http://b:9"}, "vllm_server_base_url"),
    ],
)
def test_what_has_no_effect_is_said(tmp_path, caplog, settings, name):
    check(config(tmp_path, **settings))
    messages = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(messages) == 1 and messages[0].startswith(f"{name} is set but has no effect: ")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"score_map": "softmax", "selector": "mirror"},
        {"selector_learning_rate": 1.0, "selector": "softmax"},
        {"scout_epochs": 4.0, "scout_learning_rate": 1e-5},
        {"reference_learning_rate": 1e-5, "reference": "tracked", "selector": "mirror"},
        {"reference": "zero", "selector": "bmo"},
        {"rho_start": 0.9, "rho_decay_ratio": 0.5, "rho": 0.5},
        {"rho_start": 0.9, "rho_decay_ratio": 0.5, "selector": "mirror"},
        {"refine_fraction": "auto", "refine_every": 100},
        {"rho": 0.0, "rho_start": 0.9},
        {"refine_fraction": 0.5, "refine_every": 100, "refine_start": 10, "num_generations": 8},
        {"refine_fraction": 0.5, "importance_ratio_cap": 3.0, "ratio_level": "sequence", "response_temperature": 0.5},
        {"refine_fraction": 0.5, "selector": "none", "refine_policy": "random"},
        {"refine_fraction": 0.5, "generator": "vllm", "vllm_mode": "server"},
    ],
)
def test_what_has_an_effect_is_not_warned_of(tmp_path, caplog, settings):
    check(config(tmp_path, **settings))
    assert not caplog.records


@pytest.mark.parametrize(
    "settings",
    [
        {"selector": "best"},
        {"reference": "none"},
        {"score_map": "linear"},
        {"loss_reduction": "sum"},
        {"scout_epochs": -1.0},
        {"scout_learning_rate": -1.0},
        {"reference_learning_rate": 0.0, "reference": "tracked", "selector": "mirror"},
        {"per_device_validation_batch_size": 0},
        {"num_generations": 0},
        {"max_new_tokens": 0},
        {"generation_batch_size": 0},
        {"generation_temperature": 0.0},
        {"generation_top_p": 0.0},
        {"response_temperature": 0.0},
        {"refine_policy": "highest"},
        {"refine_on_error": "ignore"},
        {"response_weighting": "softmax"},
        {"ratio_level": "word"},
        {"generator": "sglang"},
        {"vllm_mode": "remote"},
    ],
)
def test_values_that_mean_nothing_are_refused(tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        check(config(tmp_path, **settings))


def test_defaults_are_resolved(tmp_path):
    resolved = config(tmp_path, per_device_train_batch_size=3, learning_rate=1e-4, selector="mirror").resolve()
    assert (resolved.score_map, resolved.selector_learning_rate) == ("bounded", 1.75)
    assert resolved.scout_learning_rates == ()
    assert (resolved.rho, resolved.rho_start, resolved.validation_rows_per_step) == (0.5, 0.5, 3)
    assert "rho = 0.5 (half of the objective)" in resolved.announcements
    given = config(tmp_path, per_device_validation_batch_size=2, rho=0.3, rho_start=1.0).resolve()
    assert (given.rho, given.rho_start, given.validation_rows_per_step) == (0.3, 1.0, 2)
    assert "rho = 0.3 (as given)" in given.announcements


@pytest.mark.parametrize(
    ("settings", "num_training", "num_validation", "expected"),
    [
        ({}, 1000, 64, 1),
        ({}, 1000, 300, 2),
        ({"gradient_accumulation_steps": 16, "per_device_train_batch_size": 1}, 1000, 200, 4),
        ({}, 100, 1000, 4),  # not more than training rows
        ({"rho": 0.1}, 1000, 64, 4),
        ({"selector": "mirror"}, 1000, 64, 4),
        ({"per_device_validation_batch_size": 3, "gradient_accumulation_steps": 2}, 1000, 64, 6),
    ],
)
def test_with_a_scout_a_step_has_validation_rows_in_the_proportion_of_the_data(
    tmp_path, settings, num_training, num_validation, expected
):
    resolved = config(tmp_path, **settings).resolve(num_training=num_training, num_validation=num_validation)
    assert resolved.validation_rows_per_step == expected


def test_the_scout_is_tried_at_three_rates_unless_one_is_given(tmp_path):
    resolved = config(tmp_path, learning_rate=1e-4).resolve()
    assert resolved.scout_learning_rates == pytest.approx((1.5e-5, 5e-5, 1.5e-4))
    assert (resolved.score_map, resolved.selector_learning_rate) == (None, None)
    assert config(tmp_path, learning_rate=1e-4, scout_learning_rate=0.2).resolve().scout_learning_rates == (0.2,)


@pytest.mark.parametrize(
    ("settings", "rho"),
    [({}, None), ({"rho": 0.3}, 0.3), ({"rho": 0.0}, 0.0), ({"selector": "mirror"}, 0.5), ({"selector": "none"}, 0.5)],
)
def test_rho_is_left_to_the_scout_alone(tmp_path, settings, rho):
    resolved = config(tmp_path, **settings).resolve()
    assert (resolved.rho, resolved.rho_start) == (rho, rho)
    assert any(line.startswith("rho = ") for line in resolved.announcements) == (rho is not None)


def test_a_selector_of_the_user_does_not_scout(tmp_path):
    args = config(tmp_path)
    assert args.scouts() and not args.scouts(BmoSelector(0.5))
    resolved = args.resolve(BmoSelector(0.5))
    assert (resolved.rho, resolved.scout_learning_rates) == (0.5, ())


@pytest.mark.parametrize("given", ["0.25", 0.25, "2.5e-1", "0.250"])
def test_a_part_of_the_rows_is_refined_however_it_is_written(tmp_path, given):
    args = config(tmp_path, refine_fraction=given)
    assert args.refine_fraction == "0.25" and args.refines and args.resolve().refine_fraction == 0.25


def test_auto_is_left_to_the_scout(tmp_path):
    args = config(tmp_path, refine_fraction="auto")
    assert args.refines and args.resolve().refine_fraction is None
    check(args)


@pytest.mark.parametrize("nothing", ["0", 0, 0.0, "0.0"])
def test_nothing_is_refined_by_default(tmp_path, nothing):
    args = config(tmp_path, refine_fraction=nothing)
    assert not args.refines and args.refine_fraction == BilevelConfig(str(tmp_path)).refine_fraction
    assert "refine_fraction" not in args.given_settings


@pytest.mark.parametrize("given", ["half", "", None, "automatic", "50%"])
def test_a_fraction_that_is_no_number_is_refused(tmp_path, given):
    with pytest.raises(ValueError, match=f"refine_fraction must be a number or 'auto', got {given!r}"):
        config(tmp_path, refine_fraction=given)


@pytest.mark.parametrize(("text", "expected"), [("auto", "auto"), ("0.5", "0.5"), ("1", "1")])
def test_refine_fraction_on_the_command_line_and_in_a_file(tmp_path, text, expected):
    (tmp_path / "run.yaml").write_text(f"refine_fraction: {text}\nuse_cpu: true\n")
    common = ["--train_dataset", "train.jsonl", "--output_dir", str(tmp_path)]
    for options in (["--refine_fraction", text, "--use_cpu"], ["--config", str(tmp_path / "run.yaml")]):
        _, args, _ = make_train_parser().parse_args_and_config([*common, *options])
        assert args.refine_fraction == expected


def test_the_tracked_reference_refuses_fp16_only_where_it_is_read(tmp_path):
    """A CPU has no fp16: transformers would refuse the setting before tamis sees it."""
    args = config(tmp_path, reference="tracked", selector="mirror")
    args.fp16 = True
    with pytest.raises(ValueError, match="set `bf16` instead"):
        check(args)
    args.selector = "scout"
    check(args)


def test_generation_takes_the_rows_of_a_micro_batch(tmp_path):
    settings = {"per_device_train_batch_size": 3, "per_device_validation_batch_size": 2}
    assert config(tmp_path, refine_fraction=0.5, **settings).resolve().generation_batch_size == 5
    assert config(tmp_path, refine_fraction=0.5, generation_batch_size=64).resolve().generation_batch_size == 64
    assert not any("generation" in line for line in config(tmp_path, **settings).resolve().announcements)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 1.0),
        ({"selector": "mirror"}, 0.15),
        ({"selector": "none", "refine_policy": "random"}, 0.15),
        ({"response_temperature": 0.4}, 0.4),
    ],
)
def test_likely_responses_are_sharpened_only_where_no_scout_tells_them_apart(tmp_path, settings, temperature):
    assert config(tmp_path, refine_fraction=0.5, **settings).resolve().response_temperature == temperature


@pytest.mark.parametrize(
    ("settings", "start"),
    [
        ({}, 0),
        ({"selector": "column"}, 0),
        ({"refine_policy": "random", "selector": "softmax"}, 0),
        ({"selector": "mirror"}, 0.25),
        ({"selector": "softmax"}, 0.25),
        ({"selector": "mirror", "refine_start": 7}, 7),
    ],
)
def test_refining_starts_when_the_scores_say_something(tmp_path, settings, start):
    assert config(tmp_path, refine_fraction=0.5, **settings).resolve().refine_start == start


def test_a_vllm_server_is_looked_for_on_this_machine_only(tmp_path):
    assert config(tmp_path).vllm_server_base_url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize(
    "settings",
    [
        {"rho": 0.25, "selector": "bmo", "bmo_temperature": 0.2},
        {"eval_strategy": "steps", "eval_steps": 5, "lr_scheduler_type": "cosine"},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"max_length": None},
        {"eos_token": "<eos>"},
        {"refine_fraction": "auto", "scout_epochs": 3.0},
        {"refine_fraction": "0.5"},
    ],
)
def test_given_settings_replay_the_run(tmp_path, settings):
    first = config(tmp_path, **settings)
    again = BilevelConfig(**yaml.safe_load(yaml.safe_dump(first.given_settings)))
    assert again.to_dict() == first.to_dict()
    assert all(getattr(again, name) == value for name, value in settings.items())


def test_secrets_are_not_written_down(tmp_path):
    given = config(tmp_path, hub_token="hf_secret").given_settings
    assert "hf_secret" not in str(given)


@pytest.mark.parametrize("settings", [{"packing": True}, {"eval_packing": True}])
def test_settings_are_refused_before_the_model_is_loaded(tmp_path, settings):
    rows = Dataset.from_list(pairs(3))
    with pytest.raises(ValueError, match="joins"):
        BilevelTrainer(
            "no/such-model",
            config(tmp_path, **settings),
            train_dataset=rows,
            validation_dataset=Dataset.from_list(pairs(2, 9)),
        )


@pytest.mark.skipif(torch.accelerator.is_available(), reason="only a machine without accelerator falls back to fp32")
def test_without_an_accelerator_the_default_precision_is_fp32(tmp_path):
    args = BilevelConfig(output_dir=str(tmp_path))
    assert args.bf16 is False
    assert "bf16" not in args.given_settings


def test_likely_wrong_rows_are_not_random_ones(tmp_path):
    arguments = config(tmp_path, refine_fraction="auto", refine_policy="random")
    assert "give a number" in message_of(lambda: check(arguments))


def test_weights_of_the_rows_that_nothing_reads_are_warned_of(tmp_path, caplog):
    check(config(tmp_path), has_weight=True)
    assert "the training rows have weights of their own, and selector 'scout' does not read them" in caplog.text
    caplog.clear()
    check(config(tmp_path, selector="column", rho=0.0), has_weight=True)
    assert "weights of their own" not in caplog.text


def test_without_settings_a_trainer_has_the_defaults(model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list(pairs(4))
    trainer = BilevelTrainer(model_dir, train_dataset=rows, validation_dataset=Dataset.from_list(pairs(4, 100)))
    name = f"{model_dir.rstrip('/').split('/')[-1]}-tamis"
    assert trainer.args.output_dir == name and trainer.args.given_settings == {"output_dir": name}


def test_names_of_held_out_data_sets_are_text(tmp_path):
    rows = Dataset.from_list(pairs(4))
    given = {"train_dataset": rows, "validation_dataset": rows, "eval_dataset": {1: rows}}
    message = message_of(lambda: BilevelTrainer("model", config(tmp_path), **given))
    assert message == "eval_dataset: the names of data sets are text, got 1. Rename it"
