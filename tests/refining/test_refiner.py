"""Refreshes with scripted completions: which rows are picked, what becomes of their responses, original and new."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import plain_loss, tiny_model, tiny_tokenizer, worth
from conftest import token_ids as ids
from datasets import Dataset
from scripted import ScriptedGenerator
from torch import nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from tamis.refining.generation import Completion, GenerationError, SamplingSettings
from tamis.refining.refiner import Refiner, RefineSettings, in_steps, pick_rows
from tamis.refining.responses import ResponseBuffer
from tamis.selection.make import make_row_weights
from tamis.selection.row_weights import ScoutWeights
from tamis.stream import Batches, BatchRows, MicroBatch, PreparedRows

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
CPU: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1)


# --- which rows -------------------------------------------------------------------------------------------------------


def test_the_lowest_are_picked():
    candidates, scores = [2, 3, 5, 8, 13], torch.tensor([0.5, -1.0, 0.0, -2.0, 0.1])
    assert pick_rows(candidates, scores, 0.4, "lowest", seed=0) == [3, 8]
    assert pick_rows(candidates, scores, 0.6, "lowest", seed=9) == [3, 5, 8]
    assert pick_rows(candidates, scores, 0.0, "lowest", seed=0) == []
    assert pick_rows(candidates, scores, 1.0, "lowest", seed=0) == candidates


def test_ties_are_broken_in_order():
    candidates = list(range(1000))
    assert pick_rows(candidates, torch.zeros(1000), 0.3, "lowest", seed=0) == candidates[:300]


def test_random_rows_are_the_same_at_every_refresh():
    candidates = list(range(100, 200))
    picked = pick_rows(candidates, torch.randn(100), 0.3, "random", seed=0)
    assert len(set(picked)) == 30 and picked == sorted(picked) and set(picked) <= set(candidates)
    torch.manual_seed(1)
    assert pick_rows(candidates, torch.randn(100), 0.3, "random", seed=0) == picked
    assert pick_rows(candidates, torch.randn(100), 0.3, "random", seed=1) != picked
    assert set(picked) < set(pick_rows(candidates, torch.randn(100), 0.6, "random", seed=0))
    assert pick_rows(candidates, torch.randn(100), 0.0, "random", seed=0) == []
    assert pick_rows(candidates, torch.randn(100), 1.0, "random", seed=0) == candidates


# --- a refresh --------------------------------------------------------------------------------------------------------

# Places in the dataset and example_ids differ: row 0 was dropped, and the rows are shuffled. 6 is plain text.
PROMPTS = {5: "50=", 1: "1=", 4: "4=", 2: "22=", 3: "3=", 6: "60="}
ORIGINALS = {i: "abcdefg"[i] + "." for i in PROMPTS}
TRUSTED = [{"input_ids": ids(f"9{i}=z."), "labels": ids(f"9{i}=z."), "example_id": i} for i in range(3)]


def new_buffer() -> ResponseBuffer:
    return ResponseBuffer(response_weighting="bmo", temperature=0.5, ratio_level="token", cap=5.0, seed=0)


def fields(buffer: ResponseBuffer) -> dict:
    """All that is known of the rows, in which NaN equals NaN."""
    return {i: repr(row) for i, row in buffer.rows.items()}


def collated(refiner: Refiner, training_ids, step: int, validation_ids=()) -> tuple[list[dict], BatchRows]:
    """The rows of a micro-batch as a step trains on them, without padding, and what is known of them."""
    batches = Batches(
        refiner.rows,
        PreparedRows(Dataset.from_list(TRUSTED)),
        DataCollatorForLanguageModeling(pad_token_id=TOKENIZER.pad_token_id),
        CPU,
        "example",
    )
    micro_batch = refiner.substitute(MicroBatch(list(training_ids), list(validation_ids)), step)
    (batch,) = batches.collate([micro_batch])
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    columns = (batch["input_ids"].tolist(), batch["labels"].tolist(), lengths)
    rows = [{"input_ids": ids_T[:n], "labels": labels_T[:n]} for ids_T, labels_T, n in zip(*columns, strict=True)]
    return rows, batch["rows"]


def batch_rows(training_ids: list[int], responses: list[int]) -> BatchRows:
    num_rows = len(training_ids)
    return BatchRows(training_ids, [], torch.tensor(responses), torch.ones(num_rows), torch.ones(num_rows))


def train_rows() -> PreparedRows:
    rows = []
    for example_id, prompt in PROMPTS.items():
        prompt_ids, response_ids = ids(prompt), ids(ORIGINALS[example_id])
        masked = prompt_ids if example_id == 6 else [-100] * len(prompt_ids)
        rows.append(
            {
                "input_ids": prompt_ids + response_ids,
                "labels": masked + response_ids,
                "example_id": example_id,
                "note": "",
            }
        )
    return PreparedRows(Dataset.from_list(rows))


class StubScout:
    """Probabilities by the last letter before the closing token; the base model finds all responses alike."""

    base_loss = 1.5

    def __init__(self, **p_right_of_letter: float):
        self.p_right_of_letter = {ids(letter)[0]: p for letter, p in p_right_of_letter.items()}

    def p_right(self, rows: Dataset) -> torch.Tensor:
        return torch.tensor([self.p_right_of_letter[row[-2]] for row in rows["input_ids"]])

    def base_losses(self, rows: Dataset, title: str = "") -> torch.Tensor:
        return torch.full((len(rows),), self.base_loss)


class Recorded:
    """Wraps a generator; keeps what it was asked; can fail, or leave prompts out."""

    def __init__(self, generator):
        self.generator, self.settings = generator, generator.settings
        self.calls, self.error, self.num_missing = [], None, 0

    def generate(self, prompts, num_generations, seeds):
        self.calls.append((list(prompts), num_generations, seeds))
        if self.error:
            raise self.error
        completions = self.generator.generate(prompts, num_generations, seeds)
        return completions[: len(completions) - self.num_missing]


def refiner_of(script, row_weights=None, scout=None, **settings) -> Refiner:
    model = tiny_model(TOKENIZER)
    model.lm_head.weight.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    sampling = SamplingSettings(temperature=0.7, top_p=1.0, max_new_tokens=6)
    settings = RefineSettings(
        **{
            "fraction": 0.4,
            "start": 0,
            "every": 2,
            "policy": "lowest",
            "num_generations": 2,
            "max_length": 20,
            "seed": 0,
        }
        | settings
    )
    if row_weights is None:
        row_weights = make_row_weights("mirror", 8)
        row_weights.exclude(torch.tensor([0, 7]))
        row_weights.restore(torch.arange(1, 7), torch.tensor([0.5, -1.0, 0.2, -2.0, 1.0, -9.0]))
    refiner = Refiner(
        settings,
        new_buffer(),
        Recorded(ScriptedGenerator(model, lambda prompt, j: ids(script(TOKENIZER.decode(prompt), j)), sampling, EOS)),
        rows=train_rows(),
        row_weights=row_weights,
        scout=scout,
        losses=lambda rows: torch.stack([plain_loss(model, **row) for row in rows]).detach(),
        autocast=contextlib.nullcontext,
        model=model,
    )
    refiner.plan(max_steps=100)
    return refiner


def two_responses(prompt: str, j: int) -> str:
    return "hi"[j] + prompt.replace(" ", "")[0] + "."


def test_rows_of_a_prompt_and_one_response_can_be_refined():
    assert refiner_of(two_responses).candidates == [1, 2, 3, 4, 5], "6 is plain text"
    assert refiner_of(two_responses).prompts([4, 2, 4]) == [ids("4="), ids("22="), ids("4=")]


def test_a_dataset_without_prompts_is_refused():
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "example_id": 0}]
    with pytest.raises(ValueError, match=r"use prompt and completion columns, or messages with"):
        Refiner(
            refiner_of(two_responses).settings,
            new_buffer(),
            None,
            rows=PreparedRows(Dataset.from_list(rows)),
            row_weights=make_row_weights("mirror", 1),
            scout=None,
            losses=None,
            autocast=contextlib.nullcontext,
            model=nn.Linear(1, 1),
        )


def test_settings_in_steps_or_as_a_part_of_all_steps():
    assert [in_steps(setting, 40) for setting in (0.0, 0.25, 0.99, 1.0, 7.0)] == [0, 10, 39, 1, 7]


def test_due_steps_of_a_plan():
    refiner = refiner_of(two_responses, start=0.25, every=0.125)
    refiner.plan(16)
    assert [step for step in range(16) if refiner.is_due(step)] == [4, 6, 8, 10, 12, 14]
    refiner.plan(4)
    assert [step for step in range(4) if refiner.is_due(step)] == [1, 2, 3], "no more often than every step"
    with pytest.raises(ValueError, match="refine_start is step 3 and the run has 3 steps: nothing would be refined"):
        refiner_of(two_responses, start=3).plan(3)


def test_due_steps():
    refiner = refiner_of(two_responses, start=3, every=4)
    assert [step for step in range(12) if refiner.is_due(step)] == [3, 7, 11]
    refiner.refresh(7)
    assert [step for step in range(12) if refiner.is_due(step)] == [3, 11], "once each"


def test_a_refresh_puts_new_responses_in_place_of_the_lowest_ones():
    refiner = refiner_of(two_responses)
    records = refiner.refresh(2)
    assert refiner.generator.calls[0][:2] == ([ids("22="), ids("4=")], 2)
    assert list(refiner.buffer.rows) == [2, 4]
    for i, first in ((2, "2"), (4, "4")):
        refined = refiner.buffer.rows[i]
        assert (refined.step, refined.original_score) == (2, {2: -1.0, 4: -2.0}[i])
        assert [list(r.token_ids) for r in refined.responses] == [ids(f"h{first}."), ids(f"i{first}.")]
        for response in refined.responses:
            prompt = ids(PROMPTS[i])
            labels = [-100] * len(prompt) + list(response.token_ids)
            log_prob = -3 * plain_loss(refiner.model, prompt + list(response.token_ids), labels).item()
            assert response.generator_log_prob == pytest.approx(log_prob, abs=1e-5)
            assert math.isnan(response.reference_loss), "nothing has measured it"
    assert [record["example_id"] for record in records] == [2, 4]
    for record in records:
        refined = refiner.buffer.rows[record["example_id"]]
        assert [list(row_ids) for row_ids in record["token_ids"]] == [list(r.token_ids) for r in refined.responses]
        assert record["log_probs"] == [r.sampling_log_prob for r in refined.responses]
        assert record["log_probs"] != [r.generator_log_prob for r in refined.responses], "drawn at another temperature"
        assert record["response_weights"] == pytest.approx(refiner.buffer.weights(record["example_id"]).tolist())
        assert record["statuses"] == ["usable", "usable"] and record["is_refined"] and record["step"] == 2


def test_a_refined_row_starts_from_weight_one_and_its_original_score_is_remembered():
    refiner = refiner_of(two_responses)
    before = refiner.row_weights.scores(torch.arange(8)).clone()
    records = refiner.refresh(0)
    torch.testing.assert_close(refiner.row_weights.all_weights()[[2, 4]], torch.ones(2))
    torch.testing.assert_close(refiner.original_scores(), before)
    for record in records:
        weights = refiner.row_weights.weights_of(torch.tensor([before[record["example_id"]]]))
        assert record["weight"] == pytest.approx(1.0)
        assert record["original_weight"] == pytest.approx(weights.item()) and record["original_weight"] < 0.8


STATUSES = {"": "empty", ".": "empty", "ab": "unfinished", "abcdefghijklmnopqr.": "too long", "a.": "usable"}


def test_only_usable_responses_are_trained_on():
    refiner = refiner_of(lambda prompt, j: list(STATUSES)[j], num_generations=5)
    records = refiner.refresh(0)
    assert [record["statuses"] for record in records] == [list(STATUSES.values())] * 2
    assert [record["response_weights"] for record in records] == [[0, 0, 0, 0, 1]] * 2
    for i in (2, 4):
        assert [list(r.token_ids) for r in refiner.buffer.rows[i].responses] == [ids("a.")]
    history = refiner.history
    assert (history["refine/empty"], history["refine/unfinished"], history["refine/too_long"]) == (0.4, 0.2, 0.2)
    assert history["refine/num_rows"] == 2 and history["refine/num_without_usable_response"] == 0
    assert history["refine/response_tokens"] == pytest.approx((0 + 1 + 2 + 19 + 2) / 5)


def test_the_limit_counts_prompt_and_response():
    refiner = refiner_of(lambda prompt, j: "abcd.", max_length=7, fraction=1.0, num_generations=1)
    statuses = {record["example_id"]: record["statuses"] for record in refiner.refresh(0)}
    assert statuses == {1: ["usable"], 2: ["too long"], 3: ["usable"], 4: ["usable"], 5: ["too long"]}
    refiner = refiner_of(lambda prompt, j: "abcd.", max_length=None, fraction=1.0, num_generations=1)
    assert all(record["statuses"] == ["usable"] for record in refiner.refresh(0))


def test_a_row_without_a_usable_response_keeps_its_original_one():
    refiner = refiner_of(lambda prompt, j: "x." if prompt[0] == "4" else "")
    score = refiner.row_weights.scores(torch.tensor([2])).item()
    records = refiner.refresh(0)
    assert list(refiner.buffer.rows) == [4]
    assert refiner.row_weights.scores(torch.tensor([2])).item() == score
    assert [(record["is_refined"], sum(record["response_weights"])) for record in records] == [(False, 0), (True, 1)]
    assert records[0]["original_weight"] == records[0]["weight"]
    assert refiner.history["refine/num_without_usable_response"] == 1
    rows, known = collated(refiner, [2, 4], step=0)
    assert [row["input_ids"] for row in rows] == [ids("22=c."), ids("4=x.")]
    assert known.responses_L[0] == -1 and known.responses_L[1] in (0, 1)


def test_no_usable_response_at_all():
    refiner = refiner_of(lambda prompt, j: "")
    before = refiner.row_weights.scores(torch.arange(8)).clone()
    refiner.refresh(0)
    assert refiner.buffer.rows == {}
    assert torch.equal(refiner.row_weights.scores(torch.arange(8)), before)
    assert refiner.history["refine/empty"] == 1.0


def test_too_small_a_part_refines_nothing():
    refiner = refiner_of(two_responses, fraction=0.05)
    assert refiner.refresh(0) == [] and refiner.buffer.rows == {} and not refiner.is_due(0)


def test_a_row_that_is_no_longer_picked_gets_its_score_back():
    refiner = refiner_of(two_responses)
    refiner.refresh(0)
    refiner.row_weights.restore(torch.tensor([1, 5]), torch.tensor([-3.0, -4.0]))  # they have become the lowest
    others = refiner.row_weights.scores(torch.tensor([3, 6])).clone()
    refiner.refresh(2)
    assert list(refiner.buffer.rows) == [1, 5]
    assert refiner.row_weights.scores(torch.tensor([2, 4])).tolist() == [-1.0, -2.0]
    assert torch.equal(refiner.row_weights.scores(torch.tensor([3, 6])), others)
    rows, known = collated(refiner, [2, 4, 5], step=2)
    assert [row["input_ids"] for row in rows[:2]] == [ids("22=c."), ids("4=e.")]
    assert known.responses_L[:2].tolist() == [-1, -1] and known.responses_L[2] >= 0
    assert refiner.original_scores()[1:6].tolist() == pytest.approx([-3.0, -1.0, 0.2, -2.0, -4.0])


def test_the_original_score_counts_when_the_lowest_are_picked_again():
    """New responses with high scores are no reason to go back to the original one, whose score was low."""
    refiner = refiner_of(two_responses)
    for step in (0, 2, 4):
        refiner.refresh(step)
        assert list(refiner.buffer.rows) == [2, 4]
        assert [row.original_score for row in refiner.buffer.rows.values()] == [-1.0, -2.0]
        assert [row.step for row in refiner.buffer.rows.values()] == [step, step]
        refiner.row_weights.restore(torch.tensor([2, 4]), torch.tensor([5.0, 5.0]))


def test_a_random_choice_stays():
    refiner = refiner_of(two_responses, policy="random", row_weights=make_row_weights("none", 8))
    refiner.refresh(0)
    picked = list(refiner.buffer.rows)
    refiner.refresh(2)
    assert list(refiner.buffer.rows) == picked and len(picked) == 2
    assert torch.equal(refiner.row_weights.all_weights(), torch.ones(8))


def test_every_refresh_draws_anew():
    refiner, again = refiner_of(two_responses), refiner_of(two_responses)
    for step in (0, 2, 4):
        refiner.refresh(step)
    again.refresh(2)
    seeds = [seed for _, _, (seed, *_) in refiner.generator.calls]
    assert len(set(seeds)) == 3 and again.generator.calls[0][2][0] == seeds[1], "from seed and step alone"
    other = refiner_of(two_responses, seed=1)
    other.refresh(2)
    assert other.generator.calls[0][2] != seeds[1]


@pytest.mark.parametrize("how", ["raises", "too few"])
def test_a_failing_generator_changes_nothing(how):
    refiner = refiner_of(two_responses)
    refiner.refresh(0)
    rows, scores = fields(refiner.buffer), refiner.row_weights.scores(torch.arange(8)).clone()
    refiner.row_weights.restore(torch.tensor([1, 5]), torch.tensor([-3.0, -4.0]))
    scores[[1, 5]] = torch.tensor([-3.0, -4.0])
    refiner.generator.error = GenerationError("no connection") if how == "raises" else None
    refiner.generator.num_missing = 1
    with pytest.raises(GenerationError, match="no connection" if how == "raises" else "completed 1 of 2 prompts"):
        refiner.refresh(2)
    assert fields(refiner.buffer) == rows
    assert torch.equal(refiner.row_weights.scores(torch.arange(8)), scores)
    assert refiner.is_due(2), "it can be tried again"


def test_a_log_prob_that_is_no_number_does_not_reach_a_weight():
    """vLLM reports none for some tokens. Only the first completions of a few prompts are verified by a forward."""
    refiner = refiner_of(two_responses, fraction=1.0)
    generate = refiner.generator.generate

    def with_nan(*args):
        completions = generate(*args)
        completions[-1][1] = Completion(completions[-1][1].token_ids, math.nan, True)
        return completions

    refiner.generator.generate = with_nan
    with contextlib.suppress(GenerationError):
        refiner.refresh(0)
    for i in refiner.buffer.rows:
        assert refiner.buffer.weights(i).isfinite().all()
        refiner.buffer.choose(i, 0)


# --- scored by a scout ------------------------------------------------------------------------------------------------

P_RIGHT = torch.tensor([0.95, 0.2, 0.6, 0.1, 0.8, 0.9])  # of rows 1 to 6


def scouted_weights() -> ScoutWeights:
    row_weights = ScoutWeights(8)
    row_weights.exclude(torch.tensor([0, 7]))
    row_weights.settle(torch.arange(1, 7), P_RIGHT)
    return row_weights


def two_responses_ending_in_letters(prompt: str, j: int) -> str:
    return prompt.replace(" ", "")[0] + "hi"[j] + "."


def test_new_responses_get_the_probability_that_the_scout_gives_them():
    """One response each: a row is then as likely right as its response, and visited as often as that is worth."""
    row_weights = scouted_weights()
    before, visits = row_weights.all_scores(), row_weights.visits_N()
    script = {"22=": "h.", "4=": "i."}
    scout = StubScout(h=0.7, i=0.3)
    refiner = refiner_of(lambda prompt, j: script[prompt.replace(" ", "")], row_weights, scout, num_generations=1)
    refiner.refresh(0)
    assert list(refiner.buffer.rows) == [2, 4]
    torch.testing.assert_close(row_weights.p_right_N()[[2, 4]], torch.tensor([0.7, 0.3]))
    assert torch.equal(row_weights.scores(torch.tensor([1, 3, 5, 6])), before[[1, 3, 5, 6]])
    assert [row.responses[0].p_right for row in refiner.buffer.rows.values()] == pytest.approx([0.7, 0.3])
    torch.testing.assert_close(refiner.original_scores(), before)
    now = worth(torch.tensor([0.0, 0.95, 0.7, 0.6, 0.3, 0.8, 0.9, 0.0]))
    assert row_weights.visits_N() is not visits
    torch.testing.assert_close(row_weights.visits_N(), 6 * now / now.sum(), atol=1e-6, rtol=0)
    assert row_weights.num_useful() == pytest.approx(now.sum().item(), abs=1e-6)


def test_a_row_is_as_likely_right_as_the_response_that_it_would_draw_by_ratio():
    refiner = refiner_of(two_responses_ending_in_letters, scouted_weights(), StubScout(h=0.9, i=0.2))
    refiner.refresh(0)
    for i in (2, 4):
        p_right_G = torch.tensor([0.9, 0.2], dtype=torch.float64)
        drawn_G = refiner.buffer.weights(i)
        ratio_G = drawn_G / p_right_G / (drawn_G / p_right_G).sum()
        assert 0.02 < ratio_G[0] < 0.98 and drawn_G[0] > ratio_G[0], "the likelier one is drawn more often"
        expected = (ratio_G * p_right_G).sum().item()
        assert refiner.row_weights.p_right_N()[i].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("p_right", [0.0, 1e-9, 1.0])
def test_certain_responses_stay_finite(p_right):
    row_weights = scouted_weights()
    refiner = refiner_of(two_responses_ending_in_letters, row_weights, StubScout(h=p_right, i=p_right))
    refiner.refresh(0)
    assert row_weights.scores(torch.arange(1, 7)).isfinite().all()
    assert row_weights.all_weights().isfinite().all() and row_weights.visits_N().isfinite().all()
    for i in refiner.buffer.rows:
        assert refiner.buffer.weights(i).sum().item() == pytest.approx(1)


def test_auto_picks_the_rows_that_are_rather_wrong_than_right():
    """Always by their original responses, of those that can be refined: 2 and 4, and not 6, which is plain text."""
    row_weights = scouted_weights()
    row_weights.restore(torch.tensor([6]), torch.tensor([-5.0]))
    refiner = refiner_of(two_responses_ending_in_letters, row_weights, StubScout(h=0.9, i=0.9), fraction=None)
    for step in (0, 2):
        refiner.refresh(step)
        assert list(refiner.buffer.rows) == [2, 4]
    assert (row_weights.p_right_N()[[2, 4]] > 0.85).all(), "though their new responses are likely right"


def test_auto_picks_nothing_where_all_rows_are_rather_right():
    row_weights = ScoutWeights(8)
    row_weights.settle(torch.arange(8), torch.full((8,), 0.7))
    refiner = refiner_of(two_responses, row_weights, StubScout(), fraction=None)
    assert refiner.refresh(0) == [] and not refiner.buffer.rows and not refiner.is_due(0)
    assert not refiner.generator.calls, "a generator is not asked for nothing"


def test_nothing_is_due_where_the_lowest_are_wanted_and_no_row_has_been_scored():
    unscored = ScoutWeights(8)
    refiner = refiner_of(two_responses, unscored, StubScout(h=0.9, i=0.9))
    assert not any(refiner.is_due(step) for step in range(9))
    unscored.settle(torch.arange(8), torch.full((8,), 0.7))
    assert refiner.is_due(0)


def test_random_rows_are_refined_without_a_scout_to_score_them():
    row_weights = ScoutWeights(8)
    refiner = refiner_of(two_responses, row_weights, scout=None, policy="random")
    assert refiner.is_due(0)
    refiner.refresh(0)
    assert len(refiner.buffer.rows) == 2 and row_weights.visits_N() is None
    assert row_weights.all_weights().tolist() == [1.0] * 8 and row_weights.p_right_N().isnan().all()


def test_a_row_that_is_no_longer_refined_has_its_old_probability():
    row_weights = scouted_weights()
    refiner = refiner_of(two_responses_ending_in_letters, row_weights, StubScout(h=0.9, i=0.9))
    refiner.refresh(0)
    refiner.row_weights.restore(torch.tensor([1, 5]), row_weights.scores_of(torch.tensor([0.01, 0.02])))
    refiner.refresh(2)
    assert list(refiner.buffer.rows) == [1, 5]
    torch.testing.assert_close(row_weights.p_right_N()[[2, 4]], torch.tensor([0.2, 0.1]))


# --- between refreshes ------------------------------------------------------------------------------------------------


def test_rows_of_a_step_carry_the_chosen_responses():
    refiner = refiner_of(two_responses)
    refiner.refresh(0)
    seen = set()
    for step in range(12):
        rows, known = collated(refiner, [5, 4, 1, 2], step, validation_ids=[2, 0])
        assert (known.training_ids, known.validation_ids, len(rows)) == ([5, 4, 1, 2], [2, 0], 6)
        assert [row["input_ids"] for row in (rows[0], rows[2])] == [ids("50=f."), ids("1=b.")]
        assert [row["labels"] for row in rows[4:]] == [TRUSTED[2]["labels"], TRUSTED[0]["labels"]]
        assert known.responses_L[[0, 2]].tolist() == [-1, -1]
        for place, i in ((1, 4), (3, 2)):
            chosen, prompt = int(known.responses_L[place]), ids(PROMPTS[i])
            assert chosen == refiner.buffer.choose(i, step)
            response_ids = list(refiner.buffer.rows[i].responses[chosen].token_ids)
            assert rows[place] == {
                "input_ids": prompt + response_ids,
                "labels": [-100] * len(prompt) + response_ids,
            }
            seen.add((i, chosen))
    assert seen == {(2, 0), (2, 1), (4, 0), (4, 1)}, "the other response comes up in other steps"


def test_a_batch_without_refined_rows_is_as_it_was():
    refiner = refiner_of(two_responses)
    refiner.refresh(0)
    batch = MicroBatch([5, 1, 6], [0])
    assert refiner.substitute(batch, 0) == batch and not batch.substitutes


def test_rows_with_their_original_responses_count_as_they_are():
    refiner = refiner_of(two_responses, scout=StubScout())
    refiner.refresh(0)
    response, rows = refiner.buffer.rows[4].responses[1], batch_rows([5, 4, 2], [-1, 1, -1])
    log_probs = [-1.0, response.generator_log_prob + 1.0, -2.0]
    coefficients = refiner.coefficients(rows, torch.tensor(log_probs, dtype=torch.float64))
    assert coefficients[[0, 2]].tolist() == [1.0, 1.0]
    assert coefficients[1].item() == pytest.approx(refiner.buffer.coefficient(4, 1, log_probs[1]))
    assert coefficients[1].item() > 1.01
    references = refiner.reference_losses(rows)
    assert references.isnan().tolist() == [True, False, True] and references[1] == 1.5


def test_a_refiner_continues_from_its_state():
    first, second = refiner_of(two_responses), refiner_of(two_responses)
    first.refresh(2)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    assert fields(second.buffer) == fields(first.buffer)
    assert not second.is_due(2) and second.is_due(4)
    for step in (3, 4, 5):
        (rows, known), (expected, expected_known) = (collated(r, range(1, 6), step) for r in (second, first))
        assert rows == expected and torch.equal(known.responses_L, expected_known.responses_L)
    torch.testing.assert_close(second.original_scores()[[2, 4]], first.original_scores()[[2, 4]], rtol=0, atol=0)
