"""The parser of `tamis train` and of the commands that take its settings: options in groups."""

from dataclasses import fields
from typing import Any

from transformers import TrainingArguments
from trl import ModelConfig, SFTConfig, TrlParser

from tamis.check.arguments import CheckArguments
from tamis.compare.own.arguments import CompareArguments
from tamis.config import REFINING_FIELDS, BilevelConfig
from tamis.parser import StrictParser
from tamis.run import DataArguments

_TITLES = (
    "data", "selection and its two levels", "online refining", "model and LoRA", "rows to tokens", "training", "check",
    "comparison",
)  # fmt: skip
_TRANSFORMERS_OWN = {f.name for f in fields(TrainingArguments)}
_TRL_OWN = {f.name for f in fields(SFTConfig)} - _TRANSFORMERS_OWN


def make_train_parser(command: str = "train") -> TrlParser:
    """The parser of `tamis train`, and of the other commands that take its settings."""
    dataclass_types: Any = (DataArguments, BilevelConfig, ModelConfig)
    if command == "check":
        dataclass_types += (CheckArguments,)
    if command == "compare":
        dataclass_types += (CompareArguments,)
    usage = f"tamis {command} --model_name_or_path MODEL --train_dataset FILE [options]"
    return _GroupedParser(dataclass_types, prog=f"tamis {command}", usage=usage)


class _GroupedParser(StrictParser):
    """With the options in groups, in the help of all of them."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        if not hasattr(self, "_groups"):
            self._groups: Any = {title: self.add_argument_group(title) for title in _TITLES}
        self._dtype = dtype
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: Any, field: Any) -> None:  # type: ignore[override]
        TrlParser._parse_dataclass_field(self._groups[_title_of(self._dtype, field.name)], field)


def _title_of(dtype: Any, name: str) -> str:
    if dtype is DataArguments:
        return "data"
    if dtype is CheckArguments:
        return "check"
    if dtype is CompareArguments:
        return "comparison"
    if dtype is ModelConfig:
        return "model and LoRA"
    if name in REFINING_FIELDS:
        return "online refining"
    if name in _TRANSFORMERS_OWN:
        return "training"
    return "rows to tokens" if name in _TRL_OWN else "selection and its two levels"
