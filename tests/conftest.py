"""A tiny Llama with a character tokenizer, made on the spot, and what every test of a trainer shares."""

import json
import string
from functools import partial
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from scripted import Script, letters
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer
from weighed_files import weigh_files

from tamis import BilevelConfig, BilevelTrainer
from tamis.refining.generation import TransformersGenerator

datasets.disable_progress_bars()

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# One step of a trainer on the CPU in float32, that writes nothing which nobody asked for.
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 4,
}
# One trial of a scout, instead of three rates and two lengths.
ONE_TRIAL = {"scout_learning_rate": 1e-2, "scout_epochs": 8}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    symbols = ["<pad>", "<eos>", "<unk>", *string.ascii_lowercase, *string.digits, *" <>:+=\n"]
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tiny_model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_model(tokenizer).save_pretrained(path)
    return str(path)


@pytest.fixture
def bilevel(model_dir, tmp_path):
    """Make a `BilevelTrainer` on the tiny model; ``output_dir`` is a folder of the test's own unless given.

    A scout is tried at one rate and length unless others are given.
    """

    def make(train, validation=None, evaluation=None, *, model=None, peft_config=None, callbacks=None, **settings):
        given = {name: settings.pop(name) for name in ("processing_class", "prompt_template") if name in settings}
        if not isinstance(settings.get("selector", ""), str):
            given["selector"] = settings.pop("selector")
        trials = ONE_TRIAL if settings.get("selector", "scout") == "scout" and "selector" not in given else {}
        folder = {"output_dir": str(tmp_path / "run"), "overwrite_output_dir": True}
        args = BilevelConfig(**folder | PLAIN | trials | settings)
        return BilevelTrainer(
            model or model_dir,
            args,
            train_dataset=as_dataset(train),
            validation_dataset=as_dataset(validation),
            eval_dataset=as_dataset(evaluation),
            peft_config=peft_config,
            callbacks=callbacks,
            **given,
        )

    return make


def as_dataset(rows):
    return rows if rows is None or isinstance(rows, Dataset) else Dataset.from_list(rows)


@pytest.fixture
def sft(model_dir, tmp_path):
    """Make TRL's own trainer with the same settings."""

    def make(train, *, callbacks=None, **settings):
        args = SFTConfig(**{"output_dir": str(tmp_path / "sft")} | PLAIN | settings)
        return SFTTrainer(model_dir, args, train_dataset=Dataset.from_list(train), callbacks=callbacks)

    return make


@pytest.fixture
def script(monkeypatch):
    """Give all trainers that are made from now on these completions."""

    def use(completion=letters, **failure) -> Script:
        generator = Script(completion, **failure)
        monkeypatch.setattr("tamis.weighting.make_generator", generator.make)
        return generator

    return use


@pytest.fixture(scope="session")
def talkative_model(tmp_path_factory) -> str:
    return save_talkative_model(tmp_path_factory.mktemp("talkative_model"))


def save_talkative_model(path: Path) -> str:
    """The tiny model with a head that is not flat; letters close its completions, so that most of them end."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer)
    model.lm_head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, *token_ids("abcdefghijklmn")]
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def generated(monkeypatch):
    """How many prompts each call of the real generator completed."""
    calls, generate = [], TransformersGenerator.generate

    def counted(self, prompts, num_generations, seed):
        calls.append(len(prompts))
        return generate(self, prompts, num_generations, seed)

    monkeypatch.setattr(TransformersGenerator, "generate", counted)
    return calls


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of every optimizer step, as they are after clipping."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


class Killed(Exception):
    pass


class Kill(TrainerCallback):
    """Ends a run as a kill would, after an optimizer step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def lora(**settings) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["q_proj", "v_proj"], "r": 4, "task_type": "CAUSAL_LM"} | settings)


def weighted_step(reduction: str, accumulation: int) -> dict:
    """Settings of a step over 6 training and 4 validation rows, by a column of weights; the model stays as it is."""
    return {
        "selector": "column",
        "rho": 0.3,
        "loss_reduction": reduction,
        "per_device_train_batch_size": 6 // accumulation,
        "per_device_validation_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.0,
    }


def pairs(num_rows: int, start: int = 0, wrong: bool = False) -> list[dict[str, str]]:
    """Rows of different lengths: "12=" -> "12" doubled; a wrong answer is the number itself plus a letter."""
    rows = []
    for i in range(start, start + num_rows):
        answer = f"{i}x" if wrong else f"{2 * i}"
        rows.append({"prompt": f"{i}=", "completion": answer + "a" * (i % 4)})
    return rows


def two_kinds(letters: str = "ab", num_rows: int = 12) -> tuple[list[dict[str, str]], ...]:
    """Right rows, wrong rows and validation rows: numbers of two digits in no order, all with an answer by kind.

    So a row is known by its answer and by nothing else, and a scout tells the kinds apart after a moment.
    """

    def rows(start: int, letter: str) -> list[dict[str, str]]:
        places = range(start, start + num_rows)
        return [{"prompt": f"{10 + 37 * k % 90}=", "completion": letter * (1 + k % 3)} for k in places]

    return rows(0, letters[0]), rows(num_rows, letters[1]), rows(2 * num_rows, letters[0])


def worth(p_right: torch.Tensor) -> torch.Tensor:
    """What a row counts that is right with this probability, by the default selector: its weight but for the mean."""
    return p_right.square()


def token_ids(text: str) -> list[int]:
    """Of the tiny tokenizer, one for each character; a dot is the token that closes an answer."""
    tokenizer = tiny_tokenizer()
    return [tokenizer.eos_token_id if c == "." else tokenizer.convert_tokens_to_ids(c) for c in text]


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_close(actual: dict, expected: dict, atol: float = 1e-6) -> None:
    """The same names, and tensors that differ by no more than ``atol``; bit for bit where it is 0."""
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def plain_loss(model, input_ids: list[int], labels: list[int]) -> torch.Tensor:
    """Token-mean loss of one row alone, from the logits, without TRL's fused head or any padding."""
    logits = model(input_ids=torch.tensor([input_ids])).logits[0, :-1]
    return cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100)


def row_gradients(model, row: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    plain_loss(model, row["input_ids"], row["labels"]).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def read_jsonl(path: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not strict JSON")

    return [json.loads(line, parse_constant=refuse) for line in Path(path).read_text().splitlines()]


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def message_of(call) -> str:
    """The text of the ValueError that `call` raises, which must be one line."""
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def weigh(tmp_path, monkeypatch):
    """Weigh the rows of files in the working directory, see `weighed_files.weigh_files`."""
    monkeypatch.chdir(tmp_path)
    return partial(weigh_files, tmp_path)
