"""All methods of a comparison beside each other on one task."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamis.compare.rivals import run_rivals
from tamis.compare.runs import STATIC, TAMIS, TAMIS_SHARE, Method, Share, run_method
from tamis.compare.seal import DEFAULT_RATE, PUBLISHED_SHARE, run_seal
from tamis.compare.table import MIXING, TRUSTED_ALONE, add_gap_closures, best_variants
from tamis.compare.task import Task

REFINING = "tamis, refining"
RIVAL_SHARES: tuple[Share, ...] = (0.8, 0.5, TAMIS_SHARE)


def compare_methods(
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    rhos: Sequence[float],
    refining: dict[str, Any] | None = None,
    seal_shares: Sequence[Share] = (PUBLISHED_SHARE,),
    seal_rates: Sequence[float] = (DEFAULT_RATE,),
    rivals: Sequence[str] = (),
    rival_shares: Sequence[Share] = RIVAL_SHARES,
) -> list[dict[str, Any]]:
    """Run all methods on a task; returns their rows in the order of the table, the oracle last.

    Plain SFT, the trusted rows alone, direct mixing for every rho; SEAL; rivals; tamis, without and with refining, at
    the default rho; and the oracle, which mixes trusted and right rows at the rho at which mixing did best on the
    held-out rows.

    Args:
        refining: its settings; None leaves the method out.
        seal_shares: of the training rows that SEAL keeps for its second stage; `tamis.compare.runs.TAMIS_SHARE` is the
            share that tamis takes for right.
        seal_rates: of SEAL's logits; `tamis.compare.seal.PUBLISHED_RATES` is the published grid.
        rivals: names of `tamis.compare.rivals.ALL_RIVALS`.
        rival_shares: of the training rows that they keep.
    """
    first = [
        Method("plain SFT", task.train_file, STATIC | {"rho": 0.0}),
        Method(TRUSTED_ALONE, task.validation_file, STATIC | {"rho": 0.0}),
        *(Method(f"mixing rho={rho}", task.train_file, STATIC | {"rho": rho}, group=MIXING) for rho in rhos),
    ]
    rows = [run_method(method, task, output_dir, common) for method in first]
    best = best_variants(rows)[-1]["method"]
    best_rho = next(method.settings for method in first if method.name == best)
    tamis = run_method(Method(TAMIS, task.train_file, {}), task, output_dir, common)  # first: others ask for its share
    rows += run_seal(task, output_dir, common, seal_shares, seal_rates)
    rows += run_rivals(task, output_dir, common, rival_shares, rivals)
    second = [
        *([Method(REFINING, task.train_file, refining)] if refining else []),
        Method("oracle (right rows)", task.clean_file, best_rho),
    ]
    rows += [tamis, *(run_method(method, task, output_dir, common) for method in second)]
    add_gap_closures(rows)
    return rows
