"""The suite: tamis and its rivals on nine scenarios; many and few wrong rows; many, few and biased trusted ones.

    python benchmarks/suite.py --output_dir runs/suite [--jobs 2] [--seeds 0 1 2] [--scenarios ...] [--quick]

Six worlds of strings (`tasks/strings.py`) and three real tasks, German inflection, SCAN and CLINC150 (left out where
their data are not here). `CELLS` is the part of the grid that is run. In all cells tamis has its defaults, mixing and
the oracle the best rho of a grid, and every method the same steps; tasks of one scenario and seed share the base model
and the held-out rows. A row of `results.json` is a method's run; that of tamis has its estimates beside the truth.

SEAL is run everywhere, the other rivals (`tamis.compare.rivals`) for seed 0 of one cell per scenario: half of the rows
are wrong there, and the rivals are told so.

What is finished is not made again, so a suite that was stopped goes on where it was. A cell that fails is named at the
end, its log is `SCENARIO/SEED/log.txt`. `python benchmarks/suite_summary.py` draws the pictures.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from common import DATA, estimates, finish, make_parser
from suite_summary import aggregate
from tasks import clinc, german, scan, strings
from tasks.pool import TRUSTED, Pool, make_task

from tamis.compare.methods import compare_methods
from tamis.compare.rivals import ALL_RIVALS
from tamis.compare.table import format_table

POOLS: dict[str, Callable[..., Pool]] = {name: partial(strings.draw_pool, name) for name in strings.SCENARIOS}
REAL = {"german": german, "scan": scan, "clinc": clinc}
POOLS |= {name: module.draw_pool for name, module in REAL.items()}
RHOS = (0.1, 0.3, 0.8)
RIVAL_SEEDS = (0,)


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        scenario: of `POOLS`.
        wrong_share: of the training rows.
        num_validation: trusted rows.
        trusted: how they are chosen, see `tasks.pool.TRUSTED`.
    """

    scenario: str
    wrong_share: float = 0.5
    num_validation: int = 64
    trusted: str = "fair"

    @property
    def folder(self) -> str:
        """Its folder's name within that of its scenario and seed."""
        return f"wrong{self.wrong_share:g}_trusted{self.num_validation}_{self.trusted}".replace(" ", "_")


RIVAL_CELLS = [Cell(scenario) for scenario in POOLS]
CELLS = [
    *RIVAL_CELLS,
    *(Cell(name, share) for name in ("other operation", "scan") for share in (0.0, 0.1, 0.3, 0.7, 0.9)),
    *(Cell(name, share) for name in ("another style", "irrelevant") for share in (0.1, 0.9)),
    *(Cell(name, num_validation=size) for name in ("other operation", "german") for size in (16, 200)),
    *(Cell(name, trusted=trusted) for name in ("other operation", "scan") for trusted in TRUSTED[1:]),
]
QUICK_CELLS = [Cell("other operation"), Cell("irrelevant", num_validation=16)]
QUICK_POOL, QUICK_SETTINGS = {"num_train": 200, "pretrain_steps": 20}, {"max_steps": 4, "scout_epochs": 1}


def run_cell(cell: Cell, pool: Pool, folder: Path, is_quick: bool) -> list[dict[str, Any]]:
    """Rows of all methods.

    Args:
        pool: of the cell's scenario.
        folder: of all cells of the scenario and seed.
    """
    task_dir = folder / cell.folder
    task = make_task(
        task_dir, pool, wrong_share=cell.wrong_share, num_validation=cell.num_validation, trusted=cell.trusted
    )
    common = pool.settings | {"seed": pool.seed, "disable_tqdm": True, "logging_steps": 100}
    common |= QUICK_SETTINGS if is_quick else {}
    rivals = ALL_RIVALS if cell in RIVAL_CELLS and pool.seed in RIVAL_SEEDS else ()
    rows = compare_methods(task, task_dir, common, RHOS, rivals=rivals, rival_shares=(1 - cell.wrong_share,))
    for row in rows:
        if row["method"] == "tamis":
            row |= estimates(task_dir, task)
    found = {"scenario": cell.scenario, "wrong_share": cell.wrong_share, "num_validation": cell.num_validation}
    found |= {"trusted": cell.trusted, "seed": pool.seed, "num_eval": len(pool.held_out)}
    return [found | row for row in rows]


def run_cells(
    scenario: str, cells: Sequence[Cell], seed: int, output_dir: Path, is_quick: bool
) -> tuple[list[dict[str, Any]], str, list[str]]:
    """All cells of one scenario and seed, in this process.

    Returns:
        Their rows, their tables, and the names of the cells that failed.
    """
    folder = output_dir / scenario.replace(" ", "_") / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows, tables, failed = list[dict[str, Any]](), "", list[str]()
    with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        pool = POOLS[scenario](seed, **(QUICK_POOL if is_quick else {}))
        for cell in cells:
            try:
                found = run_cell(cell, pool, folder, is_quick)
            except Exception:
                traceback.print_exc()
                failed.append(f"{scenario}, seed {seed}, {cell.folder}")
                continue
            rows += found
            tables += f"\n{scenario}, seed {seed}, {cell.folder}\n{format_table(found)}\n"
    return rows, tables, failed


def run_suite(cells: Sequence[Cell], arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of all cells, and the names of those that failed. Each scenario and seed has a process."""
    rows, failed = [], []
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the new processes: tiny models run faster on one thread
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), max_tasks_per_child=1) as executor:
        jobs = {}
        for seed in arguments.seeds:
            for scenario in dict.fromkeys(cell.scenario for cell in cells):
                mine = [cell for cell in cells if cell.scenario == scenario]
                job = executor.submit(run_cells, scenario, mine, seed, arguments.output_dir, arguments.quick)
                jobs[job] = f"{scenario}, seed {seed}"
        for job in as_completed(jobs):
            try:
                found, tables, lost = job.result()
            except Exception as error:  # before its first cell, or its process was killed
                found, tables, lost = [], "", [f"{jobs[job]}: {error!r}"]
            print(tables, flush=True)
            rows += found
            failed += lost
    return sorted(rows, key=lambda row: (list(POOLS).index(row["scenario"]), row["seed"])), failed


def main() -> None:
    quick = "two cells of one seed, 10 steps of everything: shows that it runs"
    parser = make_parser(__doc__, quick=quick, scenarios=tuple(POOLS))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds = arguments.seeds[:1]
    cells = [cell for cell in (QUICK_CELLS if arguments.quick else CELLS) if cell.scenario in arguments.scenarios]
    absent = [name for name, module in REAL.items() if not (DATA / module.FOLDER).is_dir()]
    for name in absent:
        print(f"{name} is left out: its data are not here", file=sys.stderr)
    rows, failed = run_suite([cell for cell in cells if cell.scenario not in absent], arguments)
    finish(arguments, rows, aggregate(rows))
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
