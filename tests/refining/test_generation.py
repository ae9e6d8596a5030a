"""Generators against the model's own forward; what they leave as it was; and what `verify` does not let through."""

import contextlib
import copy
import math
import tomllib
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from conftest import assert_close, lora, parameters, tiny_model, tiny_tokenizer
from peft import get_peft_model
from scripted import ScriptedGenerator
from transformers import GenerationConfig

from tamis import BilevelConfig
from tamis.refining import generation
from tamis.refining.generation import (
    Completion,
    GenerationError,
    SamplingSettings,
    TransformersGenerator,
    VllmGenerator,
    base_weights_kept,
    closing_tokens,
    make_generator,
    sampled_log_prob,
    verify,
)

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("1=", "123456=", "7=", "98=", "abcdefghij=")]
CPU: Any = SimpleNamespace(
    device=torch.device("cpu"), autocast=contextlib.nullcontext, is_main_process=True, num_processes=1
)


def seeds(seed: int, num_prompts: int = len(PROMPTS)) -> list[list[int]]:
    return [[seed, i] for i in range(num_prompts)]


SETTINGS = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=5)


def opinionated_model(seed: int = 0, closing: bool = True):
    """The tiny model with a head that is not flat; letters close some completions early."""
    model = tiny_model(TOKENIZER, seed)
    model.lm_head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    if closing:
        model.generation_config.eos_token_id = [EOS, *TOKENIZER("abcdefg")["input_ids"]]
    return model


def generator_of(model, batch_size=4, **settings) -> TransformersGenerator:
    sampling = SamplingSettings(**{"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 5} | settings)
    return TransformersGenerator(model, CPU, TOKENIZER, sampling, batch_size=batch_size)


def log_prob_alone(model, prompt, token_ids, temperature=1.0) -> float:
    """By a forward of the row alone: no padding, no cache, no dropout."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]
    for module, mode in modes.items():
        module.training = mode
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor([*token_ids])[:, None]).sum().item()


@contextlib.contextmanager
def forward_shapes(model):
    """Rows and tokens of every forward."""
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


# --- what is reported -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_are_those_of_the_model_at_the_sampling_temperature(temperature):
    model = opinionated_model()
    completions = generator_of(model, temperature=temperature).generate(PROMPTS, 3, seeds(0))
    for prompt, of_prompt in zip(PROMPTS, completions, strict=True):
        for completion in of_prompt:
            expected = log_prob_alone(model, prompt, completion.token_ids, temperature)
            assert completion.log_prob == pytest.approx(expected, abs=1e-4), "whatever the padding on its left"
    lengths = {len(completion.token_ids) for completion in chain(*completions)}
    assert len(lengths) > 1, "of unlike length: nothing after the closing token is counted"


def test_completions_end_at_the_closing_token():
    model = opinionated_model()
    closing = set(model.generation_config.eos_token_id)
    completions = list(chain(*generator_of(model).generate(PROMPTS, 6, seeds(2))))
    for completion in completions:
        assert completion.is_finished == (completion.token_ids[-1] in closing)
        assert not closing & set(completion.token_ids[:-1]), "one at most, at the end"
        assert completion.is_finished or len(completion.token_ids) == 5
        assert TOKENIZER.pad_token_id not in completion.token_ids[:-1] or not completion.is_finished
    assert {c.is_finished for c in completions} == {True, False}


def test_a_closing_token_alone_is_a_completion():
    model = opinionated_model()
    model.generation_config.eos_token_id = list(range(len(TOKENIZER)))
    for completion in chain(*generator_of(model).generate(PROMPTS, 2, seeds(0))):
        assert len(completion.token_ids) == 1 and completion.is_finished


def test_closing_tokens_are_those_of_the_tokenizer_and_of_the_model():
    model = opinionated_model(closing=False)
    assert closing_tokens(model, TOKENIZER) == [EOS]
    model.generation_config.eos_token_id = [7, EOS]
    assert closing_tokens(model, TOKENIZER) == [EOS, 7]
    model.generation_config.eos_token_id = None
    assert closing_tokens(model, TOKENIZER) == [EOS]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.6)])
def test_completions_are_drawn_from_the_distribution_that_was_asked_for(temperature, top_p):
    model, prompt, num_draws = opinionated_model(), PROMPTS[0], 4000
    with torch.no_grad():
        expected = (model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    values, order = expected.sort(descending=True)
    num_kept = int((values.cumsum(0) < top_p - 1e-6).sum()) + 1
    kept = torch.zeros_like(expected).index_fill(0, order[:num_kept], 1.0)
    expected = expected * kept / (expected * kept).sum()
    generator = generator_of(model, batch_size=1000, temperature=temperature, top_p=top_p, max_new_tokens=1)
    drawn = [completion.token_ids[0] for completion in generator.generate([prompt], num_draws, seeds(0))[0]]
    frequency = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / num_draws
    # Of one frequency the standard deviation is sqrt(p (1 - p) / n): five of them for the worst of 45.
    deviation = (expected * (1 - expected) / num_draws).sqrt()
    assert ((frequency - expected).abs() <= 5 * deviation + 1e-9).all()
    assert top_p == 1 or num_kept < len(expected) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_renormalised_over_the_nucleus(temperature):
    """Those of the distribution that is drawn from: the probabilities of the nucleus sum to one."""
    model, prompt, top_p = opinionated_model(), PROMPTS[0], 0.6
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature
    values, order = logits.softmax(-1).sort(descending=True)
    num_kept = int((values.cumsum(0) < top_p - 1e-6).sum()) + 1
    expected = {
        int(token): value for token, value in zip(order[:num_kept], values / values[:num_kept].sum(), strict=False)
    }
    generator = generator_of(model, batch_size=1000, temperature=temperature, top_p=top_p, max_new_tokens=1)
    drawn = {c.token_ids[0]: c.log_prob for c in generator.generate([prompt], 1000, seeds(0))[0]}
    assert drawn.keys() == expected.keys() and len(drawn) >= 2
    for token, log_prob in drawn.items():
        assert log_prob == pytest.approx(expected[token].log().item(), abs=1e-4)
    assert sum(math.exp(log_prob) for log_prob in drawn.values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    "published",
    [
        {"do_sample": False},
        {"temperature": 0.6, "top_k": 2, "top_p": 0.5},
        {"repetition_penalty": 1.5},
        {"min_p": 0.3},
        {"no_repeat_ngram_size": 1},
        {"min_new_tokens": 4},
        {"suppress_tokens": [20, 21, 22]},
    ],
    ids=lambda published: "-".join(published),
)
def test_defaults_that_the_model_was_published_with_do_not_bend_the_distribution(published):
    """Instruction models come with settings for chatting: completions are drawn and reported without them."""
    plain, model = opinionated_model(), opinionated_model()
    eos_token_id = plain.generation_config.eos_token_id
    model.generation_config = GenerationConfig(**{"do_sample": True} | published, eos_token_id=eos_token_id)
    before = copy.deepcopy(model.generation_config)
    assert generator_of(model).generate(PROMPTS, 4, seeds(0)) == generator_of(plain).generate(PROMPTS, 4, seeds(0))
    assert model.generation_config == before


# --- seeds and order --------------------------------------------------------------------------------------------------


def test_the_seed_is_all_the_randomness_there_is():
    generator = generator_of(opinionated_model())
    torch.manual_seed(1)
    first = generator.generate(PROMPTS, 3, seeds(5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert generator.generate(PROMPTS, 3, seeds(5)) == first
    assert torch.equal(torch.get_rng_state(), state), "the global generator is where it was"
    assert generator.generate(PROMPTS, 3, seeds(6)) != first


def test_completions_of_one_prompt_differ():
    completions = generator_of(opinionated_model()).generate(PROMPTS[:1], 8, seeds(0))[0]
    assert len({tuple(completion.token_ids) for completion in completions}) > 4


def test_completions_come_in_the_order_of_the_prompts():
    """The longest prompts are completed first: each completion must find its way back."""
    model = opinionated_model()
    with forward_shapes(model) as shapes:
        completions = generator_of(model, batch_size=3).generate(PROMPTS, 2, seeds(0))
    assert [tokens for _, tokens in shapes if tokens > 1] == [11, 7, 2, 2], (
        "the longest first, where a lack of memory shows at once"
    )
    assert [len(of_prompt) for of_prompt in completions] == [2] * 5
    for i, of_prompt in enumerate(completions):
        for completion in of_prompt:
            fits = [log_prob_alone(model, prompt, completion.token_ids) for prompt in PROMPTS]
            assert fits[i] == pytest.approx(completion.log_prob, abs=1e-4)
            assert all(abs(fit - fits[i]) > 1e-3 for j, fit in enumerate(fits) if j != i), "and no other prompt's"


@pytest.mark.parametrize("num_generations", [1, 3, 17])
def test_the_batch_size_bounds_the_memory(num_generations):
    model = opinionated_model()
    with forward_shapes(model) as shapes:
        completions = generator_of(model, batch_size=4).generate(PROMPTS, num_generations, seeds(0))
    assert [len(of_prompt) for of_prompt in completions] == [num_generations] * 5
    assert max(rows for rows, _ in shapes) == 4
    num_batches = sum(tokens > 1 for _, tokens in shapes)
    assert num_batches == -(-5 * num_generations // 4), "and no batch is emptier than it must be"


def test_a_completion_does_not_depend_on_the_others():
    """On two ranks, or in other batches, the rows have other neighbours and another padding."""
    generator = generator_of(opinionated_model(), batch_size=4)
    together = generator.generate(PROMPTS, 3, seeds(0))
    apart = [generator.generate([prompt], 3, [seed])[0] for prompt, seed in zip(PROMPTS, seeds(0), strict=True)]
    assert [[c.token_ids for c in of_prompt] for of_prompt in together] == [
        [c.token_ids for c in of_prompt] for of_prompt in apart
    ]
    assert len({tuple(c.token_ids) for of_prompt in together for c in of_prompt}) > 10


def test_no_prompts_no_completions():
    assert generator_of(opinionated_model()).generate([], 3, seeds(0)) == []


# --- what is left as it was -------------------------------------------------------------------------------------------


def test_the_cache_is_used_under_activation_checkpointing_too():
    model = opinionated_model(closing=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False  # as TRL has it while training
    model.train()
    settings = {name: getattr(m, "gradient_checkpointing", None) for name, m in model.named_modules()}
    assert True in settings.values()
    with forward_shapes(model) as shapes:
        generator_of(model).generate(PROMPTS[1:2], 4, seeds(0))
    assert shapes == [(4, len(PROMPTS[1]))] + [(4, 1)] * (len(shapes) - 1) and len(shapes) > 1
    assert {name: getattr(m, "gradient_checkpointing", None) for name, m in model.named_modules()} == settings
    assert model.is_gradient_checkpointing and model.training and model.config.use_cache is False


@pytest.mark.parametrize("fails", [False, True])
def test_every_module_gets_back_its_mode(monkeypatch, fails):
    model = opinionated_model()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    modes = []
    original = model.generate

    def generate(**kwargs):
        modes.append({module.training for module in model.modules()})
        if fails:
            raise RuntimeError("out of memory")
        return original(**kwargs)

    monkeypatch.setattr(model, "generate", generate)
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
        generator_of(model).generate(PROMPTS, 1, seeds(0))
    assert modes and all(mode == {False} for mode in modes)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_are_left_alone():
    model = opinionated_model().to(torch.bfloat16)
    model.lm_head.float()
    model.model.embed_tokens.requires_grad_(False)
    before = {name: (p, p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    values = parameters(model)
    with torch.autocast("cpu", torch.bfloat16):
        generator_of(model).generate(PROMPTS, 2, seeds(0))
    assert {name: (p, p.data_ptr(), p.dtype, p.requires_grad) for name, p in model.named_parameters()} == before
    assert_close(parameters(model), values, atol=0)
    assert all(p.grad is None for p in model.parameters())


def adapted_model(dtype=torch.float32, **settings):
    """With an adapter that does something: it starts as zero otherwise."""
    model = get_peft_model(opinionated_model().to(dtype), lora(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    return model


def test_dropout_of_an_adapter_is_off():
    model = adapted_model(lora_dropout=0.5).train()
    prompt = PROMPTS[1]
    completions = generator_of(model).generate([prompt], 6, seeds(0))[0]
    expected = [log_prob_alone(model, prompt, completion.token_ids) for completion in completions]
    assert [completion.log_prob for completion in completions] == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():  # and it is on in training
        first, second = (model(input_ids=torch.tensor([prompt])).logits for _ in range(2))
    assert (first - second).abs().max() > 1e-3


def test_completions_are_those_of_the_present_weights():
    model = opinionated_model()
    generator = generator_of(model)
    before = generator.generate(PROMPTS, 2, seeds(0))
    model.load_state_dict(opinionated_model(seed=1).state_dict())
    after = generator.generate(PROMPTS, 2, seeds(0))
    assert after != before
    assert after == generator_of(opinionated_model(seed=1)).generate(PROMPTS, 2, seeds(0))
    assert verify(generator, model, PROMPTS, after, 2, contextlib.nullcontext) < 1e-4


# --- scripted completions ---------------------------------------------------------------------------------------------


def test_scripted_completions_carry_the_log_probs_of_the_model():
    model = opinionated_model()
    settings = SamplingSettings(temperature=0.7, top_p=1.0, max_new_tokens=5)
    generator = ScriptedGenerator(model, lambda prompt, j: [*prompt[:j], EOS][: j + 1 if j < 2 else 2], settings, EOS)
    completions = generator.generate(PROMPTS[:2], 3, seeds(0))
    for prompt, of_prompt in zip(PROMPTS[:2], completions, strict=True):
        assert [list(c.token_ids) for c in of_prompt] == [[EOS], [prompt[0], EOS], prompt[:2]]
        assert [c.is_finished for c in of_prompt] == [True, True, False]
        expected = [log_prob_alone(model, prompt, c.token_ids, 0.7) for c in of_prompt]
        assert [c.log_prob for c in of_prompt] == pytest.approx(expected, abs=1e-4)


def test_an_empty_completion_is_certain():
    assert sampled_log_prob(opinionated_model(), PROMPTS[0], [], SETTINGS) == 0


# --- verify -----------------------------------------------------------------------------------------------------------


class ReportingGenerator:
    """Fixed completions whose log-probabilities are off by so much per token."""

    def __init__(self, model, settings=SETTINGS, off: float = 0.0):
        self.settings = settings
        self.completions = [
            [
                Completion(ids, sampled_log_prob(model, prompt, ids, settings) + off * len(ids), True)
                for ids in ([9, 8, EOS], [10, EOS])
            ]
            for prompt in PROMPTS
        ]


def drift_of(model, generator) -> float:
    return verify(generator, model, PROMPTS, generator.completions, 2, contextlib.nullcontext)


@pytest.mark.parametrize("off", [0.0, 0.1, -0.1])
def test_the_drift_is_measured_per_token(off):
    model = opinionated_model()
    assert drift_of(model, ReportingGenerator(model, off=off)) == pytest.approx(abs(off), abs=1e-5)


@pytest.mark.parametrize("log_prob", [math.nan, math.inf])
def test_a_completion_without_log_probability_does_not_stop_the_run(log_prob):
    """It is counted as unmeasured, and not trained on."""
    model = opinionated_model()
    generator = generator_of(model)
    completions = generator.generate(PROMPTS, 2, seeds(0))
    completions[0][0] = Completion(completions[0][0].token_ids, log_prob, True)
    assert verify(generator, model, PROMPTS, completions, 2, contextlib.nullcontext) < 1e-4


@pytest.mark.parametrize("off", [0.3, -0.3])
def test_too_much_drift_is_refused(off):
    model = opinionated_model()
    with pytest.raises(GenerationError, match="does not have the present weights"):
        drift_of(model, ReportingGenerator(model, off=off))


def test_log_probs_may_be_renormalised_over_the_nucleus():
    """After cutting off the tail to top_p 0.5 a token may have up to log 2 more than the model gives it, not less."""
    model = opinionated_model()
    half = SamplingSettings(temperature=1.0, top_p=0.5, max_new_tokens=5)
    for off in (0.0, 0.35, 0.69):
        assert drift_of(model, ReportingGenerator(model, half, off)) < 1e-5
    for off in (1.0, -0.3):
        with pytest.raises(GenerationError, match="present weights"):
            drift_of(model, ReportingGenerator(model, half, off))
    with pytest.raises(GenerationError, match="present weights"):
        drift_of(model, ReportingGenerator(model, SETTINGS, off=0.35))


def test_older_weights_do_not_go_unnoticed():
    model = opinionated_model()
    generator = generator_of(copy.deepcopy(model))
    model.load_state_dict(opinionated_model(seed=1).state_dict())
    completions = generator.generate(PROMPTS, 2, seeds(0))
    with pytest.raises(GenerationError, match="nats per token away from the training model's"):
        verify(generator, model, PROMPTS, completions, 2, contextlib.nullcontext)


def test_missing_completions_do_not_go_unnoticed():
    model = opinionated_model()
    generator = ReportingGenerator(model)
    complete = generator.completions
    generator.completions = complete[:-1]
    with pytest.raises(GenerationError, match="completed 4 of 5 prompts"):
        drift_of(model, generator)
    generator.completions = [*complete[:3], complete[3][:1], complete[4]]
    with pytest.raises(GenerationError, match="returned 1 completions of prompt 3, 2 were asked for"):
        drift_of(model, generator)


def test_verifying_leaves_the_model_in_its_mode():
    model = opinionated_model().train()
    drift_of(model, ReportingGenerator(model))
    assert model.training and all(p.grad is None for p in model.parameters())


# --- vLLM -------------------------------------------------------------------------------------------------------------


class FakeVllm:
    """Behaves as TRL's `VLLMGeneration`: LoRA is merged for the transfer and taken out again; then it completes."""

    def __init__(self, model, mode="colocate", fails_in_transfer=False):
        self.model, self.mode, self.fails_in_transfer = model, mode, fails_in_transfer
        self.generation_kwargs = {}
        self.num_syncs, self.num_missing, self.received = 0, 0, None

    def sync_weights(self):
        self.num_syncs += 1
        if hasattr(self.model, "merge_adapter"):
            self.model.merge_adapter()
            if self.fails_in_transfer:
                raise ConnectionError("the server is gone")
            self.model.unmerge_adapter()

    def generate(self, prompts, images, num_generations):
        assert images is None
        self.received = (prompts, num_generations)
        completions = [[5 + len(prompt), EOS] if i % 2 == 0 else [9] for i, prompt in enumerate(prompts)]
        log_probs = [[[-0.25] for _ in ids] for ids in completions]
        num_returned = len(prompts) - self.num_missing
        return prompts, completions[:num_returned], log_probs[:num_returned], None


def vllm_generator(fake) -> VllmGenerator:
    return VllmGenerator(fake, fake.model, SETTINGS, [EOS])


def base_weights(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in parameters(model).items() if "lora" not in name}


def test_merging_for_vllm_does_not_wear_the_base_weights():
    model = adapted_model(torch.bfloat16)
    before = parameters(model)
    fake = FakeVllm(model)
    for _ in range(2):
        vllm_generator(fake).generate(PROMPTS, 2, seeds(0))
    assert fake.num_syncs == 2
    assert_close(parameters(model), before, atol=0)

    fake.sync_weights()  # by itself it does: the difference of two bf16 numbers is not what was added
    assert any(not torch.equal(p, before[name]) for name, p in base_weights(model).items())


def test_base_weights_are_kept_after_an_error_too():
    model = adapted_model()
    before = base_weights(model)
    with pytest.raises(KeyError), base_weights_kept(model):
        model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.data.zero_()
        raise KeyError
    assert_close(base_weights(model), before, atol=0)
    plain = opinionated_model()
    with base_weights_kept(plain):  # nothing is merged into a model without adapter
        plain.lm_head.weight.data.zero_()
    assert plain.lm_head.weight.abs().max() == 0


def test_a_transfer_cut_short_leaves_the_model_as_it_was():
    """The adapter was merged when the connection broke: the model must not go on without it."""
    model = adapted_model().eval()
    prompt = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        before = model(input_ids=prompt).logits
    with pytest.raises((GenerationError, ConnectionError)):
        vllm_generator(FakeVllm(model, fails_in_transfer=True)).generate(PROMPTS, 2, seeds(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=prompt).logits, before, atol=1e-6, rtol=0)


def test_completions_of_vllm_are_grouped_by_prompt():
    fake = FakeVllm(opinionated_model())
    completions = vllm_generator(fake).generate(PROMPTS, 2, seeds(0))
    assert fake.received == ([ids for ids in PROMPTS for _ in range(2)], 2)
    for prompt, of_prompt in zip(PROMPTS, completions, strict=True):
        assert of_prompt == [Completion([5 + len(prompt), EOS], -0.5, True), Completion([9], -0.25, False)]


def test_vllm_must_complete_everything():
    fake = FakeVllm(opinionated_model())
    fake.num_missing = 1
    with pytest.raises(GenerationError, match="vLLM returned 9 completions, 10 were asked for"):
        vllm_generator(fake).generate(PROMPTS, 2, seeds(0))


def test_only_a_server_is_seeded():
    """In this process one seed would give the same completion to every copy of a prompt."""
    server, colocated = FakeVllm(opinionated_model(), "server"), FakeVllm(opinionated_model())
    server.generation_kwargs = {"min_p": 0.0}
    for fake in (server, colocated):
        vllm_generator(fake).generate(PROMPTS, 2, seeds(11))
    assert server.generation_kwargs == {"min_p": 0.0, "seed": ANY}
    assert colocated.generation_kwargs == {}


def refining_config(tmp_path, **settings) -> BilevelConfig:
    return BilevelConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, refine_fraction=0.5, **settings)


def test_without_vllm_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "is_vllm_available", lambda: False)
    args = refining_config(tmp_path, generator="vllm")
    with pytest.raises(ValueError, match=r'pip install "trl\[vllm\]"'):
        make_generator(opinionated_model(), CPU, TOKENIZER, args, batch_size=4)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert "vllm" in project["optional-dependencies"], "the remedy must exist"


def test_vllm_is_made_as_the_settings_say(tmp_path, monkeypatch):
    made = []

    def fake_vllm(model, accelerator, processing_class, **settings):
        made.append(settings)
        return SimpleNamespace(mode=settings["mode"])

    monkeypatch.setattr(generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr("trl.generation.vllm_generation.VLLMGeneration", fake_vllm)
    args = refining_config(
        tmp_path, generator="vllm", vllm_mode="server", max_length=100, max_new_tokens=20, generation_temperature=0.7
    )
    with pytest.raises(ValueError, match="equal shares"):
        make_generator(opinionated_model(), SimpleNamespace(num_processes=2), TOKENIZER, args, batch_size=4)
    quantized = opinionated_model()
    quantized.hf_quantizer = object()
    with pytest.raises(ValueError, match="quantized weights"):
        make_generator(quantized, CPU, TOKENIZER, args, batch_size=4)
    generator = make_generator(opinionated_model(), CPU, TOKENIZER, args, batch_size=4)
    assert isinstance(generator, VllmGenerator)
    assert generator.settings == SamplingSettings(0.7, 1.0, 20)
    assert generator.eos_token_ids >= {EOS}
    assert made[0]["mode"] == "server" and made[0]["server_base_url"] == "http://127.0.0.1:8000"
    assert (made[0]["temperature"], made[0]["top_p"], made[0]["max_completion_length"]) == (0.7, 1.0, 20)
    assert made[0]["max_model_length"] == 120


def test_the_training_model_generates_by_default(tmp_path):
    args = refining_config(tmp_path, generation_temperature=0.7, generation_top_p=0.9, max_new_tokens=20)
    model = opinionated_model()
    generator = make_generator(model, CPU, TOKENIZER, args, batch_size=3)
    assert isinstance(generator, TransformersGenerator) and generator.model is model
    assert generator.settings == SamplingSettings(0.7, 0.9, 20) and generator.batch_size == 3
