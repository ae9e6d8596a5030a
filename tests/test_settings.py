"""How messages name settings: as fields in Python, as flags on the command line."""

import ast
import logging
import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig

from tamis import BilevelConfig
from tamis.compare.own.arguments import CompareArguments
from tamis.curation.select import SelectArguments
from tamis.report.page import ReportArguments
from tamis.run import DataArguments
from tamis.settings import FlagFormatter, as_flags

PACKAGE = Path(__file__).parents[1] / "src" / "tamis"
OF_THE_COMMAND_LINE = {"cli.py", "parser.py", "errors.py", "run.py", "stopping.py", "demo/run.py"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise `max_length`", "raise --max_length"),
        ("choose `selector='none'`, or set `refine_fraction=0`", "choose --selector none, or set --refine_fraction 0"),
        ("set `packing=False`.", "set --packing False."),
        ("or set `overwrite_output_dir=True`", "or set --overwrite_output_dir"),
        ("`trl vllm-serve` and ``2`` stay", "`trl vllm-serve` and ``2`` stay"),
    ],
)
def test_settings_in_backticks_become_flags(text, expected):
    assert as_flags(text) == expected
    assert FlagFormatter().format(logging.makeLogRecord({"msg": text})) == expected


def messages() -> list[tuple[str, str]]:
    """All texts that are raised or logged, by module; with the fields of f-strings left out."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_call = isinstance(node, ast.Call)
            if is_call and ast.unparse(node.func).split(".")[0] in ("ValueError", "logger", "NonFiniteLossError"):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                found += [(name, text) for text in texts if isinstance(text, str)]
    return found


def test_what_python_raises_names_no_flags():
    flags = [(name, text) for name, text in messages() if re.search(r"--[a-z]", text)]
    assert not [(name, text) for name, text in flags if name not in OF_THE_COMMAND_LINE]


def test_what_is_named_in_backticks_is_a_setting():
    kinds = (BilevelConfig, DataArguments, ModelConfig, SelectArguments, ReportArguments, CompareArguments)
    known = {f.name for kind in kinds for f in fields(kind)}
    named = {setting for _, text in messages() for setting in re.findall(r"`([a-z]\w*)(?:=[^`]*)?`", text)}
    assert named and named <= known
