"""Nothing is lost: runs that are killed hundreds of times, and runs whose every write fails once.

    python benchmarks/kills.py --output_dir runs/kills [--quick]

A story is a run of `tamis train` on a tiny model that dies by SIGKILL up to three times, in one phase, and is resumed
until its end; then all that it has left is compared with the undisturbed run. After that every place at which a run
writes fails once with each error of a disk, and the run is resumed; so does every place at which `tamis score` writes,
and every one of the files that are `tamis compare`'s own. A story that is told already in the output directory is not
told again. Linux with a C compiler; see `tests/nothing_lost.py`.
"""

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import finish, make_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from nothing_lost import AIMS, ERRORS, OPTIONS, OTHER_COMMANDS, SCENARIOS, Death, Runs, forks, write_sites

KILLED = -9
STORIES, KILLS = 11, 3  # of each scenario and aim; in each


def tell(runs: Runs, name: str, scenario: str, aim: str) -> dict[str, Any]:
    """One story of kills: how many there were, and in what the run differs at its end."""
    dice, kills = random.Random(name), list[str]()
    for _ in range(KILLS):
        life = runs.resume(name, AIMS[aim](runs.whole.writes, dice))
        if life.exit_code != KILLED:
            break
        kills.append(life.writes[-1].name if life.writes else "")
    else:
        life = runs.resume(name)
    differences = runs.differences(name) if life.exit_code == 0 else [life.last_words]
    return {"kind": "kills", "scenario": scenario, "aim": aim, "after": kills, "differences": differences}


def fail(runs: Runs, name: str, error: str, at: int) -> dict[str, Any]:
    """One write that fails: whether the command says which and what to do, and in what the resumed run differs."""
    write = runs.whole.writes[at - 1]
    life = runs.live(name, death=Death(at, ERRORS[error]))
    failed = [line for line in life.said.splitlines() if ", seed 0 failed: " in line]  # of a comparison, that goes on
    file, words = write.name.rpartition("/")[2].removeprefix("*"), failed[0] if failed else life.last_words
    is_clear = life.exit_code == 1 and (file in words or "checkpoint" in words) and ", then " in words
    resumed = runs.resume(name)
    differences = runs.differences(name) if resumed.exit_code == 0 else [resumed.last_words]
    found = {"kind": "failure", "command": runs.command, "error": error, "operation": write.kind, "file": write.name}
    return found | {"words": words.replace(str(runs.folder), ""), "is_clear": is_clear, "differences": differences}


def told(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All stories, those of an earlier call among them."""
    file, rows = arguments.output_dir / "stories.jsonl", []
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if file.exists():
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    known = {row["name"] for row in rows}
    num_stories, every = (1, 20) if arguments.quick else (STORIES, 1)

    def add(name: str, runs: Runs, tell_it: Any, *given: Any) -> None:
        if name not in known:
            rows.append({"name": name} | tell_it(runs, name, *given))
            with file.open("a", encoding="utf-8") as stories:
                stories.write(json.dumps(rows[-1]) + "\n")
            runs.forget(name)

    with tempfile.TemporaryDirectory() as folder, forks(Path(folder)) as context:
        scenarios = {name: Runs(context, Path(folder) / name, *options) for name, options in SCENARIOS.items()}
        for k in range(num_stories):
            for scenario, runs in scenarios.items():
                for aim in AIMS:
                    add(f"{scenario}, {aim}, {k}", runs, tell, scenario, aim)
        failing = [scenarios["refining"]]
        failing += [Runs(context, Path(folder) / name, *own, command=name) for name, own in OTHER_COMMANDS.items()]
        for runs in failing:
            for error, at in own_sites(runs)[::every]:
                write = runs.whole.writes[at - 1]
                add(f"{runs.command}, {error} {write.kind} {write.name}".replace("/", " "), runs, fail, error, at)
    return rows


def own_sites(runs: Runs) -> list[tuple[str, int]]:
    """`write_sites`; of a comparison those of files that only it writes."""
    writes = runs.whole.writes
    own = (".json", ".html") if runs.command == "compare" else ""
    return [(error, at) for error, at in write_sites(writes) if writes[at - 1].name.endswith(own)]


def main() -> None:
    parser = make_parser(__doc__, quick="one story of each kind: shows that it runs", seeds=())
    arguments = parser.parse_args()
    rows = told(arguments)
    arguments.options = " ".join(OPTIONS)
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
