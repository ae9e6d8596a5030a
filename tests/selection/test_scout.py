"""Scouting scores every row and leaves the model as it was."""

import pytest
import torch
from conftest import assert_close, lora, pairs, parameters, plain_loss
from trl import SFTConfig

from tamis.selection.scout import Scout, put_back, row_losses

RIGHT = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(12)]
WRONG = [{"prompt": f"{i}=", "completion": "b" * (1 + i % 3)} for i in range(12)]
TRUSTED = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(20, 26)]


def scout_of(trainer, reference="base") -> Scout:
    return Scout(
        trainer.model,
        trainer.args,
        trainer.data_collator,
        trainer.accelerator,
        trainer.processing_class,
        reference,
    )


def score(trainer, *, reference="base", num_steps=3, learning_rate=1e-2, batch_size=4):
    scout = scout_of(trainer, reference)
    scout.descend(trainer.validation_dataset, num_steps=num_steps, learning_rate=learning_rate, batch_size=batch_size)
    return scout.losses(trainer.train_dataset), scout.reference_losses(trainer.train_dataset)


def losses_one_by_one(trainer) -> torch.Tensor:
    return torch.stack(
        [plain_loss(trainer.model, row["input_ids"], row["labels"]) for row in trainer.train_dataset]
    ).detach()


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("is_lora", [False, True])
def test_the_model_is_put_back_bit_for_bit(bilevel, is_lora, settings):
    trainer = bilevel(RIGHT + WRONG, TRUSTED, peft_config=lora() if is_lora else None, **settings)
    before = parameters(trainer.model)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    loss_N, reference_N = score(trainer)
    assert_close(parameters(trainer.model), before, atol=0)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in trainer.model.parameters())
    assert (loss_N != reference_N).all(), "but it was elsewhere in between"


def test_put_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    before = parameters(model)
    with pytest.raises(KeyError), put_back(model):
        model.weight.data.zero_()
        raise KeyError
    assert_close(parameters(model), before, atol=0)


def test_losses_are_those_of_the_rows_in_their_order(bilevel):
    # Of different lengths, and not in the order of length
    trainer = bilevel(pairs(7, 95) + pairs(4) + RIGHT, TRUSTED)
    trainer.model.train()
    dataset = trainer.train_dataset
    measured = row_losses(trainer.model, dataset, trainer.data_collator, trainer.accelerator, batch_size=4, title="")
    torch.testing.assert_close(measured, losses_one_by_one(trainer), atol=1e-6, rtol=0)
    assert trainer.model.training
    _, reference_N = score(trainer, num_steps=1)
    torch.testing.assert_close(reference_N, measured)
    assert score(trainer, reference="zero", num_steps=1)[1].tolist() == [0] * len(dataset)


def test_measured_after_the_descent_of_the_validation_loss(bilevel):
    """What the scout measures is what plain training on the validation rows, with the same settings, would give."""
    trainer = bilevel(RIGHT + WRONG, TRUSTED, optim="sgd")
    loss_N, reference_N = score(trainer, num_steps=2, learning_rate=0.05, batch_size=6)
    alone = bilevel(
        TRUSTED,
        selector="none",
        rho=0.0,
        loss_reduction="token",
        optim="sgd",
        max_steps=2,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        per_device_train_batch_size=6,
    )
    alone.train()
    rows = trainer.train_dataset
    expected = torch.stack([plain_loss(alone.model, row["input_ids"], row["labels"]) for row in rows]).detach()
    torch.testing.assert_close(loss_N, expected, atol=1e-5, rtol=0)
    assert (reference_N - loss_N)[:12].min() > 0.1


@pytest.mark.parametrize("reference", ["base", "zero"])
def test_wrong_rows_end_below_right_ones(bilevel, reference):
    trainer = bilevel(
        WRONG + RIGHT, TRUSTED, reference=reference, max_steps=8, scout_learning_rate=1e-2, scout_ratio=0.5
    )
    trainer.train()
    scores = trainer.weighting.row_weights.table.score_N
    assert scores[:12].max() < scores[12:].min()
    weights = trainer.weighting.row_weights.all_weights()
    assert weights[:12].max() < 0.5 < 1 < weights[12:].min()
    assert trainer.weighting.row_weights.is_settled


def test_scores_do_not_move_while_training(bilevel):
    trainer = bilevel(WRONG + RIGHT, TRUSTED, max_steps=6, learning_rate=1e-2)
    row_weights, scores = trainer.weighting.row_weights, []
    commit = trainer.weighting.commit
    trainer.weighting.commit = lambda rate: scores.append(row_weights.all_scores()) or commit(rate)
    trainer.train()
    assert len(scores) == 6 and scores[0].std() > 0.1
    assert torch.equal(row_weights.all_scores(), scores[0])


@pytest.mark.parametrize("is_lora", [False, True])
def test_a_scout_that_goes_nowhere_leaves_no_trace(bilevel, is_lora):
    """With a step size that is lost in float32 all weights are one, and the run is that of direct mixing."""
    peft_config = lora if is_lora else lambda: None
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    scouted = bilevel(
        RIGHT + WRONG, TRUSTED, pairs(5), scout_learning_rate=1e-30, peft_config=peft_config(), **settings
    )
    scouted.train()
    mixed = bilevel(RIGHT + WRONG, TRUSTED, pairs(5), selector="none", peft_config=peft_config(), **settings)
    mixed.train()
    assert torch.equal(scouted.weighting.row_weights.all_weights(), torch.ones(24))
    assert_close(parameters(scouted.model), parameters(mixed.model), atol=0)
    names = ("eval_loss", "eval_teacher_forced_match", "loss", "grad_norm", "learning_rate")
    for a, b in zip(scouted.state.log_history, mixed.state.log_history, strict=True):
        assert {n: a[n] for n in names if n in a} == {n: b[n] for n in names if n in b}


def test_dropout_after_scouting_does_not_depend_on_the_scout(bilevel):
    finals = []
    for ratio in (0.25, 1.0):
        peft_config = lora(lora_dropout=0.3)
        settings = {"scout_ratio": ratio, "scout_learning_rate": 1e-30, "max_steps": 4}
        trainer = bilevel(RIGHT + WRONG, TRUSTED, peft_config=peft_config, **settings)
        trainer.train()
        finals.append(parameters(trainer.model))
    assert_close(finals[1], finals[0], atol=0)


def test_scouting_alone_is_reason_enough_for_validation_rows(bilevel):
    """rho 0: the trusted rows choose, but are not trained on."""
    trainer = bilevel(WRONG + RIGHT, TRUSTED, rho=0.0, max_steps=4, scout_learning_rate=1e-2)
    trainer.train()
    assert (
        trainer.weighting.row_weights.table.score_N[:12].max() < trainer.weighting.row_weights.table.score_N[12:].min()
    )


def test_settings_of_the_run_are_left_as_they_are(bilevel):
    trainer = bilevel(RIGHT + WRONG, TRUSTED, eval_strategy="no", save_strategy="steps", save_steps=100)
    before = dict(vars(trainer.args))
    score(trainer, num_steps=1)
    assert isinstance(trainer.args, SFTConfig) and dict(vars(trainer.args)) == before
