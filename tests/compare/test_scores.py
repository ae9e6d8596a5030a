"""Scores of training rows, against known answers: higher is better, and the model is as it was."""

import hashlib
from itertools import chain

import pytest
import torch
from conftest import (
    assert_close,
    lora,
    pairs,
    parameters,
    plain_loss,
    row_gradients,
    tiny_tokenizer,
    token_ids,
    two_kinds,
)
from torch.nn.functional import cosine_similarity

from tamis.compare import scores_gradient, scores_loss, scores_text
from tamis.compare.adapted import adapted_to_validation, warmed_up
from tamis.compare.cost import counted
from tamis.compare.rivals import RIVALS
from tamis.compare.scores_gradient import AdamStep
from tamis.metrics import auroc

RIGHT, WRONG, TRUSTED = two_kinds()
IS_RIGHT = [True] * len(RIGHT) + [False] * len(WRONG)


@pytest.fixture(autouse=True)
def short_descents(monkeypatch):
    monkeypatch.setattr("tamis.selection.scout.SCOUT_VISITS", 120)


@pytest.fixture
def untrained(bilevel):
    """A trainer to score with, before any step."""

    def make(train=RIGHT + WRONG, validation=TRUSTED, **settings):
        return bilevel(train, validation, selector="none", **settings)

    return make


def losses_one_by_one(trainer, dataset) -> torch.Tensor:
    model = trainer.model.eval()
    with torch.no_grad():
        return torch.stack([plain_loss(model, row["input_ids"], row["labels"]) for row in dataset])


@pytest.mark.parametrize("name", RIVALS)
@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_every_score_leaves_the_model_as_it_was_and_can_be_had_again(name, peft_config, untrained):
    trainer = untrained(peft_config=peft_config)
    before = parameters(trainer.model)
    trainer.model.train()
    state = torch.get_rng_state()
    score_R = RIVALS[name].score(trainer)
    assert score_R.shape == (len(IS_RIGHT),) and score_R.isfinite().all() and score_R.unique().numel() > 1
    assert_close(parameters(trainer.model), before, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert trainer.model.training and all(p.grad is None for p in trainer.model.parameters())
    torch.testing.assert_close(RIVALS[name].score(trainer), score_R)


def test_scores_that_follow_the_validation_rows_tell_the_kinds_apart(untrained):
    trainer = untrained(learning_rate=1e-2)
    for name in ("gradient cosine", "LESS", "CoLoR-Filter", "RHO-loss, offline"):
        assert auroc(RIVALS[name].score(trainer), IS_RIGHT) > 0.97, name


# --- text ---------------------------------------------------------------------------------------------------------


def test_random_scores_follow_the_seed_and_nothing_else(untrained):
    first = scores_text.random_order(untrained(seed=1))
    assert torch.equal(first, scores_text.random_order(untrained(WRONG + RIGHT, seed=1)))
    assert not torch.equal(first, scores_text.random_order(untrained(seed=2)))


def test_ngrams_are_words_and_pairs_of_words():
    expected = ["ab", "=", "c", "ab =", "= c"]
    hashes = [int(hashlib.sha256(ngram.encode()).hexdigest(), 16) % 10_000 for ngram in expected]
    assert scores_text.ngram_buckets("Ab= c").tolist() == hashes
    assert scores_text.ngram_buckets(" ").tolist() == []


def test_dsir_prefers_rows_with_the_ngrams_of_the_validation_rows(untrained):
    def rows(words, start):
        return [
            {"prompt": f"{i}=", "completion": f"{words[i % 2]} {words[(i + 1) % 2]}"} for i in range(start, start + 9)
        ]

    like, unlike = rows(["ab", "cd"], 10), rows(["xy", "zw"], 30)
    score_R = scores_text.dsir(untrained(like + unlike, rows(["cd", "ab"], 50)))
    assert auroc(score_R, [True] * 9 + [False] * 9) == 1.0


def test_dsir_draws_where_all_rows_are_alike(untrained):
    """The noise is Gumbel's: of rows with equal weights a random subset is kept."""
    rows = [{"prompt": "1=", "completion": "ab"}] * 400
    score_R = scores_text.dsir(untrained(rows, [{"prompt": "1=", "completion": "cd"}]))
    noise_R = score_R - score_R.mean()
    assert float(noise_R.std()) == pytest.approx(torch.pi / 6**0.5, abs=0.2), "the deviation of Gumbel's distribution"
    assert float((noise_R**3).mean() / noise_R.std() ** 3) > 0.5, "and its skew"


def test_embeddings_are_means_of_the_last_hidden_states(untrained):
    trainer = untrained(pairs(5), pairs(2, start=40), per_device_eval_batch_size=2)
    response = scores_text.embeddings(trainer, trainer.train_dataset)
    prompt = scores_text.embeddings(trainer, trainer.train_dataset, of="prompt")
    model = trainer.model.eval()
    for i, row in enumerate(trainer.train_dataset):
        with torch.no_grad():
            hidden_TD = model.model(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
        is_prompt_T = torch.tensor(row["labels"]) == -100
        assert is_prompt_T.any() and not is_prompt_T.all()
        for found, states in ((response, hidden_TD[~is_prompt_T]), (prompt, hidden_TD[is_prompt_T])):
            expected = torch.nn.functional.normalize(states.mean(dim=0), dim=0)
            torch.testing.assert_close(found[i], expected, atol=1e-5, rtol=0)


def test_a_copy_of_validation_rows_has_the_nearest_neighbours(untrained):
    copies = TRUSTED[:1] * 5
    score_R = scores_text.nearest_neighbours(untrained(RIGHT + TRUSTED[:1], copies))
    assert score_R.argmax() == len(RIGHT) and float(score_R[-1]) == pytest.approx(1.0, abs=1e-6)


# --- losses -------------------------------------------------------------------------------------------------------


def test_the_perplexity_filter_keeps_the_rows_of_low_loss(untrained):
    trainer = untrained(pairs(9))
    score_R = scores_loss.perplexity_filter(trainer)
    torch.testing.assert_close(score_R, -losses_one_by_one(trainer, trainer.train_dataset), atol=1e-5, rtol=0)


def test_the_color_filter_is_the_fall_of_the_loss_by_adapting(untrained):
    trainer = untrained(learning_rate=1e-2)
    base_R = losses_one_by_one(trainer, trainer.train_dataset)
    with adapted_to_validation(trainer):
        adapted_R = losses_one_by_one(trainer, trainer.train_dataset)
        validation_V = losses_one_by_one(trainer, trainer.validation_dataset)
    assert (validation_V < losses_one_by_one(trainer, trainer.validation_dataset)).all()
    torch.testing.assert_close(scores_loss.color_filter(trainer), base_R - adapted_R, atol=1e-4, rtol=0)


def test_the_reducible_loss_is_that_of_the_warmed_up_model_over_the_adapted_one(untrained):
    trainer = untrained(learning_rate=1e-2)
    with warmed_up(trainer):
        current_R = losses_one_by_one(trainer, trainer.train_dataset)
    with adapted_to_validation(trainer):
        irreducible_R = losses_one_by_one(trainer, trainer.train_dataset)
    torch.testing.assert_close(scores_loss.rho_loss_offline(trainer), current_R - irreducible_R, atol=1e-4, rtol=0)


def test_in_context_the_nearest_validation_rows_come_before_the_row(untrained):
    trainer = untrained(pairs(4), pairs(4, start=40))
    prompts = [
        scores_text.embeddings(trainer, rows, of="prompt")
        for rows in (trainer.train_dataset, trainer.validation_dataset)
    ]
    order = (prompts[0] @ prompts[1].T).argsort(dim=1, descending=True).tolist()
    score_R = scores_loss.in_context(trainer)
    for i, row in enumerate(trainer.train_dataset):
        context = list(chain.from_iterable(trainer.validation_dataset[k]["input_ids"] for k in order[i][:3]))
        labels = [-100] * len(context) + row["labels"]
        with torch.no_grad():
            inside = plain_loss(trainer.model, context + row["input_ids"], labels)
            alone = plain_loss(trainer.model, row["input_ids"], row["labels"])
        num_tokens = sum(label != -100 for label in row["labels"])
        assert float(score_R[i]) == pytest.approx(float(alone - inside) * num_tokens, abs=1e-4)


def test_examples_that_do_not_fit_into_the_context_are_left_out(untrained):
    """Of 128 positions 120 are the example's."""
    long = [{"prompt": "1" * 100, "completion": "a" * 19}]
    score_R = scores_loss.in_context(untrained(pairs(3, start=10000), long))
    assert score_R.tolist() == [0.0] * 3


def test_no_token_is_counted_that_has_nothing_before_it(untrained):
    """Rows without a prompt: their first token is trained on, but cannot be predicted without an example."""
    trainer = untrained([{"text": "abcab"}, {"text": "ba"}], [{"text": "ab"}])
    score_R, context = scores_loss.in_context(trainer), token_ids("ab.")
    for score, text in zip(score_R.tolist(), ("abcab.", "ba."), strict=True):
        ids = token_ids(text)
        with torch.no_grad():
            inside = plain_loss(trainer.model, context + ids, [-100] * (len(context) + 1) + ids[1:])
            alone = plain_loss(trainer.model, ids, ids)
        assert score == pytest.approx(float(alone - inside) * (len(ids) - 1), abs=1e-4)


# --- gradients ----------------------------------------------------------------------------------------------------


def flat(gradients: dict) -> torch.Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def test_the_gradient_cosine_is_that_with_the_mean_validation_gradient(untrained):
    trainer = untrained(pairs(4), pairs(3, start=40))
    trainer.model.eval()
    mean_P = torch.stack([flat(row_gradients(trainer.model, row)) for row in trainer.validation_dataset]).mean(dim=0)
    expected = [cosine_similarity(flat(row_gradients(trainer.model, r)), mean_P, dim=0) for r in trainer.train_dataset]
    torch.testing.assert_close(scores_gradient.gradient_cosine(trainer), torch.stack(expected), atol=1e-4, rtol=0)


def test_the_step_of_adam_is_the_one_that_adam_takes():
    """A linear model: with squared loss the gradient of a row is ``2 (w x - y) x``."""
    x, target = torch.tensor([1.0, 2.0]), 3.0
    weight = torch.nn.Parameter(torch.tensor([0.5, -1.0]))
    optimizer = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.95), weight_decay=0.0)
    for factor in (1.0, -2.0, 0.5):
        weight.grad = factor * x
        optimizer.step()
    gradient = 2 * (weight.detach() @ x - target) * x
    step = AdamStep(optimizer, [weight])(gradient)
    before = weight.detach().clone()
    weight.grad = gradient
    optimizer.step()
    torch.testing.assert_close(step, (before - weight.detach()) / 0.1)


def test_less_is_a_mean_over_checkpoints_of_cosines_with_validation_gradients(untrained):
    trainer = untrained(pairs(20), pairs(2, start=40), learning_rate=1e-2)
    expected, rates = torch.zeros(20), []

    def add(optimizer, rate):
        step = AdamStep(optimizer, scores_gradient.trainable(trainer))
        targets = list(scores_gradient.row_gradients(trainer, trainer.validation_dataset))
        for i, gradient in enumerate(scores_gradient.row_gradients(trainer, trainer.train_dataset)):
            cosines = [cosine_similarity(step(gradient), target, dim=0) for target in targets]
            expected[i] += rate * torch.stack(cosines).mean()
        rates.append(rate)

    with warmed_up(trainer, add):
        pass
    assert len(rates) == 4 and rates == sorted(rates, reverse=True), "four epochs of a rate that falls"
    torch.testing.assert_close(scores_gradient.less(trainer), expected / sum(rates), atol=1e-4, rtol=0)


def test_less_refuses_an_optimizer_without_moments(untrained):
    with pytest.raises(ValueError, match="set `optim='adamw_torch'`"):
        scores_gradient.less(untrained(optim="sgd"))


def test_the_warm_up_sees_a_twentieth_of_the_rows_and_the_model_is_put_back_if_it_fails(untrained, monkeypatch):
    trainer = untrained(pairs(60))
    before = parameters(trainer.model)
    with counted(trainer) as cost, pytest.raises(ZeroDivisionError), warmed_up(trainer):
        seen = cost.num_tokens
        assert parameters(trainer.model)["lm_head.weight"].ne(before["lm_head.weight"]).any()
        raise ZeroDivisionError
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert 4 * 3 * 3 * min(lengths) <= seen <= 4 * 3 * 3 * max(lengths), "3 rows, 4 epochs, forward and backward"
    assert_close(parameters(trainer.model), before, atol=0)


# --- cost ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_a_forward_costs_one_and_a_backward_two(peft_config, untrained):
    trainer = untrained(pairs(10), pairs(10, start=20), peft_config=peft_config)
    costs = {}
    for name in ("random", "perplexity filter", "nearest neighbours", "gradient cosine"):
        with counted(trainer) as cost:
            RIVALS[name].score(trainer)
        costs[name] = cost.forwards
    tokens = [
        sum(len(ids) for ids in rows["input_ids"]) for rows in (trainer.train_dataset, trainer.validation_dataset)
    ]
    both = 1 + tokens[1] / tokens[0]
    assert costs == pytest.approx(
        {"random": 0, "perplexity filter": 1, "nearest neighbours": both, "gradient cosine": 3 * both}
    )


def test_nothing_is_counted_afterwards(untrained):
    trainer = untrained(pairs(3))
    with counted(trainer) as cost:
        pass
    scores_loss.perplexity_filter(trainer)
    assert cost.forwards == 0


def test_texts_are_rows_as_they_are_trained_on(untrained):
    trainer = untrained(
        [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "a"}]}] * 2,
        [{"messages": [{"role": "user", "content": "2"}, {"role": "assistant", "content": "b"}]}],
    )
    decoded = tiny_tokenizer().decode(trainer.train_dataset[0]["input_ids"], skip_special_tokens=True)
    assert scores_text._texts(trainer, trainer.train_dataset) == [decoded] * 2
