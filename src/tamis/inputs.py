"""The datasets that a trainer is given: one door for all of them, before a model is loaded."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from tamis.config import BilevelConfig
from tamis.forms import as_rows, check_token_rows, is_in_tokens, token_columns
from tamis.hashes import Hashes, num_repeats
from tamis.rows import check_overlap, check_rows, content_columns, is_conversational
from tamis.settings import warn_without_effect

logger = logging.getLogger(__name__)

_IMAGE_COLUMNS = ("image", "images")


def held_out_datasets(evaluation: Any) -> dict[str, Any]:
    """The data sets of `eval_dataset`, which may be a dict of them, by their roles; nothing for None."""
    if isinstance(evaluation, dict):
        return {f"eval_dataset[{name!r}]": dataset for name, dataset in evaluation.items()}
    return {} if evaluation is None else {"eval_dataset": evaluation}


def named_datasets(
    train: Any, validation: Any, evaluation: Any, formatting_func: Callable[[dict[str, Any]], str] | None = None
) -> dict[str, Dataset]:
    """All data sets by their roles: `train_dataset`, `validation_dataset`, and `eval_dataset` or its parts by name.

    Args:
        train, validation, evaluation: see `tamis.forms.as_rows`; the last two may be None, and ``evaluation`` a dict of
            data sets.
        formatting_func: as there.

    Raises:
        ValueError: one cannot be taken, or holds images.
    """
    if evaluation == {}:
        raise ValueError("eval_dataset: there are no data sets in the dict. Leave it out")
    if isinstance(evaluation, dict) and (wrong := [name for name in evaluation if not isinstance(name, str)]):
        raise ValueError(f"eval_dataset: the names of data sets are text, got {wrong[0]!r}. Rename it")
    given = {"train_dataset": train}
    if validation is not None:
        given["validation_dataset"] = validation
    given |= held_out_datasets(evaluation)
    named = {role: as_rows(dataset, role, formatting_func) for role, dataset in given.items()}
    for role, dataset in named.items():
        if found := [column for column in _IMAGE_COLUMNS if column in dataset.column_names]:
            raise ValueError(
                f"{role}: rows with images in column {found[0]!r}: tamis trains on text, remove the column"
            )
    return named


def check_datasets(datasets: Mapping[str, Dataset], args: BilevelConfig) -> dict[str, Hashes]:
    """Check every row, and that the rows of all data sets can be compared; returns the hash of every row, by role.

    Args:
        datasets: by role, as `named_datasets` gives them.

    Raises:
        ValueError: see `tamis.rows.check_rows` and `check_overlap`; or the data sets have unlike formats.
    """
    hashes = {}
    for role, dataset in datasets.items():
        _refuse_text_field(role, dataset, args.dataset_text_field)
        hashes[role] = check_token_rows(dataset, role) if is_in_tokens(dataset) else check_rows(dataset, role)
    _refuse_mixed_formats(datasets, args)
    if "validation_dataset" in datasets:
        check_overlap(datasets, hashes)
    _warn_of_repeats("train_dataset", hashes["train_dataset"])
    return hashes


def _warn_of_repeats(role: str, hashes: Hashes) -> None:
    if num := num_repeats(hashes):
        logger.warning(
            f"{role}: {num} of {len(hashes)} rows repeat another row and count again: leave them out of "
            f"`{role}`, unless you mean it"
        )


def _refuse_text_field(role: str, dataset: Dataset, name: str) -> None:
    """TRL reads the field of text rows only."""
    columns = set(dataset.column_names)
    if name == "text":
        return
    if {"prompt", "completion"} <= columns or columns & {"messages", "input_ids"}:
        if role == "train_dataset":
            warn_without_effect(["dataset_text_field"], {"the rows are not text alone": ["dataset_text_field"]})
    else:
        raise ValueError(
            f"dataset_text_field '{name}': tamis reads the column text. Give {role} as "
            f'dataset.rename_column("{name}", "text")'
        )


def _refuse_mixed_formats(datasets: Mapping[str, Dataset], args: BilevelConfig) -> None:
    """TRL decides by the first training row which tokens are trained on, in the other data sets too."""
    if args.completion_only_loss is False and not args.assistant_only_loss:
        return  # every token of every row
    expected = _format_of(datasets["train_dataset"], "train_dataset")
    for role, dataset in datasets.items():
        found = _format_of(dataset, role)
        if found != expected:
            raise ValueError(
                f"train_dataset has {expected}, {role} has {found}: the loss would cover other parts of their rows. "
                "Give all data sets one format"
            )


def _format_of(dataset: Dataset, role: str) -> str:
    names = token_columns(dataset) if is_in_tokens(dataset) else content_columns(dataset, role)
    are_messages = names[0] == "prompt" and is_conversational(dataset)
    return " and ".join(names) + (" as lists of messages" if are_messages else "")


def without_repeats(rows: Dataset, hashes: Hashes, role: str) -> Dataset:
    """Each row once: of two copies of a validation row, the scout that has not seen the one has seen the other.

    Args:
        hashes: of the contents of ``rows``, as `check_datasets` gives them.
    """
    num = num_repeats(hashes)
    if num == 0:
        return rows
    logger.warning(f"{role}: {num} of {len(rows)} rows repeat another row and are left out")
    return rows.select(np.sort(np.unique(hashes, return_index=True)[1]))
