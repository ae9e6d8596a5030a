"""Generators whose completions are written by a function, in a test of the refiner and in whole runs."""

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

    def generate(self, prompts: Sequence[list[int]], num_generations: int, seeds: Any) -> list[list[Completion]]:
        """See `Generator`."""
        return [
            [self._completion(prompt, self.script(prompt, j)) for j in range(num_generations)] for prompt in prompts
        ]

    def _completion(self, prompt: list[int], token_ids: list[int]) -> Completion:
        log_prob = sampled_log_prob(self.model, prompt, token_ids, self.settings)
        return Completion(token_ids, log_prob, token_ids[-1:] == [self.eos_token_id])


class Script:
    """Stands in for the generator of a trainer: completions by text, calls counted, failures where it is told to."""

    def __init__(self, completion, fails_at=0, error=None):
        self.completion, self.fails_at, self.error, self.num_calls = completion, fails_at, error, 0

    def make(self, model, accelerator, processing_class, args, batch_size):
        self.settings = SamplingSettings(args.generation_temperature, args.generation_top_p, args.max_new_tokens)

        def script(prompt, j):
            text = self.completion(processing_class.decode(prompt).replace(" ", ""), j, self.num_calls)
            eos_token_id, id_of = processing_class.eos_token_id, processing_class.convert_tokens_to_ids
            return [eos_token_id if letter == "." else id_of(letter) for letter in text]

        self.scripted = ScriptedGenerator(model, script, self.settings, processing_class.eos_token_id)
        return self

    def generate(self, prompts, num_generations, seeds):
        self.num_calls += 1
        if self.num_calls == self.fails_at and self.error:
            raise self.error
        completions = self.scripted.generate(prompts, num_generations, seeds)
        return completions[:-1] if self.num_calls == self.fails_at else completions


def letters(prompt: str, j: int, call: int) -> str:
    """Of unlike length for each completion; the same at every call."""
    return "pqrst"[j] * (1 + (j + len(prompt)) % 3) + "."
