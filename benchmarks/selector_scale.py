"""What the weights cost as rows grow: time of an update and of the visits of an epoch, memory, the mean of the weights.

    python benchmarks/selector_scale.py --output_dir runs/selector_scale [--quick]

N from 10^4 to 10^8 rows, each N in a process of its own, updates of 64 rows drawn at random. `update_us`: microseconds
of an update, median of 2,000, by `mirror`, with the loss of the rows, their weights and their new scores.
`bytes_per_row`: of all tensors that are kept. `settle_s`: a scout's probabilities become weights, once a run.
`visits_s`: which rows an epoch visits, once an epoch. `mean_error`: how far the mean weight is from one at the end, by
the sums that updates have kept, against all weights added up.
"""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any

import torch
from common import finish, make_parser, peak_gb
from torch import Tensor

from tamis.selection.row_weights import RowWeights, ScoutWeights, SelectorWeights
from tamis.selection.selectors import MirrorSelector
from tamis.stream import drawn_rows

BATCH_SIZE, NUM_UPDATES = 64, 2000


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bytes_of(weights: RowWeights) -> int:
    """Of the tensors that hold something for each row."""
    tensors = [*vars(weights).values(), *vars(vars(weights).get("table")).values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor) and len(t.shape) == 1)


def by_mirror(num_rows: int, generator: torch.Generator) -> dict[str, Any]:
    """What updates along the steps cost."""
    rule = SelectorWeights(num_rows, MirrorSelector(1.75))

    def update() -> None:
        ids_B = torch.randint(num_rows, (BATCH_SIZE,), generator=generator).unique()
        loss_B = torch.rand(len(ids_B), generator=generator)
        rule.weights(ids_B, loss_B)
        rule.update(ids_B, loss_B, loss_B)

    times = [seconds(update) for _ in range(NUM_UPDATES)]
    total = sum(float(rule.table.mapped(chunk).sum()) for chunk in rule.table.score_N.split(2**20))
    return {
        "update_us": 1e6 * median(times),
        "bytes_per_row": bytes_of(rule) / num_rows,
        "mean_error": abs(total / float(rule.table.sums[0]) - 1),
    }


def by_scout(num_rows: int, generator: torch.Generator) -> dict[str, Any]:
    """What weights that are settled before training cost."""
    scout, ids_N = ScoutWeights(num_rows), torch.arange(num_rows)
    p_right_N = torch.rand(num_rows, generator=generator)
    settle_s = seconds(lambda: scout.settle(ids_N, p_right_N))
    visits_N = scout.visits_N()
    assert visits_N is not None, "it is settled"
    return {"settle_s": settle_s, "visits_s": seconds(lambda: drawn_rows(visits_N, seed=0, epoch=0))}


def measure(num_rows: int) -> dict[str, Any]:
    """One row of the table, in this process."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found = by_mirror(num_rows, generator) | by_scout(num_rows, generator)
    return {"num_rows": num_rows} | found | {"peak_gb": peak_gb()}


def main() -> None:
    arguments = make_parser(__doc__, quick="up to 10^5 rows: shows that it runs", seeds=()).parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    rows = []
    for exponent in range(4, 6 if arguments.quick else 9):
        with ProcessPoolExecutor(1, get_context("spawn")) as executor:
            rows.append(executor.submit(measure, 10**exponent).result())
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
