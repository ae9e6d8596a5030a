"""What `tamis check` costs with a million rows: time and memory, without a model.

    python benchmarks/check_speed.py --output_dir runs/check_speed [--quick]

Rows of about 250 characters are made in a temporary folder: no copies (`random`), one row in five a near-duplicate of
another (`near`), and rows that are alike but for a number, as a template makes them (`template`). Beside them are 1,000
validation rows. Each file is checked as a user would, in a process of its own, on one thread. `load_s` is
`DataArguments.load`, `rows_s` the checks, hashes and overlaps, `near_s` the search for near-duplicates, `total_s` the
whole command within its process. `peak_gb` is the peak memory of the process, of which `import_gb` is there before any
row.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from common import each_in_its_process, finish, make_parser, peak_gb
from data_speed import make_pairs, write_lines

from tamis.check import command, overlap
from tamis.train_parser import make_train_parser


def make_files(num_rows: int, folder: Path) -> dict[str, Path]:
    """Write the files of rows, and `trusted.jsonl` beside them."""
    generator, rows = random.Random(2), make_pairs(num_rows, seed=0)
    write_lines(folder / "trusted.jsonl", make_pairs(1000, seed=1))
    near = [dict(row) for row in rows]
    for i in generator.sample(range(1, num_rows), num_rows // 5):
        near[i]["prompt"], near[i]["completion"] = rows[i - 1]["prompt"], rows[i - 1]["completion"] + " Amen"
    text = rows[0]["completion"]
    alike = [{"prompt": f"How do you feel about number {i}?", "completion": text} for i in range(num_rows)]
    files = {}
    for kind, found in {"random": rows, "near": near, "template": alike}.items():
        files[kind] = folder / f"{kind}.jsonl"
        write_lines(files[kind], found)
    return files


def measure(file: Path, validation_file: Path) -> dict[str, Any]:
    """Seconds, peak memory and what was found of one file, in this process."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    found: dict[str, Any] = {"import_gb": peak_gb()}

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timing(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            found[name] = found.get(name, 0.0) + time.perf_counter() - start
            return result

        return timing

    command._load = timed("load_s", command._load)
    command._check_rows = timed("rows_s", command._check_rows)
    overlap.near_duplicates = timed("near_s", overlap.near_duplicates)
    options = ["--train_dataset", str(file), "--validation_dataset", str(validation_file), "--use_cpu", "--bf16", "no"]
    data, args, model_args, _ = make_train_parser("check").parse_args_and_config(options)
    report = timed("total_s", command.check)(data, args, model_args)
    training = report.data_sets["train_dataset"]
    found |= {"searched": training.searched, "near_duplicates": training.near_duplicates}
    return found | {"peak_gb": peak_gb()}


def main() -> None:
    arguments = make_parser(__doc__, quick="10,000 rows: shows that it runs", seeds=()).parse_args()
    num_rows = 10_000 if arguments.quick else 1_000_000
    finish(arguments, each_in_its_process(make_files, measure, num_rows, "rows"), {})


if __name__ == "__main__":
    main()
