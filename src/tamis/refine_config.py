"""Settings of online refining: `RefineConfig`, an `SFTConfig` with its fields; `BilevelConfig` builds on it."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Literal

from trl import SFTConfig

from tamis.answers import RATIO_LEVELS, RESPONSE_WEIGHTINGS
from tamis.generation import GENERATOR_NAMES
from tamis.refine import REFINE_POLICIES

logger = logging.getLogger(__name__)

REFINE_CHOICES = {
    "refine_policy": REFINE_POLICIES,
    "refine_on_error": ("stop", "continue"),
    "response_weighting": RESPONSE_WEIGHTINGS,
    "ratio_level": RATIO_LEVELS,
    "generator": GENERATOR_NAMES,
    "vllm_mode": ("colocate", "server"),
}
REFINE_SHARES = ("refine_fraction", "generation_top_p")
REFINE_POSITIVE = (
    "num_generations", "refine_every", "response_temperature", "generation_temperature", "generation_top_p",
    "generation_batch_size", "max_new_tokens",
)  # fmt: skip


@dataclass
class RefineConfig(SFTConfig):
    r"""
    What [`BilevelConfig`] has on refining.

    Parameters:
        > Parameters that control the refining

        refine_fraction (`float`, *optional*, defaults to `0.0`):
            R: the part of the questions that get new answers from the model. 0: no refining.
        refine_start (`float`, *optional*):
            First refresh: an optimizer step, or below 1 a part of all steps. Defaults to 0 where the weights are
            settled before training (scouting, `"column"`) or do not matter (`"random"`), so that the bad answers are
            never trained on; else to 0.25.
        refine_every (`float`, *optional*, defaults to `0.25`):
            From one refresh to the next, likewise.
        num_generations (`int`, *optional*, defaults to `4`):
            G: answers to each question.
        refine_policy (`str`, *optional*, defaults to `"lowest"`):
            `"lowest"`: the questions whose own answers have the least say, picked anew at every refresh. `"random"`:
            the same random ones at every refresh.
        refine_on_error (`str`, *optional*, defaults to `"stop"`):
            When the generator fails: `"stop"` saves a checkpoint and raises; `"continue"` goes on with the answers
            there are and tries again at the next refresh.
        response_weighting (`str`, *optional*, defaults to `"bmo"`):
            How the answers to one question share its weight: `"bmo"` (importance ratios) or `"uniform"`.
        response_temperature (`float`, *optional*, defaults to `0.15`):
            Temperature tau of `"bmo"`: answers count `p^(1 / tau) / q`. Smaller favours likely answers.
        ratio_level (`str`, *optional*, defaults to `"token"`):
            `"token"`: ratios of a token on average (geometric mean), `"sequence"`: of the whole answer.
        ratio_clip (`float`, *optional*, defaults to `5.0`):
            The ratio between the model and the one that generated is kept within `[1 / ratio_clip, ratio_clip]`.

        > Parameters that control the generation

        generator (`str`, *optional*, defaults to `"transformers"`):
            `"transformers"` (the training model itself) or `"vllm"`.
        generation_temperature (`float`, *optional*, defaults to `1.0`), generation_top_p (`float`, *optional*,
            defaults to `1.0`), max_new_tokens (`int`, *optional*, defaults to `256`): how answers are drawn.
        generation_batch_size (`int`, *optional*):
            Answers drawn at a time and device by `"transformers"`. The rows of a training micro-batch when not set.
        vllm_mode (`str`, *optional*, defaults to `"colocate"`), vllm_server_base_url (`str`, *optional*, defaults to
            `"http://127.0.0.1:8000"`), vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.3`):
            Where vLLM runs and how much of the memory it takes.
    """

    refine_fraction: float = field(
        default=0.0, metadata={"help": "Part of the questions that get new answers from the model. 0: no refining."}
    )
    refine_start: float | None = field(
        default=None,
        metadata={
            "help": "First refresh: an optimizer step, or below 1 a part of all steps. Default: 0 where the weights "
            "are settled before training, else 0.25."
        },
    )
    refine_every: float = field(
        default=0.25,
        metadata={
            "help": "From one refresh to the next: optimizer steps (1: every step), or below 1 a part of all steps."
        },
    )
    num_generations: int = field(default=4, metadata={"help": "New answers to each refined question."})
    refine_policy: Literal["lowest", "random"] = field(
        default="lowest",
        metadata={
            "help": "'lowest': the questions whose own answers have the least say, anew at every refresh; "
            "'random': the same random ones at every refresh."
        },
    )
    refine_on_error: Literal["stop", "continue"] = field(
        default="stop",
        metadata={"help": "When the generator fails: save and 'stop', or 'continue' with the answers there are."},
    )
    response_weighting: Literal["bmo", "uniform"] = field(
        default="bmo",
        metadata={"help": "How the answers to a question share its weight: 'bmo' (importance ratios) or 'uniform'."},
    )
    response_temperature: float = field(
        default=0.15, metadata={"help": "Temperature tau of 'bmo': answers count p^(1/tau)/q. Smaller is sharper."}
    )
    ratio_level: Literal["token", "sequence"] = field(
        default="token", metadata={"help": "Importance ratios of a token on average, or of the whole answer."}
    )
    ratio_clip: float = field(
        default=5.0, metadata={"help": "Importance ratios are kept between 1/ratio_clip and ratio_clip."}
    )
    generator: Literal["transformers", "vllm"] = field(
        default="transformers",
        metadata={"help": "What writes the answers: the training model itself ('transformers') or 'vllm'."},
    )
    generation_temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of new answers."})
    generation_top_p: float = field(default=1.0, metadata={"help": "Nucleus of the sampling; 1 is all tokens."})
    max_new_tokens: int = field(default=256, metadata={"help": "An answer not ended by then is not trained on."})
    generation_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Answers drawn at a time and device. The rows of a training micro-batch when not set: more is "
            "faster and takes more memory."
        },
    )
    vllm_mode: Literal["colocate", "server"] = field(
        default="colocate", metadata={"help": "vLLM in this process, or the server of `trl vllm-serve`."}
    )
    vllm_server_base_url: str = field(
        default="http://127.0.0.1:8000", metadata={"help": "Address of the server, for --vllm_mode server."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Part of the GPU memory that vLLM takes in this process."}
    )

    def warn_of_refining_without_effect(self, given: Collection[str]) -> None:
        """Warn of settings that change nothing.

        Args:
            given: names of the settings that differ from their defaults.
        """
        without_effect = {
            f"response_weighting '{self.response_weighting}'": ["response_temperature", "ratio_level", "ratio_clip"]
            if self.response_weighting == "uniform"
            else [],
            f"generator '{self.generator}'": ["generation_batch_size"]
            if self.generator == "vllm"
            else ["vllm_mode", "vllm_server_base_url", "vllm_gpu_memory_utilization"],
            f"vllm_mode '{self.vllm_mode}'": ["vllm_server_base_url"]
            if self.vllm_mode == "colocate"
            else ["vllm_gpu_memory_utilization"],
        }
        if not self.refine_fraction:
            own = {f.name for f in fields(RefineConfig)} - {f.name for f in fields(SFTConfig)}
            without_effect = {"refine_fraction 0": sorted(own)}
        said = set()
        for setting, names in without_effect.items():
            for name in names:
                if name in given and name not in said:
                    said.add(name)
                    logger.warning(f"{name} is set but has no effect with {setting}")
