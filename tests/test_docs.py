"""The documents agree with the tree: lines that fit a screen, links and paths that exist, flags that are accepted."""

import importlib
import importlib.util
import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from trl import ModelConfig

from tamis import BilevelConfig
from tamis.check.arguments import CheckArguments
from tamis.compare.own.arguments import CompareArguments
from tamis.curation.select import SelectArguments
from tamis.demo.run import DemoArguments
from tamis.parser import StrictParser
from tamis.report.page import ReportArguments
from tamis.run import DataArguments
from tamis.train_parser import make_train_parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)

_BENCHMARK = re.compile(r"python benchmarks/[^`\n]*")
_BAD_INPUTS = re.compile(r"<!-- table: bad_inputs -->.*?<!-- end -->", re.DOTALL)
_FLAG = re.compile(r"(?<![\w-])--([a-z]\w+)")


def table_of(section: str) -> list[list[str]]:
    """Cells of the table under a heading of docs/architecture.md, without its header."""
    text = ARCHITECTURE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("|").split("|") for line in lines[2:]]


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@documents
def test_no_line_is_longer_than_120_characters(path):
    long = [i for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"{path.name}: lines {long}"


@documents
def test_relative_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        file = (path.parent / target) if target else path
        assert file.exists(), f"{path.name} links to {link}"
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), f"{path.name} links to {link}"


@pytest.mark.parametrize("cells", table_of("Where to change what"), ids=lambda cells: cells[0].strip())
def test_a_reader_finds_what_the_table_names(cells):
    _, files, names = map(in_backticks, cells)
    assert files and names
    for file in files:
        assert (ROOT / file).is_file(), file
    sources = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    for name in names:
        for part in name.split("."):
            assert re.search(rf"\b{part}\b", sources), f"{name} is not in {', '.join(files)}"


def test_the_picture_shows_the_modules_of_the_package():
    picture = ARCHITECTURE.split("```mermaid")[1].split("```")[0]
    shown = re.findall(r"[\w/]+\.py", picture)
    package = ROOT / "src" / "tamis"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert sorted(shown) == sorted(name for name in there if not Path(name).name.startswith("_"))


@documents
def test_flags_are_fields_of_the_command_line(path):
    text = path.read_text(encoding="utf-8")
    dataclasses = (
        DataArguments,
        BilevelConfig,
        ModelConfig,
        CheckArguments,
        CompareArguments,
        SelectArguments,
        DemoArguments,
        ReportArguments,
    )
    known = {field.name for dataclass in dataclasses for field in fields(dataclass)}
    known |= {"config", "help", "help_all", "no_measure", "version", "config_file"}  # the last of accelerate launch
    assert not set(_FLAG.findall(_BAD_INPUTS.sub("", _BENCHMARK.sub("", text)))) - known


def parser_of(command: str) -> StrictParser:
    """The real parser of a command of tamis."""
    kinds = {"select": SelectArguments, "report": ReportArguments, "demo": DemoArguments}
    return StrictParser((kinds[command],)) if command in kinds else make_train_parser(command)


@documents
def test_flags_of_a_command_are_its_own(path):
    """In the middle of a sentence, where commands are not run (`test_snippets.py`): `tamis COMMAND ... --flag`."""
    for command, rest in re.findall(r"`tamis (\w+)([^`]*)`", path.read_text(encoding="utf-8")):
        flags = set(re.findall(r"(?<!\S)--\w+", rest)) - {"--config", "--help", "--help_all"}
        assert not flags - set(parser_of(command)._option_string_actions), f"tamis {command}{rest}"


@documents
def test_packages_and_targets_that_are_named_exist(path):
    text = path.read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name for found in re.findall(r"\.\[([\w,-]+)\]", text) for name in found.split(",")}
    assert extras <= set(project["optional-dependencies"])
    targets = re.findall(r"(?:^|`)make (\w+)", text, re.MULTILINE)
    assert all(f"\n{target}:" in (ROOT / "Makefile").read_text(encoding="utf-8") for target in targets)


def test_the_messages_of_troubleshooting_are_those_of_tamis():
    text = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = re.findall(r'"([^"]+)"', text)
    joined = re.compile(r'"\s*\n\s*f?"')  # a message over several lines of code
    sources = "\n".join(joined.sub("", file.read_text(encoding="utf-8")) for file in (ROOT / "src").rglob("*.py"))
    assert quoted and all(message in sources for message in quoted)


def test_a_newcomer_walks_the_quickstart_to_the_report(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    newcomer = importlib.import_module("newcomer")
    steps = [" ".join(line.split()[:2]) for line in newcomer.commands(ROOT / "docs" / "index.md")]
    timed = json.loads((ROOT / "benchmarks" / "results" / "newcomer.json").read_text(encoding="utf-8"))["rows"]
    assert steps[1:] == [row["step"] for row in timed][2:-1]


@documents
def test_flags_of_benchmarks_are_theirs(path):
    for command in _BENCHMARK.findall(path.read_text(encoding="utf-8")):
        name = command.split()[1]
        if name == "benchmarks/NAME.py":
            name = "benchmarks/common.py"
        source = (ROOT / name).read_text(encoding="utf-8") + (ROOT / "benchmarks/common.py").read_text(encoding="utf-8")
        for flag in _FLAG.findall(command):
            assert f'"--{flag}"' in source, command


def test_the_tables_are_those_of_the_committed_results():
    """Change a figure by `python docs/tables.py`, never by hand."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for document in tables.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert "<!-- table: " in text and tables.fill(text) == text
