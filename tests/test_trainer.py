"""A step against TRL's own trainer and against gradients row by row; accumulation, evaluation, failures."""

import contextlib
import itertools
import logging
import math
from itertools import chain
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from conftest import (
    PLAIN,
    GradientRecorder,
    Kill,
    Killed,
    assert_close,
    lora,
    pairs,
    parameters,
    plain_loss,
    read_jsonl,
    row_gradients,
    weighted_step,
)
from datasets import Dataset, DatasetDict
from distributed_runs import fp16_on_cpus
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tamis import BilevelConfig, BilevelTrainer, NonFiniteLossError
from tamis.checkpoint import load_state
from tamis.losses import fused_forward

PLAIN_MIXING = {"selector": "none", "rho": 0.0}
CHAT = [
    {
        "messages": [
            {"role": "user", "content": f"{i}="},
            {"role": "assistant", "content": "a" * (i % 3 + 1) + f"{2 * i}"},
        ]
    }
    for i in range(8, 14)
]
CHAT_PAIRS = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in CHAT]
FORMATS = {
    "pairs": pairs(6, 8),
    "text": [{"text": row["prompt"] + row["completion"]} for row in pairs(6, 8)],
    "chat": CHAT,
    "chat pairs": CHAT_PAIRS,
}


def one_step(make, *args, **settings):
    """Training loss and gradients of the first optimizer step."""
    recorder = GradientRecorder()
    trainer = make(*args, callbacks=[recorder], max_steps=1, max_grad_norm=0.0, **settings)
    loss = trainer.train().training_loss
    return loss, recorder.steps[0], trainer


# --- a step is what it says it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_plain_mixing_is_sft(bilevel, sft, name):
    settings = {"per_device_train_batch_size": 6}
    whole = {"assistant_only_loss": False} if name == "chat" else {}  # what TRL trains on
    loss, gradients, _ = one_step(bilevel, FORMATS[name], loss_reduction="token", **PLAIN_MIXING, **settings, **whole)
    expected_loss, expected, _ = one_step(sft, FORMATS[name], **settings)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_close(gradients, expected)


def test_plain_mixing_is_sft_under_accumulation(bilevel, sft):
    """Also where the micro-batches have unlike numbers of tokens, and the last one fewer rows."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    loss, gradients, _ = one_step(bilevel, FORMATS["pairs"], loss_reduction="token", **PLAIN_MIXING, **settings)
    expected_loss, expected, _ = one_step(sft, FORMATS["pairs"], **settings)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_close(gradients, expected)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("reduction", ["example", "token"])
def test_every_row_is_multiplied_by_its_own_coefficient(bilevel, reduction, accumulation):
    weights = [0.5, 2.0, 0.0, 1.0, 3.0, 1.5]
    train = [row | {"weight": weight} for row, weight in zip(FORMATS["pairs"], weights, strict=True)]
    loss, gradients, trainer = one_step(bilevel, train, pairs(4, 95), **weighted_step(reduction, accumulation))
    expected = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    expected_loss = 0.0
    for dataset, level in ((trainer.train_dataset, 0.7), (trainer.validation_dataset, 0.3)):
        num_tokens = [sum(label != -100 for label in row["labels"]) for row in dataset]
        for i, row in enumerate(dataset):
            share = num_tokens[i] / sum(num_tokens) if reduction == "token" else 1 / len(dataset)
            weight = weights[row["example_id"]] / (8 / 6) if level == 0.7 else 1.0
            for name, gradient in row_gradients(trainer.model, row).items():
                expected[name] += level * share * weight * gradient
            expected_loss += level * share * weight * plain_loss(trainer.model, row["input_ids"], row["labels"]).item()
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_close(gradients, expected)


def test_weight_zero_is_the_row_removed(bilevel):
    weights = [1.0, 2.0, 0.0, 1.0]
    rows = [row | {"weight": weight} for row, weight in zip(pairs(4, 8), weights, strict=True)]
    kept = [row for row in rows if row["weight"]]
    settings = {"selector": "column", "rho": 0.5}
    loss, gradients, _ = one_step(bilevel, rows, pairs(4, 95), **settings)
    expected_loss, expected, _ = one_step(bilevel, kept, pairs(4, 95), **settings)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert_close(gradients, expected)


def test_rows_without_any_weight_are_refused(bilevel):
    with pytest.raises(ValueError, match="weight"):
        bilevel([row | {"weight": 0.0} for row in pairs(4)], selector="column", rho=0.0).train()


def test_padding_does_not_change_a_loss(bilevel):
    trainer = bilevel([{"prompt": "1=", "completion": "2"}, {"prompt": "1=", "completion": "2" * 60}], **PLAIN_MIXING)
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset]
    together, _ = fused_forward(trainer.model, trainer.data_collator(rows))
    alone = [fused_forward(trainer.model, trainer.data_collator([row]))[0] for row in rows]
    by_hand = [plain_loss(trainer.model, **row) for row in rows]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-6, rtol=0)
    torch.testing.assert_close(together, torch.stack(by_hand), atol=1e-6, rtol=0)


def test_rho_goes_from_start_to_end(bilevel, tmp_path):
    recorder = GradientRecorder()
    bilevel(
        pairs(8),
        pairs(4, 95),
        selector="none",
        rho=0.0,
        rho_start=1.0,
        rho_decay_ratio=0.5,
        max_steps=4,
        learning_rate=0.0,
        max_grad_norm=0.0,
        callbacks=[recorder],
    ).train()
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
    for line, rho in zip(lines, [1.0, 0.5, 0.0, 0.0], strict=True):
        assert line["loss"] == pytest.approx(
            rho * line["validation_loss"] + (1 - rho) * line["training_loss"], abs=1e-6
        )


# --- batches and accumulation -----------------------------------------------------------------------------------------


def run_with(bilevel, batch_size: int, accumulation: int, num_rows: int = 16, **settings):
    trainer = bilevel(
        pairs(num_rows // 2) + pairs(num_rows - num_rows // 2, 50, wrong=True),
        pairs(8, 95),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        # Plain gradient descent: Adam would blow rounding of tiny gradients up to whole steps.
        **{"optim": "sgd", "learning_rate": 0.1, "num_train_epochs": 2.0} | settings,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{"selector": "mirror"}, {"selector": "mirror", "reference": "tracked"}])
def test_batch_times_accumulation_is_all_that_counts(bilevel, settings):
    # With `tracked` the excess is the difference of two models: a softer rule keeps its rounding small.
    expected = run_with(bilevel, 8, 1, selector_learning_rate=0.5, **settings)
    assert expected.state.global_step == 4 and expected.weighting.row_weights.table.score_N.std() > 0.05
    for batch_size, accumulation, strategy in ((4, 2, "random"), (1, 8, "random"), (2, 4, "batch_rebalance")):
        sampling = {"train_sampling_strategy": strategy}
        actual = run_with(bilevel, batch_size, accumulation, selector_learning_rate=0.5, **settings, **sampling)
        assert actual.state.global_step == 4
        assert_close(parameters(actual.model), parameters(expected.model), atol=2e-6)
        table, other = actual.weighting.row_weights.table, expected.weighting.row_weights.table
        torch.testing.assert_close(table.score_N, other.score_N, atol=1e-3, rtol=0)
        torch.testing.assert_close(
            actual.weighting.row_weights.all_weights(), expected.weighting.row_weights.all_weights(), atol=1e-3, rtol=0
        )
        assert torch.equal(actual.weighting.row_weights.num_updates_N, expected.weighting.row_weights.num_updates_N)


def test_a_last_window_with_fewer_rows_is_a_mean_all_the_same(bilevel):
    """10 rows in micro-batches of 4, two to a step: the second step of an epoch has one micro-batch of 2 rows."""
    recorder = GradientRecorder()
    trainer = bilevel(
        pairs(10),
        **PLAIN_MIXING,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        callbacks=[recorder],
    )
    ids = [i for batch in trainer.get_train_dataloader() for i in batch.training_ids]
    trainer.train()
    by_id = {row["example_id"]: row for row in trainer.train_dataset}
    for gradients, rows in zip(recorder.steps, (ids[:8], ids[8:]), strict=True):
        per_row = [row_gradients(trainer.model, by_id[i]) for i in rows]
        assert_close(gradients, {n: sum(g[n] for g in per_row) / len(rows) for n in gradients})


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 1}, {"dataloader_drop_last": True}])
def test_every_row_is_seen_once_an_epoch(bilevel, settings):
    trainer = run_with(bilevel, 4, 1, num_rows=10, selector="mirror", num_train_epochs=3.0, **settings)
    num_seen = trainer.weighting.row_weights.num_updates_N
    assert num_seen.sum() == (24 if settings.get("dataloader_drop_last") else 30)
    assert num_seen.max() == 3 and trainer.state.epoch == 3
    assert trainer.num_examples(trainer.callback_handler.train_dataloader) == 10


def test_workers_change_nothing(bilevel):
    with_worker = run_with(bilevel, 4, 2, num_rows=12, selector="mirror", dataloader_num_workers=1)
    assert_close(
        parameters(with_worker.model), parameters(run_with(bilevel, 4, 2, 12, selector="mirror").model), atol=0
    )


def test_global_randomness_is_not_what_picks_the_rows(bilevel):
    first = run_with(bilevel, 4, 1, num_rows=12, seed=1, data_seed=7, selector="mirror")
    second = run_with(bilevel, 4, 1, num_rows=12, seed=2, data_seed=7, selector="mirror")
    assert_close(parameters(first.model), parameters(second.model), atol=0)


class StopEpoch(TrainerCallback):
    """Ends every epoch after its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step % 2 == 0


def ids_of_run(trainer, resume=False) -> list[list[int]]:
    """The training rows of each step."""
    ids, collate = [], trainer.batches.collate
    trainer.batches.collate = lambda batches: ids.append(batches[0].training_ids) or collate(batches)
    with contextlib.suppress(Killed):
        trainer.train(resume_from_checkpoint=resume)
    return ids


def test_after_an_epoch_that_was_stopped_comes_another_permutation(bilevel):
    trainer = bilevel(pairs(16), **PLAIN_MIXING, num_train_epochs=3, callbacks=[StopEpoch()])
    ids = ids_of_run(trainer)
    epochs = [ids[k] + ids[k + 1] for k in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_sees_the_rows_it_would_have_seen(bilevel, tmp_path):
    settings = PLAIN_MIXING | {"max_steps": 12, "save_strategy": "steps", "save_steps": 6}
    expected = ids_of_run(bilevel(pairs(16), **settings, output_dir=str(tmp_path / "whole")))
    assert sorted(chain(*expected[4:8])) == list(range(16)) and expected[4:8] != expected[:4] != expected[8:]
    killed = ids_of_run(bilevel(pairs(16), **settings, callbacks=[Kill(7)]))
    resumed = ids_of_run(bilevel(pairs(16), **settings), resume=True)
    assert killed == expected[:7] and resumed == expected[6:]


# --- LoRA, checkpointing, references ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["base", "tracked"])
@pytest.mark.parametrize("is_lora", [False, True])
def test_checkpointing_changes_nothing(bilevel, is_lora, reference):
    runs = []
    for checkpointing in (False, True):
        recorder = GradientRecorder()
        trainer = bilevel(
            pairs(8),
            pairs(4, 95),
            peft_config=lora() if is_lora else None,
            selector="mirror",
            reference=reference,
            activation_checkpointing=checkpointing,
            max_steps=3,
            learning_rate=1e-2,
            callbacks=[recorder],
        )
        loss = trainer.train().training_loss
        runs.append((loss, recorder.steps[0], recorder.steps[-1], parameters(trainer.model)))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-6)
    for without, with_checkpointing in zip(runs[0][1:], runs[1][1:], strict=True):
        assert_close(with_checkpointing, without, atol=1e-5)


def test_lora_starts_from_the_loss_of_the_model(bilevel):
    full = one_step(bilevel, pairs(4), pairs(4, 95), selector="mirror")[0]
    adapter = one_step(bilevel, pairs(4), pairs(4, 95), selector="mirror", peft_config=lora())[0]
    assert adapter == pytest.approx(full, abs=1e-6)


@pytest.mark.parametrize("is_lora", [False, True])
def test_tracked_does_not_touch_the_trained_model(bilevel, is_lora):
    """Same parameters as with a selector that weighs nothing and no reference at all."""
    finals = []
    for settings in ({"selector": "none"}, {"selector": "bmo", "bmo_temperature": 1e6, "reference": "tracked"}):
        trainer = bilevel(
            pairs(8),
            pairs(4, 95),
            peft_config=lora() if is_lora else None,
            **{"optim": "sgd", "learning_rate": 0.2, "max_steps": 5} | settings,
        )
        before = parameters(trainer.model)
        tracked_before = [p.detach().clone() for p in getattr(trainer.weighting.reference, "parameters", [])]
        trainer.train()
        finals.append({n: p for n, p in parameters(trainer.model).items() if "tamis_tracked" not in n})
    assert_close(finals[1], finals[0], atol=2e-6)
    assert any((finals[1][n] - before[n]).abs().max() > 1e-3 for n in finals[1])
    moved = [
        (p - q).abs().max().item() for p, q in zip(trainer.weighting.reference.parameters, tracked_before, strict=True)
    ]
    assert min(moved) > 0, "its own adapter follows the training rows"
    assert all(p.grad is None for p in trainer.weighting.reference.parameters)


def test_only_the_trained_adapter_is_saved(bilevel, tmp_path):
    trainer = bilevel(pairs(8), pairs(4, 95), peft_config=lora(), selector="mirror", reference="tracked", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert [path.name for path in (tmp_path / "saved").rglob("adapter_model.safetensors")] == [
        "adapter_model.safetensors"
    ]
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    own = parameters(trainer.model)
    assert_close(saved, {n: own[n.replace(".weight", ".default.weight")] for n in saved}, atol=0)


# --- names of rows ----------------------------------------------------------------------------------------------------


def test_ids_of_the_user_do_not_mix_up_rows(bilevel, tmp_path):
    """A column example_id, as a table that tamis wrote has it, may be permuted or start anywhere."""
    for ids in ([3, 2, 1, 0], [10, 11, 12, 13]):
        rows = [
            row | {"example_id": i, "weight": float(w)} for w, (i, row) in enumerate(zip(ids, pairs(4), strict=True))
        ]
        loss, gradients, _ = one_step(bilevel, rows, selector="column", rho=0.0)
        plain = [{k: v for k, v in row.items() if k != "example_id"} for row in rows]
        expected_loss, expected, _ = one_step(bilevel, plain, selector="column", rho=0.0)
        assert loss == pytest.approx(expected_loss, abs=1e-6)
        assert_close(gradients, expected)


def test_prompts_that_fill_max_length_are_dropped_and_named(bilevel, caplog):
    train = [*pairs(3), {"prompt": "1" * 40, "completion": "2"}, *pairs(2, 20)]
    with caplog.at_level(logging.WARNING):
        trainer = bilevel(train, pairs(4, 95), max_length=20, max_steps=2)
    assert "train_dataset: 1 of 6 rows dropped" in caplog.text and "max_length=20: row 3. Raise" in caplog.text
    trainer.train()
    assert trainer.weighting.row_weights.num_updates_N[3] == 0 and 3 not in trainer.train_dataset["example_id"]
    with pytest.raises(ValueError, match=r"train_dataset: all 1 rows .* Raise `max_length`"):
        bilevel([train[3]], pairs(4, 95), max_length=20)
    with pytest.raises(ValueError, match=r"validation_dataset: all 1 rows .* Raise `max_length`"):
        bilevel(pairs(4), [train[3]], max_length=20)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step(bilevel, tmp_path, monkeypatch):
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=4, save_strategy="steps", save_steps=1, selector="mirror")
    states = []

    def poisoned(model, inputs):
        nll_B, outputs = fused_forward(model, inputs)
        states.append(parameters(model))
        return (
            nll_B * torch.tensor([1, float("nan")] + [1] * (len(nll_B) - 2)) if len(states) == 3 else nll_B
        ), outputs

    monkeypatch.setattr("tamis.trainer.fused_forward", poisoned)
    ids, collate = [], trainer.batches.collate
    trainer.batches.collate = lambda batches: ids.append(batches[0].training_ids) or collate(batches)
    with pytest.raises(NonFiniteLossError, match="step 3: the loss is not finite on train_dataset, row") as caught:
        trainer.train()
    # Two steps make an epoch: the third is the first of the next one.
    assert f"train_dataset, row {ids[2][1]}." in str(caught.value)
    assert_close(parameters(trainer.model), states[2], atol=0)
    saved = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert_close(saved, {n: p for n, p in parameters(trainer.model).items() if n in saved}, atol=0)
    monkeypatch.undo()
    again = bilevel(pairs(8), pairs(4, 95), max_steps=4, save_strategy="steps", save_steps=1, selector="mirror")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_deepspeed_engine_is_given_the_losses_of_plain_training(bilevel, monkeypatch):
    """DeepSpeed itself has not been run: a stand-in for its engine, which is told not to divide by the accumulation."""
    rows = [row | {"weight": 1.0 + i} for i, row in enumerate(pairs(8))]
    settings = {"selector": "column", "rho": 0.3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    plain, trainer = (bilevel(rows, pairs(4, 95), max_steps=3, **settings) for _ in range(2))
    plain.train()
    told, training_step = [], trainer.training_step

    def backward(loss, **settings):
        told.append(settings)
        loss.backward()

    engine = SimpleNamespace(backward=backward)

    def by_engine(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.DEEPSPEED)
            patch.setattr(trainer.accelerator, "deepspeed_engine_wrapped", engine, raising=False)
            return training_step(*args, **kwargs)

    trainer.training_step = by_engine
    trainer.train()
    assert told == [{"sync_gradients": is_last, "scale_wrt_gas": False} for is_last in (False, True)] * 3
    assert_close(parameters(trainer.model), parameters(plain.model), atol=0)


class Kept(TrainerCallback):
    """The parameters after every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(parameters(model))


def test_a_step_that_fp16_skips_does_not_end_the_run(bilevel, monkeypatch):
    """Its gradients overflow, by design of the scaler; the losses of rows do not."""
    monkeypatch.setattr(Accelerator, "__init__", fp16_on_cpus(Accelerator.__init__))
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=4, logging_steps=1, optim="sgd", learning_rate=0.1, fp16=True)
    before, kept = parameters(trainer.model), Kept()
    trainer.add_callback(kept)
    trainer.train()
    assert_close(kept.steps[0], before, atol=0)
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert [math.isfinite(norm) for norm in norms] == [False, True, True, True]
    for last, step in itertools.pairwise(kept.steps):
        assert any((step[name] != last[name]).any() for name in last)


def test_a_model_with_nan_names_its_rows(bilevel):
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=2, selector="mirror")
    trainer.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"train_dataset, row \d, .*validation_dataset, row \d"):
        trainer.train()


def test_a_reference_that_is_not_finite_does_not_reach_the_model(bilevel):
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=2, selector="mirror", reference="tracked")
    for parameter in trainer.weighting.reference.parameters:
        parameter.data.fill_(float("nan"))
    before = parameters(trainer.model)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert_close(parameters(trainer.model), before, atol=0)


# --- evaluation -------------------------------------------------------------------------------------------------------


def greedy(trainer, prompt: str, num_tokens: int = 12) -> str:
    """What greedy decoding answers, without padding."""
    tokenizer = trainer.processing_class
    inputs = tokenizer(prompt, return_tensors="pt")
    out = trainer.model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    return answer.replace(" ", "").split("<pad>")[0]


def test_evaluation_against_generation(bilevel):
    evaluation = [*pairs(5), *pairs(2, 40)]
    trainer = bilevel(
        pairs(6), evaluation=evaluation, **PLAIN_MIXING, learning_rate=1e-2, max_steps=60, per_device_eval_batch_size=3
    )
    trainer.train()
    metrics = trainer.evaluate()
    losses = [plain_loss(trainer.model, row["input_ids"], row["labels"]).item() for row in trainer.eval_dataset]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)
    num_right = sum(greedy(trainer, row["prompt"]) == row["completion"] + "<eos>" for row in evaluation)
    assert 0 < num_right < 7
    assert metrics["eval_teacher_forced_match"] == pytest.approx(num_right / 7)


def test_teacher_forced_match_is_not_exact_match_for_truncated_rows(bilevel):
    """Every token that is left is right, and greedy decoding goes on where the row was cut."""
    rows = [{"prompt": "1=", "completion": "2" * 30}]
    trainer = bilevel(rows, evaluation=rows, **PLAIN_MIXING, learning_rate=1e-2, max_steps=25, max_length=8)
    trainer.train()
    assert trainer.evaluate()["eval_teacher_forced_match"] == 1
    assert greedy(trainer, "1=", 40) == "2" * 40


@pytest.mark.parametrize("is_whole", [False, True])
def test_teacher_forced_match_is_exact_match_for_messages_unless_all_tokens_are_trained_on(bilevel, is_whole):
    """Every answer is what greedy decoding gives; where the user's tokens count as well, they may be anything."""
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": q * 2}]} for q in "abcd"]
    settings = PLAIN_MIXING | ({"assistant_only_loss": False} if is_whole else {})
    trainer = bilevel(rows, evaluation=rows, **settings, learning_rate=1e-2, max_steps=80)
    trainer.train()
    assert [greedy(trainer, f"<user>{q}<eos><assistant>", 3) for q in "abcd"] == [f"{q * 2}<eos>" for q in "abcd"]
    match = trainer.evaluate()["eval_teacher_forced_match"]
    assert match <= 0.25 if is_whole else match == 1


@pytest.fixture
def trainers(model_dir, tmp_path):
    """Trainers of tamis and of TRL, to evaluate with; both may have further arguments."""

    def make(evaluation, **arguments):
        settings = PLAIN | {"output_dir": str(tmp_path), "per_device_eval_batch_size": 3}
        datasets = {"train_dataset": Dataset.from_list(pairs(4)), "eval_dataset": evaluation}
        own = BilevelTrainer(model_dir, BilevelConfig(**settings, **PLAIN_MIXING), **datasets, **arguments)
        return own, SFTTrainer(model_dir, SFTConfig(**settings), **datasets, **arguments)

    return make


def accuracy(prediction) -> dict[str, float]:
    labels = prediction.label_ids[:, 1:]
    is_right = prediction.predictions[:, :-1] == labels
    return {"accuracy": float(is_right[labels != -100].mean()), "num_rows": float(len(labels))}


@pytest.mark.filterwarnings("ignore:.*return_outputs=True.*:FutureWarning")  # TRL of its own path
def test_compute_metrics_changes_no_other_metric(trainers):
    evaluation = Dataset.from_list(pairs(5, 60))
    shapes = []

    def best(logits, labels):
        shapes.append(logits.shape)
        return logits.argmax(dim=-1)

    arguments = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best}
    own, trl = trainers(evaluation, **arguments)
    found, expected = own.evaluate(), trl.evaluate()
    assert shapes[:2] == shapes[2:] and shapes[0] != shapes[1]
    for name in ("eval_accuracy", "eval_num_rows"):
        assert found[name] == expected[name]
    # TRL's are means over the two batches, of 3 and 2 rows.
    assert found["eval_accuracy"] == pytest.approx(found["eval_mean_token_accuracy"])
    assert found["eval_entropy"] == pytest.approx(expected["eval_entropy"], rel=0.05)
    without = trainers(evaluation)[0].evaluate()
    for name in ("loss", "teacher_forced_match", "mean_token_accuracy", "entropy"):
        assert found[f"eval_{name}"] == without[f"eval_{name}"]
    predicted = own.predict(own.eval_dataset)
    assert predicted.metrics["test_loss"] == found["eval_loss"] and len(predicted.label_ids) == 5


def test_several_data_sets_may_be_held_out(trainers, caplog):
    evaluation = {"a": Dataset.from_list([*pairs(5, 60), {"prompt": "1" * 2000, "completion": "2"}, *pairs(1)])}
    evaluation["b"] = Dataset.from_list(pairs(3, 80))
    with caplog.at_level(logging.WARNING):
        own, trl = trainers(evaluation)
    assert "eval_dataset['a']: 1 of 7 rows dropped" in caplog.text
    metrics = own.evaluate()
    assert {name for name in trl.evaluate() if "loss" in name} == {"eval_a_loss", "eval_b_loss"}
    for name, rows in own.eval_dataset.items():
        losses = [plain_loss(own.model, row["input_ids"], row["labels"]).item() for row in rows]
        assert metrics[f"eval_{name}_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
        assert own.evaluate(evaluation[name])["eval_loss"] == metrics[f"eval_{name}_loss"]
    assert own._fingerprints.keys() == {"train_dataset", "eval_dataset['a']", "eval_dataset['b']"}


def test_overlap_of_held_out_rows_is_said_by_name(model_dir, tmp_path, caplog):
    evaluation = DatasetDict(a=Dataset.from_list(pairs(2, 60)), b=Dataset.from_list(pairs(3)))
    args = BilevelConfig(**PLAIN, output_dir=str(tmp_path))
    rows = {"train_dataset": Dataset.from_list(pairs(4)), "validation_dataset": Dataset.from_list(pairs(2, 95))}
    BilevelTrainer(model_dir, args, **rows, eval_dataset=evaluation)
    (message,) = [r.message for r in caplog.records if "share" in r.message]
    assert message.startswith("eval_dataset['b'] and train_dataset share 3 row(s)")


@pytest.mark.parametrize("is_filtered", [True, False])
def test_rows_whose_loss_is_not_finite_are_left_out_of_the_mean_as_in_trl(bilevel, is_filtered):
    trainer = bilevel(pairs(4), evaluation=pairs(3, 60), **PLAIN_MIXING, logging_nan_inf_filter=is_filtered)
    metrics = trainer._row_metrics(torch.tensor([[1.0, 1, 2, 1, 3], [float("nan"), 0, 2, 1, 3], [4.0, 0, 4, 4, 2]]))
    assert metrics["loss"] == 2.5 if is_filtered else metrics["loss"] != metrics["loss"]
    assert metrics["teacher_forced_match"] == pytest.approx(1 / 3)
    assert (metrics["mean_token_accuracy"], metrics["entropy"]) == (6 / 8, 1.0)


def test_the_weights_at_the_end_are_those_of_the_best_checkpoint(bilevel, tmp_path):
    """Each step takes the model farther away from the held-out rows, whose answers are others: the first is best."""
    trainer = bilevel(
        [*pairs(6), *pairs(6, 50, wrong=True)], pairs(4, 95), [{"prompt": "1=", "completion": "zzzz"}],
        selector="mirror", reference="zero", learning_rate=3e-2, max_steps=3, load_best_model_at_end=True,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    run, name = tmp_path / "run", "row_weights.score_N"
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-1")
    scores = [load_state(run / f"checkpoint-{step}")[0] for step in (1, 3)]
    assert not torch.equal(scores[0][name], scores[1][name])
    written = pq.read_table(run / "weights.parquet")["score"].to_numpy()
    assert written.tolist() == scores[0][name].tolist()


def test_held_out_rows_may_have_other_columns(bilevel):
    evaluation = [row | {"example_id": 5 + i, "weight": 1.0, "note": "x"} for i, row in enumerate(pairs(3))]
    metrics = bilevel(pairs(4), evaluation=evaluation, **PLAIN_MIXING).evaluate()
    expected = bilevel(pairs(4), evaluation=pairs(3), **PLAIN_MIXING).evaluate()
    assert metrics["eval_loss"] == expected["eval_loss"]


def test_evaluation_while_training_does_not_change_the_run(bilevel):
    with_evaluation = bilevel(pairs(8), pairs(4, 95), pairs(5, 60), max_steps=4, eval_strategy="steps", eval_steps=1)
    with_evaluation.train()
    without = bilevel(pairs(8), pairs(4, 95), max_steps=4)
    without.train()
    assert_close(parameters(with_evaluation.model), parameters(without.model), atol=0)
    assert sum("eval_teacher_forced_match" in line for line in with_evaluation.state.log_history) == 4


def test_validation_rows_are_refused_where_they_are_held_out(bilevel):
    with pytest.raises(ValueError, match="share 2 row"):
        bilevel(pairs(8), pairs(4, 95), pairs(2, 95))


def test_a_dataset_that_is_not_text_is_refused(bilevel):
    with pytest.raises(ValueError, match="neither prompt and completion"):
        bilevel([{"question": "a"}], **PLAIN_MIXING)
