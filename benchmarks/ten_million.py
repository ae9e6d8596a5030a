"""What ten million rows cost `tamis check`, `select` and `report`, and a million `tamis train`: memory and seconds.

    python benchmarks/ten_million.py --output_dir runs/ten_million [--quick]

Short pairs and their weights are made in a temporary folder, as JSON lines and as Parquet; two thirds of the rows are
kept. `own_gb` is the most memory that a command has of its own, looked at twenty times a second. `peak_gb` has pages of
files as well, such as those of the rows that are mapped, which the system takes back when it needs them. Training is
20 steps of a tiny model by `--selector mirror`, with two checkpoints: all that comes before a step, and the weights.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import finish, make_parser, random_model, weighed
from tokenizers.pre_tokenizers import Split

BATCH = 100_000


def batches(num_rows: int) -> Iterator[list[dict[str, str]]]:
    for start in range(0, num_rows, BATCH):
        yield [
            {"prompt": f"How much is {i} times 7?", "completion": f"{i} times 7 is {7 * i}."}
            for i in range(start, min(start + BATCH, num_rows))
        ]


def make_run(kind: str, num_rows: int, folder: Path) -> None:
    """Rows in the file ``train.KIND`` and, in the folder ``run``, what a run leaves behind of them."""
    (folder / "run").mkdir(exist_ok=True)
    file = folder / f"train.{kind}"
    (folder / "run/config.yaml").write_text(f"train_dataset: [{file}]\nrun_info: {{}}\n", encoding="utf-8")
    generator, lines, table, weights, first = np.random.default_rng(0), None, None, None, 0
    for rows in batches(num_rows):
        p_right = generator.random(len(rows)).astype(np.float32) ** 0.6
        found = weighed(rows, file.name, first, p_right, np.log(p_right))
        weights = weights or pq.ParquetWriter(folder / "run/weights.parquet", found.schema)
        weights.write_table(found)
        if kind == "parquet":
            found = pa.Table.from_pylist(rows)
            table = table or pq.ParquetWriter(file, found.schema)
            table.write_table(found)
        else:
            lines = lines or file.open("w", encoding="utf-8")
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        first += len(rows)
    for writer in filter(None, (weights, table, lines)):
        writer.close()


# In a small process of its own: Linux counts the memory of the process that starts another one as that one's too.
MEASURE = """
import json, resource, subprocess, sys, time
started, own = time.perf_counter(), 0
process = subprocess.Popen([sys.executable, "-m", "tamis", *sys.argv[1:]], stdout=subprocess.DEVNULL)
while process.poll() is None:
    with open(f"/proc/{process.pid}/status") as file:
        own = max([own, *(int(line.split()[1]) for line in file if line.startswith("RssAnon"))])
    time.sleep(0.05)
assert process.returncode == 0, process.returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "own_gb": own * 1024 / 1e9, "peak_gb": peak * 1024 / 1e9}))
"""


def measure(options: list[str]) -> dict[str, float]:
    """Seconds and memory of a command."""
    command = [sys.executable, "-c", MEASURE, *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def commands(kind: str, folder: Path) -> list[list[str]]:
    """The commands that are measured on one kind of file."""
    clean = ["--output_dir", str(folder / "clean"), "--overwrite_output_dir"]
    select = ["select", str(folder / "run"), *clean]
    if kind == "parquet":
        return [[*select, "--add_columns"]]
    check = ["check", "--train_dataset", str(folder / "train.jsonl"), "--bf16", "false", "--use_cpu"]
    return [select, [*select, "--add_columns"], check, ["report", str(folder / "run")]]


def train_command(folder: Path) -> list[str]:
    """Training on the rows of a folder; the trusted rows are further ones, and the model a random one."""
    symbols = dict.fromkeys("".join(row["prompt"] + row["completion"] for row in next(batches(1000))))
    random_model(
        folder / "model", list(symbols), Split("", "isolated"),
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    trusted = [{"prompt": f"How much is {i} times 8?", "completion": f"{i} times 8 is {8 * i}."} for i in range(200)]
    (folder / "trusted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trusted), encoding="utf-8")
    options = "--max_steps 20 --save_steps 10 --selector mirror --use_cpu --bf16 false --disable_tqdm true"
    files = ["--train_dataset", str(folder / "train.jsonl"), "--validation_dataset", str(folder / "trusted.jsonl")]
    folders = ["--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "trained")]
    return ["train", *files, *folders, *options.split()]


def main() -> None:
    arguments = make_parser(__doc__, quick="10,000 rows: shows that it runs", seeds=()).parse_args()
    num_rows = 10_000 if arguments.quick else 10_000_000
    rows: list[dict[str, Any]] = []
    for kind in ("jsonl", "parquet"):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_run(kind, num_rows, folder)
            # what is mapped goes with the folder
            os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
            for command in commands(kind, folder):
                shown = f"{command[0]} --add_columns" if "--add_columns" in command else command[0]
                rows.append({"command": shown, "file": kind, "num_rows": num_rows, **measure(command)})
                finish(arguments, rows, {})
    with tempfile.TemporaryDirectory() as name:
        folder, num_rows = Path(name), num_rows // 10
        os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
        make_run("jsonl", num_rows, folder)
        found = measure(train_command(folder))
        rows.append({"command": "train", "file": "jsonl", "num_rows": num_rows, **found})
        finish(arguments, rows, {})


if __name__ == "__main__":
    main()
