"""The table and the sentence, from results that are made up."""

import numpy as np
import pytest

from tamis.compare.own.contenders import BASE, PLAIN
from tamis.compare.own.metrics import EVAL_LOSS, EXACT_MATCH, Metric
from tamis.compare.own.runner import Result
from tamis.compare.own.verdict import difference, format_lines, table, verdict
from tamis.compare.runs import TAMIS
from tamis.compare.table import MIXING

LOSS, MATCH = Metric(EVAL_LOSS), Metric(EXACT_MATCH, lambda rows, answers: [])


def runs(method, values_SR, group=None, metric=EVAL_LOSS) -> list[Result]:
    """One run a seed."""
    return [
        Result(method, group or method, seed, {metric: list(map(float, values_R))})
        for seed, values_R in enumerate(values_SR)
    ]


def test_the_error_of_a_difference_counts_rows_and_seeds():
    ours, theirs = runs("a", [[1, 2, 3, 4], [2, 3, 4, 5]]), runs("b", [[2, 2, 5, 5], [3, 5, 4, 8]])
    found = difference(ours, theirs, LOSS)
    better = np.array([[1, 0, 2, 1], [1, 2, 0, 3]])
    rows, seeds = better.mean(0), better.mean(1)
    assert found.value == better.mean() and found.num_seeds == 2
    assert found.error == pytest.approx(np.sqrt(rows.var(ddof=1) / 4 + seeds.var(ddof=1) / 2))
    turned = difference(runs("a", [[1, 0]], metric=EXACT_MATCH), runs("b", [[0, 0]], metric=EXACT_MATCH), MATCH)
    assert turned.value == 0.5, "of a match more is better"


def test_only_seeds_that_both_have_are_compared():
    ours, theirs = runs("a", [[1.0], [2.0], [9.0]]), runs("b", [[2.0], [4.0]])
    assert difference(ours, theirs, LOSS).value == 1.5
    failed = [Result("b", "b", 0, {}, error="broken")]
    assert difference(ours, failed, LOSS) is None


def test_differences_without_an_effect_are_noise_nineteen_times_in_twenty():
    """Rows have effects of their own, common to both methods, and so has each seed of each method."""
    draw, noise = np.random.default_rng(0), 0
    for _ in range(400):
        row_R = draw.normal(size=50)
        ours, theirs = (row_R + 0.3 * draw.normal(size=(5, 1)) + draw.normal(size=(5, 50)) for _ in range(2))
        noise += difference(runs("a", ours), runs("b", theirs), LOSS).is_noise
    assert 0.9 < noise / 400 <= 1.0


def test_the_best_variant_stands_for_its_group_and_the_best_method_comes_first():
    results = runs("mixing rho=0.1", [[3.0, 3.0]], MIXING) + runs("mixing rho=0.8", [[2.0, 2.2]], MIXING)
    lines = table([*results, *runs(TAMIS, [[1.0, 1.0]]), *runs(PLAIN, [[9.0, 9.0]])], [LOSS])
    assert [line.method for line in lines] == [TAMIS, "mixing rho=0.8", PLAIN]
    assert lines[1].num_variants == 2 and lines[1].behind.value == pytest.approx(1.1)
    assert "mixing rho=0.8 (best of 2)" in format_lines(lines, [LOSS])


def test_failed_groups_come_last():
    results = [Result(PLAIN, PLAIN, 0, {}, error="out of memory"), *runs(TAMIS, [[1.0, 1.0]])]
    lines = table(results, [LOSS])
    assert [line.group for line in lines] == [TAMIS, PLAIN] and lines[1].errors == [f"{PLAIN}, seed 0: out of memory"]
    assert f"{PLAIN}: failed" in format_lines(lines, [LOSS])


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        ([[5.0, 5.1, 5.2], [5.0, 5.2, 5.1]], "selection pays"),
        ([[0.5, 0.6, 0.5], [0.6, 0.5, 0.6]], "do not select here"),
        ([[1.0, 2.0, 3.0], [4.0, 0.1, 1.0]], "within the noise"),
    ],
)
def test_the_sentence_says_whether_it_pays(plain, words):
    ours = runs(TAMIS, [[2.0, 2.1, 2.2], [2.2, 2.1, 2.0]])
    lines = table([*runs(BASE, [[7.0] * 3] * 2), *ours, *runs(PLAIN, plain)], [LOSS])
    text = verdict(lines, LOSS)
    assert words in text and "The model began at 7." in text


def test_the_sentence_names_what_is_better_and_a_lonely_seed():
    ours, better = runs(TAMIS, [[2.0, 2.1, 2.2]]), runs("ICA", [[1.0, 1.1, 1.2]])
    text = verdict(table([*ours, *better, *runs(PLAIN, [[3.0, 3.1, 3.2]])], [LOSS]), LOSS)
    assert "Better than tamis: ICA." in text and "There is one seed" in text


def test_without_tamis_or_its_alternatives_nothing_is_claimed():
    assert "nothing can be said" in verdict(table(runs(PLAIN, [[1.0]]), [LOSS]), LOSS)
    assert "add plain_sft" in verdict(table(runs(TAMIS, [[1.0]]), [LOSS]), LOSS)
