"""Which rows a choice keeps, on tables small enough to see it."""

import numpy as np
import pyarrow as pa
import pytest
from conftest import message_of

from tamis.curation.choice import Choice, ranks

NAN = float("nan")


def table(p_right, source=None, weight=None):
    """As `weights.parquet`; a `p_right` of None is a row that was left out of training."""
    p_right = np.array([NAN if p is None else p for p in p_right])
    with np.errstate(divide="ignore"):
        score = np.log(p_right / (1 - p_right))
    return pa.table(
        {
            "source": pa.array(source or ["a"] * len(p_right), pa.string()),
            "p_right": p_right,
            "score": score,
            "weight": np.nan_to_num(p_right**2) if weight is None else np.array(weight),
            "kept": p_right >= 0.5,
        }
    )


def kept(weights, **settings):
    return np.flatnonzero(Choice(**settings).rows(weights)).tolist()


ROWS = table([0.9, 0.2, None, 0.6, 0.99, 0.5, 0.01])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0, 3, 4, 5]),
        ({"keep": "0.5"}, [0, 3, 4]),
        ({"keep": "1"}, [0, 1, 3, 4, 5, 6]),
        ({"top_k": 1}, [4]),
        ({"top_k": 100}, [0, 1, 3, 4, 5, 6]),
        ({"min_p_right": 0.6}, [0, 3, 4]),
        ({"min_p_right": 0.0}, [0, 1, 3, 4, 5, 6]),
    ],
)
def test_the_best_rows_are_kept_and_none_that_was_left_out_of_training(settings, expected):
    assert kept(ROWS, **settings) == expected


def test_shares_numbers_and_samples_may_be_of_each_source():
    rows = table([0.9, 0.8, 0.7, 0.6, 0.55, 0.52], source=["a", "a", "a", "a", "b", None])
    assert kept(rows, top_k=1, per_source=True) == [0, 4, 5]
    assert kept(rows, keep="0.5", per_source=True) == [0, 1], "round(0.5) is 0"
    drawn = kept(rows, sample=2, per_source=True)
    assert len(drawn) == 4 and {4, 5} <= set(drawn)


def test_a_sample_is_drawn_by_weight_and_repeats_itself():
    rows = table([0.9] * 400, weight=[3.0] * 200 + [1.0] * 200)
    drawn = kept(rows, sample=40, seed=1)
    assert drawn == kept(rows, sample=40, seed=1) != kept(rows, sample=40, seed=2)
    heavy = [sum(i < 200 for i in kept(rows, sample=40, seed=seed)) / 40 for seed in range(200)]
    assert 0.70 < np.mean(heavy) < 0.76, "nearly 3 to 1; a little less, for drawn rows are not put back"


def test_rows_without_weight_are_not_drawn(caplog):
    rows = table([0.9] * 4, weight=[0.0, 1.0, 0.0, 1.0])
    assert kept(rows, sample=3) == [1, 3]
    assert "sample asks for 3 rows and there are 2" in caplog.text


def test_where_no_probability_is_known_weights_rank_the_rows(caplog):
    rows = table([None] * 3, weight=[0.5, 2.0, 0.0]).set_column(4, "kept", pa.array([True, True, False]))
    assert ranks(rows).tolist() == [2, 1, 0]
    assert kept(rows, top_k=1) == [1]
    assert kept(rows) == [0, 1] and "keeps every row that was trained on" in caplog.text
    assert "`min_p_right` has nothing to compare" in message_of(lambda: kept(rows, min_p_right=0.5))


def test_saturated_probabilities_are_ranked_by_their_log_odds():
    rows = table([0.9, 0.9, 0.9])
    rows = rows.set_column(1, "p_right", pa.array([1.0, 1.0, 1.0])).set_column(2, "score", pa.array([20.0, 30.0, 25.0]))
    assert ranks(rows).tolist() == [3, 1, 2]


def test_equal_rows_have_no_best():
    message = message_of(lambda: kept(table([None] * 3, weight=[1.0, 1.0, 1.0]), keep="0.5"))
    assert message.startswith("the run gives all rows one weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "some"}, "keep must be 'auto' or a share above 0 and at most 1, got 'some'"),
        ({"keep": "0"}, "keep must be 'auto' or a share above 0 and at most 1, got 0"),
        ({"keep": "80"}, "keep must be 'auto' or a share above 0 and at most 1, got 80"),
        ({"keep": "nan"}, "keep must be 'auto' or a share"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"sample": -1}, "sample must be at least 1, got -1"),
        ({"min_p_right": 1.5}, "min_p_right must lie between 0 and 1, got 1.5"),
        ({"top_k": 3, "keep": "0.5"}, "`top_k` and `keep` both say which rows are kept"),
        ({"top_k": 3, "min_p_right": 0.5}, "`top_k` and `min_p_right` both say"),
        ({"min_p_right": 1.0}, "no row is kept. Lower `min_p_right`"),
        ({"keep": "0.05"}, "no row is kept. Raise `keep`, or use `top_k`"),
    ],
)
def test_choices_that_cannot_work(settings, message):
    assert message in message_of(lambda: kept(ROWS, **settings))


def test_settings_without_effect_are_warned_of(caplog):
    kept(ROWS, per_source=True, seed=3)
    assert "per_source is set but has no effect: no share, number or sample" in caplog.text
    assert "seed is set but has no effect: nothing is drawn" in caplog.text
    caplog.clear()
    kept(ROWS, per_source=True, seed=3, sample=1)
    assert "no effect" not in caplog.text
