"""One stream of batches: every step has rows of the training dataset first, then rows of the validation dataset.

Which rows a step holds follows from (seed, epoch, step) alone, never from a global generator, so that a resumed run and
a run on another number of ranks see the same global batches.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from tamis._compat import prepare_data_loader


def permutation(num_rows: int, seed: int, epoch: int, level: int) -> torch.Tensor:
    """A permutation of ``range(num_rows)`` that depends on (seed, epoch, level) alone; level 0 is lower, 1 upper."""
    # Distinct 63-bit seeds: torch mixes them well (Philox / MT19937 initialisation), a sum of the parts would not do.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 2 + level)
    return torch.randperm(num_rows, generator=generator)


def upper_id(row: int) -> int:
    """The example_id under which a validation row travels, below zero: it has no weight of its own."""
    return -1 - row


class BilevelBatchSampler(Sampler[list[int]]):
    """Indices into the concatenation (training rows, validation rows), one list per step of one rank.

    An epoch is one pass over the training rows; the validation rows cycle through permutations of their own. All ranks
    together hold a contiguous slice of the permutation in each step, so 2 ranks of 8 rows see what 1 rank of 16 does.

    Args:
        num_lower, num_upper: rows of the two datasets; ``num_upper`` may be 0.
        lower_batch_size, upper_batch_size: rows of each per step and rank.
        seed: all the randomness there is.
        epoch: returns the number of the present epoch; asked when an iteration starts, so that it is right on resume.
        rank, num_ranks: which share of the global batch this process takes.
        drop_last: leave out the last step of an epoch if it has fewer training rows than the others.
    """

    def __init__(
        self,
        *,
        num_lower: int,
        num_upper: int,
        lower_batch_size: int,
        upper_batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        rank: int = 0,
        num_ranks: int = 1,
        drop_last: bool = False,
    ):
        self.num_lower, self.num_upper = num_lower, num_upper
        self.lower_batch_size = lower_batch_size
        self.upper_batch_size = upper_batch_size if num_upper else 0
        self.seed, self.epoch = seed, epoch
        self.rank, self.num_ranks = rank, num_ranks
        self.drop_last = drop_last

    def __len__(self) -> int:
        num_full, num_left = divmod(self.num_lower, self.lower_batch_size * self.num_ranks)
        # Every rank needs a row in the last step, or its batch would be empty and the others would wait for it.
        keep_last = num_left >= (1 if self.upper_batch_size else self.num_ranks) and not self.drop_last
        return num_full + keep_last

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch()
        lower = permutation(self.num_lower, self.seed, epoch, level=0)
        lower_stride = self.lower_batch_size * self.num_ranks
        for step in range(len(self)):
            rows = lower[step * lower_stride : (step + 1) * lower_stride].tensor_split(self.num_ranks)[self.rank]
            yield rows.tolist() + self._upper_rows(epoch * len(self) + step)

    def _upper_rows(self, global_step: int) -> list[int]:
        """Rows of the endless sequence of permutations of the validation dataset that this rank takes in this step."""
        first = (global_step * self.num_ranks + self.rank) * self.upper_batch_size
        rows = []
        for position in range(first, first + self.upper_batch_size):
            cycle, place = divmod(position, self.num_upper)
            if cycle != getattr(self, "_cycle", None):
                self._cycle, self._order = cycle, permutation(self.num_upper, self.seed, cycle, level=1).tolist()
            rows.append(self.num_lower + self._order[place])
        return rows


class BilevelCollator:
    """Wraps TRL's collator; adds what the trainer must know of the rows of a batch, as plain integers on the CPU.

    - ``example_ids``: of the training rows, which come first; ``upper_rows``: places of the validation rows.
    - ``num_tokens``: tokens that are trained on, of every row.
    - ``answers``: of the training rows, the place of the generated answer they carry; -1 for their own.

    Batches of other datasets (evaluation) pass through unchanged.
    """

    def __init__(self, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "example_id" not in rows[0]:
            return self.collator(rows)
        example_ids = [row.pop("example_id") for row in rows]
        answers = [row.pop("answer", -1) for row in rows]
        batch = self.collator(rows)
        return {
            **batch,
            "example_ids": [example_id for example_id in example_ids if example_id >= 0],
            "upper_rows": [-1 - example_id for example_id in example_ids if example_id < 0],
            "answers": [a for a, example_id in zip(answers, example_ids, strict=True) if example_id >= 0],
            "num_tokens": (batch["labels"][:, 1:] != -100).sum(dim=1).tolist(),
        }


def make_dataloader(
    train_dataset: Dataset,
    validation_dataset: Dataset | None,
    collator: Callable[[list[Any]], Any],
    args: TrainingArguments,
    *,
    lower_batch_size: int,
    upper_batch_size: int,
    epoch: Callable[[], int],
    device: torch.device,
) -> DataLoader:
    """The stream over prepared rows (``input_ids``, ``labels``, ``example_id``) as one rank sees it.

    Args:
        validation_dataset: None where the steps have no validation rows.
        args: for seed, ranks and the settings of the dataloader.
        lower_batch_size, upper_batch_size, epoch: see `BilevelBatchSampler`.
    """
    columns = ["input_ids", "labels", "example_id"]
    stream = train_dataset.select_columns(columns)
    num_upper = 0
    if validation_dataset is not None:
        upper = validation_dataset.select_columns(columns)
        stream, num_upper = concatenate_datasets([stream, upper.cast(stream.features)]), len(upper)
    sampler = BilevelBatchSampler(
        num_lower=len(train_dataset),
        num_upper=num_upper,
        lower_batch_size=lower_batch_size,
        upper_batch_size=upper_batch_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
        epoch=epoch,
        rank=args.process_index,
        num_ranks=args.world_size,
        drop_last=args.dataloader_drop_last,
    )
    dataloader = DataLoader(
        stream,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    # num_processes=1: the sampler has already taken this rank's share.
    return prepare_data_loader(dataloader, device, num_processes=1, process_index=0, put_on_device=True)
