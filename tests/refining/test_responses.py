"""The buffer of generated responses by hand calculation: what each counts, which is drawn, what a checkpoint keeps."""

import math
import tracemalloc
from collections import Counter

import pytest
import torch

from tamis.refining.generation import Completion
from tamis.refining.responses import RefinedRow, Response, ResponseBuffer

UNIFORM_3 = [math.log(1 / 3)] * 3


def buffer_of(*rows: list[Response], **settings) -> ResponseBuffer:
    buffer = ResponseBuffer(
        **{"response_weighting": "bmo", "temperature": 1.0, "ratio_level": "sequence", "cap": 1e9, "seed": 0} | settings
    )
    buffer.rows = {
        7 + i: RefinedRow(step=3, original_score=-0.5, responses=responses) for i, responses in enumerate(rows)
    }
    return buffer


def response(num_tokens: int, old: float, sampling: float = 0.0) -> Response:
    return Response([4] * num_tokens, sampling_log_prob=sampling, generator_log_prob=old)


def softmax(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).softmax(0)


# --- weights of the responses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_uniform_weights(level):
    responses = [response(2, -1.0), response(5, -9.0), response(1, -3.0)]
    buffer = buffer_of(responses, response_weighting="uniform", ratio_level=level)
    torch.testing.assert_close(buffer.weights(7), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert [buffer.coefficient(7, j, -2.0) for j in range(3)] == [1.0] * 3


@pytest.mark.parametrize(
    ("settings", "exponents"),
    [
        # p^(1 / tau) / q, of whole responses and of a token on average
        ({}, [-6 + 5, -2 + 1.5, -3 + 4]),
        ({"temperature": 0.5}, [-12 + 5, -4 + 1.5, -6 + 4]),
        ({"ratio_level": "token"}, [(-6 + 5) / 3, (-2 + 1.5) / 1, (-3 + 4) / 2]),
        ({"ratio_level": "token", "temperature": 0.5}, [(-12 + 5) / 3, (-4 + 1.5) / 1, (-6 + 4) / 2]),
    ],
)
def test_weights_of_responses(settings, exponents):
    responses = [response(3, -6, -5), response(1, -2, -1.5), response(2, -3, -4)]
    torch.testing.assert_close(buffer_of(responses, **settings).weights(7), softmax(exponents))


def test_weights_of_one_row_do_not_depend_on_another():
    first, second = [response(1, -1.0), response(1, -2.0)], [response(2, -5.0), response(2, -4.0)]
    both = buffer_of(first, second)
    assert torch.equal(both.weights(7), buffer_of(first).weights(7))
    assert torch.equal(both.weights(8), buffer_of(second).weights(7))


# --- drawing one of them ----------------------------------------------------------------------------------------------


def scored(old: float, p_right: float) -> Response:
    return Response([4], sampling_log_prob=0.0, generator_log_prob=old, p_right=p_right)


def test_a_response_counts_by_its_ratio_times_how_likely_it_is_right():
    buffer = buffer_of([scored(-1.0, 0.9), scored(-2.0, 0.3)])
    ratio = softmax([-1.0, -2.0])
    expected = ratio * torch.tensor([0.9, 0.3])
    torch.testing.assert_close(buffer.weights(7), expected / expected.sum())
    assert buffer.p_right(7) == pytest.approx(expected.sum().item()), "of the row before the scout chooses for it"
    uniform = buffer_of([scored(-1.0, 0.9), scored(-2.0, 0.3)], response_weighting="uniform")
    assert uniform.weights(7).tolist() == pytest.approx([0.75, 0.25]) and uniform.p_right(7) == pytest.approx(0.6)


def test_without_a_scout_all_responses_are_taken_to_be_right():
    buffer = buffer_of([response(1, -1.0), response(1, -2.0)])
    torch.testing.assert_close(buffer.weights(7), softmax([-1.0, -2.0]))
    assert buffer.p_right(7) == pytest.approx(1.0)


def test_responses_that_are_surely_wrong_share_the_row_as_their_ratios_say():
    buffer = buffer_of([scored(-1.0, 0.0), scored(-2.0, 0.0)])
    torch.testing.assert_close(buffer.weights(7), softmax([-1.0, -2.0]))
    assert buffer.p_right(7) < 1e-9


def within_chance(counts: Counter, weights: torch.Tensor, num_draws: int) -> bool:
    """Every frequency within 4.5 standard deviations."""
    deviation = (weights * (1 - weights) / num_draws).sqrt()
    frequency = torch.tensor([counts[j] / num_draws for j in range(len(weights))], dtype=torch.float64)
    return bool(((frequency - weights).abs() <= 4.5 * deviation).all())


def test_frequencies_follow_the_weights():
    responses = [response(1, log_prob) for log_prob in (-1.0, -2.0, -0.2)]
    weights = softmax([-1.0, -2.0, -0.2])
    buffer, num_draws = buffer_of(*[responses] * 2000), 2000
    along_steps = Counter(buffer.choose(7, step) for step in range(num_draws))
    along_rows = Counter(buffer.choose(7 + i, 5) for i in range(num_draws))
    assert within_chance(along_steps, weights, num_draws)
    assert within_chance(along_rows, weights, num_draws)


def test_the_choice_follows_from_seed_step_and_row_alone():
    rows = [[response(1, p) for p in UNIFORM_3] for _ in range(3)]
    buffer, alone = buffer_of(*rows), buffer_of(rows[0])
    chosen = [buffer.choose(7, step) for step in range(40)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert [alone.choose(7, step) for step in reversed(range(40))][::-1] == chosen
    assert torch.equal(torch.get_rng_state(), state)
    assert [buffer.choose(8, step) for step in range(40)] != chosen
    assert [buffer_of(*rows, seed=1).choose(7, step) for step in range(40)] != chosen


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # p / p_generator is exp(-3), exp(1), exp(2); a token of them exp(-1), exp(1), exp(1)
        ({}, [math.exp(-3), math.exp(1), math.exp(2)]),
        ({"temperature": 0.5}, [math.exp(-6), math.exp(2), math.exp(4)]),
        ({"ratio_level": "token"}, [math.exp(-1), math.exp(1), math.exp(1)]),
        ({"ratio_level": "token", "temperature": 0.5}, [math.exp(-2), math.exp(2), math.exp(2)]),
        ({"cap": 3.0}, [math.exp(-3), math.exp(1), 3.0]),
        ({"cap": 1.0}, [math.exp(-3), 1.0, 1.0]),
    ],
)
def test_a_coefficient_is_the_capped_ratio_to_the_generator(settings, expected):
    responses = [response(3, -6, -5), response(1, -2, -1.5), response(2, -3, -4)]
    buffer = buffer_of(responses, **settings)
    drawn = buffer.weights(7).clone()
    coefficients = [buffer.coefficient(7, j, log_prob) for j, log_prob in enumerate([-9.0, -1.0, -1.0])]
    assert coefficients == pytest.approx(expected, rel=1e-12)
    assert torch.equal(buffer.weights(7), drawn), "a visit changes nothing"


def test_a_coefficient_is_one_where_nothing_has_changed_and_does_not_depend_on_the_others():
    alone, beside = buffer_of([response(3, -6, -5)]), buffer_of([response(3, -6, -5), response(1, -1.0)])
    assert alone.coefficient(7, 0, -6.0) == beside.coefficient(7, 0, -6.0) == 1.0
    assert alone.coefficient(7, 0, -20.0) == beside.coefficient(7, 0, -20.0) < 1e-4, "for one response alone too"


def test_a_response_alone_has_all_the_weight():
    buffer = buffer_of([response(3, -6, -5)])
    assert buffer.weights(7).tolist() == [1.0]
    assert [buffer.choose(7, step) for step in range(5)] == [0] * 5


def fields(buffer: ResponseBuffer) -> dict:
    """All that is known of the rows, in which NaN equals NaN."""
    return {i: repr(row) for i, row in buffer.rows.items()}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [
            [response(3, -1 / 3, sampling=-0.7), Response([9], -0.2, -0.1)],
            [Response([5, 6], -1e-17, 0.1, 0.3, 1 / 7)],
        ],
    ],
)
def test_state_dict_round_trip_is_bit_for_bit(rows):
    first = buffer_of(*rows)
    second = buffer_of([response(1, 0.0)], *rows[:1])
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    assert list(second.rows) == list(first.rows)
    assert fields(second) == fields(first)
    assert all(isinstance(token, int) for row in second.rows.values() for r in row.responses for token in r.token_ids)
    assert all(
        torch.equal(t.nan_to_num(7), first.state_dict()[n].nan_to_num(7)) for n, t in second.state_dict().items()
    )


def test_a_buffer_of_many_responses_is_small():
    """50,000 rows with 4 responses of 256 tokens are to fit in 300 MB, as they come and as they stay; a fiftieth."""
    ids = list(range(70_000, 70_256))  # of a large vocabulary: numbers that Python does not share
    tracemalloc.start()
    try:
        generated = [[Completion([*ids], -1.0 * j, True) for j in range(4)] for _ in range(1000)]
        rows = [[Response(c.token_ids, c.log_prob, -2.0, 0.5, 0.1) for c in found] for found in generated]
        buffer = buffer_of(*rows)
        del rows
        num_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert num_bytes < 300e6 / 50
    assert buffer.state_dict()["token_ids"].tolist()[-256:] == ids
