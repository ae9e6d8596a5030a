"""Refreshes with scripted answers: which questions are picked, what becomes of their answers, old and new."""

import contextlib
import math

import pytest
import torch
from conftest import plain_loss, tiny_model, tiny_tokenizer
from conftest import token_ids as ids
from datasets import Dataset
from torch import nn

from tamis.answers import RefineBuffer
from tamis.generation import GenerationError, Response, SamplingSettings, ScriptedGenerator
from tamis.refine import Refiner, RefineSettings, in_steps, pick_questions, question_and_answer
from tamis.selectors import make_selector

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
# --- which questions --------------------------------------------------------------------------------------------------


def test_the_lowest_are_picked():
    candidates, scores = [2, 3, 5, 8, 13], torch.tensor([0.5, -1.0, 0.0, -2.0, 0.1])
    assert pick_questions(candidates, scores, 0.4, "lowest", seed=0) == [3, 8]
    assert pick_questions(candidates, scores, 0.6, "lowest", seed=9) == [3, 5, 8]
    assert pick_questions(candidates, scores, 0.0, "lowest", seed=0) == []
    assert pick_questions(candidates, scores, 1.0, "lowest", seed=0) == candidates


def test_ties_are_broken_in_order():
    candidates = list(range(1000))
    assert pick_questions(candidates, torch.zeros(1000), 0.3, "lowest", seed=0) == candidates[:300]


def test_random_questions_are_the_same_at_every_refresh():
    candidates = list(range(100, 200))
    picked = pick_questions(candidates, torch.randn(100), 0.3, "random", seed=0)
    assert len(set(picked)) == 30 and picked == sorted(picked) and set(picked) <= set(candidates)
    torch.manual_seed(1)
    assert pick_questions(candidates, torch.randn(100), 0.3, "random", seed=0) == picked
    assert pick_questions(candidates, torch.randn(100), 0.3, "random", seed=1) != picked
    assert set(picked) < set(pick_questions(candidates, torch.randn(100), 0.6, "random", seed=0))
    assert pick_questions(candidates, torch.randn(100), 0.0, "random", seed=0) == []
    assert pick_questions(candidates, torch.randn(100), 1.0, "random", seed=0) == candidates


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([-100, -100, 12, 13], ([10, 11], [12, 13])),
        ([-100, -100, -100, 13], ([10, 11, 12], [13])),
        ([10, 11, 12, 13], None),  # plain text: no question
        ([-100, 11, -100, 13], None),  # several turns
        ([-100, 11, 12, -100], None),
        ([-100] * 4, None),  # no answer
    ],
)
def test_question_and_answer(labels, parts):
    assert question_and_answer({"input_ids": [10, 11, 12, 13], "labels": labels}) == parts


# --- a refresh --------------------------------------------------------------------------------------------------------

# Places in the dataset and example_ids differ: row 0 was dropped, and the rows are shuffled. 6 is plain text.
QUESTIONS = {5: "50=", 1: "1=", 4: "4=", 2: "22=", 3: "3=", 6: "60="}
OWN = {i: "abcdefg"[i] + "." for i in QUESTIONS}


TRUSTED = [{"input_ids": ids(f"9{i}=z."), "labels": ids(f"9{i}=z."), "example_id": -1 - i} for i in range(3)]


def new_buffer() -> RefineBuffer:
    return RefineBuffer(response_weighting="bmo", temperature=0.5, ratio_level="token", ratio_clip=5.0, seed=0)


def fields(buffer: RefineBuffer) -> dict:
    """All that is known of the questions, in which NaN equals NaN."""
    return {i: repr(question) for i, question in buffer.questions.items()}


def rewritten(refiner: Refiner, example_ids, step: int, upper_rows=()) -> list[dict]:
    """The rows of a micro-batch after answers have been put in."""
    batch = {"example_ids": list(example_ids), "upper_rows": list(upper_rows)}
    return refiner.rewrite(batch, step, torch.device("cpu"))["rows"]


def train_dataset() -> Dataset:
    rows = []
    for example_id, question in QUESTIONS.items():
        question_ids, answer_ids = ids(question), ids(OWN[example_id])
        masked = question_ids if example_id == 6 else [-100] * len(question_ids)
        rows.append(
            {
                "input_ids": question_ids + answer_ids,
                "labels": masked + answer_ids,
                "example_id": example_id,
                "note": "",
            }
        )
    return Dataset.from_list(rows)


class StubScout:
    """Losses by the last letter before the closing token; the reference finds all answers alike."""

    reference_loss = 1.5

    def __init__(self, **loss_of_letter: float):
        self.loss_of_letter = {ids(letter)[0]: loss for letter, loss in loss_of_letter.items()}

    def losses(self, rows: Dataset, title: str = "") -> torch.Tensor:
        return torch.tensor([self.loss_of_letter[row[-2]] for row in rows["input_ids"]])

    def reference_losses(self, rows: Dataset, title: str = "") -> torch.Tensor:
        return torch.full((len(rows),), self.reference_loss)


class Recorded:
    """Wraps a generator; keeps what it was asked, and what it does not answer at all."""

    def __init__(self, generator):
        self.generator, self.settings = generator, generator.settings
        self.calls, self.error, self.num_missing = [], None, 0

    def generate(self, prompts, num_generations, seed):
        self.calls.append((list(prompts), num_generations, seed))
        if self.error:
            raise self.error
        answers = self.generator.generate(prompts, num_generations, seed)
        return answers[: len(answers) - self.num_missing]


def refiner_of(script, selector=None, scout=None, **settings) -> Refiner:
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
    if selector is None:
        selector = make_selector("mirror", 8)
        selector.exclude(torch.tensor([0, 7]))
        selector.restore(torch.arange(1, 7), torch.tensor([0.5, -1.0, 0.2, -2.0, 1.0, -9.0]))
    with torch.no_grad():
        return Refiner(
            settings,
            new_buffer(),
            Recorded(
                ScriptedGenerator(model, lambda prompt, j: ids(script(TOKENIZER.decode(prompt), j)), sampling, EOS)
            ),
            train_dataset=train_dataset(),
            validation_dataset=Dataset.from_list(TRUSTED),
            collator=lambda rows: {"rows": rows},
            selector=selector,
            scout=scout,
            losses=lambda rows: torch.stack([plain_loss(model, **row) for row in rows]).detach(),
            autocast=contextlib.nullcontext,
            model=model,
        )


def two_answers(question: str, j: int) -> str:
    return "hi"[j] + question.replace(" ", "")[0] + "."


def test_questions_with_one_answer_can_be_refined():
    assert refiner_of(two_answers).candidates == [1, 2, 3, 4, 5], "6 is plain text"
    assert refiner_of(two_answers).question(4) == ids("4=")


def test_a_dataset_without_questions_is_refused():
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "example_id": 0}]
    with pytest.raises(ValueError, match=r"use prompt and completion columns, or messages with"):
        Refiner(
            refiner_of(two_answers).settings,
            new_buffer(),
            None,
            train_dataset=Dataset.from_list(rows),
            validation_dataset=None,
            collator=None,
            selector=make_selector("mirror", 1),
            scout=None,
            losses=None,
            autocast=contextlib.nullcontext,
            model=nn.Linear(1, 1),
        )


def test_settings_in_steps_or_as_a_part_of_all_steps():
    assert [in_steps(setting, 40) for setting in (0.0, 0.25, 0.99, 1.0, 7.0)] == [0, 10, 39, 1, 7]


def test_due_steps():
    refiner = refiner_of(two_answers, start=3, every=4)
    assert [step for step in range(12) if refiner.is_due(step)] == [3, 7, 11]
    refiner.refresh(7)
    assert [step for step in range(12) if refiner.is_due(step)] == [3, 11], "once each"


def test_a_refresh_puts_new_answers_in_place_of_the_lowest_ones():
    refiner = refiner_of(two_answers)
    records = refiner.refresh(2)
    assert refiner.generator.calls[0][:2] == ([ids("22="), ids("4=")], 2)
    assert list(refiner.buffer.questions) == [2, 4]
    for i, first in ((2, "2"), (4, "4")):
        question = refiner.buffer.questions[i]
        assert (question.step, question.own_score) == (2, {2: -1.0, 4: -2.0}[i])
        assert [a.token_ids for a in question.answers] == [ids(f"h{first}."), ids(f"i{first}.")]
        for known in question.answers:
            row = {"input_ids": refiner.question(i) + known.token_ids}
            row["labels"] = [-100] * len(refiner.question(i)) + known.token_ids
            log_prob = -3 * plain_loss(refiner.model, **row).item()
            assert known.log_prob == known.old_log_prob == pytest.approx(log_prob, abs=1e-5)
            assert math.isnan(known.reference_loss), "nothing has measured it"
    assert [record["example_id"] for record in records] == [2, 4]
    for record in records:
        question = refiner.buffer.questions[record["example_id"]]
        assert record["token_ids"] == [a.token_ids for a in question.answers]
        assert record["log_probs"] == [a.sampling_log_prob for a in question.answers]
        assert record["log_probs"] != [a.old_log_prob for a in question.answers], "drawn at another temperature"
        assert record["response_weights"] == pytest.approx(refiner.buffer.weights(record["example_id"])[0].tolist())
        assert record["statuses"] == ["usable", "usable"] and record["is_refined"] and record["step"] == 2


def test_a_rewritten_question_starts_from_weight_one_and_its_own_answer_is_remembered():
    refiner = refiner_of(two_answers)
    before = refiner.selector.scores(torch.arange(8)).clone()
    records = refiner.refresh(0)
    torch.testing.assert_close(refiner.selector.all_weights()[[2, 4]], torch.ones(2))
    torch.testing.assert_close(refiner.own_scores(), before)
    for record in records:
        weights = refiner.selector.weights_of(torch.tensor([before[record["example_id"]]]))
        assert record["question_weight"] == pytest.approx(1.0)
        assert record["own_weight"] == pytest.approx(weights.item()) and record["own_weight"] < 0.8


STATUSES = {"": "empty", ".": "empty", "ab": "unfinished", "abcdefghijklmnopqr.": "too long", "a.": "usable"}


def test_only_usable_answers_are_trained_on():
    refiner = refiner_of(lambda question, j: list(STATUSES)[j], num_generations=5)
    records = refiner.refresh(0)
    assert [record["statuses"] for record in records] == [list(STATUSES.values())] * 2
    assert [record["response_weights"] for record in records] == [[0, 0, 0, 0, 1]] * 2
    for i in (2, 4):
        assert [a.token_ids for a in refiner.buffer.questions[i].answers] == [ids("a.")]
    history = refiner.history
    assert (history["refine/empty"], history["refine/unfinished"], history["refine/too_long"]) == (0.4, 0.2, 0.2)
    assert history["refine/num_questions"] == 2 and history["refine/num_without_usable_answer"] == 0
    assert history["refine/answer_tokens"] == pytest.approx((0 + 1 + 2 + 19 + 2) / 5)


def test_the_limit_counts_question_and_answer():
    refiner = refiner_of(lambda question, j: "abcd.", max_length=7, fraction=1.0, num_generations=1)
    statuses = {record["example_id"]: record["statuses"] for record in refiner.refresh(0)}
    assert statuses == {1: ["usable"], 2: ["too long"], 3: ["usable"], 4: ["usable"], 5: ["too long"]}
    refiner = refiner_of(lambda question, j: "abcd.", max_length=None, fraction=1.0, num_generations=1)
    assert all(record["statuses"] == ["usable"] for record in refiner.refresh(0))


def test_a_question_without_a_usable_answer_keeps_its_own():
    refiner = refiner_of(lambda question, j: "x." if question[0] == "4" else "")
    score = refiner.selector.scores(torch.tensor([2])).item()
    records = refiner.refresh(0)
    assert list(refiner.buffer.questions) == [4]
    assert refiner.selector.scores(torch.tensor([2])).item() == score
    assert [(record["is_refined"], sum(record["response_weights"])) for record in records] == [(False, 0), (True, 1)]
    assert records[0]["own_weight"] == records[0]["question_weight"]
    assert refiner.history["refine/num_without_usable_answer"] == 1
    own, refined = rewritten(refiner, [2, 4], step=0)
    assert own["input_ids"] == ids("22=c.") and own["answer"] == -1
    assert refined["input_ids"] == ids("4=x.") and refined["answer"] in (0, 1)


def test_no_usable_answer_at_all():
    refiner = refiner_of(lambda question, j: "")
    before = refiner.selector.scores(torch.arange(8)).clone()
    refiner.refresh(0)
    assert refiner.buffer.questions == {} and refiner.buffer.metrics() == {}
    assert torch.equal(refiner.selector.scores(torch.arange(8)), before)
    assert refiner.history["refine/empty"] == 1.0


def test_too_small_a_part_refines_nothing():
    refiner = refiner_of(two_answers, fraction=0.05)
    assert refiner.refresh(0) == [] and refiner.buffer.questions == {} and not refiner.is_due(0)


def test_a_question_that_leaves_the_set_gets_its_score_back():
    refiner = refiner_of(two_answers)
    refiner.refresh(0)
    refiner.selector.restore(torch.tensor([1, 5]), torch.tensor([-3.0, -4.0]))  # they have become the lowest
    others = refiner.selector.scores(torch.tensor([3, 6])).clone()
    refiner.refresh(2)
    assert list(refiner.buffer.questions) == [1, 5]
    assert refiner.selector.scores(torch.tensor([2, 4])).tolist() == [-1.0, -2.0]
    assert torch.equal(refiner.selector.scores(torch.tensor([3, 6])), others)
    rows = rewritten(refiner, [2, 4, 5], step=2)
    assert [row["input_ids"] for row in rows[:2]] == [ids("22=c."), ids("4=e.")]
    assert [row["answer"] for row in rows[:2]] == [-1, -1] and rows[2]["answer"] >= 0
    assert refiner.own_scores()[1:6].tolist() == pytest.approx([-3.0, -1.0, 0.2, -2.0, -4.0])


def test_the_own_score_counts_when_the_lowest_are_picked_again():
    """New answers that are thought well of are no reason to go back to the own answer, which was not."""
    refiner = refiner_of(two_answers)
    for step in (0, 2, 4):
        refiner.refresh(step)
        assert list(refiner.buffer.questions) == [2, 4]
        assert [q.own_score for q in refiner.buffer.questions.values()] == [-1.0, -2.0]
        assert [q.step for q in refiner.buffer.questions.values()] == [step, step]
        refiner.selector.restore(torch.tensor([2, 4]), torch.tensor([5.0, 5.0]))


def test_a_random_choice_stays():
    refiner = refiner_of(two_answers, policy="random", selector=make_selector("none", 8))
    refiner.refresh(0)
    picked = list(refiner.buffer.questions)
    refiner.refresh(2)
    assert list(refiner.buffer.questions) == picked and len(picked) == 2
    assert torch.equal(refiner.selector.all_weights(), torch.ones(8))


def test_every_refresh_draws_anew():
    refiner, again = refiner_of(two_answers), refiner_of(two_answers)
    for step in (0, 2, 4):
        refiner.refresh(step)
    again.refresh(2)
    seeds = [seed for _, _, seed in refiner.generator.calls]
    assert len(set(seeds)) == 3 and again.generator.calls[0][2] == seeds[1], "from seed and step alone"
    other = refiner_of(two_answers, seed=1)
    other.refresh(2)
    assert other.generator.calls[0][2] != seeds[1]


@pytest.mark.parametrize("how", ["raises", "too few"])
def test_a_failing_generator_changes_nothing(how):
    refiner = refiner_of(two_answers)
    refiner.refresh(0)
    questions, scores = fields(refiner.buffer), refiner.selector.scores(torch.arange(8)).clone()
    refiner.selector.restore(torch.tensor([1, 5]), torch.tensor([-3.0, -4.0]))
    scores[[1, 5]] = torch.tensor([-3.0, -4.0])
    refiner.generator.error = GenerationError("no connection") if how == "raises" else None
    refiner.generator.num_missing = 1
    with pytest.raises(GenerationError, match="no connection" if how == "raises" else "answered 1 of 2 questions"):
        refiner.refresh(2)
    assert fields(refiner.buffer) == questions
    assert torch.equal(refiner.selector.scores(torch.arange(8)), scores)
    assert refiner.is_due(2), "it can be tried again"


def test_a_log_prob_that_is_no_number_does_not_reach_a_weight():
    """vLLM reports none for some tokens. Only the first answers of a few questions are verified by a forward."""
    refiner = refiner_of(two_answers, fraction=1.0)
    generate = refiner.generator.generate

    def with_nan(*args):
        answers = generate(*args)
        answers[-1][1] = Response(answers[-1][1].token_ids, math.nan, True)
        return answers

    refiner.generator.generate = with_nan
    with contextlib.suppress(GenerationError):
        refiner.refresh(0)
    for i in refiner.buffer.questions:
        assert refiner.buffer.weights(i)[0].isfinite().all()
        refiner.buffer.choose(i, 0)


# --- judged by a scout ------------------------------------------------------------------------------------------------


def judged_selector(name="mirror", **settings):
    selector = make_selector(name, 8, **settings)
    excess = torch.tensor([-1.0, 0.5, 0.1, 0.8, -0.2, 0.3])
    selector.judge(torch.arange(1, 7), excess, excess)
    return selector


@pytest.mark.parametrize("score_map", ["bounded", "softmax"])
@pytest.mark.parametrize("name", ["mirror", "bmo"])
def test_new_answers_are_judged_as_the_own_ones_were(name, score_map):
    """One answer each, by a scout that finds it as good as it found row 1 (-1.0) and row 5 (-0.2) of all rows."""
    selector = judged_selector(name, score_map=score_map)
    before = selector.scores(torch.arange(8)).clone()
    script = {"22=": "h.", "4=": "i."}
    scout = StubScout(h=1.5 - 1.0, i=1.5 - 0.2)
    refiner = refiner_of(lambda q, j: script[q.replace(" ", "")], selector, scout, num_generations=1)
    refiner.refresh(0)
    assert list(refiner.buffer.questions) == [2, 4]
    torch.testing.assert_close(selector.scores(torch.tensor([2, 4])), before[[1, 5]])
    assert torch.equal(selector.scores(torch.tensor([1, 3, 5, 6])), before[[1, 3, 5, 6]])
    assert [q.answers[0].reference_loss for q in refiner.buffer.questions.values()] == [1.5, 1.5]
    torch.testing.assert_close(refiner.own_scores(), before)


def test_a_question_is_judged_by_the_mean_of_its_answers_as_they_count():
    refiner = refiner_of(two_answers_ending_in_letters, judged_selector(), StubScout(h=0.5, i=2.5))
    refiner.refresh(0)
    for i in (2, 4):
        weights = refiner.buffer.weights(i)[0]
        assert 0.02 < weights[0] < 0.98
        excess = weights[0] * (0.5 - 1.5) + weights[1] * (2.5 - 1.5)
        expected = refiner.selector.judged_scores(excess[None]).float()
        torch.testing.assert_close(refiner.selector.scores(torch.tensor([i])), expected)


def two_answers_ending_in_letters(question: str, j: int) -> str:
    return question.replace(" ", "")[0] + "hi"[j] + "."


@pytest.mark.parametrize("score_map", ["bounded", "softmax"])
@pytest.mark.parametrize("excess", [-3.0, 9.0])
def test_judging_with_a_sharp_temperature_stays_finite(score_map, excess):
    """Scores of 60 and -180: sigmoid is 1 in float64 at the first."""
    selector = judged_selector("bmo", score_map=score_map, temperature=0.05)
    scout = StubScout(h=1.5 + excess, i=2.0 + excess)
    refiner = refiner_of(two_answers_ending_in_letters, selector, scout)
    refiner.refresh(0)
    assert selector.scores(torch.arange(1, 7)).isfinite().all()
    assert selector.all_weights()[1:7].isfinite().all()
    for i in refiner.buffer.questions:
        assert refiner.buffer.weights(i)[0].sum().item() == pytest.approx(1)


# --- between refreshes ------------------------------------------------------------------------------------------------


def test_rows_of_a_step_carry_the_chosen_answers():
    refiner = refiner_of(two_answers)
    refiner.refresh(0)
    seen = set()
    for step in range(12):
        rows = rewritten(refiner, [5, 4, 1, 2], step, upper_rows=[2, 0])
        assert [row["example_id"] for row in rows] == [5, 4, 1, 2, -3, -1]
        assert [row["input_ids"] for row in (rows[0], rows[2])] == [ids("50=f."), ids("1=b.")]
        assert [row["labels"] for row in rows[4:]] == [TRUSTED[2]["labels"], TRUSTED[0]["labels"]]
        for row, question, i in ((rows[1], "4=", 4), (rows[3], "22=", 2)):
            assert row["answer"] == refiner.buffer.choose(i, step)
            answer_ids = refiner.buffer.questions[i].answers[row["answer"]].token_ids
            assert row["input_ids"] == ids(question) + answer_ids
            assert row["labels"] == [-100] * len(ids(question)) + answer_ids
            seen.add((i, row["answer"]))
    assert seen == {(2, 0), (2, 1), (4, 0), (4, 1)}, "the other answer comes up in other steps"


def test_a_batch_without_refined_questions_is_passed_on():
    refiner = refiner_of(two_answers)
    refiner.refresh(0)
    batch = {"example_ids": [5, 1, 6], "upper_rows": [0]}
    assert refiner.rewrite(batch, 0, torch.device("cpu")) is batch


def test_rows_with_their_own_answers_count_as_they_are():
    refiner = refiner_of(two_answers, scout=StubScout(h=0.0, i=0.0))
    refiner.refresh(0)
    first = refiner.buffer.questions[4].answers[1]
    log_probs = [-1.0, first.log_prob + 1.0, -2.0]
    coefficients = refiner.coefficients([5, 4, 2], [-1, 1, -1], log_probs)
    assert coefficients[[0, 2]].tolist() == [1.0, 1.0]
    assert coefficients[1].item() == pytest.approx(refiner.buffer.coefficient(4, 1, first.log_prob + 1.0))
    assert coefficients[1].item() > 1.01
    references = refiner.reference_losses([5, 4, 2], [-1, 1, -1])
    assert references.isnan().tolist() == [True, False, True] and references[1] == 1.5

    before = fields(refiner.buffer)
    refiner.commit([5, 4, 2], [-1, -1, -1], log_probs)
    assert fields(refiner.buffer) == before
    refiner.commit([5, 4, 2], [-1, 1, -1], log_probs)
    assert first.log_prob == log_probs[1] and first.old_log_prob == pytest.approx(log_probs[1] - 1.0)
    assert refiner.coefficients([4], [1], [log_probs[1]]).item() == 1.0


def test_a_refiner_continues_from_its_state():
    first, second = refiner_of(two_answers), refiner_of(two_answers)
    first.refresh(2)
    second.load_state_dict({n: t.clone() for n, t in first.state_dict().items()})
    assert fields(second.buffer) == fields(first.buffer)
    assert not second.is_due(2) and second.is_due(4)
    assert rewritten(second, range(1, 6), 3) == rewritten(first, range(1, 6), 3)
    torch.testing.assert_close(second.own_scores()[[2, 4]], first.own_scores()[[2, 4]], rtol=0, atol=0)
