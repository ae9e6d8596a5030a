"""A scout descends the validation loss alone, measures rows, and leaves the model as it was."""

import logging

import pytest
import torch
from conftest import assert_close, lora, pairs, parameters, tiny_model, tiny_tokenizer
from scouting import RIGHT, TRUSTED, WRONG, losses_one_by_one, scout_of, settings_of

from tamis.config import MAX_SCOUT_EPOCHS, SCOUT_VISITS
from tamis.losses import exchanged, row_losses, trainable_parameters
from tamis.selection import scout as scout_module
from tamis.selection.calibration import fit
from tamis.selection.scout import Finding, descend, put_back, scout_lengths
from tamis.selection.trials import send_scout


def descended(trainer, num_steps=(3,), rate=1e-2, **settings) -> list[int]:
    """Leave the model where a scout of all validation rows ends; the steps at which it paused."""
    settings = settings_of(trainer, **settings)
    ids_V = trainer.batches.validation.ids
    return list(
        descend(trainer.model, trainer.batches, ids_V, settings, learning_rate=rate, num_steps=num_steps, title="")
    )


def sent(trainer, keep=False, **settings):
    """A scout that was chosen and sent, and what came of it."""
    scout = scout_of(trainer, keep)
    rows = (trainer.validation_dataset, trainer.train_dataset)
    return scout, send_scout(scout, trainer.model, *rows, settings_of(trainer, **settings), str)


# --- the model is put back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True, "gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_the_model_is_put_back_bit_for_bit(bilevel, is_lora, keep, settings):
    trainer = bilevel(RIGHT + WRONG, TRUSTED, peft_config=lora() if is_lora else None, **settings)
    before = parameters(trainer.model)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    base = losses_one_by_one(trainer.model, trainer.train_dataset)
    _, outcome = sent(trainer, keep)
    assert_close(parameters(trainer.model), before, atol=0)
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trained
    assert all(p.grad is None for p in trainer.model.parameters())
    assert (outcome.loss_R - base).abs().min() > 1e-4, "but it was elsewhere in between"


def test_put_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    before = parameters(model)
    with pytest.raises(KeyError), put_back(model):
        model.weight.data.zero_()
        model.weight.grad = torch.ones(2, 2)
        raise KeyError
    assert_close(parameters(model), before, atol=0)
    assert model.weight.grad is None


@pytest.mark.parametrize("fails_at", [1, 3, 6])
def test_the_model_is_put_back_when_scouting_fails(bilevel, monkeypatch, fails_at):
    """In a descent, and in a measurement in the middle of one."""
    for name in ("fused_losses", "row_losses"):
        trainer, calls, original = bilevel(RIGHT + WRONG, TRUSTED), [], getattr(scout_module, name)
        before = parameters(trainer.model)

        def failing(*args, original=original, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == fails_at + 2:  # the first two measurements are of the base model
                raise KeyError("gone")
            return original(*args, **kwargs)

        monkeypatch.setattr(scout_module, name, failing)
        with pytest.raises(KeyError, match="gone"):
            sent(trainer)
        monkeypatch.undo()
        assert_close(parameters(trainer.model), before, atol=0)
        assert trainer.model.training and all(p.grad is None for p in trainer.model.parameters())


def test_exchanged_comes_back_after_an_error():
    model = torch.nn.Linear(2, 2)
    before, other = parameters(model), {name: p + 1 for name, p in parameters(model).items()}
    with pytest.raises(KeyError), exchanged(model, other):
        assert_close(parameters(model), {name: p + 1 for name, p in before.items()}, atol=0)
        raise KeyError
    assert_close(parameters(model), before, atol=0)


def test_global_randomness_is_as_it_was(bilevel):
    trainer = bilevel(RIGHT + WRONG, TRUSTED, peft_config=lora(lora_dropout=0.5))
    first = sent(trainer)[1]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = sent(trainer)[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(again.loss_R, first.loss_R), "its dropout follows from its seed alone"


# --- losses and descents ----------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_rows_in_their_order(bilevel):
    # Of different lengths, and not in the order of length
    trainer = bilevel(pairs(7, 95) + pairs(4) + RIGHT, TRUSTED)
    trainer.model.train()
    dataset = trainer.train_dataset
    measured = row_losses(trainer.model, dataset, trainer.data_collator, trainer.accelerator, batch_size=4, title="")
    torch.testing.assert_close(measured, losses_one_by_one(trainer.model, dataset), atol=1e-6, rtol=0)
    assert trainer.model.training
    for keep in (False, True):
        torch.testing.assert_close(scout_of(trainer, keep).base_losses(dataset), measured)


@pytest.mark.parametrize("reduction", ["example", "token"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_descent_is_plain_training_on_the_validation_rows(bilevel, reduction, accumulation):
    trainer = bilevel(RIGHT + WRONG, TRUSTED, loss_reduction=reduction, gradient_accumulation_steps=accumulation)
    before = losses_one_by_one(trainer.model, trainer.train_dataset)
    descended(trainer, num_steps=(2,), batch_size=12 // accumulation)
    alone = bilevel(
        TRUSTED,
        selector="none",
        rho=0.0,
        loss_reduction=reduction,
        optim="adamw_torch",
        max_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=12,
    )
    alone.train()
    assert_close(parameters(trainer.model), parameters(alone.model), atol=1e-5)
    assert (before - losses_one_by_one(trainer.model, trainer.train_dataset))[:12].min() > 0.05


def test_a_descent_pauses_on_its_way_and_goes_on_as_if_it_had_not(bilevel):
    ends = []
    for num_steps in ((2, 5), (5,)):
        trainer = bilevel(RIGHT + WRONG, TRUSTED)
        assert descended(trainer, num_steps) == list(num_steps)
        ends.append(parameters(trainer.model))
    assert_close(ends[0], ends[1], atol=0)


def test_the_scout_takes_the_loss_reduction_of_the_run(bilevel):
    losses = [sent(bilevel(RIGHT, TRUSTED, loss_reduction=name))[1].loss_R for name in ("example", "token")]
    assert (losses[0] - losses[1]).abs().max() > 1e-3


@pytest.mark.parametrize("rate", [2e-5, 2e-6])
def test_a_scout_in_bf16_goes_where_one_in_float32_goes(bilevel, rate):
    """A gentle step is below the rounding of bf16: it is taken in float32."""
    scouts = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(tiny_tokenizer()).to(torch.bfloat16).to(dtype)  # the same numbers in both
        trainer = bilevel(RIGHT + WRONG, TRUSTED, model=model, processing_class=tiny_tokenizer())
        before = trainable_parameters(trainer.model)
        with put_back(trainer.model):
            descended(trainer, num_steps=(40,), rate=rate, batch_size=8)
            after = trainable_parameters(trainer.model)
        assert {p.dtype for p in after.values()} == {dtype}
        scouts.append(torch.cat([(after[n].float() - before[n].float()).flatten() for n in before]))
        assert_close(trainable_parameters(trainer.model), before, atol=0)
    expected, actual = scouts
    similarity = torch.nn.functional.cosine_similarity(expected, actual, dim=0).item()
    assert similarity > 0.5 and actual.norm() > 0.5 * expected.norm()


@pytest.mark.parametrize(
    ("num_validation", "rows_per_step", "num_epochs", "expected"),
    [
        (50, 8, None, (62, 125, 250)),  # 2000 rows are 40 passes
        (10, 8, None, (12, 25, 50)),  # 40 passes are 400 rows
        (1000, 8, None, (62, 125, 250)),
        (4, 512, None, (1,)),
        (4, 64, None, (1, 2)),
        (50, 8, 2.0, (12,)),
        (50, 8, 0.5, (3,)),
        (4, 64, 0.1, (1,)),
    ],
)
def test_lengths_of_scouts(num_validation, rows_per_step, num_epochs, expected):
    assert (SCOUT_VISITS, MAX_SCOUT_EPOCHS) == (2000, 40)
    assert scout_lengths(num_validation, rows_per_step, num_epochs) == expected


# --- a scout that is kept ---------------------------------------------------------------------------------------------


def test_a_kept_scout_scores_rows_as_it_did_before_training(bilevel):
    """Whatever has become of the model since; and by the base model too, where the scores are over its losses."""
    for coefficient in (0.0, 1.0):
        trainer = bilevel(RIGHT + WRONG, TRUSTED)
        scout, outcome = sent(trainer, keep=True)
        base = scout.base_losses(trainer.train_dataset)
        score_R = outcome.loss_R.double() - coefficient * base.double()
        calibration = fit(score_R.numpy(), score_R[:8].numpy())
        scout.finding = Finding(1e-2, 6, coefficient, calibration, 0.9)
        for parameter in trainer.model.parameters():
            parameter.data.add_(0.1)
        moved = parameters(trainer.model)
        expected = torch.from_numpy(calibration.p_right(score_R.numpy())).float()
        torch.testing.assert_close(scout.p_right(trainer.train_dataset), expected, atol=0, rtol=0)
        torch.testing.assert_close(scout.base_losses(trainer.train_dataset), base, atol=0, rtol=0)
        assert_close(parameters(trainer.model), moved, atol=0)


def test_two_copies_at_most(bilevel, monkeypatch):
    """Of the trainable parameters, on the CPU: those of the base model are not copied anew for every descent."""
    trainer, copies = bilevel(RIGHT, TRUSTED), []
    monkeypatch.setattr(scout_module, "trainable_parameters", lambda m: copies.append(1) or trainable_parameters(m))
    monkeypatch.setattr("tamis.selection.trials.trainable_parameters", scout_module.trainable_parameters)
    scout, _ = sent(trainer, keep=True)
    scout.p_right(trainer.train_dataset)
    scout.base_losses(trainer.train_dataset)
    assert len(copies) == 2
    assert scout.parameters.keys() == scout.base_parameters.keys() == trainable_parameters(trainer.model).keys()


def test_a_scout_comes_back_from_its_file(bilevel, tmp_path):
    trainer = bilevel(WRONG + RIGHT, TRUSTED)
    first, second = sent(trainer, keep=True)[0], scout_of(trainer, keep=True)
    first.save(tmp_path / "scout.safetensors")
    second.load(tmp_path / "scout.safetensors")
    assert second.finding == first.finding
    assert_close(second.parameters, first.parameters, atol=0)
    assert torch.equal(second.p_right(trainer.train_dataset), first.p_right(trainer.train_dataset))


def test_a_finding_without_an_area_comes_back_too():
    calibration = fit(torch.arange(30.0).numpy(), torch.arange(8.0).numpy(), interval_seed=0)
    again = Finding.from_json(Finding(1e-3, 5, 1.0, calibration, float("nan")).to_json())
    assert again.expected_auroc != again.expected_auroc and again.calibration == calibration
    assert (again.learning_rate, again.num_steps, again.base_coefficient) == (1e-3, 5, 1.0)


# --- in a run ---------------------------------------------------------------------------------------------------------


def p_right_of(trainer) -> torch.Tensor:
    return trainer.weighting.row_weights.p_right_N()


@pytest.mark.parametrize("settings", [{}, {"rho": 0.0}, {"loss_reduction": "token"}, {"peft_config": True}])
def test_wrong_rows_end_below_right_ones(bilevel, settings):
    """Also with rho 0: the trusted rows choose, but are not trained on."""
    settings = dict(settings)
    if settings.pop("peft_config", False):
        settings |= {"peft_config": lora(), "scout_epochs": 20}
    trainer = bilevel(WRONG + RIGHT, TRUSTED, max_steps=4, **settings)
    trainer.train()
    p_right = p_right_of(trainer)
    assert p_right[:12].max() < 0.5 < p_right[12:].min()
    weights = trainer.weighting.row_weights.all_weights()
    assert weights[:12].max() < 0.1 and weights[12:].min() > 1


def test_weights_do_not_move_while_training(bilevel):
    trainer = bilevel(WRONG + RIGHT, TRUSTED, max_steps=6, learning_rate=1e-2)
    row_weights, scores = trainer.weighting.row_weights, []
    commit = trainer.weighting.commit
    trainer.weighting.commit = lambda rate: scores.append(row_weights.all_scores()) or commit(rate)
    trainer.train()
    assert len(scores) == 6 and scores[0].std() > 0.1
    assert torch.equal(row_weights.all_scores(), scores[0])


@pytest.mark.parametrize("is_lora", [False, True])
@pytest.mark.parametrize("settings", [{"scout_learning_rate": 1e-30}, {"scout_learning_rate": 1e-30, "rho": 0.3}])
def test_a_scout_that_goes_nowhere_leaves_no_trace(bilevel, is_lora, settings):
    """With a step size that is lost in float32 no row differs from another: the run is that of direct mixing."""
    peft_config = (lambda: lora(lora_dropout=0.3)) if is_lora else lambda: None
    common = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    rows = (WRONG + RIGHT, [*WRONG[:2], *RIGHT[:2], *TRUSTED[:2]], pairs(5, 60))  # no two kinds
    scouted = bilevel(*rows, peft_config=peft_config(), **common, **settings)
    scouted.train()
    rho = settings.get("rho", 0.2)  # by default one validation row beside four training rows, each a fifth
    assert scouted.current_rho() == rho
    assert not scouted.weighting.scouting.outcome.finding.calibration.is_believed
    if "rho" not in settings:
        common["per_device_validation_batch_size"] = 1  # six validation rows beside 24, in batches of four
    mixed = bilevel(*rows, selector="none", rho=rho, peft_config=peft_config(), **common)
    mixed.train()
    assert scouted.weighting.row_weights.all_weights().tolist() == [1.0] * 24 and p_right_of(scouted).isnan().all()
    assert_close(parameters(scouted.model), parameters(mixed.model), atol=0)
    names = ("eval_loss", "eval_teacher_forced_match", "loss", "grad_norm", "learning_rate", "rho")
    for a, b in zip(scouted.state.log_history, mixed.state.log_history, strict=True):
        assert {n: a[n] for n in names if n in a} == {n: b[n] for n in names if n in b}
    num_seen = [trainer.weighting.row_weights.num_updates_N for trainer in (scouted, mixed)]
    assert torch.equal(*num_seen)


def test_right_rows_alone_leave_all_weights_at_one(bilevel, caplog):
    """They are as the unseen validation rows are, whatever the scout has learned."""
    rows = [{"prompt": f"{i}=", "completion": "a" * (1 + i % 3)} for i in range(20, 60)]
    trainer = bilevel(rows[::2], rows[1::2], max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.weighting.row_weights.all_weights().tolist() == [1.0] * 20
    assert "it decides nothing, all weights are one" in caplog.text


@pytest.mark.parametrize("num_validation", [1, 3])
def test_too_few_validation_rows_weigh_all_rows_alike(bilevel, caplog, num_validation):
    trainer = bilevel(WRONG + RIGHT, TRUSTED[:num_validation], max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    warnings = [record.message for record in caplog.records if "too few" in record.message]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{num_validation} validation rows are too few") and "at least 4" in warnings[0]
    assert trainer.weighting.row_weights.all_weights().tolist() == [1.0] * 24
    assert p_right_of(trainer).isnan().all() and trainer.current_rho() == 0.2
    settings = {"selector": "none", "rho": 0.2, "per_device_validation_batch_size": 1}
    mixed = bilevel(WRONG + RIGHT, TRUSTED[:num_validation], max_steps=3, **settings)
    mixed.train()
    assert_close(parameters(trainer.model), parameters(mixed.model), atol=0)


def test_four_validation_rows_are_enough(bilevel, caplog):
    trainer = bilevel(WRONG + RIGHT, TRUSTED[:4], max_steps=2)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "too few" not in caplog.text and trainer.weighting.scouting.outcome is not None


def test_dropout_after_scouting_does_not_depend_on_the_scout(bilevel):
    finals = []
    for epochs in (2, 8):
        settings = {"scout_epochs": epochs, "scout_learning_rate": 1e-30, "max_steps": 4}
        trainer = bilevel(RIGHT + WRONG, TRUSTED, peft_config=lora(lora_dropout=0.3), **settings)
        trainer.train()
        finals.append(parameters(trainer.model))
    assert_close(finals[1], finals[0], atol=0)


def test_a_cloned_chat_template_stays_as_it_is(bilevel, tmp_path):
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
    )
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = parameters(trainer.model)
    trainer.train()
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == trained
    moved = {name for name, p in parameters(trainer.model).items() if not torch.equal(p, before[name])}
    assert moved and moved <= trained
