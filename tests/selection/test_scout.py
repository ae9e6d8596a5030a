"""Scouting scores every row and leaves the model as it was."""

import logging

import pytest
import torch
from conftest import assert_close, lora, pairs, parameters, plain_loss, tiny_model, tiny_tokenizer

from tamis.losses import row_losses
from tamis.randomness import permutation
from tamis.selection.scout import (
    Scout,
    ScoutSettings,
    compare_excess,
    descend,
    exchanged,
    put_back,
    trainable_parameters,
)

RIGHT = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(12)]
WRONG = [{"prompt": f"{i}=", "completion": "b" * (1 + i % 3)} for i in range(12)]
TRUSTED = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(20, 26)]


def scout_of(trainer, reference="base", keep=False) -> Scout:
    return Scout(trainer.model, trainer.batches, reference, batch_size=8, keep=keep, show_progress=False)


def settings_of(trainer, **settings) -> ScoutSettings:
    defaults = {
        "num_steps": 3,
        "learning_rate": 1e-2,
        "betas": (0.9, 0.999),
        "epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "batch_size": 4,
        "num_micro_batches": trainer.args.gradient_accumulation_steps,
        "seed": 0,
    }
    return ScoutSettings(**defaults | settings)


def score(trainer, *, reference="base", **settings):
    """Losses of the training rows by a scout, and by the reference."""
    scout, settings = scout_of(trainer, reference), settings_of(trainer, **settings)
    return scout.score(trainer.model, trainer.validation_dataset, trainer.train_dataset, settings)


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


@pytest.mark.parametrize("reduction", ["example", "token"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_descent_is_plain_training_on_the_validation_rows(bilevel, reduction, accumulation):
    trainer = bilevel(RIGHT + WRONG, TRUSTED, loss_reduction=reduction, gradient_accumulation_steps=accumulation)
    loss_N, reference_N = score(trainer, num_steps=2, batch_size=6 // accumulation)
    alone = bilevel(
        TRUSTED,
        selector="none",
        rho=0.0,
        loss_reduction=reduction,
        optim="adamw_torch",
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=6,
    )
    alone.train()
    rows = trainer.train_dataset
    expected = torch.stack([plain_loss(alone.model, row["input_ids"], row["labels"]) for row in rows]).detach()
    torch.testing.assert_close(loss_N, expected, atol=1e-4, rtol=0)
    assert (reference_N - loss_N)[:12].min() > 0.1


def test_the_scout_takes_the_loss_reduction_of_the_run(bilevel):
    losses = [score(bilevel(RIGHT, TRUSTED, loss_reduction=name))[0] for name in ("example", "token")]
    assert (losses[0] - losses[1]).abs().max() > 1e-3


def test_a_cloned_chat_template_stays_as_it_is(bilevel, model_dir, tmp_path):
    """TRL clones the template with every `SFTTrainer` that is made: a second one made the base embedding trainable."""
    other = tiny_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    other.save_pretrained(tmp_path / "template")
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in RIGHT + TRUSTED
    ]
    trainer = bilevel(
        rows[:12],
        rows[12:],
        peft_config=lora(modules_to_save=["lm_head"]),
        chat_template_path=str(tmp_path / "template"),
        max_steps=4,
        scout_ratio=1.0,
        scout_learning_rate=1e-2,
    )
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = parameters(trainer.model)
    trainer.train()
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trained
    moved = {name for name, p in parameters(trainer.model).items() if not torch.equal(p, before[name])}
    assert moved and moved <= trained


@pytest.mark.parametrize("rate", [2e-5, 2e-6])
def test_a_scout_in_bf16_goes_where_one_in_float32_goes(bilevel, model_dir, rate):
    """A gentle step is below the rounding of bf16: it is taken in float32."""
    scouts = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(tiny_tokenizer()).to(torch.bfloat16).to(dtype)  # the same numbers in both
        trainer = bilevel(RIGHT + WRONG, TRUSTED, model=model, processing_class=tiny_tokenizer())
        before = trainable_parameters(trainer.model)
        scout = scout_of(trainer, keep=True)
        scout.score(
            trainer.model,
            trainer.validation_dataset,
            trainer.train_dataset,
            settings_of(trainer, num_steps=40, learning_rate=rate, batch_size=6),
        )
        scouts.append(torch.cat([(scout.parameters[n].float() - before[n].float()).flatten() for n in before]))
        assert_close(trainable_parameters(trainer.model), before, atol=0)
    expected, actual = scouts
    similarity = torch.nn.functional.cosine_similarity(expected, actual, dim=0).item()
    assert similarity > 0.5 and actual.norm() > 0.5 * expected.norm()


def test_a_scout_that_learns_nothing_of_unseen_rows_is_not_believed(bilevel, caplog):
    """Validation rows that have nothing in common: what is learned of one half says nothing of the other."""
    noise = [{"prompt": f"{i}=", "completion": "qwertyuiopasdfghjklzxcvb"[3 * (i % 8) :][:3]} for i in range(8)]
    trainer = bilevel(WRONG + RIGHT, noise, max_steps=40, scout_ratio=1.0, scout_learning_rate=3e-2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    evidence = trainer.weighting.evidence
    assert evidence.criterion - 0.5 <= evidence.error
    assert "not believed and all weights stay at one" in caplog.text
    assert trainer.weighting.row_weights.is_settled
    assert trainer.weighting.row_weights.all_weights().tolist() == [1.0] * 24


def test_a_scout_that_learns_is_believed(bilevel, caplog):
    trainer = bilevel(WRONG + RIGHT, TRUSTED, max_steps=8, scout_ratio=1.0, scout_learning_rate=1e-2)
    trainer.train()
    evidence = trainer.weighting.evidence
    assert evidence.criterion - 0.5 > 2 * evidence.error > 0 and "not believed" not in caplog.text


def test_right_rows_alone_leave_all_weights_at_one(bilevel):
    """They are as the unseen validation rows are: the criterion is one half, whatever the scout has learned."""
    rows = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(20, 60)]
    trainer = bilevel(rows[::2], rows[1::2], max_steps=8, scout_ratio=1.0, scout_learning_rate=1e-2)
    trainer.train()
    assert trainer.weighting.row_weights.all_weights().tolist() == [1.0] * 20


def test_the_evidence_is_measured_on_rows_that_were_not_seen(bilevel):
    """By hand: train on one half, compare the other half with the training rows, both ways."""
    trainer = bilevel(WRONG[:5] + RIGHT[:6], TRUSTED)
    scout, settings = scout_of(trainer), settings_of(trainer, num_steps=4, batch_size=3)
    scout.score(trainer.model, trainer.validation_dataset, trainer.train_dataset, settings)
    ids_V, losses = torch.tensor(trainer.validation_dataset["example_id"]), {}
    halves = permutation(6, settings.seed, epoch=0, level=1).tensor_split(2)
    wins = []
    for seen, unseen in (halves, halves[::-1]):
        assert not set(seen.tolist()) & set(unseen.tolist())
        for when in ("before", "after"):
            with put_back(trainer.model):
                if when == "after":
                    descend(trainer.model, trainer.batches, ids_V[seen], settings, num_steps=2, title="")
                trainer.model.eval()
                for name, rows in (("train", trainer.train_dataset), ("validation", trainer.validation_dataset)):
                    losses[when, name] = [plain_loss(trainer.model, r["input_ids"], r["labels"]).item() for r in rows]
        excess = {
            n: torch.tensor(losses["after", n]) - torch.tensor(losses["before", n]) for n in ("train", "validation")
        }
        wins += [(excess["train"] > excess["validation"][i]).double().mean().item() for i in unseen]
    assert 0.5 < scout.evidence.criterion == pytest.approx(sum(wins) / 6, abs=1e-6)


def test_the_error_is_that_of_repeated_draws():
    """Two Gaussians a standard deviation apart: the area is known, and so is how much it varies."""
    generator = torch.Generator().manual_seed(0)
    areas, errors = [], []
    for _ in range(300):
        unseen_V, training_R = torch.randn(40, generator=generator), torch.randn(60, generator=generator) + 1
        lower_V, higher_R = compare_excess(unseen_V, training_R)
        assert lower_V.mean().item() == pytest.approx(higher_R.mean().item())
        areas.append(lower_V.mean().item())
        errors.append((lower_V.var() / 40 + higher_R.var() / 60).sqrt().item())
    areas = torch.tensor(areas)
    assert areas.mean().item() == pytest.approx(0.760, abs=0.01)
    assert sum(errors) / 300 == pytest.approx(areas.std().item(), rel=0.1)


def test_two_copies_at_most(bilevel, monkeypatch):
    """Of the trainable parameters, on the CPU; exchanged with the model's where rows are scored along the run."""
    trainer = bilevel(RIGHT, TRUSTED)
    scout = scout_of(trainer, keep=True)
    copies = []
    monkeypatch.setattr(
        "tamis.selection.scout.trainable_parameters", lambda m: copies.append(1) or trainable_parameters(m)
    )
    scout.score(trainer.model, trainer.validation_dataset, trainer.train_dataset, settings_of(trainer))
    assert len(copies) == 1, "beside the one that was made with the scout"
    losses = scout.losses(trainer.train_dataset)
    before = parameters(trainer.model)
    for parameter in trainer.model.parameters():
        parameter.data.add_(0.1)
    moved = parameters(trainer.model)
    torch.testing.assert_close(scout.losses(trainer.train_dataset), losses, atol=0, rtol=0)
    reference = scout.reference_losses(trainer.train_dataset)
    assert_close(parameters(trainer.model), moved, atol=0)
    for name, parameter in trainer.model.named_parameters():
        parameter.data.copy_(before[name])
    torch.testing.assert_close(scout.reference_losses(trainer.train_dataset), reference, atol=0, rtol=0)
    assert len(copies) == 1


def test_exchanged_comes_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    before, other = parameters(model), {name: p + 1 for name, p in parameters(model).items()}
    with pytest.raises(KeyError), exchanged(model, other):
        assert_close(parameters(model), {name: p + 1 for name, p in before.items()}, atol=0)
        raise KeyError
    assert_close(parameters(model), before, atol=0)


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
