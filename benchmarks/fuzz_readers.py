"""Spoiled files for the readers: each is read, or refused in one line that names it.

    python benchmarks/fuzz_readers.py --output_dir runs/fuzz_readers [--minutes 30] [--seed 0] [--quick]

Starts from small right files of every format and layout. Each try takes one, spoils its bytes in one to five places
(flips, cuts, copies, pieces of other formats), and reads it as `tamis train` would, with and without `skip_bad_rows`.
Anything but rows or a `ValueError` of one line that names the file is a failure: the file is kept in the output
directory. `num_read`, `num_refused` and `num_failed` count tries by suffix.
"""

import gzip
import json
import random
import time
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from common import finish, make_parser

from tamis.data import load_rows

PIECES = (
    b"", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b",", b":",
    b"null", b"NaN", b"1e999", b"-1", b"true", b'{"prompt": {}}', b'""', b"\\ud800", b"PAR1", b"\x1f\x8b", b"prompt",
    b"role", b"\t",
)  # fmt: skip
PAIRS = [{"prompt": f"What is {i}?", "completion": f'It is {i}, "{i}".\n'} for i in range(4)]
CHATS = [
    {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
    for row in PAIRS
]
SHAREGPT = [
    {"conversations": [{"from": "human", "value": row["prompt"]}, {"from": "gpt", "value": row["completion"]}]}
    for row in PAIRS
]
ALPACA = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in PAIRS]
LAYOUTS = (PAIRS, CHATS, SHAREGPT, ALPACA, [{"text": row["completion"]} for row in PAIRS])


def right_files(folder: Path) -> dict[str, list[bytes]]:
    """Contents of right files by suffix."""
    found: dict[str, list[bytes]] = {".jsonl": [], ".json": [], ".parquet": [], ".csv": [], ".tsv": []}
    for rows in LAYOUTS:
        found[".jsonl"].append("\n".join(map(json.dumps, rows)).encode())
        found[".json"].append(json.dumps(rows).encode())
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        found[".parquet"].append((folder / "rows.parquet").read_bytes())
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        lines = [f"prompt{mark}completion", *(f'{row["prompt"]}{mark}"a ""b"" {i}"' for i, row in enumerate(PAIRS))]
        found[suffix].append("\r\n".join(lines).encode())
    return found | {".jsonl.gz": [gzip.compress(content) for content in found[".jsonl"]]}


def spoiled(content: bytes, draw: random.Random) -> bytes:
    """The content, changed in one to five places."""
    for _ in range(draw.randint(1, 5)):
        place, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        match draw.randrange(5):
            case 0:
                content = content[:place] + draw.choice(PIECES) + content[place:]
            case 1:
                content = content[:place] + draw.randbytes(draw.randint(1, 4)) + content[place + 1 :]
            case 2:
                content = content[:place]
            case 3:
                content = content[:place] + content[min(end, place + 20) :]
            case 4:
                content = content[:end] + content[place:end] + content[end:]
    return content


def outcome(path: Path, skips: bool) -> str:
    """What became of a file: ``read``, ``refused``, or ``failed`` with what went wrong."""
    try:
        with redirect_stderr(StringIO()):
            load_rows(path, role="train_dataset", skipped=[] if skips else None)
    except ValueError as error:
        is_right = path.name in str(error) and "\n" not in str(error)
        return "refused" if is_right else f"failed: {error}"
    except Exception as error:
        return f"failed: {error!r}"
    return "read"


def main() -> None:
    parser = make_parser(__doc__, quick="three seconds: shows that it runs", seeds=())
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    draw, counts = random.Random(arguments.seed), Counter[tuple[str, str]]()
    files = right_files(arguments.output_dir)
    end = time.monotonic() + (3 if arguments.quick else 60 * arguments.minutes)
    while time.monotonic() < end:
        suffix = draw.choice(list(files))
        content = spoiled(draw.choice(files[suffix]), draw)
        path = arguments.output_dir / f"spoiled{suffix}"
        path.write_bytes(content)
        found = outcome(path, skips=draw.random() < 0.5)
        counts[suffix, found.split(":")[0]] += 1
        if found.startswith("failed"):
            print(f"failure {sum(counts.values())}{suffix}: {found[:300]}", flush=True)
            (arguments.output_dir / f"failure_{sum(counts.values())}{suffix}").write_bytes(content)
    rows: list[dict[str, Any]] = [
        {"suffix": suffix} | {f"num_{what}": counts[suffix, what] for what in ("read", "refused", "failed")}
        for suffix in files
    ]
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
