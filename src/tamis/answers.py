"""Generated answers: the buffer that holds them, what each counts, and which one a visit trains on.

Instead of forwarding all G answers of a question, a visit draws one in proportion to its weight; once its loss is known
its weight is taken anew, beside its siblings as they were last seen, and its coefficient is new weight over drawing
weight. Memory does not depend on G. An answer that the model has moved away from counts less, and a question whose
answers it has all moved away from loses say as a whole until they are written anew: the rule of selection, ``w``
proportional to ``exp(-excess / tau)``, with the generating model as reference (our derivation; docs/refining.md).

Shape suffixes: R generated answers, G answers of one question.
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from tamis.bilevel import effective_sample_size, importance_weights

RESPONSE_WEIGHTINGS = ("bmo", "uniform")
RATIO_LEVELS = ("token", "sequence")
_NUM_MEASURED = 200  # questions that the metrics of a log step look at, so that logging costs the same for any number


@dataclass
class Answer:
    """One generated answer and what is known of it. Log-probabilities are sums over its tokens, in nats.

    Attributes:
        token_ids: exactly as generated.
        sampling_log_prob: under the distribution it was drawn from.
        old_log_prob: under the model that generated it, at temperature 1.
        log_prob: under the model when it last saw the answer.
        reference_loss: nats per token, by the reference; NaN where that is computed along the steps.
    """

    token_ids: list[int]
    sampling_log_prob: float
    old_log_prob: float = math.nan
    log_prob: float = math.nan
    reference_loss: float = math.nan


@dataclass
class Refined:
    """A question that trains on generated answers.

    Attributes:
        step: when they were generated.
        own_score: what the selector thought of its own answer.
        answers: the usable ones, at least one.
    """

    step: int
    own_score: float
    answers: list[Answer]


class RefineBuffer:
    """Generated answers by question, and which of them a visit trains on.

    Args:
        response_weighting, temperature, ratio_level, ratio_clip: see `BilevelConfig`.
        seed: with step and question all the randomness there is.
    """

    def __init__(self, *, response_weighting: str, temperature: float, ratio_level: str, ratio_clip: float, seed: int):
        self.response_weighting, self.temperature = response_weighting, temperature
        self.ratio_level, self.ratio_clip = ratio_level, ratio_clip
        self.seed = seed
        self.questions: dict[int, Refined] = {}

    def weights(self, example_id: int) -> tuple[Tensor, Tensor]:
        """Weights (G, sum one) of a question's answers as the model last saw them; which ratios were clipped."""
        answers = self.questions[example_id].answers
        if self.response_weighting == "uniform":
            uniform_G = torch.full((len(answers),), 1 / len(answers), dtype=torch.float64)
            return uniform_G, torch.zeros(len(answers), dtype=torch.bool)
        log_probs = torch.tensor(
            [[a.log_prob, a.old_log_prob, a.sampling_log_prob] for a in answers], dtype=torch.float64
        )
        if self.ratio_level == "token":
            log_probs = log_probs / torch.tensor([[len(a.token_ids)] for a in answers])
        return importance_weights(*log_probs.unbind(1), temperature=self.temperature, ratio_clip=self.ratio_clip)

    def choose(self, example_id: int, step: int) -> int:
        """The answer that a visit in ``step`` trains on, drawn in proportion to the weights."""
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + example_id) % 2**63)
        weights_G, _ = self.weights(example_id)
        return int(torch.multinomial(weights_G.double(), 1, generator=generator))

    def coefficient(self, example_id: int, chosen: int, log_prob: float) -> float:
        """Of a drawn answer whose log-probability turns out to be ``log_prob``: weight now over weight when drawn."""
        answer = self.questions[example_id].answers[chosen]
        drawn, before = self.weights(example_id)[0][chosen], answer.log_prob
        answer.log_prob = log_prob
        now, answer.log_prob = self.weights(example_id)[0][chosen], before
        return (now / drawn).item()

    def metrics(self) -> dict[str, float]:
        """Means over (at most `_NUM_MEASURED`) refined questions: ESS/G of weights, clip rate, log-ratio per token."""
        if not self.questions:
            return {}
        ess, clipped, log_ratios = [], [], []
        stride = -(-len(self.questions) // _NUM_MEASURED)
        for example_id, question in islice(self.questions.items(), 0, None, stride):
            weights_G, clipped_G = self.weights(example_id)
            ess.append(effective_sample_size(weights_G) / len(weights_G))
            clipped.append(clipped_G.float().mean().item())
            log_ratios += [(a.log_prob - a.old_log_prob) / len(a.token_ids) for a in question.answers]
        return {
            "ratio_ess": sum(ess) / len(ess),
            "ratio_clip_rate": sum(clipped) / len(clipped),
            "mean_log_ratio": sum(log_ratios) / len(log_ratios),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        flat = [(example_id, q, a) for example_id, q in self.questions.items() for a in q.answers]
        return {
            "example_id_R": torch.tensor([i for i, _, _ in flat], dtype=torch.int64),
            "step_R": torch.tensor([q.step for _, q, _ in flat], dtype=torch.int64),
            "num_tokens_R": torch.tensor([len(a.token_ids) for _, _, a in flat], dtype=torch.int64),
            "token_ids": torch.tensor([t for _, _, a in flat for t in a.token_ids], dtype=torch.int32),
            "numbers_R": torch.tensor(
                [(q.own_score, a.sampling_log_prob, a.old_log_prob, a.log_prob, a.reference_loss) for _, q, a in flat],
                dtype=torch.float64,
            ).reshape(len(flat), 5),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.questions = {}
        tokens = state["token_ids"].split(state["num_tokens_R"].tolist())
        for example_id, step, token_ids, (own_score, *numbers) in zip(
            state["example_id_R"].tolist(), state["step_R"].tolist(), tokens, state["numbers_R"].tolist(), strict=True
        ):
            question = self.questions.setdefault(example_id, Refined(step, own_score, []))
            question.answers.append(Answer(token_ids.tolist(), *numbers))
