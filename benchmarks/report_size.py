"""The page on 50,000 rows: its size, how long it takes to write and, where there is a browser, to be shown.

    python benchmarks/report_size.py --output_dir runs/report_size [--quick]

Rows of about 250 characters in a temporary folder, two thirds of them right. `view_s` is from opening the file until
its table is there, in Chromium by Playwright (`pip install playwright`); it is left out where one of them is missing.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import finish, make_parser, weighed
from data_speed import make_pairs, write_lines

from tamis.output_dir import mark_finished, write_config
from tamis.report.page import ReportArguments, report


def make_run(num_rows: int, folder: Path) -> Path:
    """What `tamis score` leaves behind of such rows."""
    run, rows, generator = folder / "run", make_pairs(num_rows, seed=0), np.random.default_rng(0)
    run.mkdir()
    write_lines(folder / "train.jsonl", rows)
    write_lines(folder / "trusted.jsonl", make_pairs(100, seed=1))
    score = np.where(
        generator.random(num_rows) < 2 / 3, generator.normal(0, 1, num_rows), generator.normal(4, 1, num_rows)
    )
    p_right = (1 / (1 + np.exp(2 * (score - 2)))).astype(np.float32)
    logit = np.log(p_right / (1 - p_right))
    pq.write_table(weighed(rows, "train.jsonl", 0, p_right, logit), run / "weights.parquet")
    ids = pa.array([*range(num_rows), *[None] * 100], pa.int64())
    scores = np.concatenate([score, generator.normal(0, 1, 100)]).astype(np.float32)
    table = pa.table({"example_id": ids, "score": scores, "weight": np.ones(len(ids), np.float32)})
    pq.write_table(table, run / "scout_scores.parquet")
    found = {"is_believed": True, "share_right": 0.67, "expected_auroc": 0.99, "base_coefficient": 1.0, "border": 2.0}
    (run / "scout.json").write_text(json.dumps(found), encoding="utf-8")
    sources = {"train_dataset": [str(folder / "train.jsonl")], "validation_dataset": str(folder / "trusted.jsonl")}
    write_config(run / "config.yaml", sources | {"run_info": {"format_version": 4}})
    mark_finished(str(run), 0)
    return run


def seconds_to_view(page: Path) -> float | None:
    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as started:
        options = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        tab = started.chromium.launch(executable_path=chromium, args=options).new_page()
        start = time.perf_counter()
        tab.goto(f"file://{page}")
        tab.wait_for_selector("html[data-ready]")
        return time.perf_counter() - start


def main() -> None:
    arguments = make_parser(__doc__, quick="500 rows: shows that it runs", seeds=()).parse_args()
    num_rows = 500 if arguments.quick else 50_000
    with tempfile.TemporaryDirectory() as name:
        run = make_run(num_rows, Path(name))
        start = time.perf_counter()
        page = report(ReportArguments(str(run)))
        row = {"num_rows": num_rows, "write_s": time.perf_counter() - start, "page_mb": page.stat().st_size / 1e6}
        row["view_s"] = seconds_to_view(page)
    finish(arguments, [row], {})


if __name__ == "__main__":
    main()
