"""Generated responses: the buffer that holds them, what each counts, and which one a visit trains on.

Instead of forwarding all G responses of a row, a visit draws one in proportion to its weight; once its loss is known
its weight is taken anew, beside its siblings as they were last seen, and its coefficient is new weight over drawing
weight. Memory does not depend on G (our derivation; docs/refining.md).

Shape suffixes: R generated responses, G responses of one row.
"""

import math
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from tamis.bilevel import effective_sample_size, importance_weights

_NUM_MEASURED = 200  # rows that the metrics of a log step look at, so that logging costs the same for any number


@dataclass
class Response:
    """One generated response and what is known of it. Log-probabilities are sums over its tokens, in nats.

    Attributes:
        token_ids: exactly as generated.
        sampling_log_prob: under the distribution it was drawn from.
        old_log_prob: under the model that generated it, at temperature 1.
        log_prob: under the model when it last saw the response.
        reference_loss: nats per token, by the reference; NaN where that is computed along the steps.
    """

    token_ids: list[int]
    sampling_log_prob: float
    old_log_prob: float = math.nan
    log_prob: float = math.nan
    reference_loss: float = math.nan


@dataclass
class RefinedRow:
    """A row that trains on generated responses.

    Attributes:
        step: when they were generated.
        original_score: the score of its original response.
        responses: the usable ones, at least one.
    """

    step: int
    original_score: float
    responses: list[Response]


class ResponseBuffer:
    """Generated responses by row, and which of them a visit trains on.

    Args:
        response_weighting, temperature, ratio_level, ratio_clip: see `BilevelConfig`.
        seed: with step and row all the randomness there is.
    """

    def __init__(self, *, response_weighting: str, temperature: float, ratio_level: str, ratio_clip: float, seed: int):
        self.response_weighting, self.temperature = response_weighting, temperature
        self.ratio_level, self.ratio_clip = ratio_level, ratio_clip
        self.seed = seed
        self.rows: dict[int, RefinedRow] = {}

    def weights(self, example_id: int) -> tuple[Tensor, Tensor]:
        """Weights (G, sum one) of a row's responses as the model last saw them; which ratios were clipped."""
        responses = self.rows[example_id].responses
        if self.response_weighting == "uniform":
            uniform_G = torch.full((len(responses),), 1 / len(responses), dtype=torch.float64)
            return uniform_G, torch.zeros(len(responses), dtype=torch.bool)
        log_probs = torch.tensor(
            [[r.log_prob, r.old_log_prob, r.sampling_log_prob] for r in responses], dtype=torch.float64
        )
        if self.ratio_level == "token":
            log_probs = log_probs / torch.tensor([[len(r.token_ids)] for r in responses])
        return importance_weights(*log_probs.unbind(1), temperature=self.temperature, ratio_clip=self.ratio_clip)

    def choose(self, example_id: int, step: int) -> int:
        """The response that a visit in ``step`` trains on, drawn in proportion to the weights."""
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + example_id) % 2**63)
        weights_G, _ = self.weights(example_id)
        return int(torch.multinomial(weights_G.double(), 1, generator=generator))

    def coefficient(self, example_id: int, chosen: int, log_prob: float) -> float:
        """Of a drawn response whose log-probability turns out to be ``log_prob``: weight now over weight when drawn."""
        response = self.rows[example_id].responses[chosen]
        drawn, before = self.weights(example_id)[0][chosen], response.log_prob
        response.log_prob = log_prob
        now, response.log_prob = self.weights(example_id)[0][chosen], before
        return (now / drawn).item()

    def metrics(self) -> dict[str, float]:
        """Means over (at most `_NUM_MEASURED`) refined rows: ESS/G of weights, clip rate, log-ratio per token."""
        if not self.rows:
            return {}
        ess, clipped, log_ratios = [], [], []
        stride = -(-len(self.rows) // _NUM_MEASURED)
        for example_id, row in islice(self.rows.items(), 0, None, stride):
            weights_G, clipped_G = self.weights(example_id)
            ess.append(effective_sample_size(weights_G) / len(weights_G))
            clipped.append(clipped_G.float().mean().item())
            log_ratios += [(r.log_prob - r.old_log_prob) / len(r.token_ids) for r in row.responses]
        return {
            "ratio_ess": sum(ess) / len(ess),
            "ratio_clip_rate": sum(clipped) / len(clipped),
            "mean_log_ratio": sum(log_ratios) / len(log_ratios),
        }

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        flat = [(example_id, row, r) for example_id, row in self.rows.items() for r in row.responses]
        return {
            "example_id_R": torch.tensor([i for i, _, _ in flat], dtype=torch.int64),
            "step_R": torch.tensor([row.step for _, row, _ in flat], dtype=torch.int64),
            "num_tokens_R": torch.tensor([len(r.token_ids) for _, _, r in flat], dtype=torch.int64),
            "token_ids": torch.tensor([t for _, _, r in flat for t in r.token_ids], dtype=torch.int32),
            "numbers_R": torch.tensor(
                [
                    (row.original_score, r.sampling_log_prob, r.old_log_prob, r.log_prob, r.reference_loss)
                    for _, row, r in flat
                ],
                dtype=torch.float64,
            ).reshape(len(flat), 5),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.rows = {}
        tokens = state["token_ids"].split(state["num_tokens_R"].tolist())
        for example_id, step, token_ids, (original_score, *numbers) in zip(
            state["example_id_R"].tolist(), state["step_R"].tolist(), tokens, state["numbers_R"].tolist(), strict=True
        ):
            row = self.rows.setdefault(example_id, RefinedRow(step, original_score, []))
            row.responses.append(Response(token_ids.tolist(), *numbers))
