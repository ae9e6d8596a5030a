"""The only imports from libraries that they do not promise to keep, in one place."""

from typing import Any

from peft.tuners.lora import LoraLayer
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK as INTEGRATIONS
from trl.import_utils import is_vllm_available

__all__ = ["INTEGRATIONS", "LoraLayer", "is_vllm_available", "vllm_generation"]


def vllm_generation(*args: Any, **kwargs: Any) -> Any:
    """TRL's `VLLMGeneration`, imported only where vLLM is used."""
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration(*args, **kwargs)
