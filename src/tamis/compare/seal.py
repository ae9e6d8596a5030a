"""SEAL (arXiv 2410.07471), the published rival, as its code has it.

Stage one trains on the trusted rows alone for an epoch, then hardly less, and all the while learns a weight for each
training row: Adam on N softmax logits, by the loss itself (reference `zero`). Stage two drops the rows with the lowest
weights, starts again from the base model, and is plain SFT on the rest. The trusted rows have no part in it.

From the published Llama example: Adam's betas and rate (see `tamis.selection.row_weights.AdamWeights`), the shares of
the upper level, 80% of the rows kept. Otherwise SEAL gets what all methods of a comparison get: optimizer, schedule,
batches and number of steps (published: three epochs, then two). Not copied: the gradient of the logits is clipped at a
norm of 10 there, and their epoch ends with the smaller of the two datasets.
"""

from pathlib import Path
from typing import Any

from tamis.compare.task import Task, learned_weights, run_dir
from tamis.files import write_atomically
from tamis.trainer import BilevelTrainer

ONE_STAGE: dict[str, Any] = {"selector": "softmax", "reference": "zero", "rho": 1.0}
PUBLISHED_SHARE = 0.8
_LESS_EACH_EPOCH = 0.03


class SealTrainer(BilevelTrainer):
    """Stage one: the upper level's share is 1 (the setting ``rho``) in the first epoch, and 0.03 less in each other."""

    def current_rho(self) -> float:
        """See `BilevelTrainer`: constant within an epoch, which is a pass over the training rows."""
        assert self.args.rho is not None, "set by `ONE_STAGE`"
        return max(self.args.rho - _LESS_EACH_EPOCH * int(self.state.epoch or 0), 0.0)


def keep_top(task: Task, output_dir: Path, method_name: str, share: float) -> Path:
    """Write the training rows with the highest weights of a run to a file in its folder, in their old order.

    Args:
        method_name: of the run that learned the weights.
        share: of all rows that are kept; the last one is not rounded up, as published.
    """
    weights, _ = learned_weights(output_dir, method_name, task)
    kept = set(weights.argsort(kind="stable")[::-1][: int(share * len(weights))].tolist())
    lines = task.train_file.read_text(encoding="utf-8").splitlines(keepends=True)
    text = "".join(line for i, line in enumerate(lines) if i in kept)
    path = run_dir(output_dir, method_name) / f"top{round(100 * share)}.jsonl"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path
