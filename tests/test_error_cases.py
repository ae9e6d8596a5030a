"""What a user gets wrong, and the one line that answers: input, exit code, message. No case may end in a traceback.

The files are small and right unless a case spoils them, the model folder is one that loads. Nearly all cases end before
the model is loaded.
"""

import errno
import json
import shutil
from pathlib import Path

import pytest
from conftest import pairs, write_jsonl
from transformers import GPT2Config, GPT2LMHeadModel

from tamis.cli import main

CHEAP = ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "1", "--scout_epochs", "1"]
CHAT = [{"role": "user", "content": "1="}, {"role": "assistant", "content": "11"}]


@pytest.fixture
def folder(tmp_path, model_dir, monkeypatch):
    """The working directory of a user."""
    make_files(tmp_path, model_dir)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return tmp_path


def make_files(folder, model_dir):
    """Three files, and a link to a model."""
    write_jsonl(folder / "train.jsonl", pairs(6) + pairs(6, 30, wrong=True))
    write_jsonl(folder / "validation.jsonl", pairs(4, 100))
    write_jsonl(folder / "eval.jsonl", pairs(3, 200))
    (folder / "model").symlink_to(model_dir)


def run(extra, without=()):
    """Exit code of `tamis train` on the files of the folder, with more options."""
    options = {
        "--model_name_or_path": "model",
        "--train_dataset": "train.jsonl",
        "--validation_dataset": "validation.jsonl",
        "--eval_dataset": "eval.jsonl",
        "--output_dir": "run",
    }
    given = [part for name, value in options.items() if name not in without for part in (name, value)]
    return main(["train", *given, *CHEAP, *extra])


def error_of(capfd) -> str:
    """The line that the command ended with; nothing else may look like an error."""
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("tamis")]
    assert len(lines) == 1, captured.err
    assert captured.out == ""
    return lines[0]


# Options, and what the line says.
OPTIONS = [
    # the parser
    ("--lerning_rate 1", "unknown option --lerning_rate; did you mean --learning_rate? See tamis train --help"),
    ("--lr 1", "unknown option --lr. See tamis train --help"),
    ("--model m", "unknown option --model; did you mean --model_name_or_path?"),
    ("--batch_size 4", "unknown option --batch_size; did you mean --per_device_train_batch_size?"),
    ("--epochs 4", "unknown option --epochs; did you mean --num_train_epochs?"),
    ("--train-file x", "unknown option --train-file; did you mean --train"),
    ("--validation_datset=x", "did you mean --validation_dataset?"),
    ("--learning 1e-4", "unknown option --learning; did you mean --learning_rate?"),
    ("--max_step 3", "unknown option --max_step; did you mean --max_steps?"),
    ("--zzz", "unknown option --zzz. See tamis train --help"),
    ("stray", "'stray' belongs to no option"),
    ("-x", "'-x' belongs to no option"),
    ("--max_steps", "--max_steps: expected one argument"),
    ("--max_steps many", "--max_steps: invalid int value: 'many'"),
    ("--max_steps 1.5", "--max_steps: invalid int value: '1.5'"),
    ("--learning_rate fast", "--learning_rate: invalid float value: 'fast'"),
    ("--use_peft maybe", "--use_peft: Truthy value expected: got maybe"),
    ("--selector best", "--selector: invalid choice: 'best' (choose from 'scout'"),
    ("--lr_scheduler_type cosin", "--lr_scheduler_type: invalid choice: 'cosin'"),
    ("--log_level loud", "--log_level: invalid choice: 'loud'"),
    ("--optim adam", "--optim: invalid choice: 'adam'"),
    ("--dtype float8", "--dtype: invalid choice: 'float8'"),
    ("--config", "--config takes the name of a YAML file"),
    ("--config --seed 1", "--config takes the name of a YAML file"),
    ("--config none.yaml", "none.yaml: no such file. Check --config"),
    ("--config=none.yaml", "none.yaml: no such file. Check --config"),
    ("--config .", ".: no such file. Check --config"),
    ("--config a.yaml --config b.yaml", "--config is given twice. Put the settings into one YAML file"),
    # numbers
    ("--per_device_train_batch_size 0", "per_device_train_batch_size must be at least 1, got 0"),
    ("--per_device_eval_batch_size 0", "per_device_eval_batch_size must be at least 1, got 0"),
    ("--per_device_validation_batch_size 0", "per_device_validation_batch_size must be positive, got 0"),
    ("--per_device_train_batch_size -4", "per_device_train_batch_size must be at least 1, got -4"),
    ("--gradient_accumulation_steps 0", "gradient_accumulation_steps must be at least 1, got 0"),
    ("--learning_rate -0.1", "learning_rate must be at least 0, got -0.1"),
    ("--learning_rate=-1e-4", "learning_rate must be at least 0, got -0.0001"),
    ("--learning_rate nan", "learning_rate must be at least 0, got nan"),
    ("--learning_rate inf", "learning_rate must be at least 0, got inf"),
    ("--scout_learning_rate -1", "scout_learning_rate must be positive, got -1"),
    ("--scout_epochs 0", "scout_epochs must be positive, got 0"),
    ("--weight_decay -1", "weight_decay must be at least 0, got -1"),
    ("--max_grad_norm -1", "max_grad_norm must be at least 0, got -1"),
    ("--warmup_steps -1", "warmup_steps"),
    ("--adam_beta1 1.5", "adam_beta1 must be below 1, got 1.5"),
    ("--seed -1", "seed must be at least 0, got -1"),
    ("--max_length 0", "max_length must be at least 1, got 0"),
    ("--max_steps -1 --num_train_epochs 0", "num_train_epochs must be positive, got 0"),
    ("--max_steps -1 --num_train_epochs -2", "num_train_epochs must be positive, got -2"),
    ("--max_steps -1 --num_train_epochs nan", "num_train_epochs must be positive, got nan"),
    ("--logging_steps 0", "requires non-zero --logging_steps"),
    ("--save_steps -3", "save_steps must be at least 0, got -3"),
    ("--neftune_noise_alpha -1", "neftune_noise_alpha must be at least 0, got -1"),
    ("--use_peft --lora_r 0", "lora_r must be at least 1, got 0"),
    ("--use_peft --lora_dropout 1", "lora_dropout must be below 1, got 1"),
    ("--rho 2", "rho must lie between 0 and 1, got 2"),
    ("--refine_fraction 2", "refine_fraction must lie between 0 and 1, got 2"),
    ("--refine_fraction some", "refine_fraction must be a number or 'auto', got 'some'"),
    ("--refine_fraction auto --num_generations 0", "num_generations must be positive, got 0"),
    ("--refine_fraction auto --max_new_tokens -1", "max_new_tokens must be positive, got -1"),
    ("--scores none", "none: no such file. Give a run directory, or its weights.parquet, to --scores"),
    ("--scores train.jsonl", "train.jsonl: cannot be read as Parquet"),
    ("--scores none --refine_fraction auto", "leave out --scores or --refine_fraction"),
    ("--rho_start 0.5", "rho_start goes to a rho that the scout chooses: set --rho too"),
    # what does not go together, or does not exist
    ("--packing", "packing joins rows"),
    ("--auto_find_batch_size", "auto_find_batch_size starts a run over"),
    ("--loss_type dft", "loss_type 'dft' has no per-row log-likelihood"),
    ("--selector column", "selector 'column' reads a column 'weight'"),
    ("--refine_fraction auto --selector mirror", "refine_fraction 'auto' is the share of rows that a scout thinks"),
    ("--load_best_model_at_end", "load_best_model_at_end"),
    ("--bf16 true --fp16", "At most one of fp16 and bf16"),
    ("--model_init_kwargs [1", "--model_init_kwargs takes a JSON object"),
    ("--gradient_checkpointing_kwargs 3", "--gradient_checkpointing_kwargs takes a JSON object"),
    ("--eos_token <none>", "('<none>') is not found in the vocabulary"),
    ("--chat_template_path none.jinja", "none.jinja: no such file. Check --chat_template_path"),
    ("--attn_implementation best", "unknown attn_implementation 'best': choose from eager, "),
    # packages, login, folders
    ("--report_to wandb", "--report_to wandb needs the package wandb: pip install wandb"),
    ("--report_to tensorboard", "--report_to tensorboard needs the package tensorboard: pip install tensorboard"),
    ("--report_to comet_ml", "pip install comet-ml"),
    ("--report_to wandbb", "unknown report_to 'wandbb': choose from none, all"),
    ("--load_in_4bit", "--load_in_4bit needs the package bitsandbytes: pip install bitsandbytes"),
    ("--load_in_8bit", "pip install bitsandbytes"),
    ("--optim adamw_bnb_8bit", "--optim adamw_bnb_8bit needs the package bitsandbytes: pip install bitsandbytes"),
    ("--optim galore_adamw", "pip install galore-torch"),
    ("--optim schedule_free_adamw", "pip install schedulefree"),
    ("--use_liger_kernel", "pip install liger-kernel"),
    ("--deepspeed zero.json", "pip install deepspeed"),
    ("--attn_implementation flash_attention_2", "pip install kernels"),
    ("--refine_fraction auto --generator vllm", "pip install"),
    ("--push_to_hub", "--push_to_hub needs a login: run `hf auth login`, or set HF_TOKEN"),
    ("--output_dir train.jsonl", "train.jsonl is a file: choose another --output_dir"),
    ("--output_dir train.jsonl/run", "train.jsonl is a file: choose another --output_dir"),
    ("--output_dir=", "--output_dir is empty: name a folder"),
    ("--output_dir mine", "mine holds weights.parquet, which a run would write over: move it, choose another"),
    ("--save_strategy best", "save_strategy 'best' compares evaluations: set --eval_strategy too"),
    # the model
    ("--model_name_or_path ./none", "./none: no such folder. Check --model_name_or_path"),
    ("--model_name_or_path /none", "/none: no such folder"),
    ("--model_name_or_path ~/none", "~/none: no such folder"),
    ("--model_name_or_path none/", "none/: no such folder"),
    ("--model_name_or_path a/b/c", "a/b/c: no such folder"),
    ("--model_name_or_path data/none", "data/none: no such folder"),
    ("--model_name_or_path data", "data: a folder without config.json or adapter_config.json"),
    ("--model_name_or_path train.jsonl", "train.jsonl is a file: give the folder of the model"),
    ("--model_name_or_path a--b", "'a--b': no such folder, nor a name that the hub could have"),
    ("--model_name_or_path org/name", "org/name: no such folder, and the hub cannot be reached"),
    ("--model_name_or_path name", "name: no such folder, and the hub cannot be reached"),
    ("--model_name_or_path empty", "empty/config.json' is not a valid JSON file"),
    ("--model_name_or_path broken", "broken. Can't instantiate"),
    ("--model_name_or_path torn", "a file of the model cannot be read"),
    ("--model_name_or_path mute", "mute. Can't instantiate a processor, a tokenizer"),
    # which rows
    ("--train_dataset none.jsonl", "none.jsonl: no such file or folder. Check --train_dataset"),
    ("--validation_dataset none.jsonl", "none.jsonl: no such file or folder. Check --validation_dataset"),
    ("--eval_dataset ./none", "./none: no such file or folder. Check --eval_dataset"),
    ("--train_dataset model/config.txt", "no such file or folder"),
    ("--train_dataset notes.txt", "notes.txt: unknown kind of file"),
    ("--train_dataset data", "data: the folder has no files of rows. Give it some, of .json"),
    ("--train_dataset train.jsonl ./train.jsonl", "./train.jsonl: named twice in train_dataset. Name it once"),
    ("--train_dataset latin.csv", "latin.csv: cannot be read as UTF-8 text; convert it, or check that it is whole ("),
    ("--train_dataset=", "no such file or folder. Check --train_dataset"),
    ("--train_dataset", "--train_dataset: expected at least one argument"),
    ("--train_dataset train", "train: no such file or folder, nor a hub data set"),
    (
        "--train_dataset train.jsonl --source_weights -1",
        "the weight -1.0 is not a finite number >= 0. Correct --source",
    ),
    ("--prompt_column q", "--prompt_column and --response_column go together"),
    ("--prompt_column q --response_column a", 'there is no column "q"'),
    ("--weight_column w --selector column", 'there is no column "w"'),
    ("--train_dataset parted --train_split dev", "no split 'dev', only"),
    ("--eval_dataset validation.jsonl", "validation_dataset and eval_dataset share 4 row(s)"),
    ("--validation_dataset chat.jsonl", "validation_dataset has messages"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS, ids=[options for options, _ in OPTIONS])
def test_options_that_cannot_work(options, message, folder, model_dir, monkeypatch, capfd):
    for target, stand_in in WITHOUT_EXTRAS.items():
        monkeypatch.setattr(target, stand_in)
    make_things_to_trip_over(folder, Path(model_dir))
    assert run(options.split()) == 2
    assert message in error_of(capfd)
    assert not (folder / "run").exists()


def unreachable(*args, **kwargs):
    raise ConnectionError("no network")


# As on a machine without the packages of extras, and without a network.
WITHOUT_EXTRAS = {
    "tamis.prerequisites.find_spec": lambda module: None,
    "tamis.prerequisites.HfApi.model_info": unreachable,
    "tamis.data.HfApi.dataset_info": unreachable,
}


def make_things_to_trip_over(folder, model_dir):
    for name in ("data", "empty", "broken", "torn", "mute", "parted", "mine"):
        (folder / name).mkdir()
    (folder / "mine" / "weights.parquet").write_text("of a user")
    (folder / "notes.txt").write_text("x")
    (folder / "latin.csv").write_bytes("prompt,completion\n1=,\xe9\n".encode("latin-1"))
    for split in ("train", "test"):
        write_jsonl(folder / "parted" / f"{split}.jsonl", pairs(2))
    write_jsonl(folder / "chat.jsonl", [{"messages": CHAT}] * 4)
    (folder / "empty" / "config.json").write_text("")
    (folder / "broken" / "config.json").write_text('{"model_type": "no such model"}')
    for file in model_dir.iterdir():
        (folder / "torn" / file.name).write_bytes(file.read_bytes())
        if file.name.startswith(("config", "model")):
            (folder / "mute" / file.name).write_bytes(file.read_bytes())
    (folder / "torn" / "model.safetensors").write_bytes(b"torn")


# What a YAML file holds, and what the line says.
YAML = [
    ("lerning_rate: 1e-4", "run.yaml: unknown key 'lerning_rate'; did you mean learning_rate?"),
    ("train-dataset: x", "run.yaml: unknown key 'train-dataset'; did you mean train_dataset?"),
    ("model: x", "run.yaml: unknown key 'model'; did you mean model_name_or_path?"),
    ("zzz: 1", "run.yaml: unknown key 'zzz'. Correct it"),
    ("config: a", "run.yaml: unknown key 'config'; did you mean liger_kernel_config?"),
    ("learning_rate:", "run.yaml: learning_rate has no value. Give it one, or remove the line"),
    ("selector: null", "run.yaml: selector has no value"),
    ("train_dataset:", "run.yaml: train_dataset has no value"),
    ("model_name_or_path: [a]", "run.yaml: model_name_or_path takes one value, got ['a']"),
    ("eval_dataset: {a: b}", "run.yaml: eval_dataset takes one value"),
    ("learning_rate: [1, 2]", "run.yaml: learning_rate takes one value, got [1, 2]"),
    ("max_steps: {a: 1}", "run.yaml: max_steps takes one value"),
    ("max_length: long", "--max_length: invalid int value: 'long'"),
    ("max_length: 1.5", "--max_length: invalid int value: '1.5'"),
    ("selector: best", "run.yaml: unknown selector 'best': choose one of scout"),
    ("per_device_train_batch_size: 0", "per_device_train_batch_size must be at least 1, got 0"),
    ("a: [1", "run.yaml: not valid YAML"),
    ("- a", "run.yaml: not a list of names and values"),
    ("", "run.yaml: not a list of names and values"),
    ("1: 2", "run.yaml: not a list of names and values"),
    ("env: 3", "run.yaml: env takes names and values"),
    ("\tlearning_rate: 1", "run.yaml: not valid YAML (while scanning for the next token found character"),
]


@pytest.mark.parametrize(("text", "message"), YAML, ids=[text for text, _ in YAML])
def test_yaml_that_cannot_work(text, message, folder, capfd):
    (folder / "run.yaml").write_text(text)
    assert run(["--config", "run.yaml"]) == 2
    assert message in error_of(capfd)


# What a YAML file holds in the place of training rows.
TRAIN_DATASETS = [
    ("train_dataset: 3", "--train_dataset takes names of files or data sets, got [3]"),
    ("train_dataset: {a: b}", "--train_dataset takes names of files or data sets, got {'a': 'b'}"),
    ("train_dataset: []", "no training rows: give --train_dataset"),
]


@pytest.mark.parametrize(("text", "message"), TRAIN_DATASETS, ids=[text for text, _ in TRAIN_DATASETS])
def test_yaml_without_training_rows(text, message, folder, capfd):
    (folder / "run.yaml").write_text(text)
    assert run(["--config", "run.yaml"], without=["--train_dataset"]) == 2
    assert message in error_of(capfd)


# What is left out, and what the line says.
MISSING = [
    ("--train_dataset", "the following arguments are required: --train_dataset. See tamis train --help"),
    ("--model_name_or_path", "no model: give --model_name_or_path"),
    ("--validation_dataset", "selector 'scout' needs validation rows: give --validation_dataset"),
]


def test_held_out_rows_that_evaluation_misses(folder, capfd):
    assert run(["--eval_strategy", "steps"], without=["--eval_dataset"]) == 2
    assert "eval_strategy 'steps' needs held-out rows: give --eval_dataset" in error_of(capfd)
    assert run(["--eval_on_start"], without=["--eval_dataset"]) == 2
    assert "eval_on_start needs held-out rows: give --eval_dataset" in error_of(capfd)
    assert not (folder / "run").exists()


@pytest.mark.parametrize(("option", "message"), MISSING, ids=[option for option, _ in MISSING])
def test_options_that_are_missing(option, message, folder, capfd):
    assert run([], without=[option]) == 2
    assert message in error_of(capfd)


def rows_of(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# What train.jsonl holds, and what the line says.
ROWS = [
    ("", "train.jsonl: there are no rows"),
    ("\n\n", "train.jsonl: there are no rows"),
    (
        '{"prompt": "1=", "comp',
        "one whole object: not valid JSON (Unterminated string starting at character 18). Correct it.",
    ),
    ('{"text": "a"}\n\n{"text"', "train.jsonl, row 1 (line 3), which must be one whole object"),
    ("[1]\n", "train.jsonl, row 0 (line 1): [1] is not an object"),
    (rows_of({"prompt": "1="}), "train.jsonl: no known layout fits the columns prompt"),
    (rows_of(*pairs(2), {"prompt": "1=", "completion": None}), 'row 2 (line 3), column "completion": the response is'),
    (rows_of(*pairs(2), {"prompt": "1=", "completion": " "}), "the response is empty"),
    (rows_of({"prompt": "1=", "completion": 3}), "the response 3 is not text"),
    (rows_of({"prompt": ["1="], "completion": "1"}), "train.jsonl, row 0 (line 1)"),
    (rows_of({"messages": "1="}), "is not a list of messages"),
    (rows_of({"messages": []}), "there are no messages"),
    (rows_of({"messages": [{"content": "1"}]}), "message 0 has no role"),
    (rows_of({"messages": CHAT[:1]}), "no message of the assistant has content"),
    (rows_of({"messages": CHAT}), "train_dataset has messages, validation_dataset has prompt and completion"),
]


@pytest.mark.parametrize(("text", "message"), ROWS, ids=range(len(ROWS)))
def test_rows_that_cannot_be_trained_on(text, message, folder, capfd):
    (folder / "train.jsonl").write_text(text)
    assert run([]) == 2
    assert message in error_of(capfd)
    assert not (folder / "run").exists()


# What goes wrong under way: the exception of a library, the exit code, and what the line says.
FAILURES = [
    (OSError(errno.ENOSPC, "No space left on device", "run/model"), 1, "the disk is full (run/model): make room"),
    (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), 1, "cannot be written"),
    (MemoryError(), 1, "out of memory: lower --per_device_train_batch_size"),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "out of memory: lower"),
    (PermissionError(errno.EACCES, "Permission denied", "run"), 2, "run: Permission denied"),
    (ModuleNotFoundError("No module named 'tiktoken'", name="tiktoken"), 2, "pip install tiktoken"),
    (TypeError("Llama.__init__() got an unexpected keyword argument 'a'"), 2, "see the settings whose names end in _k"),
    (
        ImportError("X requires the foo library. Run `pip install foo-bar`."),
        2,
        "a package is missing: pip install foo-bar",
    ),
]


@pytest.mark.parametrize(("error", "code", "message"), FAILURES, ids=[str(error)[:30] for error, _, _ in FAILURES])
def test_what_fails_under_way(error, code, message, folder, monkeypatch, capfd):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("tamis.run.BilevelTrainer.__init__", fail)
    assert run([]) == code
    assert message in error_of(capfd)


# Rows for which the model's chat template has no answer.
TEMPLATES = [
    (
        "{{ raise_exception('roles must alternate') }}",
        CHAT,
        "the chat template cannot write a conversation (roles must alternate)",
    ),
    ("{{ messages[1].tool_calls[0].function.name + 1 }}", CHAT, "the chat template cannot write a conversation"),
    (
        "{% for m in messages %}{{ 'x' + m.content }}{% endfor %}",
        None,
        "train.jsonl, row 0 (line 1): the chat template cannot write it",
    ),
    ("{% if %}", CHAT, "the chat template cannot write a conversation (Expected an expression"),
    (None, CHAT, "the model has no chat template"),
]


@pytest.mark.parametrize(("template", "messages", "message"), TEMPLATES, ids=range(len(TEMPLATES)))
def test_templates_that_cannot_render_the_rows(template, messages, message, folder, model_dir, capfd):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    tools = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *CHAT]
    for name in ("train", "validation"):
        rows = [{"messages": messages or tools}] * 4
        write_jsonl(folder / f"{name}.jsonl", [*rows, {"messages": [*CHAT, *CHAT]}] if name == "train" else rows)
    (folder / "model").unlink()
    (folder / "model").mkdir()
    for file in Path(model_dir).iterdir():
        if file.name != "chat_template.jinja":
            (folder / "model" / file.name).write_bytes(file.read_bytes())
    if template is not None:
        (folder / "model" / "chat_template.jinja").write_text(template)
    assert run([], without=["--eval_dataset"]) == 2
    assert message in error_of(capfd)


def test_a_template_that_fails_on_what_a_later_row_says(folder, model_dir, capfd):
    (folder / "model").unlink()
    shutil.copytree(model_dir, folder / "model")
    template = (
        "{% for m in messages %}{{ m.content if 'odd' not in m.content else raise_exception('odd') }}{% endfor %}"
    )
    (folder / "model" / "chat_template.jinja").write_text(template)
    for name in ("train", "validation"):
        rows = [{"messages": CHAT}] * 4
        odd = [{"messages": [CHAT[0] | {"content": "odd"}, CHAT[1]]}]
        write_jsonl(folder / f"{name}.jsonl", rows + (odd if name == "train" else []))
    assert run([], without=["--eval_dataset"]) == 2
    assert "the chat template cannot render a row (TemplateError: odd)" in error_of(capfd)


def test_rows_beyond_the_positions_of_a_model_that_has_learned_them(folder, model_dir, capfd):
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(Path(model_dir) / name, folder / "gpt2")
    options = ["--model_name_or_path", "gpt2", "--prompt_template", "plain", "--max_length", "40"]
    write_jsonl(folder / "eval.jsonl", [{"prompt": "1" * 13, "completion": "2"}])  # an answer has room for three tokens
    assert run(options) == 0
    assert "ANSWER = " in (folder / "run" / "inference_example.py").read_text()
    write_jsonl(folder / "train.jsonl", [*pairs(6), {"prompt": "1=", "completion": "a" * 50}])
    capfd.readouterr()
    assert run([*options, "--overwrite_output_dir"]) == 2
    assert error_of(capfd).endswith(
        "train_dataset: the longest row has 40 tokens, and the model 16 positions: set --max_length 16"
    )


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("none", "none: no such folder. Give a checkpoint, or 'last', to --resume_from_checkpoint"),
        ("model", "model has no tamis.safetensors: it was written with --save_only_model or not by tamis"),
        ("last", "run holds no complete checkpoint to resume from: leave --resume_from_checkpoint out, and set"),
    ],
)
def test_checkpoints_that_are_not_there(checkpoint, message, folder, capfd):
    assert run(["--resume_from_checkpoint", checkpoint]) == 2
    assert message in error_of(capfd)
    assert not (folder / "run").exists() or not any((folder / "run").iterdir())


def test_a_checkpoint_that_is_not_there_is_missed_before_the_model_is_loaded(folder, capfd):
    for checkpoint in ("none", "last"):
        assert run(["--resume_from_checkpoint", checkpoint, "--model_name_or_path", "broken"]) == 2
        assert "resume_from_checkpoint" in error_of(capfd)
    assert not (folder / "run").exists()


def test_a_folder_that_cannot_be_written_to(folder, monkeypatch, capfd):
    (folder / "locked").mkdir()
    monkeypatch.setattr("tamis.prerequisites.os.access", lambda path, mode: "locked" not in str(path))
    assert run(["--output_dir", "locked/run"]) == 2
    assert "locked cannot be written to: choose another --output_dir" in error_of(capfd)


def warnings_of(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: ")]


def test_trusted_rows_that_are_the_training_rows_are_warned_of(folder, monkeypatch, capfd):
    monkeypatch.setattr("tamis.prerequisites.HfApi.model_info", unreachable)
    (folder / "same.jsonl").write_bytes((folder / "train.jsonl").read_bytes())
    for name in ("train.jsonl", "same.jsonl"):
        run(["--validation_dataset", name, "--model_name_or_path", "org/name"])
        (warning,) = warnings_of(capfd)
        assert warning.startswith("warning: validation_dataset and train_dataset have the same rows: nothing tells")


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ("--train_split test", "train_split is set but has no effect: train.jsonl is a file"),
        ("--eval_split test", "eval_split is set but has no effect: eval.jsonl is a file"),
        ("--model_revision v2 --model_name_or_path model", "model_revision is set but has no effect: the model is a"),
        ("--dataset_text_field body", "dataset_text_field is set but has no effect: the rows are not text alone"),
        ("--weight_column w", "weight_column is set but has no effect: selector 'scout' does not read it"),
    ],
)
def test_settings_of_the_data_without_effect_are_warned_of_once(options, warning, folder, monkeypatch, capfd):
    monkeypatch.setattr("tamis.prerequisites.HfApi.model_info", unreachable)
    rows = [row | {"w": 1.0} for row in pairs(6)]
    write_jsonl(folder / "train.jsonl", rows)
    run(["--model_name_or_path", "org/name", *options.split()])
    found = warnings_of(capfd)
    assert [line for line in found if "has no effect" in line] == [line for line in found if warning in line] != []


def test_a_file_that_a_folder_holds_in_vain_is_warned_of(folder, monkeypatch, capfd):
    monkeypatch.setattr("tamis.prerequisites.HfApi.model_info", unreachable)
    (folder / "data").mkdir()
    write_jsonl(folder / "data" / "a.jsonl", pairs(4))
    (folder / "data" / "b.csv").write_text("prompt,completion\n1,2\n")
    run(["--train_dataset", "data", "--model_name_or_path", "org/name"])
    assert any("b.csv is left out" in warning for warning in warnings_of(capfd))


def test_a_name_of_the_hub_costs_one_question(folder, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr("tamis.prerequisites.HfApi.model_info", lambda *a, **k: asked.append(a) or unreachable())
    assert run(["--model_name_or_path", "org/name"]) == 2
    assert len(asked) == 1


def test_a_full_disk_is_seen_through_what_came_after_it(folder, monkeypatch, capfd):
    def save(*args, **kwargs):
        try:
            raise RuntimeError("basic_ios::clear: iostream error")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 43200 vs 43092")

    monkeypatch.setattr("tamis.run.BilevelTrainer.__init__", save)
    assert run([]) == 1
    assert "a file cannot be written (the disk is full, or does not work): see to the disk" in error_of(capfd)


def test_the_table_is_long():
    assert len(OPTIONS) + len(YAML) + len(MISSING) + len(ROWS) + len(FAILURES) + len(TEMPLATES) >= 100


def test_a_fault_of_ours_keeps_its_traceback(folder, monkeypatch):
    monkeypatch.setattr("tamis.run.make_trainer", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run([])


@pytest.mark.parametrize("argv", [["trian"], ["demo", "--sed", "1"], ["demo", "--scenario", "none"], []])
def test_other_commands(argv, capfd):
    assert main(argv) == 2
    assert "Traceback" not in capfd.readouterr().err
