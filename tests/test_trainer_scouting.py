"""Whole runs with the default selector: rows are visited as often as they weigh, and rho follows from their weights."""

import logging
from collections import Counter

import pytest
import torch
from conftest import (
    GradientRecorder,
    assert_close,
    pairs,
    parameters,
    plain_loss,
    read_jsonl,
    row_gradients,
    two_kinds,
    worth,
)

from tamis import NonFiniteLossError
from tamis.stream import drawn_rows

RIGHT, WRONG, TRUSTED = two_kinds()
MORE_TRUSTED = two_kinds(num_rows=24)[2]  # of 12 rows some kinds of responses are too many by chance
TRAIN = [*RIGHT[:8], *WRONG[:8]]  # 4 steps of 4 make an epoch


def rows_of_steps(trainer) -> list[list[int]]:
    """Filled while training: the training rows of each step, in order."""
    ids, collate = [], trainer.batches.collate

    def spy(batches):
        if batches[0].training_ids:  # not a scout's
            ids.append([i for batch in batches for i in batch.training_ids])
        return collate(batches)

    trainer.batches.collate = spy
    return ids


# --- visits -----------------------------------------------------------------------------------------------------------


def test_rows_are_visited_as_often_as_they_weigh(bilevel):
    trainer = bilevel(TRAIN, MORE_TRUSTED, num_train_epochs=3)
    steps = rows_of_steps(trainer)
    trainer.train()
    weights, num_updates = trainer.weighting.row_weights.all_weights(), trainer.weighting.row_weights.num_updates_N
    assert weights[8:].max() < 0.01 and weights[:8].min() > 1
    assert len(steps) == trainer.state.global_step == 12 and trainer.state.epoch == 3
    for epoch in range(3):
        visited = Counter(i for step in steps[4 * epoch : 4 * epoch + 4] for i in step)
        assert visited == Counter(drawn_rows(weights, trainer.args.seed, epoch).tolist())
        assert sum(visited.values()) == 16 and not set(visited) & set(range(8, 16))
    assert num_updates.tolist() == [sum(step.count(i) for step in steps) for i in range(16)]


def test_a_visit_is_a_row_of_the_mean_and_no_more(bilevel):
    """The gradient of a step by hand: a row that is in it twice counts twice, with no weight beside."""
    recorder = GradientRecorder()
    settings = {"max_steps": 3, "learning_rate": 0.0, "max_grad_norm": 0.0, "rho": 0.25}
    trainer = bilevel(TRAIN, TRUSTED, callbacks=[recorder], **settings)
    steps, validation, collate = rows_of_steps(trainer), [], trainer.batches.collate
    trainer.batches.collate = lambda batches: validation.append(batches[0].validation_ids) or collate(batches)
    trainer.train()
    assert any(len(set(step)) < len(step) for step in steps)
    for gradients, rows, trusted in zip(recorder.steps, steps, validation[-3:], strict=True):
        expected = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
        for dataset, ids, level in ((trainer.train_dataset, rows, 0.75), (trainer.validation_dataset, trusted, 0.25)):
            for i in ids:
                for name, gradient in row_gradients(trainer.model, dataset[i]).items():
                    expected[name] += level / 4 * gradient
        assert_close(gradients, expected, atol=2e-6)


def test_batch_times_accumulation_is_all_that_counts(bilevel):
    runs = []
    for batch_size, accumulation in ((8, 1), (4, 2), (1, 8)):
        settings = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        trainer = bilevel(TRAIN, TRUSTED, num_train_epochs=2, optim="sgd", learning_rate=0.1, **settings)
        trainer.train()
        runs.append(trainer)
    expected = runs[0]
    assert expected.state.global_step == 4 and expected.weighting.row_weights.all_weights().std() > 0.5
    for trainer in runs[1:]:
        weights, others = trainer.weighting.row_weights, expected.weighting.row_weights
        assert torch.equal(weights.num_updates_N, others.num_updates_N)
        torch.testing.assert_close(weights.p_right_N(), others.p_right_N(), atol=1e-3, rtol=0)
        assert trainer.current_rho() == pytest.approx(expected.current_rho(), abs=1e-4)
        assert_close(parameters(trainer.model), parameters(expected.model), atol=2e-5)


@pytest.mark.parametrize("settings", [{"dataloader_num_workers": 1}, {"dataloader_drop_last": True}])
def test_settings_of_the_loader_change_no_visit(bilevel, settings):
    runs = []
    for given in ({}, settings):
        trainer = bilevel(TRAIN, TRUSTED, num_train_epochs=2, **given)
        trainer.train()
        runs.append(trainer)
    assert_close(parameters(runs[1].model), parameters(runs[0].model), atol=0)
    assert torch.equal(*(trainer.weighting.row_weights.num_updates_N for trainer in runs))


def test_rows_that_are_left_out_do_not_shift_the_others(bilevel):
    """Places among the prepared rows are not places in the file."""
    too_long = {"prompt": "1" * 60, "completion": "2"}
    trainer = bilevel([too_long, *WRONG[:8], too_long, *RIGHT[:8]], TRUSTED, max_length=20, max_steps=8)
    trainer.train()
    num_updates = trainer.weighting.row_weights.num_updates_N
    assert num_updates[:10].tolist() == [0] * 10 and num_updates[10:].sum() == 32
    visits = trainer.weighting.visits()
    assert len(visits) == 16 and visits[:8].max() < 0.01
    torch.testing.assert_close(visits.mean(), torch.tensor(1.0))


# --- the share of the validation loss ---------------------------------------------------------------------------------


def test_rho_counts_a_validation_row_as_a_row_that_is_surely_right(bilevel, tmp_path):
    trainer = bilevel(TRAIN, MORE_TRUSTED, max_steps=2)
    trainer.train()
    p_right = trainer.weighting.row_weights.p_right_N()
    num_useful = worth(p_right).sum().item()
    assert 6 < num_useful < 8.001, "eight rows are right"
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "rho" in line]
    assert [line["rho"] for line in lines] == pytest.approx([24 / (24 + num_useful)] * len(lines), abs=1e-6)
    first = lines[0]
    expected = first["rho"] * first["validation_loss"] + (1 - first["rho"]) * first["training_loss"]
    assert first["loss"] == pytest.approx(expected, abs=1e-5)
    assert first["weighted_training_loss"] == first["training_loss"], "the weight is in the visits"


def test_rho_that_is_given_wins(bilevel, tmp_path):
    trainer = bilevel(TRAIN, TRUSTED, max_steps=4, rho=0.1, rho_start=0.9, rho_decay_ratio=0.5)
    trainer.train()
    assert trainer.weighting.row_weights.is_known
    lines = [line for line in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "validation_loss" in line]
    rhos = [0.9, 0.5, 0.1, 0.1]
    for line, rho in zip(lines, rhos, strict=True):
        assert line["loss"] == pytest.approx(
            rho * line["validation_loss"] + (1 - rho) * line["training_loss"], abs=1e-5
        )


def test_where_no_row_is_right_only_the_validation_rows_are_trained_on(bilevel):
    """Whatever rows a step holds beside them."""
    trainer = bilevel(WRONG, TRUSTED, max_steps=4)
    begin = trainer.weighting.begin

    def begin_without_hope(*args):
        begin(*args)
        trainer.weighting.row_weights.settle(torch.arange(12), torch.zeros(12))

    trainer.weighting.begin = begin_without_hope
    trainer.train()
    assert trainer.current_rho() == pytest.approx(1, abs=1e-12)
    alone = bilevel(WRONG, TRUSTED, selector="none", rho=1.0, max_steps=4)
    alone.train()
    assert_close(parameters(trainer.model), parameters(alone.model), atol=1e-7)


# --- failures and words -----------------------------------------------------------------------------------------------


def test_a_model_with_nan_names_its_rows(bilevel):
    trainer = bilevel(TRAIN, TRUSTED, max_steps=2)
    trainer.model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"train_dataset, row 0, train_dataset, row 1, .*\.\.\."):
        trainer.train()


def test_a_rate_at_which_scouts_diverge_is_said(bilevel):
    trainer = bilevel(TRAIN, TRUSTED, max_steps=2, scout_learning_rate=1e30)
    before = parameters(trainer.model)
    with pytest.raises(ValueError, match=r"scouting at learning rates 1e\+30 .* lower `scout_learning_rate`"):
        trainer.train()
    assert_close(parameters(trainer.model), before, atol=0)


def test_what_scouting_has_come_to_is_said(bilevel, caplog):
    with caplog.at_level(logging.INFO, logger="tamis"):
        bilevel(TRAIN, TRUSTED, max_steps=1).train()
    said = [record.message for record in caplog.records if record.name == "tamis.scouting"]
    assert len(said) == 2 and said[0].startswith("scout: learning rate 0.01, 24 steps") and "are right" in said[1]


def test_scores_are_of_the_model_before_training(bilevel):
    """`last_loss` of a row that is not visited is the scout's."""
    trainer = bilevel(TRAIN, TRUSTED, max_steps=2)
    base = [plain_loss(trainer.model, row["input_ids"], row["labels"]).item() for row in trainer.train_dataset]
    trainer.train()
    loss_R = trainer.weighting.scouting.outcome.loss_R
    assert torch.equal(trainer.weighting.row_weights.last_loss_N[8:], loss_R[8:])
    assert (loss_R[:8] - torch.tensor(base[:8]) < -1).all()


def test_a_run_without_progress_bars_has_none(bilevel, capfd):
    trainer = bilevel(TRAIN, pairs(4, 95), max_steps=1)
    capfd.readouterr()
    trainer.train()
    assert "scout" not in capfd.readouterr().err
