"""SEAL (arXiv 2410.07471), the published rival, as its code has it.

Stage one trains on the trusted rows alone for an epoch, then hardly less, and all the while learns a weight for each
training row: Adam on N softmax logits, by the loss itself (reference `zero`). Stage two drops the rows with the lowest
weights, starts again from the base model, and is plain SFT on the rest. The trusted rows have no part in it.

From the published Llama example: Adam's betas and rate (see `tamis.selection.adam`), the shares of the upper level, 80%
of the rows kept. Otherwise SEAL gets what all methods of a comparison get: optimizer, schedule, batches and number of
steps (published: three epochs, then two). Not copied: the gradient of the logits is clipped at a norm of 10 there, and
their epoch ends with the smaller of the two datasets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tamis.compare.runs import Method, Share, keep_top, run_alone_and_mixed, run_method, share_name, share_value
from tamis.compare.task import Task, learned_weights, run_dir, slug
from tamis.config import DEFAULT_SELECTOR_LEARNING_RATE
from tamis.trainer import BilevelTrainer

SEAL = "SEAL, one stage"
ONE_STAGE: dict[str, Any] = {"selector": "softmax", "reference": "zero", "rho": 1.0}
PUBLISHED_SHARE = 0.8
DEFAULT_RATE = DEFAULT_SELECTOR_LEARNING_RATE["softmax"]
PUBLISHED_RATES = (4e-3, DEFAULT_RATE, 1e-2)  # of the logits, from the lowest to the highest of its examples
_LESS_EACH_EPOCH = 0.03


class SealTrainer(BilevelTrainer):
    """Stage one: the upper level's share is 1 (the setting ``rho``) in the first epoch, and 0.03 less in each other."""

    def current_rho(self) -> float:
        """See `BilevelTrainer`: constant within an epoch, which is a pass over the training rows."""
        assert self.args.rho is not None, "set by `ONE_STAGE`"
        return max(self.args.rho - _LESS_EACH_EPOCH * int(self.state.epoch or 0), 0.0)


def run_seal(
    task: Task,
    output_dir: Path,
    common: dict[str, Any],
    shares: Sequence[Share],
    rates: Sequence[float] = (DEFAULT_RATE,),
) -> list[dict[str, Any]]:
    """Rows of SEAL: its first stage, and retraining on the given shares of the training rows; all for each rate.

    As published the retraining sees the kept rows alone; it is also run with the trusted rows (see
    `run_alone_and_mixed`). Rates, and alone or mixed, are variants: those with the same share are one group.

    Args:
        shares: `tamis.compare.runs.TAMIS_SHARE` is the share that tamis takes for right.
        rates: of the logits.
    """
    first, second = [], []
    for rate in rates:
        suffix = "" if rate == DEFAULT_RATE else f", rate {rate:g}"
        settings = ONE_STAGE | {"selector_learning_rate": rate}
        stage_one = Method(SEAL + suffix, task.train_file, settings, SEAL, SealTrainer)
        first.append(run_method(stage_one, task, output_dir, common))
        weights, _ = learned_weights(output_dir, stage_one.name, task)
        for share in shares:
            group = f"SEAL, {share_name(share)}"
            path = run_dir(output_dir, stage_one.name) / f"{slug(share_name(share))}.jsonl"
            kept = keep_top(task, weights, share_value(share, output_dir), path)
            rows = run_alone_and_mixed(group + suffix, kept, task, output_dir, common, group)
            second += [row | {"seconds": first[-1]["seconds"] + row["seconds"]} for row in rows]  # of both stages
    return first + second
