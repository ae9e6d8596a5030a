"""What the benchmarks share: where the data are, the table they print, the `results.json` they write."""

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from tamis.recorder import write_atomically

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def skip_without_data(folder: str) -> None:
    """Leave, with a message, where the benchmark's data are not on this machine."""
    if not (DATA / folder).is_dir():
        print(f"skipped: the data of this benchmark are not here ({DATA / folder})", file=sys.stderr)
        sys.exit(0)


def finish(arguments: argparse.Namespace, rows: list[dict[str, Any]], aggregates: dict[str, list[float]]) -> None:
    """Print the rows as a table and write ``results.json``.

    Args:
        rows: one per method and seed.
        aggregates: name -> one value per seed.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[_cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
    summary = {}
    for name, found in aggregates.items():
        values = [value for value in found if value is not None]
        if not values:
            continue
        std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        summary[name] = {"mean": float(np.mean(values)), "std": std, "num_seeds": len(values)}
        print(f"{name} {summary[name]['mean']:.3f} +- {std:.3f} ({len(values)} seeds)")
    results = {
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
        "machine": {"processor": platform.processor() or platform.machine(), "num_cpus": os.cpu_count()},
        "versions": {name: version(name) for name in ("tamis", "torch", "transformers", "trl")},
        "rows": rows,
        "aggregates": summary,
    }
    text = json.dumps(results, indent=1)
    write_atomically(arguments.output_dir / "results.json", lambda path: path.write_text(text))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
