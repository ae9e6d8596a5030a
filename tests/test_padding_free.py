"""Rows that go through the model without padding have the losses, gradients and weights of padded ones."""

from itertools import pairwise

import pytest
import torch
from conftest import assert_close, lora, message_of, pairs, parameters, tiny_model, tiny_tokenizer, two_kinds
from transformers import AttentionInterface, BloomConfig, BloomForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import add_fused_lm_head

from tamis.losses import fused_forward
from tamis.padding_free import first_fit

TOKENIZER = tiny_tokenizer()
LENGTHS = (5, 17, 1, 2, 40, 9)
SIZES = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}


def with_head(model, attention="sdpa"):
    model.set_attn_implementation(attention)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return model


def batch(has_positions: bool, lengths=LENGTHS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(3, len(TOKENIZER), (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=has_positions)(rows)


def measured(model, has_positions: bool) -> dict[str, torch.Tensor]:
    """Losses and figures of all rows, and the gradient of a sum of the losses in which each counts differently."""
    nll_B, outputs = fused_forward(model, batch(has_positions))
    model.zero_grad()
    (torch.arange(1.0, len(LENGTHS) + 1) * nll_B).sum().backward()
    found = {"nll": nll_B.detach(), "entropy": outputs.entropy.sum(1), "is_top1": outputs.is_top1.sum(1)}
    found["num_tokens"] = outputs.label_mask.sum(1)
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_losses_and_gradients_are_those_of_padded_rows(attention):
    model = with_head(tiny_model(TOKENIZER), attention)
    assert_close(measured(model, True), measured(model, False), atol=1e-5)


def test_a_row_alone_has_the_same_loss():
    model = with_head(tiny_model(TOKENIZER))
    together, _ = fused_forward(model, batch(True))
    inputs = batch(False)
    for row, length in enumerate(LENGTHS):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in inputs.items()}
        torch.testing.assert_close(fused_forward(model, alone)[0][0], together[row], atol=1e-5, rtol=0)


def test_nothing_is_computed_that_padding_would_not_compute():
    seen = []
    model = with_head(tiny_model(TOKENIZER))
    model.model.register_forward_pre_hook(lambda m, a, given: seen.append(given["input_ids"].shape), with_kwargs=True)
    for lengths in (LENGTHS, (40, 40, 40), (40, 38, 2)):
        fused_forward(model, batch(True, lengths))
    assert seen == [(2, 40), (3, 40), (2, 40)]


def by_boundaries(module, query, key, value, attention_mask, cu_seq_lens_q, max_length_q, seq_idx, **kwargs):
    """What flash attention makes of one line: each row by itself, between boundaries."""
    assert attention_mask is None and len(query) == 1 and max_length_q == max(LENGTHS)
    assert torch.equal(torch.bincount(seq_idx[0]), cu_seq_lens_q.diff())
    bounds = cu_seq_lens_q.tolist()
    parts = [
        sdpa_attention_forward(module, *(t[:, :, first:end] for t in (query, key, value)), None, **kwargs)[0]
        for first, end in pairwise(bounds)
    ]
    return torch.cat(parts, dim=1), None


def test_flash_attention_gets_one_line_and_where_its_rows_end(monkeypatch):
    model = with_head(tiny_model(TOKENIZER))
    expected = measured(model, False)
    AttentionInterface.register("flash_by_hand", by_boundaries)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_by_hand")
    assert_close(measured(model, True), expected, atol=1e-5)


# --- where rows are laid ----------------------------------------------------------------------------------------------


def test_rows_share_lines_where_they_fit():
    assert first_fit([5, 2, 3, 5], width=5) == [0, 13, 10, 5]
    assert first_fit([5, 2, 3, 5], width=15) == [0, 13, 10, 5]
    assert first_fit([4, 4, 4], width=4) == [0, 4, 8]


@pytest.mark.parametrize("seed", range(20))
def test_rows_do_not_overlap_and_need_no_more_lines_than_there_are(seed):
    lengths = torch.randint(1, 30, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
    for width in (max(lengths), sum(lengths)):
        starts = first_fit(lengths, width)
        tokens = [start + t for start, length in zip(starts, lengths, strict=True) for t in range(length)]
        assert len(set(tokens)) == len(tokens) == sum(lengths)
        lines = [(start // width, (start + n - 1) // width) for start, n in zip(starts, lengths, strict=True)]
        assert all(first == last for first, last in lines) and max(lines)[0] < len(lengths)


# --- whole runs -------------------------------------------------------------------------------------------------------

RIGHT, WRONG, TRUSTED = two_kinds()
REFINING = {"refine_fraction": 0.5, "num_generations": 2, "max_new_tokens": 4}
FOLLOWING = {"selector": "mirror", "selector_learning_rate": 0.1}
RUNS = {
    "scouted": {},
    "refining, checkpointing": FOLLOWING | REFINING | {"activation_checkpointing": True},
    "tracked, tokens, accumulation": FOLLOWING
    | {"reference": "tracked", "reference_learning_rate": 1e-4}  # Adam would blow rounding up to whole steps
    | {"loss_reduction": "token", "gradient_accumulation_steps": 2},
    "lora": FOLLOWING | {"peft_config": lora()},
}


def history(trainer) -> list[dict[str, float]]:
    timings = ("runtime", "per_second", "flos", "refine/seconds")
    return [{n: v for n, v in line.items() if not n.endswith(timings)} for line in trainer.state.log_history]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_that_with_padding(bilevel, name):
    """Losses, scores, weights, held-out metrics and parameters."""
    runs = []
    for is_padding_free in (False, True):
        settings = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "padding_free": is_padding_free}
        settings |= {"eval_strategy": "steps", "eval_steps": 2}
        trainer = bilevel(RIGHT + WRONG, TRUSTED, pairs(7, 500), **settings | RUNS[name])
        trainer.train()
        assert trainer.config_settings.get("padding_free", False) is is_padding_free
        assert trainer.data_collator.return_position_ids is is_padding_free
        runs.append(trainer)
    expected, actual = runs
    assert len(history(actual)) == len(history(expected)) > 5
    for line, expected_line in zip(history(actual), history(expected), strict=True):
        assert line == pytest.approx(expected_line, abs=1e-5, rel=1e-5)
    for column, values in expected.weighting.columns().items():
        assert actual.weighting.columns()[column] == pytest.approx(values, abs=1e-4, rel=1e-4, nan_ok=True), column
    assert_close(parameters(actual.model), parameters(expected.model), atol=1e-5)


def test_losses_of_experts_are_the_same(bilevel):
    """They are means over tokens: in a batch without padding there must be none but those of rows."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_hidden_layers": 1}
    config = MixtralConfig(intermediate_size=32, max_position_embeddings=128, **SIZES, **heads)
    found = []
    for is_padding_free in (False, True):
        torch.manual_seed(0)
        settings = {"max_steps": 2, "router_aux_loss_coef": 1.0, "padding_free": is_padding_free, "selector": "none"}
        trainer = bilevel(
            RIGHT + WRONG, TRUSTED, model=MixtralForCausalLM(config), processing_class=tiny_tokenizer(), **settings
        )
        trainer.train()
        found.append([line["aux_loss"] for line in trainer.state.log_history if "aux_loss" in line])
    assert len(found[0]) == 2 and found[1] == pytest.approx(found[0], abs=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_that_mixes_rows_is_refused(bilevel, tmp_path):
    """Its attention goes by no positions."""
    model = BloomForCausalLM(BloomConfig(n_layer=2, n_head=4, **SIZES))
    message = message_of(
        lambda: bilevel(pairs(8), pairs(4, 50), model=model, processing_class=tiny_tokenizer(), padding_free=True)
    )
    assert (
        message.startswith("padding_free: this model does not keep rows apart") and "or leave `padding_free`" in message
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
