"""Memory that the recipes need on one GPU, by arithmetic: no model is loaded and no GPU is needed.

    python benchmarks/recipe_memory.py

- Parameters, gradients and the two moments of Adam, counted on the model as PEFT wraps it, without its data
  (`tamis.check.cost.least_memory`).
- Activations that stay until the backward: with activation checkpointing, the input of each layer.
- Activations of the one layer that is computed again: what autograd keeps of a real layer for 64 tokens in bf16, scaled
  to all tokens of a micro-batch. The same again for its gradients.
- 2 GB for CUDA, the language model's head (TRL computes it in pieces) and what else there is.

A micro-batch is taken with as many trusted rows as training rows, all of ``max_length``: the most that can come.
"""

from pathlib import Path

import torch
import yaml
from peft import get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig
from trl import ModelConfig

from tamis.check.cost import least_memory
from tamis.run import peft_config_of

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
REST = 2e9
_NUM_TOKENS = 64
# As published with the models.
CONFIGS: dict[str, PretrainedConfig] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ),
    "EleutherAI/pythia-1b": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8,
        max_position_embeddings=2048,
    ),
}  # fmt: skip


def kept_by_layer(config: PretrainedConfig, model_args: ModelConfig) -> float:
    """Bytes that the backward of one layer needs of its forward, for each token."""
    small = type(config)(**config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 8, "attn_implementation": "sdpa"})
    model = get_peft_model(AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16), peft_config_of(model_args))
    model.enable_input_require_grads()  # as any layer but the first has them
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(input_ids=torch.zeros(1, _NUM_TOKENS, dtype=torch.long))
    del output
    return sum(kept.values()) / _NUM_TOKENS


def memory_of(recipe: Path) -> float:
    """Bytes that a recipe needs on one GPU."""
    settings = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    config = CONFIGS[settings["model_name_or_path"]]
    names = ("use_peft", "lora_r", "lora_alpha", "lora_target_modules")
    model_args = ModelConfig(**{name: settings[name] for name in names})
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), peft_config_of(model_args)
        )
    num_tokens = 2 * settings["per_device_train_batch_size"] * settings["max_length"]
    inputs = config.num_hidden_layers * config.hidden_size * 2
    return least_memory(model) + num_tokens * (inputs + 2 * kept_by_layer(config, model_args)) + REST


def main() -> None:
    for recipe in sorted(RECIPES.glob("*.yaml")):
        print(f"{recipe.name:<26}{memory_of(recipe) / 1e9:.0f} GB")


if __name__ == "__main__":
    main()
