"""Generators: what writes new completions of prompts, with the weights that the model has at that moment.

| name           | how                                                          | needs                      |
|----------------|--------------------------------------------------------------|----------------------------|
| `transformers` | the training model itself, batched, with a KV cache          | nothing                    |
| `vllm`         | TRL's `VLLMGeneration`, in this process or on a server       | `pip install "trl[vllm]"`  |

All of them take and return token ids: what is trained on is what was generated, never decoded and encoded again.
`verify` compares the log-probabilities that a generator reports with those of the training model, so that a generator
with other weights is noticed (one that is a few optimizer steps behind may not be).
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)

from tamis._compat import LoraLayer, is_vllm_available, vllm_generation
from tamis.checkpoint import ResumableError
from tamis.losses import evaluation_mode
from tamis.progress import Bar
from tamis.ranks import BrokenForwardError, agreed, is_sharded
from tamis.refining.responses import as_int32

logger = logging.getLogger(__name__)

# Nats per token between generator and training model, on average over a completion. Arithmetic in bf16 with and without
# a KV cache differs by about 0.01; one optimizer step of old weights is hard to tell from that, a forgotten
# synchronisation is not.
MAX_DRIFT = 0.2

Seeds = Sequence[Sequence[int]]  # one for each prompt: non-negative integers, which are mixed


class GenerationError(ResumableError):
    """The generator failed, or did not answer every prompt, or answered with other weights than the model has."""


@contextmanager
def failing_together(model: nn.Module) -> Iterator[None]:
    """What fails on one rank fails on all: the others would wait for its responses. The settings say what follows.

    Args:
        model: the training model. Where it is sharded, all ranks generate in the same forwards.

    Raises:
        GenerationError: of whatever kind the failure is.
        BrokenForwardError: of a sharded model.
    """
    failure = ""
    try:
        yield
    except GenerationError as error:
        failure = str(error)
    except Exception as error:
        if is_sharded(model):
            raise BrokenForwardError(error) from error
        logger.debug("traceback", exc_info=True)
        failure = f"the generator failed: {type(error).__name__}: {error}"
    if failure := agreed(failure):
        raise GenerationError(failure)


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are drawn.

    Attributes:
        temperature: of the sampling distribution; positive.
        top_p: the smallest set of tokens whose probabilities sum to at least this is drawn from; 1 is all.
        max_new_tokens: a completion that has not ended by then is unfinished.
    """

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One generated completion.

    Attributes:
        token_ids: as generated, with the closing token if it has one; kept as int32.
        log_prob: nats, sum over the tokens, under the distribution it was drawn from: at its temperature, and
            renormalised over the tokens that top_p left.
        is_finished: it ended with a closing token.
    """

    token_ids: Sequence[int]
    log_prob: float
    is_finished: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", as_int32(self.token_ids))


class Generator(Protocol):
    """Anything that completes prompts."""

    settings: SamplingSettings

    def generate(self, prompts: Sequence[list[int]], num_generations: int, seeds: Seeds) -> list[list[Completion]]:
        """``num_generations`` completions of each prompt, by the weights that the model has now.

        Args:
            prompts: token ids.
            seeds: of each prompt: all the randomness there is, where the generator can be seeded.
        """


@contextmanager
def without_published_defaults(model: Any) -> Iterator[None]:
    """`generate` does not fill what is left open from the settings the model was published with for chatting."""
    owners = [owner for owner in {model, *model.modules()} if "generation_config" in vars(owner)]
    published = [owner.generation_config for owner in owners]
    for owner in owners:
        owner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for owner, config in zip(owners, published, strict=True):
            owner.generation_config = config


class _Sampler(LogitsProcessor):
    """Draws the tokens while `generate` runs, and notes their log-probabilities: no second forward, no logits kept.

    A token is the quantile of its distribution at a number that was drawn before. So a completion depends on its own
    seed alone, not on the rows that it shares a batch with; `torch.multinomial` would draw for the batch as a whole.

    Args:
        quantile_BT: uniform in [0, 1), float64, one for each token that there may be.
    """

    def __init__(self, quantile_BT: Tensor, settings: SamplingSettings):
        self.temperature, self._quantile_BT = settings.temperature, quantile_BT
        self._nucleus = TopPLogitsWarper(settings.top_p) if settings.top_p < 1 else None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) whose highest is the drawn token's."""
        scores = scores.float() / self.temperature
        if self._nucleus is not None:
            scores = self._nucleus(input_ids, scores)
        log_prob_BV = scores.log_softmax(dim=1)
        mass_BV = log_prob_BV.exp().cumsum(dim=1)
        quantile_B1 = self._quantile_BT[:, len(self._columns), None].to(scores.device, scores.dtype)
        drawn_B1 = torch.searchsorted(mass_BV, quantile_B1 * mass_BV[:, -1:], right=True)
        drawn_B1 = drawn_B1.clamp(max=scores.shape[1] - 1)  # logits that are not numbers have no quantile
        self._columns.append(log_prob_BV.gather(1, drawn_B1).squeeze(1))
        return torch.full_like(scores, -math.inf).scatter_(1, drawn_B1, 0.0)

    def log_probs(self) -> Tensor:
        """Of all generated tokens of the finished batch, B x T."""
        return torch.stack(self._columns, dim=1)


class TransformersGenerator:
    """The training model's own `generate`, in batches of rows of like length.

    Args:
        model: the training model, with or without adapters; used as it is.
        processing_class: its tokenizer; pads and ends completions.
        batch_size: completions drawn at a time. It bounds the memory, whatever the number of completions a prompt.
        show_progress: a bar over the completions.
    """

    def __init__(
        self,
        model: Any,
        accelerator: Accelerator,
        processing_class: PreTrainedTokenizerBase,
        settings: SamplingSettings,
        *,
        batch_size: int,
        show_progress: bool = False,
    ):
        self.model, self.accelerator, self.settings = model, accelerator, settings
        self.batch_size, self.show_progress = batch_size, show_progress
        self.pad_token_id = processing_class.pad_token_id
        self.eos_token_ids = closing_tokens(model, processing_class)
        self._config = GenerationConfig(
            do_sample=False,  # `_Sampler` does
            repetition_penalty=1.0,
            use_cache=True,  # TRL switches it off in the model's own settings
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
        )

    def generate(self, prompts: Sequence[list[int]], num_generations: int, seeds: Seeds) -> list[list[Completion]]:
        """See `Generator`."""
        rows = [(i, j) for i in range(len(prompts)) for j in range(num_generations)]
        rows.sort(key=lambda row: -len(prompts[row[0]]))  # stable: the longest first, where a lack of memory shows
        completions: list[list[Completion]] = [[] for _ in prompts]
        bar = Bar("generating responses", len(rows), is_shown=self.show_progress)
        with evaluation_mode(self.model), without_published_defaults(self.model), torch.no_grad(), bar:
            for first in range(0, len(rows), self.batch_size):
                batch = rows[first : first + self.batch_size]
                drawn = [np.random.default_rng([*seeds[i], j]).random(self.settings.max_new_tokens) for i, j in batch]
                found = self._draw([prompts[i] for i, _ in batch], torch.from_numpy(np.stack(drawn)))
                for (i, _), completion in zip(batch, found, strict=True):
                    completions[i].append(completion)
                bar.advance(len(batch))
        return completions

    def _draw(self, prompts: list[list[int]], quantile_BT: Tensor) -> list[Completion]:
        longest = max(map(len, prompts))
        padding = [longest - len(ids) for ids in prompts]
        input_ids = torch.tensor([[self.pad_token_id] * p + ids for p, ids in zip(padding, prompts, strict=True)])
        attention_mask = torch.tensor([[0] * p + [1] * (longest - p) for p in padding])
        sampler = _Sampler(quantile_BT, self.settings)
        with self.accelerator.autocast():
            sequences = self.model.generate(
                input_ids=input_ids.to(self.accelerator.device),
                attention_mask=attention_mask.to(self.accelerator.device),
                generation_config=self._config,
                logits_processor=LogitsProcessorList([sampler]),
                synced_gpus=is_sharded(self.model),
            )
        log_probs = sampler.log_probs().cpu()
        return [
            self._cut(ids, row_log_probs)
            for ids, row_log_probs in zip(sequences[:, longest:].tolist(), log_probs, strict=True)
        ]

    def _cut(self, token_ids: list[int], log_probs_T: Tensor) -> Completion:
        """Without the padding that follows the closing token."""
        length = next((t + 1 for t, token in enumerate(token_ids) if token in self.eos_token_ids), None)
        token_ids = token_ids[:length]
        return Completion(token_ids, log_probs_T[: len(token_ids)].sum().item(), is_finished=length is not None)


class VllmGenerator:
    """vLLM through TRL's `VLLMGeneration`, after sending it the present weights.

    With LoRA the adapter is merged into the base weights for the transfer. Taking it out again does not give back
    the same bf16 numbers (huggingface/trl#6688), so the base weights are kept on the CPU meanwhile and put back.

    Args:
        vllm: a `trl.generation.vllm_generation.VLLMGeneration`.
    """

    def __init__(self, vllm: Any, model: nn.Module, settings: SamplingSettings, eos_token_ids: Sequence[int]):
        self.vllm, self.model, self.settings = vllm, model, settings
        self.eos_token_ids = set(eos_token_ids)

    def generate(self, prompts: Sequence[list[int]], num_generations: int, seeds: Seeds) -> list[list[Completion]]:
        """See `Generator`."""
        with base_weights_kept(self.model):
            self.vllm.sync_weights()
        # Only there: in this process one seed would give the same completion to every copy of a prompt.
        if self.vllm.mode == "server" and prompts:
            seed = int(np.random.default_rng(list(seeds[0])).integers(2**63))
            self.vllm.generation_kwargs = self.vllm.generation_kwargs | {"seed": seed}
        rows = [ids for ids in prompts for _ in range(num_generations)]
        _, generated, log_probs, _ = self.vllm.generate(rows, images=None, num_generations=num_generations)
        if len(generated) != len(rows):
            raise GenerationError(f"vLLM returned {len(generated)} completions, {len(rows)} were asked for")
        completions = []
        for token_ids, per_token in zip(generated, log_probs, strict=True):
            total = sum(drawn[0] if drawn[0] is not None else math.nan for drawn in per_token)
            is_finished = bool(token_ids) and token_ids[-1] in self.eos_token_ids
            completions.append(Completion(token_ids, total, is_finished))
        return [completions[i : i + num_generations] for i in range(0, len(rows), num_generations)]


@contextmanager
def base_weights_kept(model: nn.Module) -> Iterator[None]:
    """On leaving, the weights under the LoRA layers are bit for bit what they were on entering, no adapter merged."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)] if isinstance(model, PeftModel) else []
    bases = [p for layer in layers for p in layer.get_base_layer().parameters()]
    before = [p.detach().to("cpu", copy=True) for p in bases]
    try:
        yield
    finally:
        for layer in layers:
            if layer.merged:  # the transfer broke off
                layer.unmerge()
        for parameter, kept in zip(bases, before, strict=True):
            parameter.data.copy_(kept)


def check_installed(generator: str) -> None:
    """Raise a ValueError if what the generator of that name needs is not installed."""
    if generator == "vllm" and not is_vllm_available():
        raise ValueError("generator 'vllm' needs vLLM: pip install \"trl[vllm]\", or leave `generator` out")


def make_generator(
    model: Any,
    accelerator: Accelerator,
    processing_class: PreTrainedTokenizerBase,
    args: Any,
    batch_size: int,
) -> Generator:
    """The generator that a `BilevelConfig` asks for.

    Raises:
        ValueError: vLLM is asked for and not installed, or cannot be had with this model or number of ranks.
    """
    settings = SamplingSettings(args.generation_temperature, args.generation_top_p, args.max_new_tokens)
    if args.generator == "transformers":
        return TransformersGenerator(
            model,
            accelerator,
            processing_class,
            settings,
            batch_size=batch_size,
            show_progress=accelerator.is_main_process and not args.disable_tqdm,
        )
    check_installed(args.generator)
    if args.vllm_mode == "server" and accelerator.num_processes > 1:
        raise ValueError(
            "a vLLM server deals completions out in equal shares, which those of the ranks are not: train on one rank, "
            "or use `vllm_mode='colocate'`"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "generator 'vllm' would merge the adapter into quantized weights, which cannot be undone exactly "
            "(huggingface/trl#6688): leave `generator` out, or train without quantization"
        )
    vllm = vllm_generation(
        model,
        accelerator,
        processing_class,
        mode=args.vllm_mode,
        server_base_url=args.vllm_server_base_url,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.max_length and args.max_length + args.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_completion_length=settings.max_new_tokens,
    )
    return VllmGenerator(vllm, model, settings, closing_tokens(model, processing_class))


def closing_tokens(model: Any, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a completion: the tokenizer's, and those that the model was published with."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    configured = configured if isinstance(configured, list) else [configured]
    found = [processing_class.eos_token_id, *configured]
    return list(dict.fromkeys(token for token in found if token is not None))


def sampled_log_prob(model: Any, prompt: list[int], token_ids: Sequence[int], settings: SamplingSettings) -> float:
    """Sum of log-probabilities of a completion under the sampling distribution, by a forward of its own."""
    if not token_ids:
        return 0.0
    with evaluation_mode(model), torch.no_grad():
        ids = torch.tensor([[*prompt, *token_ids]], device=model.device)
        logits_TV = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / settings.temperature
    return float(logits_TV.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())


def verify(
    generator: Generator,
    model: Any,
    prompts: Sequence[list[int]],
    completions: list[list[Completion]],
    num_generations: int,
    autocast: Callable[[], Any],
    num_checked: int = 4,
) -> float:
    """Check that every prompt was completed as asked, by the weights that ``model`` has; returns the drift.

    The drift is the largest difference, in nats per token, between the log-probabilities that the generator reports and
    those of the training model, over one completion each of ``num_checked`` prompts.

    Raises:
        GenerationError: completions are missing, or the drift exceeds `MAX_DRIFT`.
    """
    if len(completions) != len(prompts):
        raise GenerationError(f"the generator completed {len(completions)} of {len(prompts)} prompts")
    for i, found in enumerate(completions):
        if len(found) != num_generations:
            raise GenerationError(
                f"the generator returned {len(found)} completions of prompt {i}, {num_generations} were asked for"
            )
    drift = 0.0
    for prompt, found in list(zip(prompts, completions, strict=True))[:num_checked]:
        completion = found[0]
        num_tokens = max(len(completion.token_ids), 1)
        with autocast():
            own = sampled_log_prob(model, prompt, completion.token_ids, generator.settings)
        if not math.isfinite(completion.log_prob):
            continue  # counted as unmeasured, and not trained on
        difference = (completion.log_prob - own) / num_tokens
        # Where the generator has renormalised over the tokens that top_p left, each gains at most log(1 / top_p).
        difference = max(-difference, difference + math.log(generator.settings.top_p), 0.0)
        drift = max(drift, difference if math.isfinite(difference) else math.inf)
    if drift > MAX_DRIFT:
        raise GenerationError(
            f"the generator's log-probabilities are {drift:.2f} nats per token away from the training model's: it does "
            "not have the present weights"
        )
    return drift
