"""What ten million rows cost `tamis select`: peak memory of its process, and seconds.

    python benchmarks/select_size.py --output_dir runs/select_size [--quick]

Short pairs and their weights are made in a temporary folder, as JSON lines and as Parquet; two thirds of the rows are
kept. `peak_gb` is that of the whole command, `import_gb` that of `tamis select --help`.
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
from common import finish, make_parser, weighed

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
import resource, subprocess, sys, time
started = time.perf_counter()
subprocess.run([sys.executable, "-m", "tamis", *sys.argv[1:]], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9)
"""


def measure(options: list[str]) -> tuple[float, float]:
    """Seconds of a command, and its peak memory in GB."""
    command = [sys.executable, "-c", MEASURE, *options]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE)
    seconds, peak_gb = map(float, done.stdout.split())
    return seconds, peak_gb


def main() -> None:
    arguments = make_parser(__doc__, quick="10,000 rows: shows that it runs", seeds=()).parse_args()
    num_rows = 10_000 if arguments.quick else 10_000_000
    _, import_gb = measure(["select", "--help"])
    rows: list[dict[str, Any]] = []
    for kind, options in (("jsonl", []), ("jsonl", ["--add_columns"]), ("parquet", ["--add_columns"])):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_run(kind, num_rows, folder)
            seconds, peak_gb = measure(["select", str(folder / "run"), "--output_dir", str(folder / "clean"), *options])
            kept = json.loads((folder / "clean/manifest.json").read_text())["num_kept"]
        rows.append({"file": kind, "options": " ".join(options), "num_rows": num_rows, "num_kept": kept})
        rows[-1] |= {"seconds": seconds, "peak_gb": peak_gb, "import_gb": import_gb}
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
