"""Which rows a step holds: every training row once an epoch, the same on any number of ranks, from the seed alone."""

from collections import Counter
from itertools import chain

import pytest
import torch

from tamis.stream import BilevelBatchSampler, BilevelCollator, permutation, upper_id


def sampler(num_lower=20, num_upper=7, lower=4, upper=3, epoch=0, seed=0, **settings) -> BilevelBatchSampler:
    return BilevelBatchSampler(
        num_lower=num_lower,
        num_upper=num_upper,
        lower_batch_size=lower,
        upper_batch_size=upper,
        seed=seed,
        epoch=lambda: epoch,
        **settings,
    )


def global_batches(num_ranks: int, **settings) -> list[list[int]]:
    """The rows of all ranks together, sorted, step by step."""
    ranks = [list(sampler(rank=rank, num_ranks=num_ranks, **settings)) for rank in range(num_ranks)]
    return [sorted(chain(*step)) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_lower", [1, 5, 20, 23])
def test_every_training_row_exactly_once_an_epoch(num_lower, num_ranks):
    batches = global_batches(num_ranks, num_lower=num_lower, epoch=3)
    rows = [row for batch in batches for row in batch if row < num_lower]
    assert sorted(rows) == list(range(num_lower))
    assert len(batches) == len(sampler(num_lower=num_lower, num_ranks=num_ranks))


def test_training_rows_come_first():
    for batch in sampler(num_lower=10):
        levels = [row >= 10 for row in batch]
        assert levels == sorted(levels) and sum(levels) == 3


@pytest.mark.parametrize("num_lower", [32, 35])
def test_two_ranks_see_what_one_rank_with_the_double_batch_sees(num_lower):
    for epoch in range(3):
        two = global_batches(2, num_lower=num_lower, lower=4, upper=2, epoch=epoch)
        one = global_batches(1, num_lower=num_lower, lower=8, upper=4, epoch=epoch)
        assert two == one


def test_rows_follow_from_seed_and_epoch_alone():
    torch.manual_seed(1)
    first = list(sampler(epoch=2, seed=5))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert list(sampler(epoch=2, seed=5)) == first
    assert torch.equal(torch.get_rng_state(), state), "no draw from the global generator"
    assert list(sampler(epoch=3, seed=5)) != first
    assert list(sampler(epoch=2, seed=6)) != first
    assert permutation(50, 0, 1, level=0).tolist() != permutation(50, 0, 1, level=1).tolist()


def test_the_epoch_is_asked_for_when_an_iteration_starts():
    epoch = 0
    stream = BilevelBatchSampler(
        num_lower=20, num_upper=0, lower_batch_size=4, upper_batch_size=4, seed=0, epoch=lambda: epoch
    )
    first = list(stream)
    epoch = 1
    assert list(stream) != first and list(stream) == list(sampler(num_upper=0, epoch=1))


def test_validation_rows_cycle_evenly_across_epochs():
    rows = Counter(row for epoch in range(7) for batch in sampler(epoch=epoch) for row in batch if row >= 20)
    # 7 epochs of 5 steps of 3 rows: 15 whole cycles through the 7 rows
    assert set(rows) == set(range(20, 27)) and set(rows.values()) == {15}


def test_validation_rows_of_any_whole_cycle_are_distinct():
    rows = [row for epoch in range(2) for batch in sampler(epoch=epoch) for row in batch if row >= 20]
    cycles = [rows[i : i + 7] for i in range(0, 28, 7)]
    assert all(len(set(cycle)) == 7 for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1, "each cycle has an order of its own"


def test_fewer_validation_rows_than_a_batch_takes():
    assert all(Counter(batch)[20] == 3 for batch in sampler(num_upper=1, upper=3))


def test_drop_last():
    assert [len(batch) for batch in sampler(num_lower=10, num_upper=0)] == [4, 4, 2]
    assert [len(batch) for batch in sampler(num_lower=10, num_upper=0, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in sampler(num_lower=8, num_upper=0, drop_last=True)] == [4, 4]


def test_fewer_rows_than_ranks():
    with_upper = [list(sampler(num_lower=2, rank=rank, num_ranks=3)) for rank in range(3)]
    assert [sum(row < 2 for row in batches[0]) for batches in with_upper] == [1, 1, 0]
    assert all(len(batches) == 1 for batches in with_upper), "every rank has the same number of steps"
    # Without validation rows a rank would be left with nothing: the step is left out on all of them.
    assert [list(sampler(num_lower=2, num_upper=0, rank=rank, num_ranks=3)) for rank in range(3)] == [[], [], []]


def test_collator_counts_and_names_rows():
    def pad(rows):
        width = max(len(row["labels"]) for row in rows)
        return {"labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows])}

    rows = [
        {"labels": [-100, 5, 6], "example_id": 9},
        {"labels": [5, 6], "example_id": 3},  # the first token has nothing to be predicted from
        {"labels": [-100, -100, -100, 7], "example_id": upper_id(4)},
    ]
    batch = BilevelCollator(pad)(rows)
    assert batch["example_ids"] == [9, 3] and batch["upper_rows"] == [4] and batch["num_tokens"] == [2, 1, 1]
    assert list(BilevelCollator(pad)([{"labels": [1, 2]}])) == ["labels"], "batches of evaluation pass unchanged"
