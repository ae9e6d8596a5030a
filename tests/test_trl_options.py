"""The verdict on every option of TRL: it works as there, it is refused, or it is said to have no effect."""

import copy
import inspect
import logging
import re
from dataclasses import fields
from itertools import chain

import pytest
import torch
from accelerate.utils import ParallelismConfig
from conftest import PLAIN, assert_close, pairs, parameters, tiny_model, tiny_tokenizer
from datasets import Dataset, DatasetDict
from transformers import MixtralConfig, MixtralForCausalLM, ProcessorMixin, TrainerCallback
from trl import SFTConfig, SFTTrainer

from tamis import BilevelConfig, BilevelTrainer
from tamis.checks import check_settings

# --- the verdicts on SFTConfig ----------------------------------------------------------------------------------------

# As in TRL, apart from the values below. Most are read by code that is inherited and touches nothing of tamis.
WORKS = """
    output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
    lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
    optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
    neftune_noise_alpha torch_empty_cache_steps logging_strategy logging_steps logging_first_step log_on_each_node
    logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
    per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
    eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy save_steps
    save_on_each_node save_total_limit push_to_hub hub_token hub_private_repo hub_model_id hub_strategy
    hub_always_push hub_revision load_best_model_at_end metric_for_best_model greater_is_better ignore_data_skip
    restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu accelerator_config
    dataloader_drop_last label_names ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers
    ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config debug skip_memory_metrics do_train do_eval do_predict
    resume_from_checkpoint local_rank model_init_kwargs trust_remote_code router_aux_loss_coef chat_template_path
    dataset_num_proc eos_token max_length truncation_mode shuffle_dataset pad_to_multiple_of padding_free
    completion_only_loss assistant_only_loss activation_offloading pad_token train_sampling_strategy
""".split()  # noqa: SIM905


_MAIN_PROCESS = "training rows are collated in the main process"
# A value, and a part of the reason.
NO_EFFECT = {
    "average_tokens_across_devices": (False, "counted over all devices"),
    "dataloader_num_workers": (2, _MAIN_PROCESS),
    "dataloader_pin_memory": (False, _MAIN_PROCESS),
    "dataloader_persistent_workers": (True, _MAIN_PROCESS),
    "dataloader_prefetch_factor": (2, _MAIN_PROCESS),
    "dataloader_multiprocessing_context": ("spawn", _MAIN_PROCESS),
    "dataloader_in_order": (False, _MAIN_PROCESS),
    "remove_unused_columns": (False, "training rows reach the collator as input_ids and labels"),
    "length_column_name": ("num_tokens", "the lengths of rows are counted"),
    "packing_strategy": ("wrapped", "packing is off"),
}
# A value, and a part of the sentence.
REFUSED = {
    "label_smoothing_factor": (0.1, "label_smoothing_factor changes what a row's loss means"),
    "auto_find_batch_size": (True, "auto_find_batch_size starts a run over whose scores have moved"),
    "enable_jit_checkpoint": (True, "enable_jit_checkpoint may save between the step of the scores"),
    "parallelism_config": (ParallelismConfig(tp_size=2), "parallelism_config"),
    "deepspeed": ({"zero_optimization": {"stage": 2}}, "DeepSpeed keeps gradients and optimizer to itself"),
    "dataset_kwargs": ({"skip_prepare_dataset": True}, "skip_prepare_dataset is not supported"),
    "packing": (True, "packing joins rows"),
    "eval_packing": (True, "packing joins rows"),
    "loss_type": ("dft", "has no per-row log-likelihood"),
    "dataset_text_field": ("content", 'dataset.rename_column("content", "text")'),  # by the rows: see below
}
# Single values, or combinations, of options that otherwise work.
REFUSED_VALUES = [
    ({"optim": "lomo"}, "optim 'lomo' updates the parameters inside the backward pass"),
    ({"optim": "galore_adamw_layerwise"}, "updates the parameters inside the backward pass"),
    ({"optim": "apollo_adamw_layerwise"}, "updates the parameters inside the backward pass"),
    ({"accelerator_config": {"split_batches": True}}, "split_batches"),
    ({"fp16": True, "reference": "tracked", "selector": "mirror"}, "fp16 scales the loss"),
    ({"activation_offloading": True}, "activation_offloading needs an accelerator"),
    ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy 'sequential'"),
    ({"train_sampling_strategy": "group_by_length"}, "or choose batch_rebalance"),
    ({"save_only_model": True, "refine_fraction": 0.5}, "set `refine_on_error='continue'`"),
    ({"completion_only_loss": False, "refine_fraction": 0.5}, "completion_only_loss false trains on prompts"),
]
ALLOWED_VALUES = [
    {"save_only_model": True, "refine_fraction": 0.5, "refine_on_error": "continue"},
    {"save_only_model": True},
    {"train_sampling_strategy": "batch_rebalance", "gradient_accumulation_steps": 2},
    {"fp16": True, "selector": "none", "rho": 0.5},
    {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}, "non_blocking": True}},
]
# What must stand beside a value for the config to be made at all.
ALONGSIDE = {
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
}
# transformers, or a package that is not there, would speak first.
SET_LATER = ("deepspeed", "parallelism_config")


def config(tmp_path, **settings) -> BilevelConfig:
    return BilevelConfig(**{"output_dir": str(tmp_path / "run")} | PLAIN | settings)


def check(args: BilevelConfig) -> None:
    rows = Dataset.from_list([{"prompt": "1", "completion": "2"}])
    check_settings(args, {role: rows for role in ("train_dataset", "validation_dataset", "eval_dataset")})


def test_there_is_a_verdict_on_every_option():
    verdicts = [*WORKS, *NO_EFFECT, *REFUSED]
    assert {f.name for f in fields(SFTConfig)} == set(verdicts) and len(set(verdicts)) == len(verdicts)


@pytest.mark.parametrize("name", sorted(REFUSED.keys() - {"dataset_text_field"}))
def test_options_that_are_refused(tmp_path, name):
    value, message = REFUSED[name]
    args = config(tmp_path, **({} if name in SET_LATER else {name: value}))
    if name in SET_LATER:
        check(args)
        setattr(args, name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        check(args)


@pytest.mark.parametrize(("settings", "message"), REFUSED_VALUES)
def test_values_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        check(config(tmp_path, **settings))


@pytest.mark.parametrize("settings", ALLOWED_VALUES)
def test_values_beside_the_refused_ones_are_accepted(tmp_path, caplog, settings):
    args = config(tmp_path, **settings)
    caplog.clear()  # transformers warns of settings that a CPU has no use for
    check(args)
    assert not caplog.records


@pytest.mark.parametrize("name", NO_EFFECT)
def test_options_without_effect(tmp_path, caplog, name):
    value, reason = NO_EFFECT[name]
    check(config(tmp_path, **{name: value}, **ALONGSIDE.get(name, {})))
    (message,) = [r.message for r in caplog.records if r.message.startswith(f"{name} ")]
    assert message.startswith(f"{name} is set but has no effect: ") and reason in message


def test_sorting_by_length_is_without_effect_where_a_step_is_one_micro_batch(tmp_path, caplog):
    check(config(tmp_path, train_sampling_strategy="batch_rebalance"))
    (record,) = caplog.records
    assert record.message.endswith("train_sampling_strategy is set but has no effect: a step has one micro-batch")


def test_settings_of_data_loaders_are_without_effect(tmp_path, caplog):
    check(config(tmp_path, accelerator_config={"dispatch_batches": True, "non_blocking": True}))
    (record,) = caplog.records
    assert record.message.startswith("accelerator_config.dispatch_batches is set but has no effect: ")


SCOUTING_OR_REFINING = (
    {},
    {"selector": "mirror", "reference": "zero", "refine_fraction": 0.5},
    {"selector": "none", "refine_fraction": 0.5, "refine_policy": "random"},
)


@pytest.mark.parametrize("by_launcher", [True, False])
def test_what_a_sharded_model_cannot_do_is_refused(tmp_path, monkeypatch, by_launcher):
    def check_sharded(engine, version="2", **settings):
        args = config(tmp_path, **settings)
        with monkeypatch.context() as patch:
            if by_launcher:
                patch.setenv(f"ACCELERATE_USE_{engine.upper()}", "true")
                patch.setenv("FSDP_VERSION", version)
            else:
                setattr(args, engine, True)
                args.fsdp_plugin_args = {"fsdp_version": int(version)}
            check(args)

    for engine, version in (("fsdp", "2"), ("fsdp", "1"), ("deepspeed", "2")):
        check_sharded(engine, version, selector="none")
        check_sharded(engine, version, reference="zero", selector="mirror")
        check_sharded(engine, version, scores="scores")
        for reference in ("base", "tracked"):
            with pytest.raises(ValueError, match="the references 'base' and 'tracked' cannot be had"):
                check_sharded(engine, version, selector="mirror", reference=reference)
        with pytest.raises(ValueError, match="padding_free is not checked for models sharded"):
            check_sharded(engine, version, selector="none", padding_free=True)
    for settings in SCOUTING_OR_REFINING:
        check_sharded("fsdp", **settings)
        with pytest.raises(ValueError, match="set `fsdp_version: 2`"):
            check_sharded("fsdp", "1", **settings)
        with pytest.raises(ValueError, match="DeepSpeed keeps gradients and optimizer to itself"):
            check_sharded("deepspeed", **settings)


@pytest.mark.parametrize("settings", [{}, {"refine_fraction": 0.5}])
def test_what_is_uploaded_is_said(tmp_path, caplog, settings):
    check(config(tmp_path, push_to_hub=True, **settings))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "push_to_hub uploads the whole of output_dir" in record.message
    assert ("refinements.parquet" in record.message) == bool(settings)


@pytest.mark.parametrize(
    ("settings", "is_on"),
    [
        ({}, True),
        ({"gradient_checkpointing": False}, False),
        ({"gradient_checkpointing": True}, True),
        ({"activation_checkpointing": False}, False),
        ({"activation_checkpointing": True}, True),
        ({"activation_checkpointing": True, "gradient_checkpointing": False}, True),  # transformers: the new name wins
    ],
)
def test_activation_checkpointing_by_both_names(tmp_path, settings, is_on):
    args = BilevelConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert (args.activation_checkpointing, args.gradient_checkpointing) == (is_on, is_on)
    again = BilevelConfig(**args.given_settings)
    assert again.activation_checkpointing is is_on


# --- works: a run without weights is that of SFTTrainer ---------------------------------------------------------------

ROWS = pairs(8, 8)
# Every step sees all rows, so that the order in which they come does not matter.
MIXING = {"selector": "none", "rho": 0.0, "loss_reduction": "token"}
WHOLE = {"per_device_train_batch_size": 8, "max_steps": 3}
EVALUATE = {"eval_strategy": "steps", "eval_steps": 1}
RUNS = {
    "Adam and its schedule": {
        "learning_rate": 5e-3, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-2, "weight_decay": 0.5,
        "max_grad_norm": 0.1, "warmup_steps": 2, "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2}, "max_steps": 4, "full_determinism": True, "logging_first_step": True,
    },
    "another optimizer, accumulation, epochs, no padding": {
        "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4, "num_train_epochs": 2.0, "max_steps": -1, "seed": 7, "data_seed": 3,
        "accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}, "torch_empty_cache_steps": 1,
        "padding_free": True, "max_length": None, "train_sampling_strategy": "batch_rebalance",
    },
    "rows to tokens": {
        "max_length": 5, "completion_only_loss": False, "eos_token": "<unk>", "shuffle_dataset": True,
        "pad_to_multiple_of": 16, "optim_args": "eps=1e-3",
    },
    "precision and memory": {
        "bf16": True, "activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False},
        "use_cache": True, "skip_memory_metrics": False,
    },
    "evaluation and saving": {
        "lr_scheduler_type": "reduce_lr_on_plateau", "per_device_eval_batch_size": 2, "eval_on_start": True,
        "prediction_loss_only": True, "eval_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "save_only_model": True, "save_total_limit": 1, "include_num_input_tokens_seen": "non_padding",
        "debug": "underflow_overflow", "max_steps": 2, **EVALUATE,
    },
}  # fmt: skip


@pytest.fixture
def both(model_dir, tmp_path):
    """The final parameters of a run of tamis without weights, and of TRL's own run with the same settings."""

    def run(*, model=lambda: None, rows=ROWS, arguments=lambda: {}, **settings):
        settings = PLAIN | WHOLE | settings
        rows, finals = Dataset.from_list(rows), []
        datasets = {
            "train_dataset": rows,
            "eval_dataset": rows.select(range(3)) if "eval_strategy" in settings else None,
        }
        for trainer_class, make in ((BilevelTrainer, BilevelConfig), (SFTTrainer, SFTConfig)):
            own = MIXING if make is BilevelConfig else {}
            # A copy: transformers writes into the dicts.
            args = make(output_dir=str(tmp_path / make.__name__), **copy.deepcopy(settings), **own)
            trainer = trainer_class(model() or model_dir, args, **datasets, **arguments())
            trainer.train()
            finals.append(parameters(trainer.model))
        return finals

    return run


@pytest.fixture(scope="module")
def default_run(model_dir, tmp_path_factory):
    args = SFTConfig(output_dir=str(tmp_path_factory.mktemp("default")), **PLAIN | WHOLE)
    trainer = SFTTrainer(model_dir, args, train_dataset=Dataset.from_list(ROWS))
    trainer.train()
    return parameters(trainer.model)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_weights_is_that_of_trl(both, default_run, name):
    assert RUNS[name].keys() <= set(WORKS)
    actual, expected = both(**RUNS[name])
    # Sums in another order round differently in bf16, and Adam makes whole steps of tiny gradients.
    assert_close(actual, expected, atol=2e-4 if name == "precision and memory" else 1e-5)
    assert max((actual[n] - default_run[n]).abs().max().item() for n in actual) > 1e-4, "the settings do something"


def test_the_auxiliary_loss_of_experts_is_that_of_trl(both):
    def model():
        torch.manual_seed(0)
        size = {"vocab_size": len(tiny_tokenizer()), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
        tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        return MixtralForCausalLM(MixtralConfig(max_position_embeddings=128, **size, **heads, **tokens))

    logged = []

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    def arguments():
        return {"processing_class": tiny_tokenizer(), "callbacks": [Log()]}

    settings = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    actual, expected = both(model=model, arguments=arguments, router_aux_loss_coef=1.0, **settings)
    assert_close(actual, expected, atol=1e-5)
    own, trl = (line for line in logged if "loss" in line)
    assert own["aux_loss"] == pytest.approx(trl["aux_loss"], abs=1e-5) and own["aux_loss"] > 0
    assert own["loss"] == pytest.approx(trl["loss"], abs=1e-5)


# --- the verdicts on the arguments of SFTTrainer ----------------------------------------------------------------------

ARGUMENTS_THAT_WORK = """
    model data_collator train_dataset eval_dataset processing_class compute_metrics callbacks optimizers
    optimizer_cls_and_kwargs preprocess_logits_for_metrics quantization_config peft_config formatting_func
""".split()  # noqa: SIM905
ARGUMENTS_THAT_ARE_REFUSED = ["args", "compute_loss_func"]
TRAIN, VALIDATION = Dataset.from_list(pairs(4)), Dataset.from_list(pairs(2, 95))
CHAT = Dataset.from_list(
    [{"messages": [{"role": "user", "content": "1="}, {"role": "assistant", "content": "2"}]} for _ in range(2)]
)
NOT_A_DATASET = "must be a datasets.Dataset, got"
REFUSED_ARGUMENTS = [
    ({"args": {"seed": 1}}, "args must be a BilevelConfig, got dict"),
    ({"args": SFTConfig(output_dir="unused", use_cpu=True, bf16=False)}, "args must be a BilevelConfig, got SFTConfig"),
    ({"compute_loss_func": lambda outputs, labels, num_items_in_batch: 0}, "compute_loss_func replaces the loss"),
    ({"train_dataset": None}, f"train_dataset {NOT_A_DATASET} NoneType"),
    ({"train_dataset": pairs(4)}, f"train_dataset {NOT_A_DATASET} list"),
    ({"train_dataset": DatasetDict(a=TRAIN, b=TRAIN)}, "train_dataset has the splits a, b: give one of them"),
    ({"train_dataset": TRAIN.to_iterable_dataset()}, f"train_dataset {NOT_A_DATASET} IterableDataset"),
    ({"validation_dataset": {"a": VALIDATION}}, f"validation_dataset {NOT_A_DATASET} dict"),
    ({"validation_dataset": VALIDATION.to_iterable_dataset()}, f"validation_dataset {NOT_A_DATASET} IterableDataset"),
    ({"eval_dataset": VALIDATION.to_iterable_dataset()}, f"eval_dataset {NOT_A_DATASET} IterableDataset"),
    ({"eval_dataset": {"a": TRAIN, "b": [1]}}, f"eval_dataset['b'] {NOT_A_DATASET} list"),
    ({"eval_dataset": {}}, "eval_dataset: there are no data sets"),
    ({"eval_dataset": {"a": TRAIN.select([])}}, "eval_dataset['a']: there are no rows"),
    ({"eval_dataset": {"a": TRAIN, "b": VALIDATION}}, "validation_dataset and eval_dataset['b'] share 2 row"),
    ({"train_dataset": TRAIN.add_column("images", [[]] * 4)}, "train_dataset: rows with images"),
    ({"validation_dataset": CHAT}, "train_dataset has prompt and completion, validation_dataset has messages"),
    ({"eval_dataset": {"chat": CHAT}}, "train_dataset has prompt and completion, eval_dataset['chat'] has messages"),
]


def test_there_is_a_verdict_on_every_argument():
    verdicts = [*ARGUMENTS_THAT_WORK, *ARGUMENTS_THAT_ARE_REFUSED]
    assert set(inspect.signature(SFTTrainer.__init__).parameters) - {"self"} == set(verdicts)
    assert set(ARGUMENTS_THAT_ARE_REFUSED) <= {name for given, _ in REFUSED_ARGUMENTS for name in given}


def refused(tmp_path, arguments: dict, **settings) -> str:
    """The sentence with which arguments are refused; nothing was loaded, nothing written."""
    given = {"args": config(tmp_path, **settings), "train_dataset": TRAIN, "validation_dataset": VALIDATION}
    with pytest.raises(ValueError) as caught:
        BilevelTrainer("no/such-model", **given | arguments)
    assert not list(tmp_path.iterdir())
    return str(caught.value)


def test_a_collator_is_refused_where_rows_go_without_padding(tmp_path):
    assert "leave data_collator out" in refused(tmp_path, {"data_collator": pad_left}, padding_free=True)


@pytest.mark.parametrize(("arguments", "message"), REFUSED_ARGUMENTS)
def test_arguments_that_are_refused(tmp_path, arguments, message):
    assert message in refused(tmp_path, arguments)


def test_what_is_refused_once_the_model_is_loaded_writes_nothing_either(tmp_path, model_dir):
    rows = Dataset.from_list([{"prompt": "1" * 40, "completion": "2"}])
    with pytest.raises(ValueError, match="Raise `max_length`"):
        BilevelTrainer(model_dir, config(tmp_path, max_length=20, **MIXING), train_dataset=TRAIN, eval_dataset=rows)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_text_field_of_another_name_is_refused_where_trl_reads_it(tmp_path, model_dir):
    value, message = REFUSED["dataset_text_field"]
    rows = {"train_dataset": Dataset.from_dict({"content": ["1=2"]})}
    assert message in refused(tmp_path, rows, dataset_text_field=value)
    assert message in refused(tmp_path, {"train_dataset": rows["train_dataset"].add_column("text", ["3=4"])},
                              dataset_text_field=value)  # fmt: skip
    BilevelTrainer(model_dir, config(tmp_path, dataset_text_field=value, **MIXING), train_dataset=TRAIN)


def test_formats_may_differ_where_every_token_is_trained_on(tmp_path, model_dir):
    args = config(tmp_path, completion_only_loss=False)
    trainer = BilevelTrainer(model_dir, args, train_dataset=TRAIN, validation_dataset=CHAT)
    assert all(row["labels"] == row["input_ids"] for row in [*trainer.train_dataset, *trainer.validation_dataset])


def flatten(rows):
    """What TRL's padding-free training does."""
    return {name: torch.tensor([list(chain(*(row[name] for row in rows)))]) for name in ("input_ids", "labels")}


@pytest.mark.parametrize("settings", [MIXING, {}])
def test_a_collator_that_joins_rows_is_refused(tmp_path, model_dir, settings):
    datasets = {"train_dataset": TRAIN, "validation_dataset": VALIDATION}
    trainer = BilevelTrainer(model_dir, config(tmp_path, max_steps=1, **settings), **datasets, data_collator=flatten)
    with pytest.raises(ValueError, match="one row of labels for each row"):
        trainer.train()


def pad_left(rows):
    width = max(len(row["labels"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    batch = {n: torch.tensor([[fill[n]] * (width - len(row[n])) + row[n] for row in rows]) for n in fill}
    mask = torch.tensor([[0] * (width - len(row["labels"])) + [1] * len(row["labels"]) for row in rows])
    return batch | {"attention_mask": mask}


def test_collator_optimizer_and_callbacks_are_those_given(both, default_run):
    calls = []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            calls.append(state.global_step)

    def arguments():
        optimizer = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})
        return {"data_collator": pad_left, "optimizer_cls_and_kwargs": optimizer, "callbacks": [Count()]}

    actual, expected = both(arguments=arguments)
    assert calls == [1, 2, 3] * 2
    assert_close(actual, expected, atol=1e-5)
    assert max((actual[n] - default_run[n]).abs().max().item() for n in actual) > 1e-3


def test_an_optimizer_may_be_given(both, default_run):
    models = []

    def model():
        models.append(tiny_model(tiny_tokenizer()))
        return models[-1]

    def arguments():
        return {
            "optimizers": (torch.optim.SGD(models[-1].parameters(), lr=0.1), None),
            "processing_class": tiny_tokenizer(),
        }

    actual, expected = both(model=model, arguments=arguments)
    assert_close(actual, expected, atol=1e-5)
    assert max((actual[n] - default_run[n]).abs().max().item() for n in actual) > 1e-3


class Processor(ProcessorMixin):
    """Of a model for text and images: it has a tokenizer, but is none."""

    attributes = ["tokenizer"]
    tokenizer_class = "PreTrainedTokenizerFast"

    def __init__(self, tokenizer=None, **kwargs):
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template

    def __call__(self, text=None, **kwargs):
        return self.tokenizer([text] if isinstance(text, str) else text, **kwargs)


@pytest.mark.parametrize("settings", [{}, {"refine_fraction": 0.5, "max_new_tokens": 3}])
def test_a_processor_may_take_the_place_of_a_tokenizer(tmp_path, model_dir, settings):
    datasets = {"train_dataset": TRAIN, "validation_dataset": VALIDATION}
    args = config(tmp_path, max_steps=2, **settings)
    trainer = BilevelTrainer(model_dir, args, **datasets, processing_class=Processor(tiny_tokenizer()))
    trainer.train()
    assert trainer.state.global_step == 2
