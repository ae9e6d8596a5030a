"""How to ask the model that a run has trained: one row as the model sees it, the model card, an example that runs.

The card's snippet and ``inference_example.py`` use transformers alone, and peft where an adapter was trained. Both
write the prompt as training did.
"""

import json
import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.text import Text

from tamis.files import write_atomically
from tamis.inputs import held_out_datasets
from tamis.losses import evaluation_mode
from tamis.model_card import data_section
from tamis.output_dir import EXAMPLE
from tamis.refining.generation import closing_tokens
from tamis.rows import last_answer, row_name
from tamis.trl_options import is_sharded

logger = logging.getLogger(__name__)

MAX_NEW_TOKENS = 128
_QUESTION = "What is the capital of France?"  # a card is published, and rows may be private
_NO_BASE = "[None](https://huggingface.co/None)"  # so TRL names a base model that is a folder
_MAX_SHOWN = 300  # characters of each part of a row
_SNIPPET = """\
import torch
{imports}
{path}
{asked}

tokenizer = AutoTokenizer.from_pretrained(MODEL)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = {auto_class}.from_pretrained(MODEL, dtype={dtype}).to(device)
{inputs}
output = model.generate(**inputs.to(device), max_new_tokens={max_new_tokens}, do_sample=False{stop})
answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
"""
_AS_TEXT = 'inputs = tokenizer(PROMPT, return_tensors="pt")'
_AS_CHAT = (
    "inputs = tokenizer.apply_chat_template(\n"
    '    MESSAGES, {tools}add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)'
)


# --- one row as the model sees it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShownRow:
    """One row as the model sees it.

    Attributes:
        place: its name.
        num_tokens, num_trained: all of its tokens, and those that are trained on.
        parts: runs of tokens as text, each with whether it is trained on.
    """

    place: str
    num_tokens: int
    num_trained: int
    parts: list[tuple[bool, str]]

    def title(self) -> str:
        """What is said of it before the text."""
        return f"{self.place}; {self.num_tokens} tokens, {self.num_trained} trained on, between ⟦ and ⟧"

    def text(self) -> Text:
        """What is trained on stands between ⟦ and ⟧, and in colour."""
        line = Text()
        for is_trained, text in self.parts:
            line.append(f"⟦{text}⟧" if is_trained else text, style="bold green" if is_trained else "dim")
        return line


def first_row(trainer: Any) -> ShownRow:
    """The first training row."""
    row = trainer.train_dataset[0]
    return ShownRow(
        place=row_name(trainer.train_dataset, "train_dataset", 0),
        num_tokens=len(row["input_ids"]),
        num_trained=sum(label != -100 for label in row["labels"]),
        parts=_parts(row, trainer.processing_class),
    )


def show_row(trainer: Any) -> None:
    """Print the first training row to stderr."""
    row = first_row(trainer)
    line = Text(f"first row ({row.title()}):\n").append_text(row.text())
    Console(file=sys.stderr, soft_wrap=True, highlight=False).print(line)


def _parts(row: dict[str, Any], processing_class: Any) -> list[tuple[bool, str]]:
    """Runs of tokens that are trained on or not, as text in which line ends and other controls are escaped."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if not runs or runs[-1][0] != (label != -100):
            runs.append((label != -100, []))
        runs[-1][1].append(token)
    return [(is_trained, _escaped(processing_class.decode(tokens))) for is_trained, tokens in runs]


def _escaped(text: str) -> str:
    if len(text) > _MAX_SHOWN:
        half = _MAX_SHOWN // 2
        text = f"{text[:half]} ... {len(text) - 2 * half} more characters ... {text[-half:]}"
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# --- what asks the model ----------------------------------------------------------------------------------------------


def snippet(trainer: Any, model: str, row: dict[str, Any], num_prompt_tokens: int = 0) -> str:
    """Python that asks the trained model with the prompt of a row.

    Args:
        model: an expression of the saved model's folder or name.
        row: a prepared or unprepared row of the trainer, in one of TRL's formats.
        num_prompt_tokens: see `max_new_tokens`.
    """
    auto_class = "AutoPeftModelForCausalLM" if _is_adapter(trainer) else "AutoModelForCausalLM"
    classes = ["AutoTokenizer"] if _is_adapter(trainer) else ["AutoModelForCausalLM", "AutoTokenizer"]
    imports = [f"from transformers import {', '.join(classes)}"]
    if _is_adapter(trainer):
        imports.insert(0, f"from peft import {auto_class}")
    prompt, tools = prompt_of(row)
    if isinstance(prompt, str):
        asked, inputs = f"PROMPT = {prompt!r}", _AS_TEXT
    else:
        asked, inputs = f"MESSAGES = {prompt!r}", _AS_CHAT.format(tools="tools=TOOLS, " if tools else "")
        if tools:
            asked += f"\nTOOLS = {tools!r}"
    stop = stop_tokens(trainer)
    return _SNIPPET.format(
        imports="\n".join(imports),
        path=f"\nMODEL = {model}",
        asked=asked,
        auto_class=auto_class,
        dtype=trainer.accelerator.unwrap_model(trainer.model).dtype,
        inputs=inputs,
        max_new_tokens=max_new_tokens(trainer, num_prompt_tokens),
        stop=f", eos_token_id={stop}" if stop else "",
    )


def prompt_of(row: dict[str, Any]) -> tuple[str | list[dict[str, Any]], Any]:
    """What a row asks, as text or as messages, and with which tools."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if "prompt" in row:
        prompt = row["prompt"]
    elif "messages" in row:
        prompt = row["messages"][: last_answer(row["messages"])]
    else:
        prompt = " ".join(row["text"].split(" ")[:8])
    if isinstance(prompt, list):
        prompt = [{name: value for name, value in message.items() if value is not None} for message in prompt]
    return prompt, tools


def stop_tokens(trainer: Any) -> list[int]:
    """What ends an answer, where the saved model does not say so itself: the special token that training ends with."""
    tokenizer, known = trainer._tokenizer, closing_tokens(trainer.model, trainer._tokenizer)
    row = trainer.train_dataset[0]
    trained = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100]
    ends = [token for token in trained if token in tokenizer.all_special_ids]
    return [] if not ends or ends[-1] in known else [*known, ends[-1]]


def _asked(trainer: Any) -> tuple[str, Any]:
    """Prepared rows to ask, and their role: held out if there are any."""
    candidates = {**held_out_datasets(trainer.eval_dataset), "validation_dataset": trainer.validation_dataset}
    candidates["train_dataset"] = trainer.train_dataset
    return next((role, rows) for role, rows in candidates.items() if rows is not None)


def max_new_tokens(trainer: Any, num_prompt_tokens: int) -> int:
    """Enough for an answer, within what the model can read; half of that where the prompt is not known yet (0)."""
    config = trainer.accelerator.unwrap_model(trainer.model).config
    num_positions: int | None = getattr(config, "max_position_embeddings", None)
    if num_positions is None:
        return MAX_NEW_TOKENS
    return max(1, min(MAX_NEW_TOKENS, num_positions // 2, num_positions - num_prompt_tokens))


def _is_adapter(trainer: Any) -> bool:
    return isinstance(trainer.accelerator.unwrap_model(trainer.model), PeftModel)


def _inputs(trainer: Any, row: dict[str, Any]) -> Any:
    """The prompt of a row in tokens, as the example makes them."""
    prompt, tools = prompt_of(row)
    if isinstance(prompt, str):
        return trainer._tokenizer(prompt, return_tensors="pt")
    template = trainer.prompts.chat_template
    return trainer._tokenizer.apply_chat_template(
        prompt, tools, chat_template=template, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )


def _answer(trainer: Any, inputs: Any) -> str:
    """The trained model's greedy answer, as the example makes it."""
    tokenizer, model = trainer._tokenizer, trainer.accelerator.unwrap_model(trainer.model)
    num_prompt_tokens = inputs["input_ids"].shape[1]
    stop = {"eos_token_id": found} if (found := stop_tokens(trainer)) else {}
    with evaluation_mode(model), torch.no_grad():
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens(trainer, num_prompt_tokens),
            do_sample=False,
            use_cache=True,
            **stop,
        )
    return str(tokenizer.decode(output[0, num_prompt_tokens:], skip_special_tokens=True))


def write_example(trainer: Any) -> None:
    """Write ``inference_example.py``: it asks the saved model a held-out prompt and compares with the run's answer."""
    role, rows = _asked(trainer)
    row, path = rows[0], Path(str(trainer.args.output_dir)) / EXAMPLE
    inputs = _inputs(trainer, row)
    text = f'"""Asks the model of this run. The prompt is that of {row_name(rows, role, 0)}."""\n\nimport sys\n'
    text += "from pathlib import Path\n\n" + snippet(
        trainer, "Path(__file__).resolve().parent", row, inputs["input_ids"].shape[1]
    )
    try:
        found = None if is_sharded(trainer.args) else _answer(trainer, inputs)
    except (RuntimeError, IndexError) as error:  # memory or positions: no reason to fail a run whose model is saved
        logger.warning(f"{EXAMPLE} cannot say what the run answers: {error}")
        found = None
    if found is None:
        text = text.replace("import sys\n", "")
    else:
        text += (
            "\n# What the run itself answered; other hardware may round differently.\n"
            f"ANSWER = {found!r}\n"
            'print("as the run" if answer == ANSWER else f"unlike the run: {ANSWER!r}", file=sys.stderr)\n'
        )
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _data(trainer: Any) -> str:
    held_out, table = held_out_datasets(trainer.eval_dataset).values(), trainer._row_table
    num_rows = {
        "train_dataset": len(table),
        "validation_dataset": len(trainer.validation_dataset or ()),
        "eval_dataset": sum(map(len, held_out)),
    }
    sources = table["source"].drop_null().unique().to_pylist()
    return data_section(Path(str(trainer.args.output_dir)), num_rows, sources)


def describe(trainer: Any, card: Path) -> None:
    """Put into a model card how to ask this model, the template of its prompts and its data, for TRL's quick start."""
    is_chat = trainer.prompts.chat_template is not None
    row = {"prompt": [{"role": "user", "content": _QUESTION}] if is_chat else "Write a prompt as in training here."}
    output_dir = Path(str(trainer.args.output_dir))
    model = repr(trainer.hub_model_id or (output_dir.name if output_dir.is_absolute() else str(output_dir)))
    template, written = trainer.prompts.chat_template, ""
    if template is None:
        written = "A prompt is the text as it is: nothing is put before or after it.\n"
    else:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", template)), default=0))
        written = f"The chat template of the tokenizer:\n\n{fence}jinja\n{template}\n{fence}\n"
    text = (
        f"## Quick start\n\n```python\n{snippet(trainer, model, row)}```\n\n"
        f"## Prompt template\n\n{written}\n{_data(trainer)}\n## Training procedure"
    )
    before, _, rest = card.read_text(encoding="utf-8").partition("## Quick start")
    folder = Path(trainer.accelerator.unwrap_model(trainer.model).config._name_or_path).name
    before = before.replace(_NO_BASE, f"the local model `{folder}`" if folder else "a local model")
    _, _, after = rest.partition("## Training procedure")
    write_atomically(card, lambda path: path.write_text(before + text + after, encoding="utf-8"))
