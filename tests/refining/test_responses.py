"""The buffer of generated responses by hand calculation: what each counts, which is drawn, what a checkpoint keeps."""

import dataclasses
import math
from collections import Counter

import pytest
import torch

from tamis.refining.responses import RefinedRow, Response, ResponseBuffer

UNIFORM_3 = [math.log(1 / 3)] * 3


def buffer_of(*rows: list[Response], **settings) -> ResponseBuffer:
    buffer = ResponseBuffer(
        **{"response_weighting": "bmo", "temperature": 1.0, "ratio_level": "sequence", "ratio_clip": 1e9, "seed": 0}
        | settings
    )
    buffer.rows = {
        7 + i: RefinedRow(step=3, original_score=-0.5, responses=responses) for i, responses in enumerate(rows)
    }
    return buffer


def response(num_tokens: int, log_prob: float, old: float = 0.0, sampling: float = 0.0) -> Response:
    return Response([4] * num_tokens, sampling_log_prob=sampling, old_log_prob=old, log_prob=log_prob)


def softmax(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).softmax(0)


# --- weights of the responses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_uniform_weights(level):
    responses = [response(2, -1.0), response(5, -9.0), response(1, -3.0)]
    weights, clipped = buffer_of(responses, response_weighting="uniform", ratio_level=level).weights(7)
    torch.testing.assert_close(weights.double(), torch.full((3,), 1 / 3, dtype=torch.float64))
    assert not clipped.any()


@pytest.mark.parametrize(
    ("settings", "exponents"),
    [
        # p^(1 / tau) / q, of whole responses and of a token on average
        ({}, [-6 + 5, -2 + 1.5, -3 + 4]),
        ({"temperature": 0.5}, [-12 + 5, -4 + 1.5, -6 + 4]),
        ({"ratio_level": "token"}, [(-6 + 5) / 3, (-2 + 1.5) / 1, (-3 + 4) / 2]),
        ({"ratio_level": "token", "temperature": 0.5}, [(-12 + 5) / 3, (-4 + 1.5) / 1, (-6 + 4) / 2]),
        # r = p / p_old is exp(-2), exp(-1), exp(3) for the responses, exp(-2/3), exp(-1), exp(1.5) a token
        ({"ratio_clip": math.e}, [(-1 - 4) + 5, (-1 - 1) + 1.5, (1 - 6) + 4]),
        ({"ratio_clip": math.e, "ratio_level": "token"}, [(-2 - 4 + 5) / 3, -1 - 1 + 1.5, 1 + (-6 + 4) / 2]),
    ],
)
def test_importance_weights_of_responses(settings, exponents):
    responses = [response(3, -6, old=-4, sampling=-5), response(1, -2, old=-1, sampling=-1.5), response(2, -3, -6, -4)]
    weights, clipped = buffer_of(responses, **settings).weights(7)
    torch.testing.assert_close(weights, softmax(exponents))
    expected = {True: [False] * 3, False: [settings.get("ratio_level") != "token", False, True]}
    assert clipped.tolist() == expected["ratio_clip" not in settings]


def test_weights_of_one_row_do_not_depend_on_another():
    first, second = [response(1, -1.0), response(1, -2.0)], [response(2, -5.0), response(2, -4.0)]
    both = buffer_of(first, second)
    assert torch.equal(both.weights(7)[0], buffer_of(first).weights(7)[0])
    assert torch.equal(both.weights(8)[0], buffer_of(second).weights(7)[0])


# --- drawing one of them ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("weighting", ["bmo", "uniform"])
def test_on_average_a_draw_times_its_coefficient_is_the_new_weight(weighting, level):
    """The new weight of a response is the one with its own new log-probability, the others' as they were last seen."""
    responses = [response(3, -6, old=-4, sampling=-5), response(1, -2, old=-1, sampling=-1.5), response(2, -3, -6, -4)]
    settings = {"response_weighting": weighting, "ratio_level": level, "temperature": 0.7, "ratio_clip": 5.0}
    buffer = buffer_of(responses, **settings)
    drawn = buffer.weights(7)[0].double()
    for j, log_prob in enumerate([-4.5, -2.5, -5.5]):
        expected = buffer_of([dataclasses.replace(r) for r in responses], **settings)
        expected.rows[7].responses[j].log_prob = log_prob
        new = expected.weights(7)[0][j].item()
        assert drawn[j].item() * buffer.coefficient(7, j, log_prob) == pytest.approx(new, rel=1e-12)
        assert weighting == "uniform" or new != pytest.approx(drawn[j].item(), rel=1e-2)


def test_coefficient_is_one_if_nothing_has_changed_and_stores_nothing():
    responses = [response(3, -6, old=-4, sampling=-5), response(1, -2, old=-1, sampling=-1.5)]
    buffer = buffer_of(responses, temperature=0.3)
    before = [dataclasses.replace(r) for r in responses]
    assert [buffer.coefficient(7, j, r.log_prob) for j, r in enumerate(responses)] == [1.0, 1.0]
    assert buffer.coefficient(7, 0, -1.0) > 1 > buffer.coefficient(7, 0, -9.0)
    assert buffer.rows[7].responses == before


def test_a_response_alone_has_all_the_weight():
    buffer = buffer_of([response(3, -6, old=-4, sampling=-5)])
    assert buffer.weights(7)[0].tolist() == [1.0]
    assert [buffer.choose(7, step) for step in range(5)] == [0] * 5
    assert buffer.coefficient(7, 0, -20.0) == 1.0


def test_metrics_on_a_hand_computed_example():
    buffer = buffer_of(
        [response(1, 0.0), response(1, 0.0), response(1, -math.inf), response(1, -math.inf)],
        [response(2, -1.0, old=-3.0, sampling=0.0), response(2, -1.0, old=-3.0, sampling=0.0)],
        ratio_clip=1.5,
        response_weighting="uniform",
    )
    assert buffer_of().metrics() == {}
    buffer.rows.pop(7)
    assert buffer.metrics() == {"ratio_ess": 1.0, "ratio_clip_rate": 0.0, "mean_log_ratio": 1.0}
    buffer.response_weighting, buffer.rows[8].responses[0].log_prob = "bmo", -3.0
    # r is 1 and e^2, which is clipped to 1.5: weights 0.4 and 0.6
    metrics = buffer.metrics()
    assert metrics["ratio_ess"] == pytest.approx(1 / (0.4**2 + 0.6**2) / 2)
    assert (metrics["ratio_clip_rate"], metrics["mean_log_ratio"]) == (0.5, 0.5)


def fields(buffer: ResponseBuffer) -> dict:
    """All that is known of the rows, in which NaN equals NaN."""
    return {i: repr(row) for i, row in buffer.rows.items()}


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [
            [response(3, -1 / 3, old=-0.1, sampling=-0.7), Response([9], -0.2)],
            [Response([5, 6], -1e-17, 0.1, 0.2, 0.3)],
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
