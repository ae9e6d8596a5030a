"""The stream of training: which rows a step holds, and the batches that they become.

A row has one identity on its way: its id, an ``example_id`` in the training dataset or in the validation dataset. The
stream yields ids (`MicroBatch`); `Batches.collate` looks the rows up, puts generated responses in their place, and
counts what each row is worth in the mean of its level. Which rows a step holds follows from (seed, epoch, step) alone,
never from a global generator, so that a resumed run and a run on another number of ranks see the same global batches.

Shape suffixes: B rows of a micro-batch, training rows first; L its training rows, U its validation rows.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from tamis.losses import Collate
from tamis.randomness import EndlessPermutations, permutation
from tamis.rows import arrow_column

_AT_ONCE = 1000


@dataclass(frozen=True)
class Substitute:
    """A response that a row trains on instead of its original one.

    Attributes:
        index: its place among the responses of the row.
        token_ids: as generated.
    """

    index: int
    token_ids: Sequence[int]


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one micro-batch, by their ids.

    Attributes:
        training_ids, validation_ids: in order.
        substitutes: by training id, for rows that do not train on their original response.
    """

    training_ids: list[int]
    validation_ids: list[int]
    substitutes: dict[int, Substitute] = field(default_factory=dict)


@dataclass(frozen=True)
class BatchRows:
    """What is known of the rows of a collated micro-batch, beside its tensors; all on the CPU.

    Attributes:
        training_ids, validation_ids: the L training rows come first, then the U validation rows.
        responses_L: which response each training row has: its place among the generated ones, -1 for the original.
        num_tokens_B: tokens that are trained on.
        share_B: what a row counts in the mean over its level in the whole optimizer step (all micro-batches and ranks).
    """

    training_ids: list[int]
    validation_ids: list[int]
    responses_L: Tensor
    num_tokens_B: Tensor
    share_B: Tensor

    @property
    def num_training(self) -> int:
        """L."""
        return len(self.training_ids)

    @property
    def ids_L(self) -> Tensor:
        """The training ids as a tensor (int64)."""
        return torch.tensor(self.training_ids, dtype=torch.int64)


class PreparedRows:
    """Token ids and labels of the prepared rows of a dataset, by id.

    Args:
        dataset: ``input_ids``, ``labels``, ``example_id``; rows that were left out are not in it. ``num_tokens`` of
            each row may be there.
    """

    def __init__(self, dataset: Dataset):
        self._dataset = dataset
        self.ids = _numbers(dataset, "example_id")
        self._rows = dataset.select_columns(["input_ids", "labels"])
        self._places = torch.full((int(self.ids.max()) + 1,), -1, dtype=torch.int64)
        self._places[self.ids] = torch.arange(len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_tokens(self) -> Tensor:
        """Of each row (int64), before it was cut."""
        return _numbers(self._dataset, "num_tokens")

    def take(self, example_ids: Sequence[int]) -> list[dict[str, list[int]]]:
        """The rows with these ids, in their order; one read of the dataset."""
        places = self._places[torch.tensor(example_ids, dtype=torch.int64)]
        assert (places >= 0).all(), f"rows of {example_ids} were left out"
        columns = self._rows[places.tolist()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def __iter__(self) -> Iterator[tuple[int, dict[str, list[int]]]]:
        return zip(self.ids.tolist(), self._rows, strict=True)


def _numbers(dataset: Dataset, column: str) -> Tensor:
    return torch.tensor(arrow_column(dataset, column).to_numpy(), dtype=torch.int64)


def prompt_and_response(row: dict[str, list[int]]) -> tuple[list[int], list[int]] | None:
    """Token ids of prompt and response of a prepared row; None unless it is a prompt followed by one response."""
    labels = row["labels"]
    start = next((t for t, label in enumerate(labels) if label != -100), len(labels))
    if not 0 < start < len(labels) or -100 in labels[start:]:
        return None
    return row["input_ids"][:start], row["input_ids"][start:]


def as_row(prompt: list[int], response: Sequence[int]) -> dict[str, list[int]]:
    """The prepared row of a prompt and a response: only the response is trained on."""
    return {"input_ids": [*prompt, *response], "labels": [-100] * len(prompt) + [*response]}


def as_rows(pairs: Sequence[tuple[list[int], Sequence[int]]]) -> Dataset:
    """The prepared rows of prompts and responses. Lists of numbers are made of a batch of them at a time."""
    kind = pa.list_(pa.int32())
    schema = pa.schema({"input_ids": kind, "labels": kind})
    tables = [
        pa.Table.from_pylist([as_row(*pair) for pair in pairs[start : start + _AT_ONCE]], schema)
        for start in range(0, len(pairs), _AT_ONCE)
    ]
    return Dataset(pa.concat_tables(tables), fingerprint="responses")


def drawn_rows(visits_N: Tensor, seed: int, epoch: int) -> Tensor:
    """The N visits of an epoch, in the order of the rows: row i has ``visits_N[i]`` of them, rounded up or down.

    Systematic resampling: right on average over epochs, and each row exactly once where all visits are one.

    Args:
        visits_N: non-negative, mean one.
    """
    num_rows = len(visits_N)
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    offset = torch.randint(2**20, (1,), generator=generator).item() / 2**20
    ends = visits_N.double().cumsum(0)
    ends = ends * (num_rows / ends[-1])
    ends[-1] = num_rows  # whatever was rounded away
    counts = torch.diff((ends + offset).floor(), prepend=torch.zeros(1, dtype=torch.float64)).long()
    return torch.repeat_interleave(torch.arange(num_rows), counts)


def longest_first(places: Tensor, length_of: Tensor, rows_per_step: int) -> Tensor:
    """The rows of each optimizer step, the longest first; every step keeps its rows.

    Args:
        places: of rows, in their order in the epoch; a row may be there several times.
        length_of: tokens of each row of the data set, by its place.
    """
    by_length = length_of[places].argsort(descending=True, stable=True)
    return places[by_length[(by_length // rows_per_step).argsort(stable=True)]]


class BilevelBatchSampler(Sampler[list[int]]):
    """Places in the concatenation (training rows, validation rows), one list per step of one rank.

    An epoch is one pass over the training rows; the validation rows cycle through permutations of their own. All ranks
    together hold a contiguous slice of the permutation in each step, so 2 ranks of 8 rows see what 1 rank of 16 does.
    Where rows are visited by their weight, an epoch has as many visits, and each row a share of them. By lengths only
    the rows of one step change places, so that a step descends the same objective.

    Args:
        num_training, num_validation: rows of the two datasets; ``num_validation`` may be 0.
        training_batch_size: training rows of a micro-batch.
        validation_rows_per_step: of an optimizer step over all ranks, spread evenly over its micro-batches; the first
            one of the first rank has one in any case.
        accumulation: micro-batches of an optimizer step on each rank.
        seed: all the randomness there is.
        rank, num_ranks: which share of the global batch this process takes.
        drop_last: leave out the last step of an epoch if it has fewer training rows than the others.
        visits: how often each training row is to be visited in an epoch on average (mean one), asked at every step
            and drawn anew where it is another tensor; None for each row once.
        lengths: of the training and validation rows: those of a step are dealt to its micro-batches and ranks by
            length, the longest first, so that there is less padding. None: as they come.
    """

    def __init__(
        self,
        *,
        num_training: int,
        num_validation: int,
        training_batch_size: int,
        validation_rows_per_step: int,
        seed: int,
        accumulation: int = 1,
        rank: int = 0,
        num_ranks: int = 1,
        drop_last: bool = False,
        visits: Callable[[], Tensor | None] = lambda: None,
        lengths: Tensor | None = None,
    ):
        self.num_training, self.num_validation = num_training, num_validation
        self.training_batch_size = training_batch_size
        self.validation_rows_per_step = validation_rows_per_step if num_validation else 0
        self.seed, self.epoch, self.accumulation = seed, 0, accumulation
        self.rank, self.num_ranks = rank, num_ranks
        self._order = EndlessPermutations(num_validation, seed)
        self.drop_last, self._visits, self._lengths = drop_last, visits, lengths

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is. `transformers` does, at the start of each and on resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        num_full, num_left = divmod(self.num_training, self.training_batch_size * self.num_ranks)
        # Every rank needs a row in the last step, or its batch would be empty and the others would wait for it.
        always_some = self.validation_rows_per_step >= self.accumulation * self.num_ranks
        keep_last = num_left >= (1 if always_some else self.num_ranks) and not self.drop_last
        return num_full + keep_last

    def __iter__(self) -> Iterator[list[int]]:
        epoch, visits = self.epoch, None
        places = permutation(self.num_training, self.seed, epoch, level=0)
        stride = self.training_batch_size * self.num_ranks
        order = self._within_steps(places, stride)
        for step in range(len(self)):
            present = self._visits()
            if present is not None and present is not visits:
                visits = present
                order = self._within_steps(drawn_rows(present, self.seed, epoch)[places], stride)
            rows = order[step * stride : (step + 1) * stride].tensor_split(self.num_ranks)[self.rank]
            yield rows.tolist() + self._validation_places(epoch, step)

    def _within_steps(self, places: Tensor, stride: int) -> Tensor:
        """The rows of an epoch, those of each step in the order in which they are dealt out."""
        places = places[: len(self) * stride]  # rows of a micro-batch that is left out are any, not the shortest
        return places if self._lengths is None else longest_first(places, self._lengths, stride * self.accumulation)

    def _validation_places(self, epoch: int, micro_batch: int) -> list[int]:
        """What this rank takes of the endless sequence of permutations of the validation dataset.

        The rows of an optimizer step follow each other, and are dealt to its micro-batches in turn, those of all ranks.
        An epoch ends with a step, which may have fewer micro-batches than the others.
        """
        step, place = divmod(micro_batch, self.accumulation)
        num_micro_batches = min(self.accumulation, len(self) - step * self.accumulation)
        step += epoch * math.ceil(len(self) / self.accumulation)
        num_rows, num_parts = self.validation_rows_per_step, self.accumulation * self.num_ranks
        part = place * self.num_ranks + self.rank
        first, end, last = (-(-k * num_rows // num_parts) for k in (part, part + 1, num_micro_batches * self.num_ranks))
        places = torch.tensor(self._order.places(step * num_rows, last), dtype=torch.int64) + self.num_training
        if self._lengths is not None and last:
            places = longest_first(places, self._lengths, last)
        return places[first:end].tolist()


def make_stream(
    training: PreparedRows,
    validation: PreparedRows | None,
    args: TrainingArguments,
    *,
    training_batch_size: int,
    validation_rows_per_step: int,
    visits: Callable[[], Tensor | None] = lambda: None,
) -> DataLoader[Any]:
    """The `MicroBatch`es of one rank.

    Args:
        validation: None where the steps have no validation rows.
        args: for seed and ranks.
        training_batch_size, validation_rows_per_step, visits: see `BilevelBatchSampler`.
    """
    levels = [training] if validation is None else [training, validation]
    num_training, num_validation = len(training), sum(map(len, levels[1:]))
    ids = torch.cat([rows.ids for rows in levels])
    by_length = args.train_sampling_strategy == "batch_rebalance"

    def name(places: list[int]) -> MicroBatch:
        found = ids[places].tolist()
        split = sum(place < num_training for place in places)
        return MicroBatch(found[:split], found[split:])

    sampler = BilevelBatchSampler(
        num_training=num_training,
        num_validation=num_validation,
        training_batch_size=training_batch_size,
        validation_rows_per_step=validation_rows_per_step,
        accumulation=args.gradient_accumulation_steps,
        seed=args.seed if args.data_seed is None else args.data_seed,
        rank=args.process_index,
        num_ranks=args.world_size,
        drop_last=args.dataloader_drop_last,
        visits=visits,
        lengths=torch.cat([rows.num_tokens for rows in levels]) if by_length else None,
    )
    places: Any = range(num_training + num_validation)
    return _Stream(places, batch_sampler=sampler, collate_fn=name)


class _Stream(DataLoader[Any]):
    batch_sampler: BilevelBatchSampler

    def set_epoch(self, epoch: int) -> None:
        """A plain loader keeps from its sampler which epoch `transformers` says it is."""
        self.batch_sampler.set_epoch(epoch)


class Batches:
    """Turns the micro-batches of a step into tensors, once.

    Args:
        training, validation: where rows are looked up.
        collate: TRL's collator, or the user's.
        loss_reduction: ``example``: every row counts the same in the mean over its level. ``token``: every token does.
    """

    def __init__(
        self,
        training: PreparedRows,
        validation: PreparedRows | None,
        collate: Collate,
        accelerator: Accelerator,
        loss_reduction: str,
    ):
        self.training, self.validation, self._collate = training, validation, collate
        self.accelerator, self.loss_reduction = accelerator, loss_reduction

    def collate(self, micro_batches: Sequence[MicroBatch]) -> list[dict[str, Any]]:
        """The tensors of each micro-batch of one optimizer step, with its `BatchRows` under ``rows``."""
        batches = [self.collate_rows(self._rows(micro_batch)) for micro_batch in micro_batches]
        num_tokens = [(batch["labels"][:, 1:] != -100).sum(dim=1) for batch in batches]
        totals = self._totals(micro_batches, num_tokens)
        for batch, micro_batch, num_tokens_B in zip(batches, micro_batches, num_tokens, strict=True):
            batch["rows"] = BatchRows(
                micro_batch.training_ids,
                micro_batch.validation_ids,
                _responses(micro_batch),
                num_tokens_B,
                self._shares(num_tokens_B, len(micro_batch.training_ids), totals),
            )
        return [send_to_device(batch, self.accelerator.device) for batch in batches]

    def collate_rows(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The tensors of rows, checked: a collator that joins rows would make losses of something else.

        Raises:
            ValueError: there is not one row of labels for each row.
        """
        batch = self._collate(rows)
        if "labels" not in batch or len(batch["labels"]) != len(rows):
            raise ValueError("data_collator must make one row of labels for each row: every row's loss is needed")
        return batch

    def _rows(self, micro_batch: MicroBatch) -> list[dict[str, list[int]]]:
        rows = self.training.take(micro_batch.training_ids)
        for place, example_id in enumerate(micro_batch.training_ids):
            if example_id in micro_batch.substitutes:
                parts = prompt_and_response(rows[place])
                assert parts is not None, "only rows of a prompt and one response are refined"
                rows[place] = as_row(parts[0], micro_batch.substitutes[example_id].token_ids)
        if self.validation is not None:
            rows += self.validation.take(micro_batch.validation_ids)
        return rows

    def _totals(self, micro_batches: Sequence[MicroBatch], num_tokens: list[Tensor]) -> list[int]:
        """What the two means of the step run over, on all ranks: rows of each level, then tokens of each."""
        totals = torch.zeros(4, dtype=torch.int64)
        for micro_batch, num_tokens_B in zip(micro_batches, num_tokens, strict=True):
            num_training = len(micro_batch.training_ids)
            tokens = [int(part.sum()) for part in (num_tokens_B[:num_training], num_tokens_B[num_training:])]
            totals += torch.tensor([num_training, len(micro_batch.validation_ids), *tokens])
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals.to(self.accelerator.device), reduction="sum")
        return totals.clamp(min=1).tolist()

    def _shares(self, num_tokens_B: Tensor, num_training: int, totals: list[int]) -> Tensor:
        levels = (num_tokens_B[:num_training], num_tokens_B[num_training:])
        if self.loss_reduction == "token":
            return torch.cat([part / total for part, total in zip(levels, totals[2:], strict=True)])
        return torch.cat([
            torch.full((len(part),), 1.0 / total) for part, total in zip(levels, totals[:2], strict=True)
        ])  # fmt: skip


def _responses(micro_batch: MicroBatch) -> Tensor:
    found = micro_batch.substitutes
    return torch.tensor([found[i].index if i in found else -1 for i in micro_batch.training_ids], dtype=torch.int64)
