"""Twins of the recipes, small enough for a CPU: the paper's two experiments on rows and a model that are at hand.

    python benchmarks/recipes.py --output_dir runs/recipes [--scenarios quality safety hh_rlhf] [--quick]

Each twin is a recipe of `recipes/` for Llama-3, read by the parser of `tamis train`; flags replace the model, the
files, the rates and the lengths, nothing else. The model is a Llama of 2.2M parameters, pretrained on other rows of
Alpaca: nothing here is a figure of a large model. Trusted and held-out rows are of the right kinds:

| twin      | recipe    | right kinds                                 | wrong kind                         |
|-----------|-----------|---------------------------------------------|------------------------------------|
| `quality` | `quality` | Alpaca rated 4.5 of 5 or more (AlpaGasus)   | Alpaca rated lower                 |
| `safety`  | `safety`  | Alpaca; harmful questions with safe answers | harmful goals, "Sure, here is ..." |
| `hh_rlhf` | `safety`  | Alpaca; the answer that people preferred    | the answer that they rejected      |

The answers to the harmful goals (AdvBench) are no more than the goal itself, said again. Methods: the model as it is,
trusted rows alone, direct mixing at rho 0.5, the published rule (softmax of one logit a row, rho 0.5), the recipe
without refining, the recipe. A method that is finished is not run again.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from common import DATA, finish, make_parser, make_small_model, skip_without_data
from llm_rows import hh_questions, read_alpaca
from transformers.utils.chat_template_utils import render_jinja_template

from tamis.data import load_rows
from tamis.files import write_atomically
from tamis.prompts import ALPACA
from tamis.run import make_trainer
from tamis.train_parser import make_train_parser

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
RECIPE_OF = {"quality": "quality", "safety": "safety", "hh_rlhf": "safety"}
MAX_CHARACTERS = 400  # of a row's prompt and of its answer
PRETRAINING = {"rows": 16_000, "steps": 1000}
QUICK_PRETRAINING = {"rows": 80, "steps": 5}
Row = dict[str, str]
# Of `eval` so many are held out of the right kinds, and at most 100 of the wrong one, of which there are few.
SIZES = {"train": 576, "validation": 96, "eval": 160}
QUICK_SIZES = {"train": 24, "validation": 12, "eval": 12}
FLAGS = """--prompt_template alpaca --max_length 256 --learning_rate 2e-3 --scout_learning_rate 1e-3 --scout_epochs 6
    --refine_every 0.5 --max_new_tokens 64 --bf16 false --dtype float32 --use_cpu --activation_checkpointing false
    --save_strategy no --report_to none --disable_tqdm true --per_device_eval_batch_size 32""".split()  # noqa: SIM905
QUICK_FLAGS = "--max_steps 2 --scout_epochs 1 --max_new_tokens 4".split()  # noqa: SIM905
MIXING = ["--selector", "none", "--rho", "0.5", "--refine_fraction", "0"]
METHODS = {
    "trusted rows alone": ["--selector", "none", "--rho", "0", "--refine_fraction", "0"],
    "direct mixing": MIXING,
    "published rule": ["--selector", "softmax", "--reference", "zero", *MIXING[2:]],
    "tamis, selection alone": ["--refine_fraction", "0"],
    "tamis": [],
}


# --- rows -------------------------------------------------------------------------------------------------------------


def alpaca(rated_well: bool | None = None) -> Iterator[Row]:
    """Rows of Alpaca; all of them, or those that are rated 4.5 or more, or those that are not."""
    for row in read_alpaca():
        if rated_well is None or bool(row["rated_4.5"]) == rated_well:
            yield {name: row[name] for name in ("instruction", "input", "output")}


def as_row(question: str, answer: str) -> Row:
    return {"instruction": question, "input": "", "output": answer}


def safe_answers() -> Iterator[Row]:
    path = DATA / "safety/safety_only_instructions.json"
    for row in json.loads(path.read_text(encoding="utf-8")):
        yield as_row(row["instruction"], row["output"])


def unsafe_answers() -> Iterator[Row]:
    """Harmful goals, and the beginning of an answer as AdvBench has it: "Write a script" - "Sure, here is a script"."""
    for line in (DATA / "safety/harmful_behaviors.csv").read_text(encoding="utf-8").splitlines():
        goal = line.strip().strip('"')
        yield as_row(goal, f"Sure, here is {goal.split(' ', 1)[1]}")


def people_answers(preferred: bool) -> Iterator[Row]:
    """First turns of hh_rlhf with the preferred or with the rejected answer."""
    for question in hh_questions():
        answer = question.right if preferred else question.wrong
        if len(question.prompt) == 1 and answer:
            yield as_row(question.prompt[0]["content"], answer)


# Of each twin, the rows of every kind: those that are right, then the wrong one.
KINDS: dict[str, dict[str, Any]] = {
    "quality": {"rated well": lambda: alpaca(True), "rated low": lambda: alpaca(False)},
    "safety": {"Alpaca": alpaca, "safe": safe_answers, "unsafe": unsafe_answers},
    "hh_rlhf": {
        "Alpaca": alpaca,
        "preferred": lambda: people_answers(True),
        "rejected": lambda: people_answers(False),
    },
}


def make_parts(twin: str, sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of ``train`` (all kinds alike), ``validation``, ``right`` and ``wrong`` (both held out); no prompt twice."""
    rng, taken = random.Random(seed), set[tuple[str, str]]()
    kinds = list(KINDS[twin])
    right, wrong = kinds[:-1], kinds[-1]
    parts: dict[str, list[dict[str, Any]]] = {"train": [], "validation": [], "right": [], "wrong": []}
    for kind in kinds:
        found = [row for row in KINDS[twin][kind]() if is_short(row)]
        rng.shuffle(found)
        quotas = {"train": sizes["train"] // len(kinds)}
        if kind == wrong:
            quotas["wrong"] = min(sizes["eval"], 100)
        else:
            quotas |= {"validation": sizes["validation"] // len(right), "right": sizes["eval"] // len(right)}
        rows = iter(found)
        for part, num_rows in quotas.items():
            wanted = len(parts[part]) + num_rows
            for row in rows:
                if (prompt := (row["instruction"], row["input"])) not in taken:
                    taken.add(prompt)
                    parts[part].append({**row, "kind": kind, "is_right": kind != wrong})
                if len(parts[part]) == wanted:
                    break
    for rows_of_part in parts.values():
        rng.shuffle(rows_of_part)
    return parts


def is_short(row: Row) -> bool:
    """Whether a row is short enough, and has an answer."""
    return len(row["instruction"]) + len(row["input"]) <= MAX_CHARACTERS and 0 < len(row["output"]) <= MAX_CHARACTERS


def write_parts(parts: dict[str, list[dict[str, Any]]], folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.jsonl" for name in parts}
    for name, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in parts[name]), encoding="utf-8")
    return files


def as_text(row: Row) -> str:
    """A row in the template of the recipes: their models have seen prompts, too."""
    question = "\n\n### Input:\n".join(text for text in (row["instruction"], row["input"]) if text)
    message = {"role": "user", "content": question}
    (prompt,), _ = render_jinja_template([[message]], chat_template=ALPACA, add_generation_prompt=True)
    return f"{prompt}{row['output']}"


def make_model(model_dir: Path, is_quick: bool, seed: int) -> None:
    """Pretrain the small model on rows of Alpaca that are in no twin of this seed."""
    if (model_dir / "config.json").is_file():
        return
    all_parts = [make_parts(twin, QUICK_SIZES if is_quick else SIZES, seed) for twin in KINDS]
    taken = {row["instruction"] for parts in all_parts for rows in parts.values() for row in rows}
    rows = [row for row in alpaca() if is_short(row) and row["instruction"] not in taken]
    random.Random(seed).shuffle(rows)
    size = QUICK_PRETRAINING if is_quick else PRETRAINING
    make_small_model([as_text(row) for row in rows[: size["rows"]]], model_dir, size["steps"], seed)


# --- runs -------------------------------------------------------------------------------------------------------------


def run(recipe: Path, flags: list[str], files: dict[str, Path]) -> tuple[dict[str, float], dict[str, float]]:
    """Train by a recipe; the metrics of the held-out rows before and after."""
    data, args, model_args = make_train_parser().parse_args_and_config(["--config", str(recipe), *flags])
    held_out = {name: load_rows(files[name], role="eval_dataset") for name in ("right", "wrong")}
    trainer = make_trainer(data, args, model_args, datasets=data.load() | {"eval_dataset": held_out})
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return before, trainer.evaluate()


def losses(metrics: dict[str, float]) -> dict[str, float]:
    return {f"{name}_loss": metrics[f"eval_{name}_loss"] for name in ("right", "wrong")}


def kept_by_kind(run_dir: Path, rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of the training rows of each kind: the share that is kept, and the share of all weight that they have."""
    table = pq.read_table(run_dir / "weights.parquet", columns=["kept", "weight"])
    kept, weight = (table[name].to_numpy().astype(float) for name in ("kept", "weight"))
    kinds = np.array([row["kind"] for row in rows])
    found = {str(kind): kinds == kind for kind in dict.fromkeys(kinds)}
    return {
        "kept": {kind: float(kept[of_kind].mean()) for kind, of_kind in found.items()},
        "weight": {kind: float(weight[of_kind].sum() / weight.sum()) for kind, of_kind in found.items()},
    }


def run_twin(twin: str, folder: Path, model_dir: Path, is_quick: bool, seed: int) -> list[dict[str, Any]]:
    """All methods on one twin: their rows, the base model first. A method that is finished is not run again."""
    parts = make_parts(twin, QUICK_SIZES if is_quick else SIZES, seed)
    files = write_parts(parts, folder)
    recipe = RECIPES / f"{RECIPE_OF[twin]}_llama3_8b.yaml"
    rows: list[dict[str, Any]] = []
    for method, own in METHODS.items():
        run_dir = folder / method.replace(" ", "_").replace(",", "")
        result_file = run_dir / "twin.json"
        if not result_file.is_file():
            train_file = files["validation" if method == "trusted rows alone" else "train"]
            flags = ["--model_name_or_path", str(model_dir), "--train_dataset", str(train_file)]
            flags += ["--validation_dataset", str(files["validation"]), "--eval_dataset", str(files["right"])]
            flags += ["--validation_split", "train", "--eval_split", "train", "--output_dir", str(run_dir)]
            flags += ["--overwrite_output_dir", "--seed", str(seed), *FLAGS, *(QUICK_FLAGS if is_quick else []), *own]
            before, after = run(recipe, flags, files)
            found = {"before": losses(before), "after": losses(after)}
            if method != "trusted rows alone":
                found |= kept_by_kind(run_dir, parts["train"])
            if (scout := run_dir / "scout.json").is_file():
                report = json.loads(scout.read_text(encoding="utf-8"))
                found |= {name: report[name] for name in ("is_believed", "share_right", "expected_auroc")}
            text = json.dumps(found)
            write_atomically(result_file, lambda path, text=text: path.write_text(text, encoding="utf-8"))
        found = json.loads(result_file.read_text(encoding="utf-8"))
        before = found.pop("before")
        if not rows:
            rows.append({"method": "base model", **before})
        rows.append({"method": method, **found.pop("after"), **found})
    return [{"twin": twin, "seed": seed, **row} for row in rows]


def aggregate(rows: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Held-out losses by twin and method, one value per seed."""
    found: dict[str, list[float | None]] = {}
    for row in rows:
        for name in ("right_loss", "wrong_loss"):
            found.setdefault(f"{name}, {row['twin']}, {row['method']}", []).append(row[name])
    return found


def main() -> None:
    parser = make_parser(
        __doc__, seeds=(0,), scenarios=tuple(KINDS), quick="few rows and two steps: shows that it runs"
    )
    arguments: argparse.Namespace = parser.parse_args()
    for folder in ("alpaca", "safety", "hh_rlhf"):
        skip_without_data(folder)
    rows: list[dict[str, Any]] = []
    for seed in arguments.seeds:
        model_dir = arguments.output_dir / f"model{seed}"
        make_model(model_dir, arguments.quick, seed)
        for twin in arguments.scenarios:
            rows += run_twin(twin, arguments.output_dir / f"{twin}{seed}", model_dir, arguments.quick, seed)
            finish(arguments, rows, aggregate(rows))  # after each: a run that is stopped has a table


if __name__ == "__main__":
    main()
