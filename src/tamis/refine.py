"""Online self-refining: questions whose own answers have little say get new ones, written by the model.

At a refresh the fraction R of the questions is picked, the present model writes G answers to each, and from then on
they train on those, each visit on one. The coefficient of a generated answer is

    weight of the question (BDS)  *  weight of the answer among the G (BMO)

See `tamis.answers` for the second factor. A question without a usable answer keeps its own, with the weight it had.

Shape suffixes: B rows of a batch, R generated answers, G answers of one question.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tamis.answers import Answer, RefineBuffer, Refined
from tamis.generation import GenerationError, Generator, Response, make_generator, verify
from tamis.scout import Scout, row_losses
from tamis.selectors import Selector
from tamis.stream import upper_id

logger = logging.getLogger(__name__)

REFINE_POLICIES = ("lowest", "random")


def pick_questions(candidates: Sequence[int], own_scores: Tensor, fraction: float, policy: str, seed: int) -> list[int]:
    """The questions to rewrite: ``round(fraction * len(candidates))`` of them, in ascending order.

    Args:
        candidates: example_ids of the questions that can be rewritten.
        own_scores: what the selector thinks of the own answer of each, same length.
        policy: ``lowest``: those with the least say, anew at every refresh. ``random``: the same at every refresh.
    """
    num_picked = round(fraction * len(candidates))
    if policy == "random":
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    else:
        order = own_scores.argsort(stable=True)
    return sorted(candidates[i] for i in order[:num_picked].tolist())


def question_and_answer(row: dict[str, Any]) -> tuple[list[int], list[int]] | None:
    """Token ids of question and answer of a prepared row; None unless it is a question followed by one answer."""
    labels = row["labels"]
    start = next((t for t, label in enumerate(labels) if label != -100), len(labels))
    if not 0 < start < len(labels) or -100 in labels[start:]:
        return None
    return row["input_ids"][:start], row["input_ids"][start:]


@dataclass(frozen=True)
class RefineSettings:
    """When and what is refined; `BilevelConfig` documents the values.

    Attributes:
        start, every: in optimizer steps.
        max_length: tokens of question and answer together; longer ones are not trained on.
    """

    fraction: float
    start: int
    every: int
    policy: str
    num_generations: int
    max_length: int | None
    seed: int


class Refiner:
    """Refreshes the buffer, and tells the trainer what refined questions train on.

    Args:
        train_dataset, validation_dataset: prepared rows (``input_ids``, ``labels``, ``example_id``).
        collator: of the trainer, which makes a batch of them.
        selector: gets neutral scores for rewritten questions, and their judgement where a scout is at hand.
        scout: judges new answers as it judged the rows' own; without parameters of its own it measures the base model
            only. None where the selector reads no losses.
        losses: token-mean losses (R) of prepared rows by the present model.
        num_ranks, rank: the ranks share the questions.
    """

    def __init__(
        self,
        settings: RefineSettings,
        buffer: RefineBuffer,
        generator: Generator,
        *,
        train_dataset: Dataset,
        validation_dataset: Dataset | None,
        collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
        selector: Selector,
        scout: Scout | None,
        losses: Callable[[Dataset], Tensor],
        autocast: Callable[[], Any],
        model: Any,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.settings, self.buffer, self.generator = settings, buffer, generator
        self.selector, self.scout, self.losses = selector, scout, losses
        self.autocast, self.model = autocast, model
        self.collator = collator
        self._upper: Dataset | None = None
        if validation_dataset is not None:  # batches name trusted rows by their place before any was left out
            self._upper = validation_dataset.select_columns(["input_ids", "labels", "example_id"])
            self._upper_place = {example_id: i for i, example_id in enumerate(self._upper["example_id"])}
        self.rank, self.num_ranks = rank, num_ranks
        self.last_refresh = -1
        self.history: dict[str, float] = {}
        self._rows = train_dataset.select_columns(["input_ids", "labels"])
        self._place = {example_id: i for i, example_id in enumerate(train_dataset["example_id"])}
        parts = {example_id: question_and_answer(self._rows[i]) for example_id, i in self._place.items()}
        self._question_length = {example_id: len(both[0]) for example_id, both in parts.items() if both}
        self.candidates = sorted(self._question_length)
        if not self.candidates:
            raise ValueError(
                "no training row is a question with one answer, so none can be rewritten: use prompt and completion "
                "columns, or messages with --assistant_only_loss, or set --refine_fraction 0"
            )
        if len(self.candidates) < len(train_dataset):
            logger.warning(
                f"{len(self.candidates)} of {len(train_dataset)} training rows are a question with one answer: "
                "refine_fraction is a part of these, the others keep their answers"
            )

    def is_due(self, step: int) -> bool:
        """Whether the answers are written anew before this optimizer step."""
        since = step - self.settings.start
        return since >= 0 and since % self.settings.every == 0 and step != self.last_refresh

    def question(self, example_id: int) -> list[int]:
        """Token ids of a question."""
        return self._rows[self._place[example_id]]["input_ids"][: self._question_length[example_id]]

    # --- a refresh --------------------------------------------------------------------------------------------------

    def refresh(self, step: int) -> list[dict[str, Any]]:
        """Pick questions, have them answered anew, judge the answers; returns a record of each (`refinements.parquet`).

        Raises:
            GenerationError: the generator failed, or see `tamis.generation.verify`. The buffer is as before the call.
        """
        started = time.perf_counter()
        own_score_N = self.own_scores()
        picked = pick_questions(
            self.candidates,
            own_score_N[self.candidates],
            self.settings.fraction,
            self.settings.policy,
            self.settings.seed,
        )
        responses, drift = self._generate(picked, step)
        seconds = time.perf_counter() - started
        statuses = {i: [self._status(i, response) for response in responses[i]] for i in picked}
        questions = {}
        for i in picked:
            usable = [r for r, status in zip(responses[i], statuses[i], strict=True) if status == "usable"]
            if usable:
                answers = [Answer(r.token_ids, r.log_prob) for r in usable]
                questions[i] = Refined(step, own_score_N[i].item(), answers)
        excess_R = self._measure(questions)
        self._swap(questions)
        if self.scout and self.selector.is_settled and questions:
            self._judge(excess_R)
        self.last_refresh = step
        self.history = self._summary(statuses, responses, seconds) | {"refine/logprob_drift": drift}
        ids = torch.tensor(picked, dtype=torch.int64)
        weights = self.selector.weights_of(torch.stack([self.selector.scores(ids), own_score_N[ids]], dim=1)).tolist()
        return [
            {"example_id": i, "step": step, "question_weight": question_weight, "own_weight": own_weight}
            | self._record(i, responses[i], statuses[i])
            for i, (question_weight, own_weight) in zip(picked, weights, strict=True)
        ]

    def _generate(self, picked: list[int], step: int) -> tuple[dict[int, list[Response]], float]:
        mine = picked[self.rank :: self.num_ranks]
        prompts = [self.question(i) for i in mine]
        seed = ((self.settings.seed * 1_000_003 + step) * 1_003 + self.rank) % 2**63
        failure, answers, drift = "", [], 0.0
        try:
            answers = self.generator.generate(prompts, self.settings.num_generations, seed)
            drift = verify(self.generator, self.model, prompts, answers, self.settings.num_generations, self.autocast)
        except GenerationError as error:
            failure = str(error)
        except Exception as error:  # of whatever kind: the run shall end after saving, or go on without it
            logger.debug("traceback", exc_info=True)
            failure = f"the generator failed: {type(error).__name__}: {error}"
        if self.num_ranks > 1:  # a failure on one rank is all ranks': the others would wait for its answers for ever
            failure = next(filter(None, gather_object([failure])), "")
        if failure:
            raise GenerationError(failure)
        found = list(zip(mine, answers, strict=True))
        return dict(gather_object(found) if self.num_ranks > 1 else found), drift

    def _status(self, example_id: int, response: Response) -> str:
        num_tokens = len(response.token_ids)
        if not math.isfinite(response.log_prob):  # vLLM has none for some tokens
            return "unmeasured"
        if num_tokens == 0 or (num_tokens == 1 and response.is_finished):  # nothing but the closing token
            return "empty"
        if not response.is_finished:
            return "unfinished"
        if self.settings.max_length and self._question_length[example_id] + num_tokens > self.settings.max_length:
            return "too long"
        return "usable"

    def _measure(self, questions: dict[int, Refined]) -> Tensor:
        """Note what the present model and the reference make of the new answers; returns the scout's excess losses."""
        flat = [(i, answer) for i, question in questions.items() for answer in question.answers]
        nothing_R = torch.full((len(flat),), math.nan)
        if not flat:
            return nothing_R
        prompts = {i: self.question(i) for i in questions}
        rows = Dataset.from_list([_row(prompts[i], answer.token_ids) for i, answer in flat])
        loss_R = self.losses(rows)
        reference_R = self.scout.reference_losses(rows) if self.scout else nothing_R
        for (_, answer), loss, reference in zip(flat, loss_R.tolist(), reference_R.tolist(), strict=True):
            answer.old_log_prob = answer.log_prob = -loss * len(answer.token_ids)
            answer.reference_loss = reference
        return self.scout.losses(rows) - reference_R if self.scout and self.selector.is_settled else nothing_R

    def _judge(self, excess_R: Tensor) -> None:
        """Score refined questions as the scout scored all rows, by the mean over their answers, each as it counts."""
        questions = self.buffer.questions
        excess_by_question = excess_R.split([len(question.answers) for question in questions.values()])
        excess_Q = torch.stack([
            (self.buffer.weights(i)[0] * excess_G).sum()
            for i, excess_G in zip(questions, excess_by_question, strict=True)
        ])  # fmt: skip
        self.selector.restore(torch.tensor(list(questions)), self.selector.judged_scores(excess_Q).float())

    def _swap(self, questions: dict[int, Refined]) -> None:
        """The new questions instead of the old ones, and the scores with them."""
        left = {i: question.own_score for i, question in self.buffer.questions.items() if i not in questions}
        if left:
            self.selector.restore(torch.tensor(list(left)), torch.tensor(list(left.values())))
        self.buffer.questions = questions
        if questions:
            self.selector.restart(torch.tensor(list(questions)))

    def _summary(
        self, statuses: dict[int, list[str]], responses: dict[int, list[Response]], seconds: float
    ) -> dict[str, float]:
        counts: dict[str, int] = defaultdict(int)
        for status in (s for row in statuses.values() for s in row):
            counts[status] += 1
        lengths = [len(r.token_ids) for row in responses.values() for r in row]
        total = max(len(lengths), 1)
        return {
            "refine/num_questions": len(self.buffer.questions),
            "refine/num_without_usable_answer": len(statuses) - len(self.buffer.questions),
            **{
                f"refine/{status.replace(' ', '_')}": counts[status] / total
                for status in ("empty", "unfinished", "too long", "unmeasured")
            },
            "refine/answer_tokens": sum(lengths) / total,
            "refine/seconds": seconds,
            "refine/tokens_per_second": sum(lengths) / seconds,
        }

    def _record(self, example_id: int, responses: list[Response], statuses: list[str]) -> dict[str, Any]:
        weights = [0.0] * len(responses)
        if example_id in self.buffer.questions:
            usable = [j for j, status in enumerate(statuses) if status == "usable"]
            for j, weight in zip(usable, self.buffer.weights(example_id)[0].tolist(), strict=True):
                weights[j] = weight
        return {
            "token_ids": [r.token_ids for r in responses],
            "log_probs": [r.log_prob for r in responses],
            "statuses": statuses,
            "response_weights": weights,
            "is_refined": example_id in self.buffer.questions,
        }

    def summary(self, step: int) -> str:
        """One line on the last refresh, for people."""
        h = self.history
        return (
            f"step {step}: {h['refine/num_questions']} questions train on new answers, "
            f"{h['refine/num_without_usable_answer']} kept their own; of the answers {h['refine/empty']:.1%} "
            f"were empty, {h['refine/unfinished']:.1%} unfinished, {h['refine/too_long']:.1%} too long; "
            f"{h['refine/tokens_per_second']:.0f} tokens/s"
        )

    # --- between refreshes ------------------------------------------------------------------------------------------

    def rewrite(self, batch: dict[str, Any], step: int, device: torch.device) -> dict[str, Any]:
        """A micro-batch in which refined questions have a generated answer, whose place is in ``answers``."""
        questions = self.buffer.questions
        if not any(i in questions for i in batch["example_ids"]):
            return batch
        rows = []
        for i in batch["example_ids"]:
            row = self._rows[self._place[i]]
            chosen = self.buffer.choose(i, step) if i in questions else -1
            if chosen >= 0:
                row = _row(self.question(i), questions[i].answers[chosen].token_ids)
            rows.append({**row, "example_id": i, "answer": chosen})
        for place in batch["upper_rows"]:
            assert self._upper is not None, "the batch has rows of it"
            rows.append(dict(self._upper[self._upper_place[upper_id(place)]]))
        return send_to_device(self.collator(rows), device)

    def reference_losses(self, example_ids: Sequence[int], answers: Sequence[int]) -> Tensor:
        """Reference losses of the rows whose answers were generated, as far as they are known; NaN for the others."""
        return torch.tensor([
            self.buffer.questions[i].answers[chosen].reference_loss if chosen >= 0 else math.nan
            for i, chosen in zip(example_ids, answers, strict=True)
        ])  # fmt: skip

    def coefficients(self, example_ids: Sequence[int], answers: Sequence[int], log_probs: Sequence[float]) -> Tensor:
        """What the response weights make of the rows of a micro-batch: one for rows with their own answers."""
        return torch.tensor([
            self.buffer.coefficient(i, chosen, log_prob) if chosen >= 0 else 1.0
            for i, chosen, log_prob in zip(example_ids, answers, log_probs, strict=True)
        ])  # fmt: skip

    def commit(self, example_ids: Sequence[int], answers: Sequence[int], log_probs: Sequence[float]) -> None:
        """Note the log-probabilities of the answers that one optimizer step has seen, on all ranks."""
        for i, chosen, log_prob in zip(example_ids, answers, log_probs, strict=True):
            if chosen >= 0:
                self.buffer.questions[i].answers[chosen].log_prob = log_prob

    def own_scores(self) -> Tensor:
        """Scores of all N rows for their own answers, refined or not."""
        score_N = self.selector.scores(torch.arange(len(self.selector.num_updates_N))).clone()
        for i, question in self.buffer.questions.items():
            score_N[i] = question.own_score
        return score_N

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        return self.buffer.state_dict() | {"last_refresh": torch.tensor(self.last_refresh)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.buffer.load_state_dict(state)
        self.last_refresh = int(state["last_refresh"])


def _row(question: list[int], answer: list[int]) -> dict[str, Any]:
    return {"input_ids": question + answer, "labels": [-100] * len(question) + answer}


def in_steps(setting: float, max_steps: int) -> int:
    """A number of steps as it is, a part of all steps (below 1) as their number."""
    return int(setting * max_steps) if setting < 1 else int(setting)


def make_refiner(
    args: Any,
    resolved: Any,
    max_steps: int,
    *,
    model: Any,
    accelerator: Accelerator,
    processing_class: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    validation_dataset: Dataset | None,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    selector: Selector,
    scout: Scout | None,
) -> Refiner:
    """The refiner that a `BilevelConfig` and its resolved settings ask for; the rest is its trainer's."""
    buffer = RefineBuffer(
        response_weighting=args.response_weighting,
        temperature=args.response_temperature,
        ratio_level=args.ratio_level,
        ratio_clip=args.ratio_clip,
        seed=args.seed,
    )
    settings = RefineSettings(
        fraction=args.refine_fraction,
        start=in_steps(resolved.refine_start, max_steps),
        every=max(in_steps(args.refine_every, max_steps), 1),
        policy=args.refine_policy,
        num_generations=args.num_generations,
        max_length=args.max_length,
        seed=args.seed,
    )
    if settings.start >= max_steps:
        raise ValueError(
            f"refine_start is step {settings.start} and the run has {max_steps} steps: nothing would be refined. Lower "
            "--refine_start, or set --refine_fraction 0"
        )

    def losses(rows: Dataset) -> Tensor:
        title = "" if args.disable_tqdm else "log-probabilities"
        return row_losses(model, rows, collator, accelerator, batch_size=resolved.generation_batch_size, title=title)

    return Refiner(
        settings,
        buffer,
        make_generator(model, accelerator, processing_class, args, resolved.generation_batch_size),
        train_dataset=train_dataset,
        validation_dataset=validation_dataset,
        collator=collator,
        selector=selector,
        scout=scout,
        losses=losses,
        autocast=accelerator.autocast,
        model=model,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
