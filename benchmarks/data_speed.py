"""What a million rows cost before and between the steps: load, check, hash and write weights.

    python benchmarks/data_speed.py --output_dir runs/data_speed [--quick]

Rows of about 250 characters are made in a temporary folder, in every kind of file. Each kind is measured in a process
of its own, on one thread: `load_s` is `load_rows`; `check_s` what the trainer does before it tokenizes (`check_rows`,
which hashes, `check_overlap`, `fingerprint`, `row_table`); `write_s` the slowest of three `write_weights`. `total_s` is
load and check, `cpu_s` the same in seconds of the processor, to which others on the machine add little. `peak_gb` is
the peak memory of the process up to there, of which `import_gb` is there before any row.
"""

import csv
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import each_in_its_process, finish, make_parser, peak_gb

from tamis.data import load_rows
from tamis.hashes import fingerprint
from tamis.recorder import Recorder
from tamis.rows import attach_example_ids, check_overlap, check_rows, row_table
from tamis.selection.make import make_row_weights

TEXT = (
    "the of and to in is that why how explain list three reasons give number question answer city capital model learn "
    "weight train été naïve 東京"
)


def make_pairs(num_rows: int, seed: int) -> list[dict[str, str]]:
    generator, words = random.Random(seed), TEXT.split()
    return [
        {
            "prompt": f"{i}, {seed}: {' '.join(generator.choices(words, k=13))}?",
            "completion": " ".join(generator.choices(words, k=30)) + ".",
        }
        for i in range(num_rows)
    ]


def make_files(num_rows: int, folder: Path) -> dict[str, Path]:
    """Write the same rows as pairs and as conversations, and `trusted.jsonl` beside them."""
    pairs = make_pairs(num_rows, seed=0)
    write_lines(folder / "trusted.jsonl", make_pairs(1000, seed=1))
    roles = {"prompt": "user", "completion": "assistant"}
    chats = [{"messages": [{"role": roles[name], "content": row[name]} for name in roles]} for row in pairs]
    files = {}
    for kind, rows in {"pairs": pairs, "messages": chats}.items():
        files[f"{kind}.jsonl"] = path = folder / f"{kind}.jsonl"
        write_lines(path, rows)
        files[f"{kind}.parquet"] = path = folder / f"{kind}.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    files["pairs.json"] = path = folder / "pairs.json"
    path.write_text(json.dumps(pairs), encoding="utf-8")
    files["pairs.csv"] = path = folder / "pairs.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(roles))
        writer.writeheader()
        writer.writerows(pairs)
    return files


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(file: Path, validation_file: Path) -> dict[str, float]:
    """Seconds and peak memory of one kind of file, in this process."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    found = {"import_gb": peak_gb()}
    start_cpu = time.process_time()

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        found[f"{name}_s"] = max(time.perf_counter() - start, found.get(f"{name}_s", 0.0))
        return result

    def check() -> pa.Table:
        hashes = {role: check_rows(dataset, role) for role, dataset in datasets.items()}
        check_overlap(datasets, hashes)
        for role in datasets:
            fingerprint(hashes[role])
        return row_table(attach_example_ids(datasets["train_dataset"]), hashes["train_dataset"])

    datasets = {"validation_dataset": load_rows(validation_file, role="validation_dataset")}
    datasets["train_dataset"] = timed("load", lambda: load_rows(file, role="train_dataset"))
    found["load_gb"] = peak_gb()
    table = timed("check", check)
    found["total_s"] = found["load_s"] + found["check_s"]
    found["cpu_s"] = time.process_time() - start_cpu
    found["peak_gb"] = peak_gb()
    row_weights = make_row_weights("mirror", len(table))

    def write() -> None:
        columns = {"weight": row_weights.all_weights(), "score": row_weights.all_scores()}
        columns |= {"num_updates": row_weights.num_updates_N, "last_loss": row_weights.last_loss_N}
        recorder.write_weights(table, {name: tensor.numpy() for name, tensor in columns.items()})

    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(folder)
        for _ in range(3):
            timed("write", write)
    return found


def main() -> None:
    arguments = make_parser(__doc__, quick="10,000 rows: shows that it runs", seeds=()).parse_args()
    num_rows = 10_000 if arguments.quick else 1_000_000
    finish(arguments, each_in_its_process(make_files, measure, num_rows, "file"), {})


if __name__ == "__main__":
    main()
