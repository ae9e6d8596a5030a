"""Where a prompt meets its response: rows whose text makes one token of the two are tokenized in two parts.

TRL tokenizes prompt and response as one text. Where a token reaches over the boundary, it trains from that token on,
behind a prompt that is shorter than the one the model will be asked with. tamis tokenizes such a row's prompt and
response apart, as generation does. All other rows stay as TRL makes them.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset

from tamis.hashes import derived_fingerprint
from tamis.rows import arrow_column

logger = logging.getLogger(__name__)

_TRL_LOGGER = "trl.trainer.sft_trainer"
_TRL_WARNING = "The tokenized prompt is not a prefix"
_MARKS = ("\n", "a")  # stand before a response while it is tokenized: one of them does not merge with it


@contextmanager
def one_warning(dataset: Dataset) -> Iterator[None]:
    """Within it TRL warns at most once that prompts are not prefixes; of text not at all, see `tokenized_apart`."""
    num_shown = 1 if _has_text_prompts(dataset) else 0

    def is_first(record: logging.LogRecord) -> bool:
        nonlocal num_shown
        is_warning = _TRL_WARNING in record.getMessage()
        num_shown += is_warning
        return not is_warning or num_shown == 1

    logging.getLogger(_TRL_LOGGER).addFilter(is_first)
    try:
        yield
    finally:
        logging.getLogger(_TRL_LOGGER).removeFilter(is_first)


def tokenized_apart(name: str, dataset: Dataset, tokenizer: Any, completion_only_loss: bool) -> Dataset:
    """Tokenize prompt and response apart in the rows where they make one token; say in how many rows.

    Args:
        name: of the data set, for what is said.
        dataset: as TRL has tokenized it, uncut, with the texts of which `input_ids` and `labels` were made. Data sets
            without prompts that are text are returned as they are.
        completion_only_loss: whether the prompt is left out of the labels.
    """
    if not _has_text_prompts(dataset) or not len(dataset):
        return dataset

    def split(part: dict[str, Any]) -> dict[str, Any]:
        input_ids, labels, is_split = part["input_ids"], part["labels"], []
        for i, prompt_ids in enumerate(tokenizer(part["prompt"])["input_ids"]):
            is_merged = input_ids[i][: len(prompt_ids)] != prompt_ids
            response_ids = _tokens_of_response(part["completion"][i], tokenizer) if is_merged else None
            is_split.append(response_ids is not None)
            if response_ids is not None:
                input_ids[i] = prompt_ids + response_ids
                labels[i] = ([-100] * len(prompt_ids) if completion_only_loss else prompt_ids) + response_ids
        return {"input_ids": input_ids, "labels": labels, "is_split": is_split}

    # The tokenizer is in the fingerprint of the tokenized rows already.
    found = dataset.with_format(None).map(split, batched=True, new_fingerprint=derived_fingerprint(dataset, "apart"))
    is_split = arrow_column(found, "is_split")
    if num_split := pc.sum(is_split).as_py():
        first = found[pc.index(is_split, True).as_py()]
        logger.info(
            f"{name}: in {num_split} of {len(found)} rows the end of the prompt and the start of the response make one "
            f"token (first: {first['prompt'][-20:]!r}); they are tokenized apart, as the model will be asked"
        )
    return found.remove_columns("is_split")


def _tokens_of_response(text: str, tokenizer: Any) -> list[int] | None:
    """The tokens of a response that stands behind a prompt; None where no mark stays apart from it.

    At the start of a text some tokenizers, such as Llama 2's, add a space, which the model would learn to answer with.
    """
    for mark in _MARKS:
        before, both = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (mark, mark + text))
        if both[: len(before)] == before:
            found: list[int] = both[len(before) :]
            return found
    return None


def _has_text_prompts(dataset: Dataset) -> bool:
    return "prompt" in dataset.column_names and getattr(dataset.features["prompt"], "dtype", "").endswith("string")
