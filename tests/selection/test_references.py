"""The three references: what they cost, that they are what they say, and where `tracked` ends up."""

import math

import pytest
import torch
from conftest import lora, pairs, parameters, plain_loss, read_jsonl, tiny_model, tiny_tokenizer

from tamis.selection import references
from tamis.selection.references import ZeroReference

# One prompt, two answers: the weighted loss has its minimum where the answers have the probabilities of the weights.
FORKED = [{"prompt": "1=", "completion": "a"}, {"prompt": "1=", "completion": "b"}]
UNKNOWN = torch.full((6,), math.nan)  # no reference loss is known before it is measured


def batch_of(trainer, dataset=None) -> dict:
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in dataset or trainer.train_dataset]
    return dict(trainer.data_collator(rows))


def test_zero_is_zero():
    assert ZeroReference().losses({}, torch.arange(3), UNKNOWN[:3]).tolist() == [0, 0, 0]
    assert ZeroReference().state_dict() == {}


@pytest.mark.parametrize("is_lora", [False, True])
def test_base_is_the_model_before_training(bilevel, is_lora):
    trainer = bilevel(
        pairs(6),
        pairs(4, 95),
        peft_config=lora(lora_dropout=0.5) if is_lora else None,
        max_steps=6,
        learning_rate=1e-2,
        selector="mirror",
    )
    before = tiny_model(tiny_tokenizer())
    expected = torch.stack([plain_loss(before, row["input_ids"], row["labels"]) for row in trainer.train_dataset])
    inputs = batch_of(trainer)
    trainer.train()
    trainer.weighting.reference.loss_N.fill_(math.nan)  # forget: measure again, after training
    measured = trainer.weighting.reference.losses(inputs, torch.tensor(trainer.train_dataset["example_id"]), UNKNOWN)
    torch.testing.assert_close(measured, expected.detach(), atol=1e-5, rtol=0)
    now = torch.stack([plain_loss(trainer.model.eval(), r["input_ids"], r["labels"]) for r in trainer.train_dataset])
    assert (now - expected).abs().min() > 1e-3, "the model itself has moved on"
    assert not measured.requires_grad


@pytest.mark.parametrize("is_lora", [False, True])
def test_base_measures_each_row_once(bilevel, monkeypatch, is_lora):
    trainer = bilevel(
        pairs(10), pairs(4, 95), peft_config=lora() if is_lora else None, num_train_epochs=3, selector="mirror"
    )
    num_measured, fused_losses = [], references.fused_losses

    def counting(model, inputs):
        assert not model.training
        num_measured.append(len(inputs["input_ids"]))
        return fused_losses(model, inputs)

    monkeypatch.setattr(references, "fused_losses", counting)
    trainer.train()
    assert num_measured == [4, 4, 2], "in the first of three epochs"
    assert trainer.model.training, "left as it was found"


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
@pytest.mark.parametrize("reference", ["base", "tracked"])
def test_at_the_first_step_nothing_has_an_excess(bilevel, tmp_path, reference, settings):
    """The reference computes in the precision of the model, or the difference of the two would be all rounding."""
    bilevel(pairs(4), pairs(4, 95), reference=reference, max_steps=1, selector="mirror", **settings).train()
    first = read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert first["training_loss"] > 1 and abs(first["penalty_gap"]) < 1e-6


def follow(trainer, weights_B: torch.Tensor, num_steps: int) -> tuple[list[float], list[float]]:
    """Steps of the tracked reference alone, with fixed weights: its weighted loss and the size of its gradient."""
    reference, inputs, ids = trainer.weighting.reference, batch_of(trainer), torch.arange(len(weights_B))
    losses, norms = [], []
    for step in range(num_steps):
        losses.append((weights_B * reference.losses(inputs, ids, UNKNOWN[: len(ids)])).mean().item())
        reference.backward(weights_B / len(weights_B))
        norms.append(torch.stack([p.grad.norm() for p in reference.parameters if p.grad is not None]).norm().item())
        reference.step(1e-2 if step < num_steps - 80 else 1e-3)
    return losses, norms


@pytest.mark.parametrize("is_lora", [False, True])
def test_tracked_approaches_the_minimum_of_the_weighted_loss(bilevel, is_lora):
    peft_config = lora(target_modules="all-linear", r=8) if is_lora else None
    trainer = bilevel(FORKED, pairs(2, 95), selector="mirror", reference="tracked", peft_config=peft_config)
    # The random head is so flat that no adapter below it could be certain of anything.
    for model in (trainer.model, trainer.weighting.reference._model):
        model.get_output_embeddings().weight.data.normal_(generator=torch.Generator().manual_seed(0))
    before = parameters(trainer.model)
    weights_B = torch.tensor([1.5, 0.5])
    losses, norms = follow(trainer, weights_B, num_steps=200)
    # Of two tokens each the first is the answer, the second <eos>, which can be certain.
    own_B = -0.5 * torch.tensor([0.75, 0.25]).log()
    minimum = (weights_B * own_B).mean().item()
    assert losses[0] > 5 * minimum and minimum - 1e-5 < losses[-1] < minimum + 5e-3
    assert norms[-1] < norms[0] / 30
    now = parameters(trainer.model)
    assert all(torch.equal(now[n], p) for n, p in before.items() if "tamis_tracked" not in n)

    trainer.model.eval()
    model_B = torch.stack([plain_loss(trainer.model, r["input_ids"], r["labels"]) for r in trainer.train_dataset])
    reference_B = trainer.weighting.reference.losses(batch_of(trainer), torch.arange(2), UNKNOWN[:2])
    torch.testing.assert_close(model_B - reference_B, model_B - own_B, atol=1e-2, rtol=0)


@pytest.mark.parametrize("is_lora", [False, True])
def test_tracked_continues_from_its_state_bit_for_bit(bilevel, is_lora):
    first, second = (
        bilevel(FORKED, pairs(2, 95), selector="mirror", reference="tracked", peft_config=lora() if is_lora else None)
        for _ in range(2)
    )
    weights_B = torch.tensor([1.5, 0.5])
    follow(first, weights_B, num_steps=3)
    second.weighting.reference.load_state_dict(
        {n: t.clone() for n, t in first.weighting.reference.state_dict().items()}
    )
    assert follow(first, weights_B, num_steps=3) == follow(second, weights_B, num_steps=3)


def test_tracked_takes_its_own_learning_rate(bilevel):
    moved = []
    for learning_rate in (None, 1e-6):
        trainer = bilevel(
            pairs(4),
            pairs(4, 95),
            selector="mirror",
            reference="tracked",
            reference_learning_rate=learning_rate,
            max_steps=1,
        )
        before = [p.detach().clone() for p in trainer.weighting.reference.parameters]
        trainer.train()
        steps = zip(trainer.weighting.reference.parameters, before, strict=True)
        moved.append(max((p - q).abs().max().item() for p, q in steps))
    assert moved == pytest.approx([1e-3, 1e-6], rel=0.05), "Adam's first step is the learning rate"


def test_tracked_refuses_modules_that_two_adapters_would_share(bilevel):
    with pytest.raises(ValueError, match=r"modules_to_save .* choose `reference='base'`"):
        bilevel(
            pairs(4),
            pairs(4, 95),
            selector="mirror",
            reference="tracked",
            peft_config=lora(modules_to_save=["embed_tokens"]),
        )


def test_every_rank_joins_in_reducing_every_gradient(bilevel):
    """The last batch of an epoch may leave a rank without training rows: the others would wait for it for ever."""
    trainer = bilevel(pairs(4), pairs(4, 95), selector="mirror", reference="tracked")
    reduced = []
    trainer.weighting.reference._reduce_gradient = lambda gradient: reduced.append(gradient.shape)
    trainer.weighting.reference.step(1e-3)
    assert reduced == [parameter.shape for parameter in trainer.weighting.reference.parameters]
