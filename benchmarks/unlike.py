"""A world unlike the demo's: other symbols, other operations, answers of many lengths, two kinds of faults.

    python benchmarks/unlike.py --output_dir runs/unlike [--seeds 0 1 2] [--quick]

It is there to measure what was tuned elsewhere: no setting is chosen on it. Questions are operations on numbers,
`<sort>40271=`. About half of the wrong answers are those of another operation, the others are right but for their
last symbols. The base model is pretrained for a moment on right and wrong rows in equal parts; 4,000 training rows
are wrong in 20% or 80%, beside 64 trusted rows. Both shares have the same base model, questions, trusted rows and
held-out rows, and all methods take the steps of the demo.
"""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import finish, make_parser

from tamis.compare.methods import compare_methods
from tamis.compare.table import format_table
from tamis.compare.task import Task
from tamis.demo.base_model import build_model, build_tokenizer, pretrain
from tamis.demo.run import MIXING_RHOS, SETTINGS

WORLD_VERSION = 1
DIGITS = "0123456789"
WRONG_SHARES = (0.2, 0.8)
NUM_TRAIN, NUM_VALIDATION, NUM_EVAL, NUM_PRETRAIN = 4000, 64, 500, 16_000
PRETRAIN_STEPS = 1600
MIN_LENGTH, MAX_LENGTH = 3, 5

# Each one's fault of the first kind is the answer of the next one.
OPERATIONS: dict[str, Callable[[str], str]] = {
    "sort": lambda number: "".join(sorted(number)),
    "peaks": lambda number: "".join(max(number[: i + 1]) for i in range(len(number))),
    "halves": lambda number: "".join(str(int(digit) // 2) for digit in number),
    "fall": lambda number: "".join(sorted(number, reverse=True)),
    "stutter": lambda number: "".join(2 * digit for digit in number),
    "lows": lambda number: "".join(min(number[: i + 1]) for i in range(len(number))),
    "parity": lambda number: "".join("+-"[int(digit) % 2] for digit in number),
    "odd places": lambda number: number[::2],
}


def draw_number(rng: random.Random) -> str:
    """Digits of which some repeat the one before."""
    number = rng.choice(DIGITS)
    for _ in range(rng.randint(MIN_LENGTH, MAX_LENGTH) - 1):
        number += number[-1] if rng.random() < 0.25 else rng.choice(DIGITS)
    return number


def corrupt(answer: str) -> str:
    """The answer with its last two symbols swapped, or without the last one where that changes nothing."""
    swapped = answer[:-2] + answer[:-3:-1]
    return swapped if swapped != answer else answer[:-1]


def draw_question(taken: set[str], rng: random.Random) -> dict[str, str]:
    """A question that is not in ``taken`` (it is added), its right answer and one of each kind of fault."""
    names = list(OPERATIONS)
    while True:
        name, number = rng.choice(names), draw_number(rng)
        prompt, right = f"<{name}>{number}=", OPERATIONS[name](number)
        other = OPERATIONS[names[(names.index(name) + 1) % len(names)]](number)
        answers = {"right": right, "other": other, "corrupt": corrupt(right)}
        if prompt not in taken and len(set(answers.values())) == len(answers) and all(answers.values()):
            taken.add(prompt)
            return {"prompt": prompt} | answers


def answer_rows(questions: list[dict[str, str]], wrong_share: float, rng: random.Random) -> list[dict[str, Any]]:
    """A row for each question, wrong with that probability; the column ``kind`` names the fault."""
    rows = []
    for question in questions:
        kind = rng.choice(["other", "corrupt"]) if rng.random() < wrong_share else "right"
        truth = {"is_right": kind == "right", "right_answer": question["right"], "kind": kind}
        rows.append({"prompt": question["prompt"], "completion": question[kind], **truth})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_tasks(folder: Path, seed: int, pretrain_steps: int) -> dict[float, Task]:
    """The tasks of one seed, by the share of wrong rows; made once."""
    fingerprint = f"unlike {WORLD_VERSION} {seed} {pretrain_steps}"
    shared = Task.in_folder(folder, fingerprint)
    tasks = {
        share: replace(
            shared,
            train_file=folder / f"train_{share}.jsonl",
            clean_file=folder / f"clean_{share}.jsonl",
            fingerprint=f"{fingerprint} {share}",
        )
        for share in WRONG_SHARES
    }
    manifest = folder / "task.txt"
    if manifest.is_file():
        if manifest.read_text(encoding="utf-8") != fingerprint:
            raise ValueError(f"{folder} holds another task: choose another --output_dir")
        return tasks

    folder.mkdir(parents=True, exist_ok=True)
    rng, taken = random.Random(seed), set[str]()
    evaluation, validation, train, pretraining = (
        [draw_question(taken, rng) for _ in range(num_rows)]
        for num_rows in (NUM_EVAL, NUM_VALIDATION, NUM_TRAIN, NUM_PRETRAIN)
    )
    write_rows(shared.eval_file, answer_rows(evaluation, 0.0, rng))
    write_rows(shared.validation_file, answer_rows(validation, 0.0, rng))
    for share, task in tasks.items():
        rows = answer_rows(train, share, random.Random(seed))
        write_rows(task.train_file, rows)
        write_rows(task.clean_file, [row for row in rows if row["is_right"]])
    make_base_model(answer_rows(pretraining, 0.5, rng), shared.model_dir, pretrain_steps, seed)
    manifest.write_text(fingerprint, encoding="utf-8")
    return tasks


def make_base_model(rows: list[dict[str, Any]], model_dir: Path, num_steps: int, seed: int) -> None:
    """A Llama of 0.2M parameters that has seen right and wrong rows."""
    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in rows]
    tokenizer = build_tokenizer([DIGITS + "+-=", *(f"<{name}>" for name in OPERATIONS)])
    model = build_model(tokenizer, hidden_size=96, num_layers=2, seed=seed)
    pretrain(model, tokenizer, pairs, model_dir, num_steps=num_steps, batch_size=64, learning_rate=3e-3, seed=seed)


def aggregate(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """One value per seed of the figures of interest, at each share of wrong rows."""
    aggregates = {}
    for share in WRONG_SHARES:
        for method, prefix in (("tamis", ""), ("SEAL, one stage", "seal_"), ("trusted rows alone", "trusted_")):
            mine = [row for row in rows if row["wrong_share"] == share and row["method"] == method]
            for figure in ("gap_closure", "gap_closure_loss", "selection_auroc"):
                aggregates[f"{prefix}{figure}_{share}"] = [row[figure] for row in mine]
    return aggregates


def main() -> None:
    arguments = make_parser(__doc__).parse_args()
    all_rows = []
    for seed in arguments.seeds:
        folder = arguments.output_dir / f"seed{seed}"
        tasks = make_tasks(folder / "task", seed, 20 if arguments.quick else PRETRAIN_STEPS)
        common = SETTINGS | {"seed": seed} | ({"max_steps": 20} if arguments.quick else {})
        for share, task in tasks.items():
            rows = compare_methods(task, folder / f"wrong_{share}", common, MIXING_RHOS)
            print(f"seed {seed}, {share:.0%} of the training rows wrong\n{format_table(rows)}", flush=True)
            all_rows += [{"wrong_share": share, "seed": seed, **row} for row in rows]
    finish(arguments, all_rows, aggregate(all_rows))


if __name__ == "__main__":
    main()
