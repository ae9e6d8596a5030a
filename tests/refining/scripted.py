"""A generator whose completions are written by a function."""

from collections.abc import Callable, Sequence
from typing import Any

from tamis.refining.generation import Completion, SamplingSettings, sampled_log_prob


class ScriptedGenerator:
    """Completions by a function of the prompt; their log-probabilities are the training model's.

    Args:
        script: (prompt token ids, number of the completion) -> token ids; finished if they end with ``eos_token_id``.
    """

    def __init__(
        self,
        model: Any,
        script: Callable[[list[int], int], list[int]],
        settings: SamplingSettings,
        eos_token_id: int,
    ):
        self.model, self.script, self.settings, self.eos_token_id = model, script, settings, eos_token_id

    def generate(self, prompts: Sequence[list[int]], num_generations: int, seed: int) -> list[list[Completion]]:
        """See `Generator`."""
        return [
            [self._completion(prompt, self.script(prompt, j)) for j in range(num_generations)] for prompt in prompts
        ]

    def _completion(self, prompt: list[int], token_ids: list[int]) -> Completion:
        log_prob = sampled_log_prob(self.model, prompt, token_ids, self.settings)
        return Completion(token_ids, log_prob, token_ids[-1:] == [self.eos_token_id])
