"""Does the saved model answer as the run says it does? `tamis train`, then plain transformers by the card's snippet.

    python benchmarks/deployed.py --output_dir runs/deployed [--scenarios clinc clinc_chat alpaca] [--quick]

The run prints the share of 200 held-out rows whose every token is the model's first choice. Afterwards the snippet of
the model card, which knows transformers alone, generates an answer to each of the same prompts.

| scenario     | rows                                          | model                                               |
|--------------|-----------------------------------------------|-----------------------------------------------------|
| `clinc`      | CLINC150, ten intents, `utterance`, `intent`  | a Llama made on the spot, without a chat template   |
| `clinc_chat` | the same                                      | the same, with a chat template                      |
| `alpaca`     | Alpaca's own columns, answers of 1 to 4 words | SmolLM2-135M-Instruct in 4 bits, LoRA (`llm_model`) |

The Alpaca run is stopped by SIGINT after its first logging step and resumed; its exit status is in the results.
"""

import json
import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from common import (
    DATA,
    finish,
    last_evaluation,
    make_parser,
    make_small_model,
    skip_without_data,
    train_command,
    write_files,
)
from llm_model import convert, skip_without_model
from llm_rows import read_alpaca
from transformers import AutoTokenizer

SCENARIOS = ("clinc", "clinc_chat", "alpaca")
NUM_EVAL = 200
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
Rows = dict[str, list[dict[str, str]]]


def clinc_rows(rng: random.Random, is_quick: bool) -> Rows:
    """1,000 rows of ten intents, a tenth of them with another intent, and 100 trusted ones."""
    data = json.loads((DATA / "clinc150/data_full.json").read_text(encoding="utf-8"))
    intents = rng.sample(sorted({intent for _, intent in data["train"]}), 10)
    parts = {
        name: [{"utterance": text, "intent": intent} for text, intent in data[source] if intent in intents]
        for name, source in {"train": "train", "validation": "val", "eval": "test"}.items()
    }
    for rows in parts.values():
        rng.shuffle(rows)
    for row in parts["train"][::10]:
        row["intent"] = rng.choice([intent for intent in intents if intent != row["intent"]])
    sizes = {"train": 100 if is_quick else 1000, "validation": 100, "eval": NUM_EVAL}
    return {name: parts[name][:size] for name, size in sizes.items()}


def alpaca_rows(rng: random.Random, is_quick: bool) -> Rows:
    """300 rows as Alpaca has them, 64 trusted and 200 held-out ones; short answers, so that a match says something."""
    short = [row for row in read_alpaca() if 1 <= len(row["output"].split()) <= 4 and len(row["input"]) < 200]
    short = list({(row["instruction"], row["input"]): row for row in short}.values())
    rng.shuffle(short)
    rows = [{name: row[name] for name in ("instruction", "input", "output")} for row in short]
    sizes = (20, 8, 8) if is_quick else (300, 64, NUM_EVAL)
    bounds = (0, sizes[0], sum(sizes[:2]), sum(sizes))
    return {name: rows[bounds[i] : bounds[i + 1]] for i, name in enumerate(("train", "validation", "eval"))}


def interrupt(command: list[str], run_dir: Path) -> int:
    """Start the command, press Ctrl-C once its metrics say that it trains, and return its exit status."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would ours
    process = subprocess.Popen(command)
    while process.poll() is None:
        if (run_dir / "metrics.jsonl").is_file() and "training_loss" in (run_dir / "metrics.jsonl").read_text():
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.5)
    return process.wait()


def asked(run_dir: Path, rows: list[dict[str, Any]]) -> list[str]:
    """The answers that the snippet of the model card gives to these rows; its model is loaded once."""
    (snippet,) = re.findall(r"```python\n(.*?)```", (run_dir / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    snippet = re.sub(r"^MODEL = .*$", f"MODEL = {str(run_dir)!r}", snippet, flags=re.MULTILINE)
    load, model, ask = re.split(r"^(model = .*)$", snippet, flags=re.MULTILINE)
    found: dict[str, Any] = {}
    exec(load + model, found)
    is_chat = "MESSAGES" in found
    answers = []
    for row in rows:
        found["MESSAGES" if is_chat else "PROMPT"] = _prompt(row, is_chat)
        exec(ask.replace("print(answer)", ""), found)
        answers.append(found["answer"])
    return answers


def _prompt(row: dict[str, Any], is_chat: bool) -> Any:
    """As the card documents it, by hand."""
    text = row["utterance"] if "utterance" in row else "\n\n".join(filter(None, (row["instruction"], row["input"])))
    return [{"role": "user", "content": text}] if is_chat else text


def run_scenario(scenario: str, folder: Path, seed: int, is_quick: bool) -> dict[str, Any]:
    """What the run says of the held-out rows, and what its model answers to them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    result: dict[str, Any] = {"scenario": scenario, "seed": seed}
    if scenario == "alpaca":
        rows, model_dir, column = alpaca_rows(rng, is_quick), folder.parent / "smollm2", "output"
        convert(model_dir)
        options = ["--use_peft", "--learning_rate=2e-4", "--scout_learning_rate=1e-4", "--max_length=160"]
        options += ["--scout_epochs=2", "--logging_steps=5", f"--max_steps={6 if is_quick else 60}"]
    else:
        rows, model_dir, column = clinc_rows(rng, is_quick), folder / "model", "intent"
        texts = [f"{row['utterance']} {row['intent']}" for row in rows["train"]]
        if not (model_dir / "model.safetensors").is_file():
            make_small_model(texts, model_dir, 20 if is_quick else 100, seed)
        if scenario == "clinc_chat":
            tokenizer = AutoTokenizer.from_pretrained(model_dir)
            tokenizer.chat_template = CHAT_TEMPLATE
            tokenizer.save_pretrained(model_dir)
        options = ["--prompt_column=utterance", "--response_column=intent", "--learning_rate=1e-3"]
        options += ["--num_train_epochs=1" if is_quick else "--num_train_epochs=6"]
    command = train_command(write_files(rows, folder), model_dir, folder / "run", f"--seed={seed}", *options)
    if not (folder / "run/weights.parquet").is_file():
        if scenario == "alpaca":
            result["exit_status_of_interrupted_run"] = interrupt(command, folder / "run")
            command.append("--resume_from_checkpoint=last")
        subprocess.run(command, check=True)
    answers = asked(folder / "run", rows["eval"])
    matches = [answer.strip() == row[column].strip() for answer, row in zip(answers, rows["eval"], strict=True)]
    by_run = last_evaluation(folder / "run")["eval_teacher_forced_match"]
    return result | {"match_of_the_run": by_run, "match_of_the_card": sum(matches) / len(matches)}


def main() -> None:
    parser = make_parser(__doc__, seeds=(0,), scenarios=SCENARIOS, quick="few rows and steps: shows that it runs")
    arguments = parser.parse_args()
    for name in ("clinc150", "alpaca"):
        skip_without_data(name)
    if "alpaca" in arguments.scenarios:
        skip_without_model(arguments.output_dir / "smollm2")
    rows = [
        run_scenario(scenario, arguments.output_dir / f"{scenario}{seed}", seed, arguments.quick)
        for seed in arguments.seeds
        for scenario in arguments.scenarios
    ]
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
