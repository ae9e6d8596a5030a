"""The short help of `tamis train` and of the commands that take its settings: examples, then the options that matter.

It imports nothing but argparse, so that it is there at once. `--help_all` has every option, from the parser itself.
"""

import argparse

EXAMPLES = {
    "train": """examples:
  tamis train --model_name_or_path Qwen/Qwen3-0.6B --train_dataset train.jsonl \\
    --validation_dataset validation.jsonl --output_dir run
  tamis train --config run/config.yaml --output_dir again     the same run once more
  tamis train --config run/config.yaml --output_dir run --resume_from_checkpoint last
""",
    "check": """examples:
  tamis check --model_name_or_path Qwen/Qwen3-0.6B --train_dataset train.jsonl \\
    --validation_dataset validation.jsonl --output_dir run
  tamis check --train_dataset train.jsonl                     the rows alone, without a model
""",
    "score": """examples:
  tamis score --model_name_or_path Qwen/Qwen3-0.6B --train_dataset train.jsonl \\
    --validation_dataset validation.jsonl --output_dir scores
  tamis select scores --output_dir clean                      the rows that are likely right, in files of their own
""",
    "compare": """examples:
  tamis compare --model_name_or_path Qwen/Qwen3-0.6B --train_dataset train.jsonl \\
    --validation_dataset validation.jsonl --eval_dataset held_out.jsonl --output_dir comparison
""",
}
_WHAT = {
    "train": "Fine-tune a model on doubtful rows under the guidance of trusted ones.",
    "check": "Say what `tamis train` would meet: bad rows, copies, what is trained on, time, memory and disk.",
    "score": "Say how likely each doubtful row is right, by what trusted rows teach a model; nothing is trained.",
    "compare": "Tell on your own data whether selection pays: tamis beside plain SFT, mixing and rivals.",
}
# By option: what its value is called, and what it does. A test holds the defaults, in brackets, against the settings.
OPTIONS: dict[str, tuple[str, str]] = {
    "model_name_or_path": ("MODEL", "folder or hub name"),
    "train_dataset": ("FILE", "doubtful rows: JSON, CSV, Parquet, folder, hub"),
    "validation_dataset": ("FILE", "trusted rows, 50 or more, that guide it"),
    "eval_dataset": ("FILE", "held-out rows, to measure the result"),
    "output_dir": ("DIR", "where all files go [trainer_output]"),
    "prompt_column": ("NAME", "column of the prompts, if unrecognised"),
    "response_column": ("NAME", "column of the responses, if unrecognised"),
    "learning_rate": ("LR", "about 2e-4 with LoRA [2e-05]"),
    "num_train_epochs": ("N", "passes over the training rows [3.0]"),
    "max_steps": ("N", "stop after so many steps [-1: by epochs]"),
    "per_device_train_batch_size": ("N", "rows a device holds at a time [8]"),
    "gradient_accumulation_steps": ("N", "batches in one step [1]"),
    "max_length": ("N", "tokens of a row; more are cut [1024]"),
    "use_peft": ("", "train a LoRA adapter, not the whole model"),
    "lora_r": ("R", "rank of the adapter [16]"),
    "selector": ("NAME", "how rows get weights [scout]"),
    "refine_fraction": ("auto", "new responses for prompts of wrong rows [0]"),
    "resume_from_checkpoint": ("last", "go on with a run that was interrupted"),
    "seed": ("N", "of all randomness [42]"),
    "log_level": ("LEVEL", "debug shows everything [passive: the essential]"),
}


_OWN: dict[str, dict[str, tuple[str, str]]] = {
    "check": {
        "no_measure": ("", "do not load the model, nor train steps to know time and memory"),
        "json": ("", "write one JSON object to stdout, and nothing else"),
    },
    "compare": {
        "methods": ("NAMES", "what is compared; --help_all lists them [six], or all"),
        "seeds": ("N N", "a run of each method each [0 1 2]"),
        "metric": ("NAME", "eval_loss, exact_match, module:function, lm_eval:TASK [eval_loss]"),
        "max_tokens": ("N", "tokens of a run [those of plain SFT]"),
        "max_minutes": ("N", "the same as time"),
    },
}
_LEFT_OUT = {
    "score": (
        "eval_dataset", "num_train_epochs", "max_steps", "selector", "refine_fraction", "resume_from_checkpoint",
    ),
    "compare": ("refine_fraction", "resume_from_checkpoint", "seed"),
}  # fmt: skip


def short_help(command: str = "train") -> str:
    """The text of `tamis COMMAND --help`."""
    parser = argparse.ArgumentParser(
        prog=f"tamis {command}",
        usage=f"tamis {command} --model_name_or_path MODEL --train_dataset FILE [options]",
        description=f"{_WHAT[command]}\n\n{EXAMPLES[command]}",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36),
        add_help=False,
    )
    options = parser.add_argument_group("options, in order of need")
    for name, (metavar, text) in OPTIONS.items():
        if name not in _LEFT_OUT.get(command, ()):
            _add(options, name, metavar, text)
    other = parser.add_argument_group("more")
    for name, (metavar, text) in _OWN.get(command, {}).items():
        _add(other, name, metavar, text)
    other.add_argument("--config", metavar="FILE", help="read options from a YAML file; flags win")
    other.add_argument("--help_all", action="store_true", help="all options, those of TRL and transformers too")
    other.add_argument("--version", action="store_true", help="version of tamis")
    return parser.format_help()


def _add(group: argparse._ArgumentGroup, name: str, metavar: str, text: str) -> None:
    if metavar:
        group.add_argument(f"--{name}", metavar=metavar, help=text)
    else:
        group.add_argument(f"--{name}", action="store_true", help=text)
