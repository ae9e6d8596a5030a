"""What online refining costs: speed of generation, and peak memory whatever the number of answers.

    python benchmarks/refining_cost.py --output_dir runs/refining_cost [--quick]

`tokens_ratio`: tokens per second of `TransformersGenerator` over those of plain `generate` with the same model, rows
and batches (medians of alternating rounds; the forward for old log-probabilities is not generation and is left out).
`memory_ratio_G`: peak memory of a run with G answers to each question over that of the same run without refining, each
in a process of its own: of the accelerator where there is one, else of the whole process.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from statistics import median

import torch
from accelerate import Accelerator
from common import finish, make_parser
from datasets import Dataset
from transformers import GenerationConfig, LlamaForCausalLM

from tamis import BilevelConfig, BilevelTrainer
from tamis.demo.base_model import build_model, build_tokenizer
from tamis.losses import evaluation_mode
from tamis.refining.generation import SamplingSettings, TransformersGenerator

LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUM_GENERATIONS = (1, 4, 16)


def make_rows(num_rows: int, length: int) -> list[dict[str, str]]:
    """Questions and answers of ``length`` letters each."""
    text = LETTERS * (length // 13 + 2)
    return [
        {"prompt": text[i % 26 :][:length] + "=", "completion": text[(i * 7) % 26 :][:length]} for i in range(num_rows)
    ]


def make_model(hidden_size: int) -> tuple[LlamaForCausalLM, object]:
    tokenizer = build_tokenizer([LETTERS + "="])
    return build_model(tokenizer, hidden_size=hidden_size, num_layers=4, seed=0), tokenizer


def tokens_per_second(batch_size: int, num_new_tokens: int, num_rounds: int) -> dict[str, float]:
    """Of our generator and of plain `generate` on the same batches."""
    model, tokenizer = make_model(256)
    accelerator = Accelerator()
    model = model.to(accelerator.device)
    settings = SamplingSettings(temperature=1.0, top_p=1.0, max_new_tokens=num_new_tokens)
    ours = TransformersGenerator(model, accelerator, tokenizer, settings, batch_size=batch_size)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in make_rows(4 * batch_size, 32)]
    batches = [torch.tensor(prompts[i : i + batch_size]) for i in range(0, len(prompts), batch_size)]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=num_new_tokens, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip

    def plain() -> int:
        num_tokens = 0
        with evaluation_mode(model), torch.no_grad():
            for ids in batches:
                ids = ids.to(accelerator.device)
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
                num_tokens += int((out[:, ids.shape[1] :] != tokenizer.pad_token_id).sum())
        return num_tokens

    def generator() -> int:
        seeds = [(0, i) for i in range(len(prompts))]
        return sum(len(r.token_ids) for answers in ours.generate(prompts, 1, seeds) for r in answers)

    speeds: dict[str, list[float]] = {"plain": [], "tamis": []}
    for round_ in range(num_rounds + 1):
        for name, run in (("plain", plain), ("tamis", generator)):
            torch.manual_seed(0)
            started = time.perf_counter()
            num_tokens = run()
            if round_:  # the first round warms up
                speeds[name].append(num_tokens / (time.perf_counter() - started))
    return {name: median(values) for name, values in speeds.items()}


def measure_memory(num_generations: int, is_quick: bool) -> None:
    """Train a few steps in this process (0: without refining) and print the peak memory in bytes."""
    model, tokenizer = make_model(64 if is_quick else 256)
    length = 16 if is_quick else 64
    with tempfile.TemporaryDirectory() as folder:
        args = BilevelConfig(
            folder, max_steps=4, per_device_train_batch_size=16, max_length=4 * length, report_to="none",
            save_strategy="no", disable_tqdm=True, activation_checkpointing=False, max_new_tokens=length,
            refine_fraction=0.5 if num_generations else 0.0, num_generations=num_generations or 4, refine_every=2.0,
        )  # fmt: skip
        rows = Dataset.from_list(make_rows(64, length))
        validation = Dataset.from_list(
            [
                {"prompt": f"{i}{r['prompt']}", "completion": r["completion"]}
                for i, r in enumerate(make_rows(16, length))
            ]
        )
        trainer = BilevelTrainer(
            model, args, train_dataset=rows, validation_dataset=validation, processing_class=tokenizer
        )
        trainer.train()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated())
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def peak_memory(num_generations: int, is_quick: bool) -> float:
    command = [sys.executable, __file__, "--measure_memory", str(num_generations), "--output_dir", "."]
    output = subprocess.run(command + ["--quick"] * is_quick, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def main() -> None:
    parser = make_parser(__doc__, quick="a smaller model: shows that it runs", seeds=())
    parser.add_argument("--measure_memory", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure_memory is not None:
        return measure_memory(arguments.measure_memory, arguments.quick)
    speeds = tokens_per_second(8, 16, 2) if arguments.quick else tokens_per_second(32, 64, 7)
    rows = [{"method": name, "tokens_per_second": value} for name, value in speeds.items()]
    aggregates = {"tokens_ratio": [speeds["tamis"] / speeds["plain"]]}
    offline = peak_memory(0, arguments.quick)
    rows.append({"method": "offline", "peak_memory_mb": offline / 1e6})
    for num_generations in NUM_GENERATIONS:
        peak = peak_memory(num_generations, arguments.quick)
        rows.append({"method": f"refining, G={num_generations}", "peak_memory_mb": peak / 1e6})
        aggregates[f"memory_ratio_{num_generations}"] = [peak / offline]
    finish(arguments, rows, aggregates)


if __name__ == "__main__":
    main()
