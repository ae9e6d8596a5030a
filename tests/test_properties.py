"""What holds for every input, by hypothesis: readers, rows of a step, selectors, response weights, selection.

The examples are the same in every run. `python benchmarks/fuzz_readers.py` tries millions of files.
"""

import csv
import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tamis.bilevel import importance_ratio, response_weights, row_coefficients
from tamis.curation.choice import Choice, ranks
from tamis.data import load_rows
from tamis.selection.scores import ScoreTable
from tamis.selection.selectors import MirrorSelector
from tamis.stream import drawn_rows

every = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"]
finite = st.floats(-50, 50, width=32)
# Surrogates and NUL are no text of a file; a text of spaces alone is refused, as it should be.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
pairs = st.lists(st.fixed_dictionaries({"prompt": texts, "completion": texts}), min_size=1, max_size=5)
fragments = st.sampled_from(
    [
        b'{"prompt": "a", "completion": "b"}',
        b"[",
        b"]",
        b"{",
        b",",
        b"\n",
        b'"',
        b"\\u12",
        b"\xff\xfe",
        b"PAR1",
        b"null",
    ]
) | st.binary(max_size=4)


@every
@given(content=st.lists(fragments, max_size=8).map(b"".join), suffix=st.sampled_from(SUFFIXES))
def test_any_bytes_are_rows_or_an_error_of_one_line_that_names_the_file(tmp_path, content, suffix):
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    try:
        rows = load_rows(path, role="train_dataset")
    except ValueError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert len(rows) > 0


@every
@given(rows=pairs, suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".parquet"]))
def test_what_was_written_is_read(tmp_path, rows, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix in (".csv", ".tsv"):
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, ["prompt", "completion"], delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
        path.write_text(text.getvalue(), encoding="utf-8", newline="")
    else:
        lines = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_text(lines, encoding="utf-8")
    found = load_rows(path, role="train_dataset")
    assert [{"prompt": row["prompt"], "completion": row["completion"]} for row in found] == rows
    assert found["row"][:] == list(range(len(rows)))


@every
@given(visits=st.lists(st.floats(0, 5), min_size=1, max_size=40).filter(lambda v: sum(v) > 0.1), seed=st.integers(0, 9))
def test_rows_are_visited_by_their_weight_rounded_up_or_down(visits, seed):
    visits_N = torch.tensor(visits, dtype=torch.float64)
    visits_N *= len(visits) / visits_N.sum()
    counts_N = torch.bincount(drawn_rows(visits_N, seed, epoch=3), minlength=len(visits))
    assert counts_N.sum() == len(visits)
    assert ((counts_N - visits_N).abs() < 1 + 1e-6).all()


@every
@given(weights=st.lists(st.floats(0, 9), min_size=1, max_size=9), num_validation=st.integers(1, 9), rho=st.floats(0, 1))
def test_coefficients_are_shares_of_the_two_levels(weights, num_validation, rho):
    weights_L = torch.tensor(weights, dtype=torch.float64)
    share_B = torch.cat([
        torch.full((n,), 1 / n, dtype=torch.float64) for n in (len(weights), num_validation)
    ])  # fmt: skip
    found = row_coefficients(weights_L, rho, share_B)
    assert (found >= 0).all() and found[len(weights) :].sum() == pytest.approx(rho)
    assert found[: len(weights)].sum() == pytest.approx((1 - rho) * float(weights_L.mean()))


@every
@given(
    score_map=st.sampled_from(["bounded", "softmax", "squared"]),
    updates=st.lists(st.dictionaries(st.integers(0, 6), finite, min_size=1), max_size=12),
)
def test_weights_have_the_mean_of_one_after_any_updates(score_map, updates):
    table = ScoreTable(7, score_map)
    for update in updates:
        table.set(torch.tensor(list(update)), torch.tensor(list(update.values()), dtype=torch.float32))
    weights_N = table.weights_of(table.score_N)
    assert (weights_N >= 0).all() and float(weights_N.double().mean()) == pytest.approx(1, abs=1e-5)
    assert 1 - 1e-6 <= table.effective_sample_size() <= 7 + 1e-6
    order = table.score_N.argsort()
    assert (weights_N[order].diff() >= 0).all(), "a higher score is no lower weight"


@every
@given(excess=st.lists(finite, min_size=2, max_size=9), seen=st.lists(finite, min_size=1, max_size=9))
def test_mirror_descent_lowers_a_score_the_more_the_higher_the_loss(excess, seen):
    selector = MirrorSelector(1.75)
    selector.observe(torch.tensor(seen))
    excess_B = torch.tensor(excess)
    scores_B = selector.next_scores(torch.zeros(len(excess)), excess_B)
    assert scores_B.isfinite().all() and (scores_B[excess_B.argsort()].diff() <= 0).all()
    assert float(scores_B.abs().max()) <= 1.75 * 3 + 1e-5


@every
@given(
    log_probs=st.lists(st.tuples(st.floats(-300, 0), st.floats(-300, 0)), min_size=1, max_size=8),
    temperature=st.floats(0.05, 4),
)
def test_response_weights_are_a_distribution_that_no_order_changes(log_probs, temperature):
    generator_G, sampling_G = torch.tensor(log_probs, dtype=torch.float64).unbind(1)
    weights_G = response_weights(generator_G, sampling_G, temperature=temperature)
    assert (weights_G >= 0).all() and float(weights_G.sum()) == pytest.approx(1)
    turned_G = response_weights(generator_G.flip(0), sampling_G.flip(0), temperature=temperature)
    torch.testing.assert_close(turned_G.flip(0), weights_G)
    equal_G = response_weights(sampling_G, sampling_G, temperature=1.0)
    torch.testing.assert_close(equal_G, torch.full_like(equal_G, 1 / len(equal_G)))


@every
@given(now=st.floats(-300, 0), before=st.floats(-300, 0), temperature=st.floats(0.05, 4), cap=st.floats(1, 8))
def test_importance_ratios_follow_the_model_and_are_capped(now, before, temperature, cap):
    def ratio(of_now):
        tensors = (torch.tensor(value, dtype=torch.float64) for value in (of_now, before))
        return float(importance_ratio(*tensors, temperature=temperature, cap=cap))

    assert 0 <= ratio(now) <= cap * (1 + 1e-12) and ratio(before) == 1
    assert ratio(now) <= ratio(now + 1)
    if (now - before) / temperature < math.log(cap):
        assert ratio(now) == pytest.approx(math.exp((now - before) / temperature), rel=1e-9, abs=1e-300)


@every
@given(
    p_right=st.lists(st.floats(0.001, 0.999), min_size=2, max_size=30).filter(lambda p: len(set(p)) > 1),
    top_k=st.integers(1, 40),
    share=st.floats(0.05, 1),
    limit=st.floats(0, 0.9),
)
def test_selection_keeps_the_best_rows_and_as_many_as_it_was_asked_for(p_right, top_k, share, limit):
    p_right_N = np.array(p_right)
    weights = pa.table({
        "p_right": p_right_N, "weight": p_right_N**2, "score": np.log(p_right_N / (1 - p_right_N)),
        "kept": p_right_N >= 0.5, "source": pa.array(["a"] * len(p_right)).dictionary_encode(),
    })  # fmt: skip
    rank_N = ranks(weights)
    assert sorted(rank_N) == list(range(1, len(p_right) + 1))
    kept_N = Choice(top_k=top_k).rows(weights)
    assert kept_N.sum() == min(top_k, len(p_right))
    assert kept_N.all() or rank_N[kept_N].max() < rank_N[~kept_N].min()
    number = round(share * len(p_right))
    if number:
        assert Choice(keep=str(share)).rows(weights).sum() == number
    if (p_right_N >= limit).any():
        kept_N = Choice(min_p_right=limit).rows(weights)
        assert np.array_equal(kept_N, p_right_N >= limit)
        drawn_N = Choice(min_p_right=limit, sample=1).rows(weights)
        assert drawn_N.sum() == 1 and kept_N[drawn_N].all()
