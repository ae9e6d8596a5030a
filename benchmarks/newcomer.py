"""A newcomer's path, timed: from the clone to the report on own rows, by the commands of the quickstart.

    python benchmarks/newcomer.py --output_dir runs/newcomer [--quick]

The rows and the model are those of the demo, made beforehand: 4,000 doubtful rows, 80 trusted ones, 500 held out, a
Llama of 0.3M parameters. Everything else is read from `docs/index.md` of the clone: its shell commands run one after
the other in a new shell, as they stand but for the name of the model, up to the report on the trained model. Packages
have the pinned versions of `requirements.txt` (`PIP_CONSTRAINT`). Seconds on the clock of this machine.
"""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

from common import finish, make_parser

from tamis.demo.language import make_language_world

ROOT = Path(__file__).resolve().parents[1]
NAMED, LAST = "Qwen/Qwen3-0.6B", "tamis report run"
QUICK_WORLD = {"num_train": 200, "num_validation": 40, "num_eval": 20, "pretrain_steps": 20}


def commands(page: Path) -> list[str]:
    """Lines of the shell in the quickstart, up to the last step."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return lines[: lines.index(LAST) + 1]


def timed(command: str, folder: Path, environment: dict[str, str]) -> float:
    """Seconds of a command in a shell; its output is shown.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    started = time.perf_counter()
    subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=True)
    return time.perf_counter() - started


def walk(output_dir: Path, is_quick: bool) -> list[dict[str, Any]]:
    """A row for each step."""
    task = make_language_world(output_dir / "world", **(QUICK_WORLD if is_quick else {}))
    clone = output_dir / "tamis"
    shutil.rmtree(clone, ignore_errors=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    rows = [{"step": "git clone", "seconds": timed(f"git clone --quiet {ROOT} {clone}", output_dir, environment)}]
    files = {"train": task.train_file, "validation": task.validation_file, "held_out": task.eval_file}
    for name, file in files.items():
        shutil.copy(file, clone / f"{name}.jsonl")
    environment["PIP_CONSTRAINT"] = str(clone / "requirements.txt")
    activate = "source .venv/bin/activate"
    for line in commands(clone / "docs" / "index.md"):
        command = line.replace(NAMED, str(task.model_dir.resolve()))
        prefix = "" if "venv" in line else f"{activate} && "
        seconds = timed(prefix + command, clone, environment)
        rows.append(
            {"step": " ".join(line.split()[:2]) if "venv" not in line else "python -m venv", "seconds": seconds}
        )
    return [*rows, {"step": "in all", "seconds": sum(row["seconds"] for row in rows)}]


def main() -> None:
    arguments = make_parser(__doc__, quick="200 rows: shows that it runs", seeds=()).parse_args()
    arguments.output_dir = arguments.output_dir.resolve()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    finish(arguments, walk(arguments.output_dir, arguments.quick), {})


if __name__ == "__main__":
    main()
