"""Online self-refining: rows whose original responses have low weights get new ones, written by the model.

At a refresh the fraction R of the rows is picked, the present model writes G responses to each prompt, and from then on
the rows train on those, each visit on one. The coefficient of a generated response is

    weight of the row (BDS)  *  weight of the response among the G (BMO)

See `tamis.refining.responses` for the second factor. A row without a usable response keeps its original one, with the
weight it had.

Shape suffixes: B rows of a batch, L its training rows, R generated responses, Q refined rows, G responses of one row.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn

from tamis.config import BilevelConfig, Resolved
from tamis.losses import row_losses
from tamis.ranks import share
from tamis.refining.generation import Completion, Generator, failing_together, verify
from tamis.refining.responses import RefinedRow, Response, ResponseBuffer
from tamis.selection.row_weights import RowWeights, ScoutWeights
from tamis.selection.scout import Scout
from tamis.stream import Batches, BatchRows, MicroBatch, PreparedRows, Substitute, as_rows, prompt_and_response

logger = logging.getLogger(__name__)


def pick_rows(candidates: Sequence[int], original_scores: Tensor, fraction: float, policy: str, seed: int) -> list[int]:
    """The rows to refine: ``round(fraction * len(candidates))`` of them, in ascending order.

    Args:
        candidates: example_ids of the rows that can be refined.
        original_scores: the score of the original response of each, same length.
        policy: ``lowest``: those with the lowest scores, anew at every refresh. ``random``: the same at every refresh.
    """
    num_picked = round(fraction * len(candidates))
    if policy == "random":
        order = torch.randperm(len(candidates), generator=torch.Generator().manual_seed(seed))
    else:
        order = original_scores.argsort(stable=True)
    return sorted(candidates[i] for i in order[:num_picked].tolist())


@dataclass(frozen=True)
class RefineSettings:
    """When and what is refined; `BilevelConfig` documents the values.

    Attributes:
        start, every: optimizer steps, or below 1 a part of all steps.
        fraction: of the rows; None for those whose score is below zero, which are more likely wrong than right.
        max_length: tokens of prompt and response together; longer ones are not trained on.
    """

    fraction: float | None
    start: float
    every: float
    policy: str
    num_generations: int
    max_length: int | None
    seed: int


class Refiner:
    """Refreshes the buffer, and tells what refined rows train on.

    Args:
        rows: the prepared training rows.
        row_weights: gets neutral scores for refined rows, and the scout's where there is one.
        scout: tells how likely new responses are right, as it did of the original ones; without a finding it measures
            the base model only. None where no losses are read.
        losses: token-mean losses (R) of prepared rows by the present model.
        num_ranks, rank: the ranks share the rows.

    Raises:
        ValueError: no training row is a prompt with one response.
    """

    def __init__(
        self,
        settings: RefineSettings,
        buffer: ResponseBuffer,
        generator: Generator,
        *,
        rows: PreparedRows,
        row_weights: RowWeights,
        scout: Scout | None,
        losses: Callable[[Dataset], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        model: nn.Module,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.settings, self.buffer, self.generator = settings, buffer, generator
        self.rows, self.row_weights, self.scout, self.losses = rows, row_weights, scout, losses
        self.autocast, self.model = autocast, model
        self.rank, self.num_ranks = rank, num_ranks
        self.last_refresh = -1
        self.history: dict[str, float] = {}
        self._prompt_length = {i: len(both[0]) for i, row in rows if (both := prompt_and_response(row))}
        self.candidates = sorted(self._prompt_length)
        if not self.candidates:
            raise ValueError(
                "no training row is a prompt with one response, so none can be refined: use prompt and completion "
                "columns, or messages with `assistant_only_loss=True`, or set `refine_fraction=0`"
            )
        if len(self.candidates) < len(rows):
            logger.warning(
                f"{len(self.candidates)} of {len(rows)} training rows are a prompt with one response: "
                "refine_fraction is a part of these, the others keep their responses"
            )

    def plan(self, max_steps: int) -> None:
        """Fix the steps of the refreshes.

        Raises:
            ValueError: the first refresh would come after the last step.
        """
        self._start = in_steps(self.settings.start, max_steps)
        self._every = max(in_steps(self.settings.every, max_steps), 1)
        if self._start >= max_steps:
            raise ValueError(
                f"refine_start is step {self._start} and the run has {max_steps} steps: nothing would be refined. "
                "Lower `refine_start`, or set `refine_fraction=0`"
            )

    def is_due(self, step: int) -> bool:
        """Whether the responses are written anew before this optimizer step.

        Never where the rows with the lowest scores are wanted and the scout could not score them: all scores are equal,
        and the first rows of the file would be rewritten for no reason.
        """
        is_unscored = isinstance(self.row_weights, ScoutWeights) and not self.row_weights.is_known
        if is_unscored and self.settings.policy == "lowest":
            return False
        since = step - self._start
        return since >= 0 and since % self._every == 0 and step != self.last_refresh

    def prompts(self, example_ids: Sequence[int]) -> list[list[int]]:
        """Token ids of the prompts of rows."""
        rows = self.rows.take(example_ids)
        return [row["input_ids"][: self._prompt_length[i]] for i, row in zip(example_ids, rows, strict=True)]

    # --- a refresh --------------------------------------------------------------------------------------------------

    def refresh(self, step: int) -> list[dict[str, Any]]:
        """Pick rows, have new responses written, score them; returns a record of each row (`refinements.parquet`).

        Raises:
            GenerationError: the generator failed, or see `tamis.refining.generation.verify`. The buffer is as before
                the call.
        """
        started = time.perf_counter()
        original_score_N = self.original_scores()
        picked = pick_rows(
            self.candidates,
            original_score_N[self.candidates],
            self._fraction(original_score_N),
            self.settings.policy,
            self.settings.seed,
        )
        completions, drift = self._generate(picked, step)
        seconds = time.perf_counter() - started
        statuses = {i: [self._status(i, completion) for completion in completions[i]] for i in picked}
        usable = {
            i: [c for c, status in zip(completions[i], statuses[i], strict=True) if status == "usable"] for i in picked
        }
        responses = self._measure({i: found for i, found in usable.items() if found})
        rows = {i: RefinedRow(step, original_score_N[i].item(), found) for i, found in responses.items()}
        self._swap(rows)
        if self._scoring_scout and rows:
            self._score()
        self.last_refresh = step
        self.history = self._summary(statuses, completions, seconds) | {"refine/logprob_drift": drift}
        ids = torch.tensor(picked, dtype=torch.int64)
        scores = torch.stack([self.row_weights.scores(ids), original_score_N[ids]], dim=1)
        return [
            {"example_id": i, "step": step, "weight": weight, "original_weight": original_weight}
            | self._record(i, completions[i], statuses[i])
            for i, (weight, original_weight) in zip(picked, self.row_weights.weights_of(scores).tolist(), strict=True)
        ]

    def _fraction(self, original_score_N: Tensor) -> float:
        """Part of the rows to refine; when not given that whose response is more likely wrong than right."""
        if self.settings.fraction is not None:
            return self.settings.fraction
        return (original_score_N[self.candidates] < 0).double().mean().item()

    def _generate(self, picked: list[int], step: int) -> tuple[dict[int, list[Completion]], float]:
        if not picked:
            return {}, 0.0
        mine = share(picked, self.rank, self.num_ranks)
        prompts = self.prompts(mine)
        seeds = [(self.settings.seed, step, i) for i in mine]  # the same on any number of ranks
        num_generations = self.settings.num_generations
        with failing_together(self.model):
            completions = self.generator.generate(prompts, num_generations, seeds)
        with failing_together(self.model):
            drift = verify(self.generator, self.model, prompts, completions, num_generations, self.autocast)
        found = list(zip(mine, completions, strict=True))
        if self.num_ranks > 1:
            found, drift = gather_object(found), max(gather_object([drift]))
        return dict(found), drift

    def _status(self, example_id: int, completion: Completion) -> str:
        num_tokens = len(completion.token_ids)
        if not math.isfinite(completion.log_prob):  # vLLM has none for some tokens
            return "unmeasured"
        if num_tokens == 0 or (num_tokens == 1 and completion.is_finished):  # nothing but the closing token
            return "empty"
        if not completion.is_finished:
            return "unfinished"
        if self.settings.max_length and self._prompt_length[example_id] + num_tokens > self.settings.max_length:
            return "too long"
        return "usable"

    def _measure(self, usable: dict[int, list[Completion]]) -> dict[int, list[Response]]:
        """The completions with their losses by the present model and the base model; and how likely they are right."""
        flat = [(i, completion) for i, completions in usable.items() for completion in completions]
        if not flat:
            return {}
        prompts = dict(zip(usable, self.prompts(list(usable)), strict=True))
        dataset = as_rows([(prompts[i], completion.token_ids) for i, completion in flat])
        loss_R, reference_R, p_right_R = self.losses(dataset), torch.full((len(flat),), math.nan), torch.ones(len(flat))
        if scout := self._scoring_scout:
            p_right_R = scout.p_right(dataset)
        elif self.scout and self.row_weights.uses_excess:
            reference_R = self.scout.base_losses(dataset)
        responses: dict[int, list[Response]] = {i: [] for i in usable}
        found = zip(flat, loss_R.tolist(), reference_R.tolist(), p_right_R.tolist(), strict=True)
        for (i, completion), loss, reference, p_right in found:
            log_prob = -loss * len(completion.token_ids)
            responses[i].append(Response(completion.token_ids, completion.log_prob, log_prob, reference, p_right))
        return responses

    @property
    def _scoring_scout(self) -> Scout | None:
        """The scout where it has scored the rows, and so scores their new responses."""
        is_scored = isinstance(self.row_weights, ScoutWeights) and self.row_weights.is_known
        return self.scout if is_scored else None

    def _score(self) -> None:
        """Refined rows are as likely right as their responses."""
        assert isinstance(self.row_weights, ScoutWeights), "only those are settled by a scout"
        p_right_Q = torch.tensor([self.buffer.p_right(i) for i in self.buffer.rows])
        self.row_weights.restore(torch.tensor(list(self.buffer.rows)), self.row_weights.scores_of(p_right_Q))

    def _swap(self, rows: dict[int, RefinedRow]) -> None:
        """The new rows instead of the old ones, and the scores with them."""
        left = {i: row.original_score for i, row in self.buffer.rows.items() if i not in rows}
        if left:
            self.row_weights.restore(torch.tensor(list(left)), torch.tensor(list(left.values())))
        self.buffer.rows = rows
        if rows:
            self.row_weights.restart(torch.tensor(list(rows)))

    def _summary(
        self, statuses: dict[int, list[str]], completions: dict[int, list[Completion]], seconds: float
    ) -> dict[str, float]:
        counts: dict[str, int] = defaultdict(int)
        for status in (s for row in statuses.values() for s in row):
            counts[status] += 1
        lengths = [len(c.token_ids) for row in completions.values() for c in row]
        total = max(len(lengths), 1)
        return {
            "refine/num_rows": len(self.buffer.rows),
            "refine/num_without_usable_response": len(statuses) - len(self.buffer.rows),
            **{
                f"refine/{status.replace(' ', '_')}": counts[status] / total
                for status in ("empty", "unfinished", "too long", "unmeasured")
            },
            "refine/response_tokens": sum(lengths) / total,
            "refine/seconds": seconds,
            "refine/tokens_per_second": sum(lengths) / seconds,
        }

    def _record(self, example_id: int, completions: list[Completion], statuses: list[str]) -> dict[str, Any]:
        weights: list[float] = [0.0] * len(completions)
        p_right: list[float | None] = [None] * len(completions)
        if example_id in self.buffer.rows:
            usable = [j for j, status in enumerate(statuses) if status == "usable"]
            responses = self.buffer.rows[example_id].responses
            for j, weight, response in zip(usable, self.buffer.weights(example_id).tolist(), responses, strict=True):
                weights[j] = weight
                p_right[j] = response.p_right if self._scoring_scout else None
        return {
            "token_ids": [c.token_ids for c in completions],
            "log_probs": [c.log_prob for c in completions],
            "statuses": statuses,
            "response_weights": weights,
            "response_p_right": p_right,
            "is_refined": example_id in self.buffer.rows,
        }

    def summary(self, step: int) -> str:
        """One line on the last refresh, for people."""
        h = self.history
        return (
            f"step {step}: {h['refine/num_rows']} rows train on new responses, "
            f"{h['refine/num_without_usable_response']} kept their original ones; of the responses "
            f"{h['refine/empty']:.1%} were empty, {h['refine/unfinished']:.1%} unfinished, "
            f"{h['refine/too_long']:.1%} too long; {h['refine/tokens_per_second']:.0f} tokens/s"
        )

    # --- between refreshes ------------------------------------------------------------------------------------------

    def substitute(self, batch: MicroBatch, step: int) -> MicroBatch:
        """The micro-batch with the generated response that each of its refined rows trains on in this step."""
        found = {}
        for i in batch.training_ids:
            if i in self.buffer.rows:
                chosen = self.buffer.choose(i, step)
                found[i] = Substitute(chosen, self.buffer.rows[i].responses[chosen].token_ids)
        return MicroBatch(batch.training_ids, batch.validation_ids, found)

    def reference_losses(self, rows: BatchRows) -> Tensor:
        """Reference losses (L) of the generated responses of a micro-batch, as far as they are known; else NaN."""
        return torch.tensor([
            self.buffer.rows[i].responses[chosen].reference_loss if chosen >= 0 else math.nan
            for i, chosen in zip(rows.training_ids, rows.responses_L.tolist(), strict=True)
        ])  # fmt: skip

    def coefficients(self, rows: BatchRows, log_prob_L: Tensor) -> Tensor:
        """What the response weights make of the rows of a micro-batch: one for rows with their original response."""
        visits = zip(rows.training_ids, rows.responses_L.tolist(), log_prob_L.tolist(), strict=True)
        return torch.tensor([self.buffer.coefficient(*visit) if visit[1] >= 0 else 1.0 for visit in visits])

    def original_scores(self) -> Tensor:
        """Scores of all N rows for their original responses, refined or not."""
        score_N = self.row_weights.all_scores()
        for i, row in self.buffer.rows.items():
            score_N[i] = row.original_score
        return score_N

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        return self.buffer.state_dict() | {"last_refresh": torch.tensor(self.last_refresh)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.buffer.load_state_dict(state)
        self.last_refresh = int(state["last_refresh"])


def in_steps(setting: float, max_steps: int) -> int:
    """A number of steps as it is, a part of all steps (below 1) as their number."""
    return int(setting * max_steps) if setting < 1 else int(setting)


def make_refiner(
    args: BilevelConfig,
    resolved: Resolved,
    generator: Generator,
    model: nn.Module,
    batches: Batches,
    row_weights: RowWeights,
    scout: Scout | None,
) -> Refiner:
    """The refiner that the settings ask for; the rest is its trainer's."""
    accelerator = batches.accelerator

    def losses(rows: Dataset) -> Tensor:
        title, size = "" if args.disable_tqdm else "log-probabilities", resolved.generation_batch_size
        return row_losses(model, rows, batches.collate_rows, accelerator, batch_size=size, title=title)

    return Refiner(
        RefineSettings(
            fraction=resolved.refine_fraction,
            start=resolved.refine_start,
            every=args.refine_every,
            policy=args.refine_policy,
            num_generations=args.num_generations,
            max_length=args.max_length,
            seed=args.seed,
        ),
        ResponseBuffer(
            response_weighting=args.response_weighting,
            temperature=resolved.response_temperature,
            ratio_level=args.ratio_level,
            cap=args.importance_ratio_cap,
            seed=args.seed,
        ),
        generator,
        rows=batches.training,
        row_weights=row_weights,
        scout=scout,
        losses=losses,
        autocast=accelerator.autocast,
        model=model,
        rank=accelerator.process_index,
        num_ranks=accelerator.num_processes,
    )
