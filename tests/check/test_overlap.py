"""Copies and near-duplicates: known answers, whatever the order of the rows."""

import random

import numpy as np
import pytest
from datasets import Dataset

from tamis.check import advice, overlap
from tamis.check.overlap import keys_of, near_duplicates, num_other_answers, shared
from tamis.hashes import num_repeats
from tamis.rows import check_rows

WORDS = ["river", "stone", "window", "letter", "garden", "silver", "morning", "engine", "castle", "bottle", "winter"]


def text(seed: int, num_words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def keys(rows, role="train_dataset"):
    dataset = Dataset.from_list(rows)
    return dataset, keys_of(dataset, role, check_rows(dataset, role))


def near(**rows_of_role):
    found = {role: keys(rows, role) for role, rows in rows_of_role.items()}
    datasets = {role: dataset for role, (dataset, _) in found.items()}
    return near_duplicates(datasets, {role: own for role, (_, own) in found.items()})


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


ROWS = [pair("a", "1"), pair("b", "2"), pair("a", "1"), pair("a", "3"), pair("a", "1"), pair("c", "1")]


def test_repeats_and_further_responses():
    _, found = keys(ROWS)
    assert num_repeats(found.row_N) == 2  # a 1, three times
    assert num_other_answers(found) == 1  # a 3


def test_shared_rows_and_prompts():
    _, training = keys(ROWS)
    _, trusted = keys([pair("a", "3"), pair("b", "9"), pair("d", "1")])
    assert vars(shared(training, trusted)) == {"rows": 1, "prompts": 5}
    assert vars(shared(trusted, training)) == {"rows": 1, "prompts": 2}


def test_messages_have_the_prompt_before_their_last_answer():
    def chat(answer, system="s"):
        return {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": answer},
            ]
        }

    _, found = keys([chat("1"), chat("2"), chat("1", system="t")])
    assert num_repeats(found.row_N) == 0 and num_other_answers(found) == 1


def test_what_belongs_to_a_prompt_makes_it_another_one():
    _, found = keys(
        [pair("a", "1") | {"system": "s"}, pair("a", "2") | {"system": "t"}, pair("a", "3") | {"system": "s"}]
    )
    assert num_other_answers(found) == 1


def test_texts_have_no_prompts():
    _, found = keys([{"text": "a"}, {"text": "a"}])
    assert num_repeats(found.row_N) == 1 and num_other_answers(found) is None
    assert shared(found, found).prompts is None


def test_near_duplicates_are_found_and_copies_are_none():
    first, second = text(1), text(2)
    rows = [
        pair(first, "x"),
        pair(first.upper(), "  x"),
        pair(first + " end", "x"),
        pair(second, "x"),
        pair(second, "x"),
    ]
    found = near(train_dataset=rows)["train_dataset", "train_dataset"]
    assert found.num_rows == 2 and found.num_searched == 4
    assert all({i, j} <= {0, 1, 2} and i != j for i, j in found.pairs) and len(found.pairs) == 2


def test_near_duplicates_between_data_sets():
    trusted = [pair(text(seed), "x") for seed in range(3)]
    rows = [pair(text(10), "x"), trusted[0], pair(text(1) + " end", "x"), pair(text(11), "x")]
    found = near(validation_dataset=trusted, train_dataset=rows)
    assert found["train_dataset", "validation_dataset"].pairs == [(2, 1)]
    assert found["train_dataset", "validation_dataset"].num_rows == 1, "row 1 is a copy"
    assert found["validation_dataset", "validation_dataset"].num_rows == 0
    assert ("validation_dataset", "train_dataset") not in found


@pytest.mark.parametrize(("share_changed", "is_near"), [(0.01, True), (0.02, True), (0.2, False), (1.0, False)])
def test_how_near_is_near(share_changed, is_near):
    """A changed word costs up to ten of the 5-grams; rows of a thousand words leave chance no part in it."""
    generator, words = random.Random(0), [str(number) for number in range(10_000, 11_000)]
    changed = [f"{generator.random():.4f}" if generator.random() < share_changed else word for word in words]
    found = near(train_dataset=[pair(" ".join(words), "x"), pair(" ".join(changed), "x")])
    assert bool(found["train_dataset", "train_dataset"].num_rows) == is_near


def test_short_rows_and_languages_without_spaces():
    rows = [
        pair("a", "b"),
        pair("a", "c"),
        pair("我想知道今天北京的天气怎么样,请你告诉我好吗", "今天北京是晴天,气温二十度,没有风,适合出门散步"),
    ]
    rows += [pair("我想知道今天北京的天气怎么样,请你告诉我好吗?", "今天北京是晴天,气温二十度,没有风,适合出门散步")]
    assert near(train_dataset=rows)["train_dataset", "train_dataset"].num_rows == 1


def test_the_order_of_rows_does_not_matter():
    rows = [pair(text(seed // 3) + " " + " ".join(WORDS[: seed % 3]), "x") for seed in range(60)]
    rows += rows[:7]
    trusted = [pair(text(seed), "y") for seed in range(0, 20, 5)]
    expected = near(validation_dataset=trusted, train_dataset=rows)
    assert expected["train_dataset", "train_dataset"].num_rows == 40
    assert expected["train_dataset", "validation_dataset"].num_rows > 0
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        again = near(validation_dataset=trusted, train_dataset=rows)
        assert {k: (v.num_rows, v.num_searched) for k, v in again.items()} == {
            k: (v.num_rows, v.num_searched) for k, v in expected.items()
        }


def test_of_a_large_data_set_a_sample_is_searched(monkeypatch):
    monkeypatch.setattr(overlap, "MAX_SEARCHED", 10)
    rows = [pair(text(seed), "x") for seed in range(30)]
    found = near(train_dataset=rows)["train_dataset", "train_dataset"]
    assert found.num_searched == 10
    _, own = keys(rows)
    assert set(overlap._searched(own.row_N)) == set(np.argsort(own.row_N)[:10])


def test_what_is_said_of_near_duplicates():
    trusted = [pair(text(seed), "x") for seed in range(3)]
    datasets = {"validation_dataset": trusted, "train_dataset": [pair(text(10), "x"), pair(text(1) + " end", "x")]}
    found = near(**datasets)["train_dataset", "validation_dataset"]
    loaded = {role: Dataset.from_list(rows) for role, rows in datasets.items()}
    assert advice._on_near(loaded, "train_dataset", "validation_dataset", found) == (
        "train_dataset: 1 of 2 distinct rows nearly repeat a row of validation_dataset, first train_dataset, row 1 ~ "
        "validation_dataset, row 1. The choice of rows will favour them: leave them out of `train_dataset`"
    )
