"""What the methods of `tamis compare` are judged by: a number for each held-out row, of a trained model.

- ``eval_loss``: the loss of the row, in nats per token; lower is better.
- ``exact_match``: whether the greedy answer to the prompt is the row's response, but for white space around it.
- ``module:function``: a function of the user. It gets the rows, as dicts with the columns of `tamis.data.load_rows`,
  and the greedy answers, and returns a number for each; higher is better.
- ``lm_eval:TASK``: a task of lm-evaluation-harness, the package's own or of the folder ``$LM_EVAL_TASKS``: the mean of
  its first metric, one number for all rows.
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from tamis.losses import evaluation_mode
from tamis.refining.generation import closing_tokens
from tamis.trainer import BilevelTrainer

EVAL_LOSS, EXACT_MATCH, LM_EVAL = "eval_loss", "exact_match", "lm_eval:"
Values = NDArray[np.float64]
_IGNORED = -100


@dataclass(frozen=True)
class Metric:
    """One way to judge.

    Attributes:
        name: as it was given.
        judge: of rows and answers; None where no answers are asked for.
    """

    name: str
    judge: Callable[[list[dict[str, Any]], list[str]], Sequence[float]] | None = None

    @property
    def is_lower_better(self) -> bool:
        """Losses are."""
        return self.name == EVAL_LOSS


def find_metrics(names: Sequence[str]) -> list[Metric]:
    """The metrics of those names.

    Raises:
        ValueError: there is no such metric, module or function; or it needs a package that is not there.
    """
    if not names or len(set(names)) < len(names):
        raise ValueError(f"metric: give at least one, and each once, got {list(names)}")
    return [_find(name) for name in names]


def _find(name: str) -> Metric:
    if name == EVAL_LOSS:
        return Metric(name)
    if name == EXACT_MATCH:
        return Metric(name, exact_match)
    if name.startswith(LM_EVAL):
        if find_spec("lm_eval") is None:
            raise ValueError(f"metric {name!r} needs a package: pip install lm-eval")
        return Metric(name)
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise ValueError(
            f"unknown metric {name!r}: choose {EVAL_LOSS}, {EXACT_MATCH}, {LM_EVAL}TASK or module:function"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module of the user stands in the folder of the command
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"metric {name!r} cannot be imported ({error}): give a module and a function of it") from error
    return Metric(name, function)


def exact_match(rows: list[dict[str, Any]], answers: list[str]) -> list[float]:
    """1 where the answer is the response of the row, but for white space around it; see `evaluate`."""
    return [float(answer.strip() == row["response"].strip()) for row, answer in zip(rows, answers, strict=True)]


def evaluate(
    trainer: BilevelTrainer, metrics: Sequence[Metric], held_out: Dataset, max_new_tokens: int
) -> dict[str, Values]:
    """Values of the held-out rows by metric; ``eval_loss`` is always among them.

    Args:
        max_new_tokens: of an answer.
        held_out: the rows as they were loaded. A user's function gets these columns, and ``response``: the text that
            the answer is to be compared with.

    Raises:
        ValueError: a function of the user did not return a finite number for each row.
    """
    trainer.evaluate()
    found = {EVAL_LOSS: trainer.evaluated_losses().double().numpy()}
    judged = [metric for metric in metrics if metric.judge is not None]
    if judged:
        rows, answers = _answered(trainer, held_out, max_new_tokens)
        found |= {metric.name: _judged(metric, rows, answers) for metric in judged}
    for metric in metrics:
        if metric.name.startswith(LM_EVAL):
            found[metric.name] = _lm_eval(trainer, metric.name.removeprefix(LM_EVAL))
    return found


def _judged(metric: Metric, rows: list[dict[str, Any]], answers: list[str]) -> Values:
    assert metric.judge is not None, "asked of these alone"
    values = np.asarray(metric.judge(rows, answers), dtype=np.float64)
    if values.shape != (len(rows),) or not np.isfinite(values).all():
        raise ValueError(
            f"metric {metric.name!r} returned values of shape {values.shape}: it must return a finite number for each "
            f"of the {len(rows)} rows"
        )
    return values


def _answered(
    trainer: BilevelTrainer, held_out: Dataset, max_new_tokens: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """The held-out rows that were prepared, each with its response as text, and the model's greedy answers."""
    prepared: Any = trainer.eval_dataset
    tokenizer: Any = trainer.processing_class
    prompts, rows = [], []
    for example in prepared.select_columns(["example_id", "input_ids", "labels"]):
        start, end = _last_response(example["labels"])
        prompts.append(example["input_ids"][:start])
        response = tokenizer.decode(example["input_ids"][start:end], skip_special_tokens=True)
        rows.append(dict(held_out[example["example_id"]]) | {"response": response})
    return rows, greedy_answers(trainer, prompts, max_new_tokens)


def _last_response(labels: list[int]) -> tuple[int, int]:
    """Where the last run of trained tokens begins and ends."""
    end = max(i for i, label in enumerate(labels) if label != _IGNORED) + 1
    start = end
    while start > 0 and labels[start - 1] != _IGNORED:
        start -= 1
    return start, end


def greedy_answers(trainer: BilevelTrainer, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """The most likely continuation of each prompt as text, of at most so many tokens.

    Prompts of about the same length share a batch, of ``per_device_eval_batch_size``.
    """
    model, tokenizer, args = trainer.model, trainer.processing_class, trainer.args
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers, size, device = [""] * len(prompts), args.per_device_eval_batch_size, trainer.accelerator.device
    with evaluation_mode(model), torch.no_grad(), trainer.accelerator.autocast():
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            ids = [torch.tensor(prompts[i]) for i in batch]
            masks = [torch.ones_like(one) for one in ids]
            sequences = model.generate(
                input_ids=pad_sequence(ids, True, tokenizer.pad_token_id, padding_side="left").to(device),
                attention_mask=pad_sequence(masks, True, padding_side="left").to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=closing_tokens(model, tokenizer),
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(sequences[:, len(max(ids, key=len)) :], skip_special_tokens=True)
            for i, text in zip(batch, texts, strict=True):
                answers[i] = text
    return answers


def _lm_eval(trainer: BilevelTrainer, task: str) -> Values:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(trainer.model, tokenizer=trainer.processing_class, batch_size=trainer.args.per_device_eval_batch_size)
    manager = TaskManager(include_path=os.environ.get("LM_EVAL_TASKS"))
    with evaluation_mode(trainer.model):
        found = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"][task]
    name = next(name for name, value in found.items() if isinstance(value, float) and "stderr" not in name)
    return np.array([found[name]])
