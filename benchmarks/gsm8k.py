"""Real model solutions of GSM8K, right and wrong, judged and rewritten, by the command line with a small model.

    python benchmarks/gsm8k.py --output_dir runs/gsm8k [--quick]

Lower level: the solutions that four models wrote to the 1,319 test questions (`model_solutions.jsonl`), each labelled
right or wrong; nobody planted the errors. Upper level and held-out rows: human solutions to other questions. Reported
whatever it is: AUROC of the weights against the label, beside what the length of the solution tells, with and without
refining. The model is far too small for arithmetic: what is shown is that the run completes on real rows.
"""

import json
import random

import numpy as np
import pyarrow.parquet as pq
from common import DATA, as_pair, finish, make_parser, make_small_model, skip_without_data, tamis_train, write_files

from tamis.metrics import auroc

NUM_VALIDATION, NUM_EVAL = 200, 300
REFINING = ("--refine_fraction", "0.2", "--num_generations", "2", "--refine_every", "0.5", "--max_new_tokens", "96",
    "--generation_batch_size", "128",
)  # fmt: skip


def read(name: str) -> list[dict]:
    """Rows of one file of the data."""
    return [json.loads(line) for line in (DATA / f"gsm8k/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def split_rows(seed: int) -> tuple[dict[str, list[dict]], list[str]]:
    """Train, validation and eval rows, no question in two of them, and texts to pretrain on."""
    human = read("train")
    random.Random(seed).shuffle(human)
    # The model solutions end with "A: 18" where the human ones have "#### 18".
    human = [{"question": row["question"], "answer": row["answer"].replace("####", "A:")} for row in human]
    solutions = {
        (row["question"], solution["solution"]): solution["is_correct"]
        for row in read("model_solutions")
        for name, solution in row.items()
        if name not in ("question", "ground_truth") and solution["solution"].strip()
    }
    train = [{"question": q, "answer": a, "is_correct": is_correct} for (q, a), is_correct in solutions.items()]
    parts = {"train": train, "validation": human[:NUM_VALIDATION]}
    parts["eval"] = human[NUM_VALIDATION : NUM_VALIDATION + NUM_EVAL]
    rest = human[NUM_VALIDATION + NUM_EVAL :]
    return parts, [f"{row['question']}\n{row['answer']}" for row in rest]


def main() -> None:
    parser = make_parser(__doc__, seeds=())
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    skip_without_data("gsm8k")
    pretrain_steps, max_steps = (20, 20) if arguments.quick else (150, 100)

    parts, texts = split_rows(arguments.seed)
    pairs = {part: [as_pair(row["question"], row["answer"]) for row in rows] for part, rows in parts.items()}
    files = write_files(pairs, arguments.output_dir)
    make_small_model(texts, arguments.output_dir / "model", pretrain_steps, arguments.seed)
    is_correct = np.array([row["is_correct"] for row in parts["train"]])
    lengths = np.array([len(row["answer"]) for row in parts["train"]])
    results = []
    for method, extra in {"mixing": ("--selector", "none"), "tamis": (), "tamis, refining": REFINING}.items():
        run_dir = arguments.output_dir / method.replace(", ", "_")
        metrics = tamis_train(files, arguments.output_dir / "model", run_dir, max_steps, *extra)
        row = {"method": method, "seed": arguments.seed, "test_loss": metrics["eval_loss"]}
        if method != "mixing":
            table = pq.read_table(run_dir / "weights.parquet")
            weights, kept = table["weight"].to_numpy(), table["kept"].to_numpy()
            row |= {"auroc": auroc(weights[kept], is_correct[kept]), "rows_kept": int(kept.sum())}
            row["auroc_by_length_alone"] = auroc(-lengths[kept], is_correct[kept])
        if extra == REFINING:
            answers = pq.read_table(run_dir / "refinements.parquet").to_pylist()
            statuses = [status for answer in answers for status in answer["statuses"]]
            row["usable_answers"] = statuses.count("usable") / len(statuses)
        results.append(row)
    finish(arguments, results, aggregates={"auroc": [results[1]["auroc"]]})


if __name__ == "__main__":
    main()
