"""A step against TRL's own trainer and against gradients row by row; accumulation, evaluation, failures."""

import logging

import pytest
import torch
from conftest import (
    GradientRecorder,
    assert_close,
    lora,
    pairs,
    parameters,
    plain_loss,
    read_jsonl,
    row_gradients,
    weighted_step,
)
from safetensors.torch import load_file

from tamis import NonFiniteLossError
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
    loss, gradients, _ = one_step(bilevel, FORMATS[name], loss_reduction="token", **PLAIN_MIXING, **settings)
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


@pytest.mark.parametrize("settings", [{"scout_ratio": 0.0}, {"scout_ratio": 0.5}, {"reference": "tracked"}])
def test_batch_times_accumulation_is_all_that_counts(bilevel, settings):
    # With `tracked` the excess is the difference of two models: a softer rule keeps its rounding small.
    expected = run_with(bilevel, 8, 1, selector_learning_rate=0.5, **settings)
    assert expected.state.global_step == 4 and expected.weighting.row_weights.table.score_N.std() > 0.05
    for batch_size, accumulation in ((4, 2), (1, 8)):
        actual = run_with(bilevel, batch_size, accumulation, selector_learning_rate=0.5, **settings)
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
    trainer = run_with(bilevel, 4, 1, num_rows=10, scout_ratio=0.0, num_train_epochs=3.0, **settings)
    num_seen = trainer.weighting.row_weights.num_updates_N
    assert num_seen.sum() == (24 if settings.get("dataloader_drop_last") else 30)
    assert num_seen.max() == 3 and trainer.state.epoch == 3
    assert trainer.num_examples(trainer.callback_handler.train_dataloader) == 10


def test_workers_change_nothing(bilevel):
    with_worker = run_with(bilevel, 4, 2, num_rows=12, scout_ratio=0.0, dataloader_num_workers=1)
    assert_close(parameters(with_worker.model), parameters(run_with(bilevel, 4, 2, 12, scout_ratio=0.0).model), atol=0)


def test_global_randomness_is_not_what_picks_the_rows(bilevel):
    first = run_with(bilevel, 4, 1, num_rows=12, seed=1, data_seed=7, scout_ratio=0.0)
    second = run_with(bilevel, 4, 1, num_rows=12, seed=2, data_seed=7, scout_ratio=0.0)
    assert_close(parameters(first.model), parameters(second.model), atol=0)


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
    full = one_step(bilevel, pairs(4), pairs(4, 95), scout_ratio=0.0)[0]
    adapter = one_step(bilevel, pairs(4), pairs(4, 95), scout_ratio=0.0, peft_config=lora())[0]
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
    trainer = bilevel(pairs(8), pairs(4, 95), peft_config=lora(), reference="tracked", max_steps=1)
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
    assert "train_dataset: 1 of 6 rows dropped" in caplog.text and "first: train_dataset, row 3" in caplog.text
    trainer.train()
    assert trainer.weighting.row_weights.num_updates_N[3] == 0 and 3 not in trainer.train_dataset["example_id"]
    with pytest.raises(ValueError, match=r"train_dataset: all 1 rows .* Raise --max_length"):
        bilevel([train[3]], pairs(4, 95), max_length=20)
    with pytest.raises(ValueError, match=r"validation_dataset: all 1 rows .* Raise --max_length"):
        bilevel(pairs(4), [train[3]], max_length=20)


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_step(bilevel, tmp_path, monkeypatch):
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=4, save_strategy="steps", save_steps=1, scout_ratio=0.0)
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
    again = bilevel(pairs(8), pairs(4, 95), max_steps=4, save_strategy="steps", save_steps=1, scout_ratio=0.0)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4


def test_a_model_with_nan_names_its_rows(bilevel):
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=2, scout_ratio=0.0)
    trainer.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"train_dataset, row \d, .*validation_dataset, row \d"):
        trainer.train()


def test_a_reference_that_is_not_finite_does_not_reach_the_model(bilevel):
    trainer = bilevel(pairs(8), pairs(4, 95), max_steps=2, reference="tracked")
    for parameter in trainer.weighting.reference.parameters:
        parameter.data.fill_(float("nan"))
    before = parameters(trainer.model)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert_close(parameters(trainer.model), before, atol=0)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_against_generation(bilevel):
    train = pairs(6)
    evaluation = [*pairs(5), *pairs(2, 40)]
    trainer = bilevel(
        train, evaluation=evaluation, **PLAIN_MIXING, learning_rate=1e-2, max_steps=60, per_device_eval_batch_size=3
    )
    trainer.train()
    metrics = trainer.evaluate()
    losses = [plain_loss(trainer.model, row["input_ids"], row["labels"]).item() for row in trainer.eval_dataset]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / 7, abs=1e-5)
    tokenizer, num_right = trainer.processing_class, 0
    for row in evaluation:
        prompt = tokenizer(row["prompt"], return_tensors="pt")
        out = trainer.model.generate(**prompt, do_sample=False, max_new_tokens=12, pad_token_id=0)
        answer = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=False)
        num_right += answer.replace(" ", "").split("<pad>")[0] == row["completion"] + "<eos>"
    assert 0 < num_right < 7
    assert metrics["eval_teacher_forced_match"] == pytest.approx(num_right / 7)


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
