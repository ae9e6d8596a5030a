"""Equal tokens for all methods: how many rows a step of each has, and how many steps each makes.

A step of plain SFT has training rows alone. Where trusted rows are in it too, they take the place of some: with as many
training rows and the trusted rows on top, the same tokens would make fewer steps of the same learning rate, and that
would decide. What is left is that the rows of one method are longer than those of another: the methods share a number
of tokens, prompts included and cut rows as they are cut, and each makes as many steps as that takes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tamis.check.measure import seconds_per_step
from tamis.compare.own.contenders import Rows
from tamis.config import BilevelConfig, validation_rows_beside
from tamis.rows import arrow_column
from tamis.trainer import BilevelTrainer

Lengths = NDArray[np.float64]

_SIZE, _ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Budget:
    """What each run may see.

    Attributes:
        num_tokens: in all of its steps.
        reason: where the number comes from.
    """

    num_tokens: float
    reason: str

    def num_steps(self, tokens_per_step: float) -> int:
        """Optimizer steps of a run; at least one."""
        return max(round(self.num_tokens / tokens_per_step), 1)


@dataclass(frozen=True)
class Shape:
    """The budget, and how long the rows are: from these the steps of a run.

    Attributes:
        length_N, length_V: tokens of each training row, and of each trusted row; 0 for those that were dropped.
    """

    budget: Budget
    length_N: Lengths
    length_V: Lengths

    def tokens_per_step(self, rows: Rows, args: BilevelConfig, sees_validation: bool) -> float:
        """On average, if rows are drawn alike."""
        lengths = [self.length_N[rows.ids_K], *([self.length_V] if rows.with_trusted else [])]
        tokens = args.training_rows_per_step * _mean(np.concatenate(lengths))
        if sees_validation and args.trains_on_validation:
            resolved = args.resolve(num_training=len(rows.ids_K), num_validation=len(self.length_V))
            tokens += resolved.validation_rows_per_step * _mean(self.length_V)
        return tokens


def _mean(length_K: Lengths) -> float:
    length_K = length_K[length_K > 0]
    if not len(length_K):
        raise ValueError("no row is left to train on: raise `max_length`, or `keep_share`")
    return float(length_K.mean())


def find_budget(trainer: BilevelTrainer, max_tokens: int | None, max_minutes: float | None) -> Budget:
    """The tokens that were asked for, those that the minutes suffice for, or those of plain SFT.

    Args:
        trainer: a fresh one of plain SFT. It is of no use afterwards if time is measured.
    """
    if max_tokens is not None:
        return Budget(max_tokens, "as given")
    args, length = trainer.args, lengths_of(trainer, "train_dataset")
    per_step = args.training_rows_per_step * _mean(length)
    if max_minutes is not None:
        seconds = seconds_per_step(trainer, num_steps=trainer.num_steps())
        reason = f"{max_minutes:g} minutes, at {seconds:.2g} s for a step of plain SFT"
        return Budget(60 * max_minutes / seconds * per_step, reason)
    if args.max_steps > 0:
        return Budget(args.max_steps * per_step, f"{args.max_steps} steps of plain SFT")
    return Budget(args.num_train_epochs * float(length.sum()), f"{args.num_train_epochs:g} epochs of plain SFT")


def lengths_of(trainer: BilevelTrainer, role: str) -> Lengths:
    """Tokens of each prepared row as it is trained on; of the training rows by their place, 0 for dropped ones."""
    rows: Any = {"train_dataset": trainer.train_dataset, "validation_dataset": trainer.validation_dataset}[role]
    num_tokens, limit = arrow_column(rows, "num_tokens").to_numpy(), trainer.args.max_length
    ids = arrow_column(rows, "example_id").to_numpy()
    length_N = np.zeros(len(trainer.weighting.train_rows) if role == "train_dataset" else int(ids.max()) + 1)
    length_N[ids] = num_tokens if limit is None else num_tokens.clip(max=limit)
    return length_N


def with_trusted_rows(args: BilevelConfig, num_training: int, num_validation: int) -> dict[str, int]:
    """Settings by which a step with trusted rows has as many rows as one without, or as near as batches can be divided.

    The trusted rows have the share ``rho`` of a step, as they have of the objective, and by default that of the data. A
    number of them that the user has set stays.
    """
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if args.per_device_validation_batch_size is not None:
        return {}
    if args.rho is None:  # as many trusted rows as go with the training rows of a step
        name, largest = (_SIZE, size) if size > 1 else (_ACCUMULATION, accumulation)
        wanted = args.training_rows_per_step

        def surplus(candidate: int) -> int:
            num_rows = candidate * wanted // largest
            return abs(num_rows + validation_rows_beside(num_rows, num_training, num_validation) - wanted)

        return {name: min(range(1, largest + 1), key=surplus)}
    if size == 1:
        return {_ACCUMULATION: accumulation // 2} if accumulation % 2 == 0 else {}
    num_trusted = min(max(round(size * args.rho), 1), size - 1)
    return {_SIZE: size - num_trusted, "per_device_validation_batch_size": num_trusted}
