"""Which rows a step holds: each row as often as it is to be visited, on any number of ranks, from the seed alone."""

from collections import Counter
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainingArguments

from tamis import stream as stream_module
from tamis.randomness import permutation
from tamis.stream import (
    Batches,
    BilevelBatchSampler,
    MicroBatch,
    PreparedRows,
    Substitute,
    drawn_rows,
    longest_first,
    make_stream,
    prompt_and_response,
)


def sampler(
    num_training=20, num_validation=7, training=4, validation=3, epoch=0, seed=0, **settings
) -> BilevelBatchSampler:
    made = BilevelBatchSampler(
        num_training=num_training,
        num_validation=num_validation,
        training_batch_size=training,
        validation_rows_per_step=validation * settings.get("num_ranks", 1) * settings.get("accumulation", 1),
        seed=seed,
        **settings,
    )
    made.set_epoch(epoch)
    return made


def global_batches(num_ranks: int, **settings) -> list[list[int]]:
    """The rows of all ranks together, sorted, step by step."""
    ranks = [list(sampler(rank=rank, num_ranks=num_ranks, **settings)) for rank in range(num_ranks)]
    return [sorted(chain(*step)) for step in zip(*ranks, strict=True)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_training", [1, 5, 20, 23])
def test_every_training_row_exactly_once_an_epoch(num_training, num_ranks):
    batches = global_batches(num_ranks, num_training=num_training, epoch=3)
    rows = [row for batch in batches for row in batch if row < num_training]
    assert sorted(rows) == list(range(num_training))
    assert len(batches) == len(sampler(num_training=num_training, num_ranks=num_ranks))


def test_a_step_has_the_same_rows_however_it_is_divided():
    """Three validation rows a step: on one rank and in one micro-batch, or dealt to up to eight."""

    def steps(num_ranks, accumulation, training):
        made = {"num_training": 48, "validation": 0, "num_ranks": num_ranks, "accumulation": accumulation}
        ranks = [sampler(rank=rank, training=training, **made) for rank in range(num_ranks)]
        for one in ranks:
            one.validation_rows_per_step = 3
        micro_batches = list(zip(*ranks, strict=True))
        assert all(max(micro_batches[step][0]) >= 48 for step in range(0, len(micro_batches), accumulation))
        groups = [micro_batches[k : k + accumulation] for k in range(0, len(micro_batches), accumulation)]
        return [sorted(row for micro_batch in group for row in chain(*micro_batch)) for group in groups]

    expected = steps(1, 1, 8)
    assert len(expected) == 6 and all(sum(row >= 48 for row in step) == 3 for step in expected)
    for num_ranks, accumulation in ((1, 2), (1, 8), (2, 1), (2, 2), (2, 4), (4, 2), (8, 1)):
        assert steps(num_ranks, accumulation, 8 // (num_ranks * accumulation)) == expected


def test_a_short_last_step_has_validation_rows_too():
    """Ten micro-batches in steps of four: the last step has two, and the next epoch begins with a new one."""
    for epoch in (0, 1):
        made = sampler(num_training=40, training=4, validation=0, epoch=epoch, accumulation=4)
        made.validation_rows_per_step = 1
        num_validation = [sum(row >= 40 for row in batch) for batch in made]
        assert num_validation == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]


def test_training_rows_come_first():
    for batch in sampler(num_training=10):
        levels = [row >= 10 for row in batch]
        assert levels == sorted(levels) and sum(levels) == 3


@pytest.mark.parametrize("num_training", [32, 35])
def test_two_ranks_see_what_one_rank_with_the_double_batch_sees(num_training):
    for epoch in range(3):
        two = global_batches(2, num_training=num_training, training=4, validation=2, epoch=epoch)
        one = global_batches(1, num_training=num_training, training=8, validation=4, epoch=epoch)
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


def test_another_epoch_is_another_permutation():
    stream = sampler(num_validation=0)
    first = list(stream)
    assert list(stream) == first, "until an epoch is said to be over"
    stream.set_epoch(1)
    assert list(stream) != first and list(stream) == list(sampler(num_validation=0, epoch=1))


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
    assert all(Counter(batch)[20] == 3 for batch in sampler(num_validation=1, validation=3))


def test_drop_last():
    assert [len(batch) for batch in sampler(num_training=10, num_validation=0)] == [4, 4, 2]
    assert [len(batch) for batch in sampler(num_training=10, num_validation=0, drop_last=True)] == [4, 4]
    assert [len(batch) for batch in sampler(num_training=8, num_validation=0, drop_last=True)] == [4, 4]


def test_fewer_rows_than_ranks():
    with_validation = [list(sampler(num_training=2, rank=rank, num_ranks=3)) for rank in range(3)]
    assert [sum(row < 2 for row in batches[0]) for batches in with_validation] == [1, 1, 0]
    assert all(len(batches) == 1 for batches in with_validation), "every rank has the same number of steps"
    # Without validation rows a rank would be left with nothing: the step is left out on all of them.
    assert [list(sampler(num_training=2, num_validation=0, rank=rank, num_ranks=3)) for rank in range(3)] == [
        [],
        [],
        [],
    ]


# --- rows visited by their weight -------------------------------------------------------------------------------------


def visits_of(num_rows: int, seed: int = 0, share_of_zeros: float = 0.3) -> torch.Tensor:
    """Uneven visits of mean one, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    visits = torch.rand(num_rows, generator=generator) ** 3
    visits[torch.rand(num_rows, generator=generator) < share_of_zeros] = 0
    return visits / visits.mean()


def counts_of(visits: torch.Tensor, seed: int = 0, epoch: int = 0) -> torch.Tensor:
    return torch.bincount(drawn_rows(visits, seed, epoch), minlength=len(visits))


@pytest.mark.parametrize("value", [1.0, 0.1, 1 / 3, 7e4])
@pytest.mark.parametrize("num_rows", [1, 7, 1000, 100_003])
def test_equal_visits_are_one_each(num_rows, value):
    for epoch in range(5):
        drawn = drawn_rows(torch.full((num_rows,), value), seed=3, epoch=epoch)
        assert torch.equal(drawn, torch.arange(num_rows))


@pytest.mark.parametrize("num_rows", [2, 11, 5000])
def test_visits_are_rounded_up_or_down_and_make_a_whole_epoch(num_rows):
    visits = visits_of(num_rows, seed=num_rows)
    for epoch in range(50):
        counts = counts_of(visits, epoch=epoch)
        assert counts.sum() == num_rows
        assert (counts - visits).abs().max() < 1 + 1e-3, "float32 and the sum of 5000 of them"
        assert not counts[visits == 0].any()


def test_drawn_rows_are_in_order():
    drawn = drawn_rows(visits_of(300), 0, 0)
    assert (drawn.diff() >= 0).all() and drawn.dtype == torch.int64


def test_visits_are_right_on_average():
    """Of 4000 epochs: a fraction is a coin toss each time, with a standard error of at most 0.5 / sqrt(4000)."""
    visits = torch.tensor([0.25, 2.5, 0.0, 1.9, 0.05, 1.3])
    total = sum(counts_of(visits, epoch=epoch) for epoch in range(4000))
    torch.testing.assert_close(total / 4000, visits, atol=4 * 0.5 / 4000**0.5, rtol=0)


def test_visits_follow_from_seed_and_epoch_alone():
    visits = visits_of(200)
    torch.manual_seed(1)
    first = drawn_rows(visits, 5, 2)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(drawn_rows(visits, 5, 2), first) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(drawn_rows(visits, 5, 3), first) and not torch.equal(drawn_rows(visits, 6, 2), first)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_equal_visits_are_the_uniform_stream(num_ranks):
    for epoch in range(2):
        settings = {"num_training": 23, "epoch": epoch, "rank": num_ranks - 1, "num_ranks": num_ranks}
        assert list(sampler(visits=lambda: torch.ones(23), **settings)) == list(sampler(**settings))


def test_an_epoch_has_as_many_steps_and_each_row_its_visits():
    visits = visits_of(23)
    batches = list(sampler(num_training=23, visits=lambda: visits, epoch=4))
    counts = torch.bincount(torch.tensor([row for batch in batches for row in batch if row < 23]), minlength=23)
    assert len(batches) == len(sampler(num_training=23)) and torch.equal(counts, counts_of(visits, epoch=4))
    assert [batch[-3:] for batch in batches] == [batch[-3:] for batch in sampler(num_training=23, epoch=4)]


def test_repeated_visits_are_spread_over_the_epoch():
    """By the permutation, as rows are: half of all visits are one row's, and so is about half of every step."""
    visits = torch.tensor([1000.0] + [1000 / 1999] * 1999)
    batches = list(sampler(num_training=2000, num_validation=0, training=100, visits=lambda: visits))
    assert [batch.count(0) for batch in batches] == pytest.approx([50] * 20, abs=4 * 5)


@pytest.mark.parametrize("num_training", [32, 35])
def test_two_ranks_see_the_visits_of_one_rank(num_training):
    visits = visits_of(num_training)
    for epoch in range(3):
        common = {"num_training": num_training, "epoch": epoch, "visits": lambda: visits}
        assert global_batches(2, training=4, validation=2, **common) == global_batches(
            1, training=8, validation=4, **common
        )


def test_visits_that_change_in_an_epoch_count_from_the_next_step_on():
    first, second = visits_of(20, seed=1), visits_of(20, seed=2)
    present = [first]
    changing = []
    for step, batch in enumerate(sampler(visits=lambda: present[0])):
        changing.append(batch)
        if step == 1:
            present[0] = second
    before, after = (list(sampler(visits=lambda v=v: v)) for v in (first, second))
    assert changing == before[:2] + after[2:] and before != after


def test_a_stream_that_is_taken_up_in_an_epoch_needs_the_present_visits_only():
    """A resumed run skips the steps that were made with other visits: those that are left are the same."""
    first, second = visits_of(20, seed=1), visits_of(20, seed=2)
    present = [first]
    whole = []
    for step, batch in enumerate(sampler(visits=lambda: present[0], epoch=1)):
        whole.append(batch)
        if step == 2:
            present[0] = second
    assert list(sampler(visits=lambda: second, epoch=1))[3:] == whole[3:]


def test_visits_that_come_up_in_an_epoch_replace_the_uniform_order():
    """As after the first refresh: before it each row is visited once."""
    visits, present = visits_of(20), [None]
    found = []
    for batch in sampler(visits=lambda: present[0]):
        found.append(batch)
        present[0] = visits
    assert found == list(sampler())[:1] + list(sampler(visits=lambda: visits))[1:]


def test_the_same_tensor_is_not_drawn_anew(monkeypatch):
    drawn, asked, present = [], [], [visits_of(20)]
    monkeypatch.setattr(stream_module, "drawn_rows", lambda *args: drawn.append(1) or drawn_rows(*args))
    for step, _ in enumerate(sampler(visits=lambda: asked.append(1) or present[0])):
        if step == 2:
            present[0] = present[0].clone()
    assert len(asked) == 5 and len(drawn) == 2, "at the first step, and where another tensor came"


# --- the rows of a step by length -------------------------------------------------------------------------------------


def lengths_of(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Long-tailed, with ties."""
    return (torch.randn(num_rows, generator=torch.Generator().manual_seed(seed)).exp() * 20).long() + 1


def micro_batches(num_ranks: int, **settings) -> list[list[list[int]]]:
    """By optimizer step: its micro-batches, those of all ranks together, each with the rows that it has."""
    ranks = [sampler(rank=rank, num_ranks=num_ranks, **settings) for rank in range(num_ranks)]
    found, accumulation = list(zip(*ranks, strict=True)), settings["accumulation"]
    return [list(chain(*found[k : k + accumulation])) for k in range(0, len(found), accumulation)]


DIVISIONS = [(1, 1), (1, 4), (2, 2), (3, 2), (4, 1)]


@pytest.mark.parametrize(("num_ranks", "accumulation"), DIVISIONS)
@pytest.mark.parametrize("num_training", [24, 37, 50])
@pytest.mark.parametrize("drop_last", [False, True])
def test_sorting_by_length_leaves_every_step_its_rows(num_ranks, accumulation, num_training, drop_last):
    """Of both levels, visit by visit: so the objective of every step is the same, not only on average."""
    visits, lengths = visits_of(num_training), lengths_of(num_training + 7)
    for epoch, seed, visited in ((0, 0, None), (1, 5, visits), (2, 5, visits)):
        settings = {
            "num_training": num_training, "epoch": epoch, "seed": seed, "accumulation": accumulation,
            "drop_last": drop_last, "visits": lambda visited=visited: visited,
        }  # fmt: skip
        plain = micro_batches(num_ranks, **settings)
        by_length = micro_batches(num_ranks, lengths=lengths, **settings)
        assert [sorted(chain(*step)) for step in by_length] == [sorted(chain(*step)) for step in plain]
        assert [list(map(len, step)) for step in by_length] == [list(map(len, step)) for step in plain]


@pytest.mark.parametrize(("num_ranks", "accumulation"), DIVISIONS)
def test_micro_batches_of_a_step_go_from_long_rows_to_short_ones(num_ranks, accumulation):
    lengths = lengths_of(57)
    for step in micro_batches(num_ranks, accumulation=accumulation, num_training=50, lengths=lengths):
        for level in (range(50), range(50, 57)):
            found = [lengths[row].item() for micro_batch in step for row in micro_batch if row in level]
            assert found == sorted(found, reverse=True)


def test_rows_by_length_known_answer():
    """Steps of four: the second and the third place of a tie stay in order."""
    places, lengths = torch.tensor([5, 0, 3, 1, 4, 2]), torch.tensor([7, 9, 1, 7, 2, 8])
    assert longest_first(places, lengths, rows_per_step=4).tolist() == [1, 5, 0, 3, 4, 2]


def test_a_visit_is_as_likely_in_every_step_as_without_lengths():
    """Chi-square over 2000 seeds: 12 rows in 3 steps, the longest row not sooner than others."""
    lengths, counts = lengths_of(12), torch.zeros(12, 3)
    for seed in range(2000):
        settings = {"num_training": 12, "num_validation": 0, "training": 2, "accumulation": 2, "seed": seed}
        for step, rows in enumerate(micro_batches(1, lengths=lengths, **settings)):
            counts[list(chain(*rows)), step] += 1
    assert counts.sum() == 12 * 2000
    expected = 2000 / 3
    chi_square_of_row = ((counts - expected).square() / expected).sum(dim=1)
    assert chi_square_of_row.max() < 16, "two degrees of freedom: 3e-4 of each row"


def test_there_is_less_padding():
    lengths, num_tokens = lengths_of(640), {}
    for given in (None, lengths):
        settings = {"num_training": 640, "num_validation": 0, "training": 4, "accumulation": 8, "lengths": given}
        steps = micro_batches(1, **settings)
        num_tokens[given is None] = sum(len(rows) * lengths[rows].max().item() for step in steps for rows in step)
    assert lengths.sum() < num_tokens[False] < 0.7 * num_tokens[True]


# --- from ids to tensors ----------------------------------------------------------------------------------------------

TRAINING = PreparedRows(
    Dataset.from_list(
        [
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "example_id": 9},
            {"input_ids": [5, 6], "labels": [5, 6], "example_id": 3},  # the first token follows from nothing
            {"input_ids": [8, 8, 8, 1], "labels": [-100, -100, 8, 1], "example_id": 4},
        ]
    )
)
VALIDATION = PreparedRows(
    Dataset.from_list([{"input_ids": [2, 2, 2, 7], "labels": [-100, -100, -100, 7], "example_id": 4}])
)


def batches_of(reduction: str, accelerator=None) -> Batches:
    def pad(rows):
        width = max(len(row["labels"]) for row in rows)
        return {
            "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["labels"])) for row in rows]),
            "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        }

    return Batches(TRAINING, VALIDATION, pad, accelerator or Accelerator(cpu=True), reduction)


def test_rows_are_found_by_their_ids_in_any_order():
    assert [row["input_ids"] for row in TRAINING.take([4, 9, 4])] == [[8, 8, 8, 1], [5, 6, 7], [8, 8, 8, 1]]
    assert [(i, row["labels"]) for i, row in TRAINING] == [
        (9, [-100, 6, 7]),
        (3, [5, 6]),
        (4, [-100, -100, 8, 1]),
    ]
    with pytest.raises(AssertionError, match="left out"):
        TRAINING.take([5])


@pytest.mark.parametrize(
    ("reduction", "shares"), [("example", [[1 / 3, 1 / 3, 1], [1 / 3]]), ("token", [[2 / 5, 1 / 5, 1], [2 / 5]])]
)
def test_a_batch_names_and_counts_its_rows(reduction, shares):
    first, second = batches_of(reduction).collate([MicroBatch([9, 3], [4]), MicroBatch([4], [])])
    assert first["input_ids"].tolist() == [[5, 6, 7, 0], [5, 6, 0, 0], [2, 2, 2, 7]]
    rows = first["rows"]
    assert (rows.training_ids, rows.validation_ids) == ([9, 3], [4]) and rows.num_training == 2
    assert rows.num_tokens_B.tolist() == [2, 1, 1] and rows.responses_L.tolist() == [-1, -1]
    assert rows.share_B.tolist() == pytest.approx(shares[0])
    assert second["rows"].share_B.tolist() == pytest.approx(shares[1]), "of the whole step, not of the micro-batch"


@pytest.mark.parametrize("collate", [lambda rows: {"labels": torch.zeros(1, 9)}, lambda rows: {"input_ids": [1, 2]}])
def test_a_collator_must_keep_rows_apart(collate):
    batches = Batches(TRAINING, VALIDATION, collate, Accelerator(cpu=True), "example")
    with pytest.raises(ValueError, match="one row of labels for each row"):
        batches.collate([MicroBatch([9, 3], [4])])
    with pytest.raises(ValueError, match="one row of labels for each row"):
        batches.collate_rows(TRAINING.take([9, 3]))


def test_a_generated_response_takes_the_place_of_the_original_one():
    substitute = {4: Substitute(index=2, token_ids=[6, 1])}
    (batch,) = batches_of("token").collate([MicroBatch([9, 4], [], substitute)])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 8, 6, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [-100, -100, 6, 1]]
    assert batch["rows"].responses_L.tolist() == [-1, 2]


def test_the_stream_yields_ids():
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    stream = make_stream(TRAINING, VALIDATION, args, training_batch_size=2, validation_rows_per_step=1)
    batches = list(stream)
    assert sorted(chain(*(batch.training_ids for batch in batches))) == [3, 4, 9]
    assert [batch.validation_ids for batch in batches] == [[4], [4]]


def test_the_stream_asks_for_visits_at_every_step():
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    visits = torch.tensor([0.0, 3.0, 0.0])
    stream = make_stream(
        TRAINING, VALIDATION, args, training_batch_size=2, validation_rows_per_step=1, visits=lambda: visits
    )
    assert [batch.training_ids for batch in stream] == [[3, 3], [3]]


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([-100, -100, 12, 13], ([10, 11], [12, 13])),
        ([-100, -100, -100, 13], ([10, 11, 12], [13])),
        ([10, 11, 12, 13], None),  # plain text: no prompt
        ([-100, 11, -100, 13], None),  # several turns
        ([-100, 11, 12, -100], None),
        ([-100] * 4, None),  # no response
    ],
)
def test_prompt_and_response(labels, parts):
    assert prompt_and_response({"input_ids": [10, 11, 12, 13], "labels": labels}) == parts
