"""Generated responses: the buffer that holds them, how a visit draws one, and what it counts.

A visit to a refined row trains on one of its G responses, drawn by weights that are fixed when they are generated; its
coefficient is the importance ratio between the model and the one that generated, capped. So memory and the cost of a
step do not depend on G, and a visit changes nothing (our derivation; docs/refining.md).

Shape suffixes: R generated responses, G responses of one row.
"""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tamis.bilevel import importance_ratio, response_weights


def as_int32(token_ids: Sequence[int]) -> Sequence[int]:
    """The same ids in a tenth of the memory of a list; as they are where they have that already."""
    return token_ids if isinstance(token_ids, array) else array("i", token_ids)


@dataclass(frozen=True, slots=True)
class Response:
    """One generated response and what is known of it. Log-probabilities are sums over its tokens, in nats.

    Attributes:
        token_ids: exactly as generated; kept as int32.
        sampling_log_prob: under the distribution it was drawn from.
        generator_log_prob: under the model that generated it, at temperature 1.
        reference_loss: nats per token, by the reference; NaN where that is computed along the steps.
        p_right: probability that it is right, by the scout; one where there is none.
    """

    token_ids: Sequence[int]
    sampling_log_prob: float
    generator_log_prob: float
    reference_loss: float = math.nan
    p_right: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", as_int32(self.token_ids))


@dataclass(frozen=True, slots=True)
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
        response_weighting, temperature, ratio_level: see `BilevelConfig`.
        cap: its ``importance_ratio_cap``.
        seed: with step and row all the randomness there is.
    """

    def __init__(self, *, response_weighting: str, temperature: float, ratio_level: str, cap: float, seed: int):
        self.response_weighting, self.temperature = response_weighting, temperature
        self.ratio_level, self.cap = ratio_level, cap
        self.seed = seed
        self.rows: dict[int, RefinedRow] = {}

    def weights(self, example_id: int) -> Tensor:
        """Weights (G, float64, sum one) of a row's responses, by ratio and scout; fixed when they are generated."""
        right_G = self._ratio_weights(example_id) * self._p_right(example_id)
        return right_G / right_G.sum()

    def p_right(self, example_id: int) -> float:
        """Probability that a row trains on a right response: the mean of its responses', each as its ratio counts."""
        return float(self._ratio_weights(example_id) @ self._p_right(example_id))

    def _p_right(self, example_id: int) -> Tensor:
        p_right = [response.p_right for response in self.rows[example_id].responses]
        return torch.tensor(p_right, dtype=torch.float64).clamp(min=1e-12)

    def _ratio_weights(self, example_id: int) -> Tensor:
        responses = self.rows[example_id].responses
        if self.response_weighting == "uniform":
            return torch.full((len(responses),), 1 / len(responses), dtype=torch.float64)
        log_probs = [[r.generator_log_prob / self._unit(r), r.sampling_log_prob / self._unit(r)] for r in responses]
        of_generator_G, of_sampling_G = torch.tensor(log_probs, dtype=torch.float64).unbind(1)
        return response_weights(of_generator_G, of_sampling_G, temperature=self.temperature)

    def _unit(self, response: Response) -> int:
        """What its log-probabilities are divided by: its tokens where ratios are of a token on average."""
        return len(response.token_ids) if self.ratio_level == "token" else 1

    def choose(self, example_id: int, step: int) -> int:
        """The response that a visit in ``step`` trains on, drawn by the weights."""
        generator = torch.Generator().manual_seed(((self.seed * 1_000_003 + step) * 1_000_003 + example_id) % 2**63)
        return int(torch.multinomial(self.weights(example_id), 1, generator=generator))

    def coefficient(self, example_id: int, chosen: int, log_prob: float) -> float:
        """What a response counts whose log-probability under the present model is ``log_prob``."""
        if self.response_weighting == "uniform":
            return 1.0
        response = self.rows[example_id].responses[chosen]
        now, before = (torch.tensor(value, dtype=torch.float64) for value in (log_prob, response.generator_log_prob))
        unit = self._unit(response)
        return importance_ratio(now / unit, before / unit, temperature=self.temperature, cap=self.cap).item()

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors from which `load_state_dict` continues bit for bit."""
        flat = [(example_id, row, r) for example_id, row in self.rows.items() for r in row.responses]
        numbers = [
            (row.original_score, r.sampling_log_prob, r.generator_log_prob, r.reference_loss, r.p_right)
            for _, row, r in flat
        ]
        return {
            "example_id_R": torch.tensor([i for i, _, _ in flat], dtype=torch.int64),
            "step_R": torch.tensor([row.step for _, row, _ in flat], dtype=torch.int64),
            "num_tokens_R": torch.tensor([len(r.token_ids) for _, _, r in flat], dtype=torch.int64),
            "token_ids": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *(r.token_ids for _, _, r in flat)])),
            "numbers_R": torch.tensor(numbers, dtype=torch.float64).reshape(len(flat), 5),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`."""
        self.rows = {}
        tokens = state["token_ids"].split(state["num_tokens_R"].tolist())
        for example_id, step, token_ids, (original_score, *numbers) in zip(
            state["example_id_R"].tolist(), state["step_R"].tolist(), tokens, state["numbers_R"].tolist(), strict=True
        ):
            row = self.rows.setdefault(example_id, RefinedRow(step, original_score, []))
            row.responses.append(Response(token_ids.numpy(), *numbers))
