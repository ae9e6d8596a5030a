"""Where a prompt meets its response: rows in which the two share a token are counted.

TRL trains such a row from the shared token on, so that the model learns to go on from another prompt than it will be
asked. It warns once for every end of a prompt, which may be once a row.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset

logger = logging.getLogger(__name__)

_TRL_LOGGER = "trl.trainer.sft_trainer"
_TRL_WARNING = "The tokenized prompt is not a prefix"
_NUM_ROWS = 1000  # tokenised at a time


@contextmanager
def one_warning(dataset: Dataset) -> Iterator[None]:
    """Within it TRL warns at most once that prompts are not prefixes; of text not at all, see `report_merged`."""
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


def report_merged(role: str, rows: Dataset, prepared: Dataset, tokenizer: Any) -> None:
    """Say in how many rows the last token of the prompt is the first of the response.

    Args:
        rows: by `example_id`; only prompts that are text are looked at.
        prepared: the same rows, or some of them, with `labels`. Rows that were cut are passed over.
    """
    if not _has_text_prompts(rows) or "labels" not in prepared.column_names or not len(prepared):
        return
    rows, prepared = rows.with_format(None), prepared.with_format(None)
    num_merged, shown = 0, ""
    for start in range(0, len(prepared), _NUM_ROWS):
        part = prepared[start : start + _NUM_ROWS]
        prompts = rows[part["example_id"]]["prompt"]
        for ids, labels, prompt, length in zip(
            tokenizer(prompts)["input_ids"], part["labels"], prompts, part["num_tokens"], strict=True
        ):
            start_of_response = next((i for i, label in enumerate(labels) if label != -100), len(labels))
            if len(labels) == length and 0 < start_of_response < len(ids):
                num_merged += 1
                shown = shown or prompt[-20:]
    if num_merged:
        logger.warning(
            f"{role}: in {num_merged} of {len(prepared)} rows the end of the prompt and the start of the response make "
            f"one token (first: {shown!r}), and the model will be asked with others than it is trained on. End the "
            "prompts with a space or a line break, or set `prompt_template`"
        )


def _has_text_prompts(dataset: Dataset) -> bool:
    return "prompt" in dataset.column_names and getattr(dataset.features["prompt"], "dtype", "").endswith("string")
