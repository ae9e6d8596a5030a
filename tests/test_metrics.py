"""Known answers of the figures that runs are compared by."""

import numpy as np
import pytest

from tamis.compare.table import MIXING, TRUSTED_ALONE, add_gap_closures, best_variants
from tamis.metrics import auroc, gap_closure


def test_auroc_of_a_perfect_a_reversed_and_a_constant_ranking():
    is_right = [True, True, False, False]
    assert auroc([4, 3, 2, 1], is_right) == 1.0
    assert auroc([1, 2, 3, 4], is_right) == 0.0
    assert auroc([7, 7, 7, 7], is_right) == 0.5


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 20, size=200)  # many ties
    is_right = generator.random(200) < 0.3
    pairs = scores[is_right][:, None] - scores[~is_right][None, :]
    assert auroc(scores, is_right) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean(), abs=1e-12)


def test_auroc_needs_both_kinds():
    assert auroc([1, 2], [True, True]) is None


def test_gap_closure_of_losses_and_accuracies():
    assert gap_closure(baseline=0.5, method=0.9, oracle=0.9) == pytest.approx(1.0)
    assert gap_closure(baseline=0.5, method=0.4, oracle=0.9) == pytest.approx(-0.25)
    assert gap_closure(baseline=2.0, method=1.25, oracle=1.0) == pytest.approx(0.75)
    assert gap_closure(0.5, 0.6, 0.5) is None
    assert str(gap_closure(0.5, 0.5, 0.9)) == "0.0"


def comparison(**trusted_alone) -> list[dict]:
    def row(method, accuracy, loss, group=None):
        return {"method": method, "group": group or method, "test_accuracy": accuracy, "test_loss": loss}

    return [
        row("plain SFT", 0.9, 0.1),
        row(TRUSTED_ALONE, trusted_alone["accuracy"], trusted_alone["loss"]),
        row("mixing rho=0.1", 0.6, 1.0, MIXING),
        row("mixing rho=0.5", 0.5, 0.8, MIXING),
        row("tamis", 0.8, 0.6),
        row("oracle", 1.0, 0.4),
    ]


def test_gap_closures_are_measured_from_the_best_mixing_of_each_figure():
    rows = comparison(accuracy=0.1, loss=2.0)
    add_gap_closures(rows)
    assert rows[4]["gap_closure"] == pytest.approx(0.5)
    assert rows[4]["gap_closure_loss"] == pytest.approx(0.5)
    assert rows[2]["gap_closure_loss"] == pytest.approx(-0.5)


def test_gap_closures_are_measured_from_the_trusted_rows_alone_where_these_are_better():
    rows = comparison(accuracy=0.75, loss=0.9)
    add_gap_closures(rows)
    assert rows[1]["gap_closure"] == 0
    assert rows[4]["gap_closure"] == pytest.approx(0.2)
    assert rows[4]["gap_closure_loss"] == pytest.approx(0.5), "the loss of mixing is the better one"
    assert rows[5]["gap_closure"] == 1


def test_of_variants_the_most_accurate_is_shown():
    names = [row["method"] for row in best_variants(comparison(accuracy=0.1, loss=2.0))]
    assert names == ["plain SFT", TRUSTED_ALONE, "mixing rho=0.1", "tamis", "oracle"]
