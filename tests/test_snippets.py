"""The commands and snippets of the documents run, on small files and a tiny model in place of the named one.

docs/clean_data.md has tests of its own, and commands of benchmarks are held against their options in `test_docs.py`.
"""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pandas
import pyarrow.parquet as parquet
import pytest
import yaml
from conftest import two_kinds, write_jsonl
from torch import Tensor

import tamis
from tamis.cli import main
from tamis.data import load_rows

ROOT = Path(__file__).resolve().parents[1]
NAMED, SHELL = re.compile(r"Qwen/Qwen3-[\w.]+"), ("python3.11 -m venv", "pip install", "make ", "tamis --version")
ON_A_CPU = {"use_cpu": True, "bf16": False, "report_to": "none"}
CHEAP = {
    "train": {"max_steps": 2, "scout_epochs": 1},
    "check": {"max_steps": 2, "scout_epochs": 1},
    "score": {"scout_epochs": 1},
    "compare": {"max_steps": 1, "scout_epochs": 1, "seeds": 0, "methods": "plain_sft tamis", "max_new_tokens": 4},
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.M)


def commands(page: str) -> list[list[str]]:
    """Those of tamis, without what sets an environment up."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True) for line in lines if not line.startswith(SHELL)]


def run(words: list[str]) -> None:
    """A command as it stands, but for the model, and cheaper."""
    assert words[0] == "tamis", words
    cheap = CHEAP[words[1]] | ON_A_CPU if words[1] in CHEAP else {}  # later options win
    extra = shlex.split(" ".join(f"--{name} {value}" for name, value in cheap.items()))
    assert main([*(NAMED.sub("model", word) for word in words[1:]), *extra]) == 0, words


@pytest.fixture
def folder(tmp_path, model_dir, monkeypatch):
    """The working directory of a reader."""
    right, wrong, trusted = two_kinds(num_rows=12)
    files = {"train": right + wrong, "validation": trusted[:6], "held_out": trusted[6:]}
    for name, rows in (("nested", right), ("nested_validation", trusted[:6])):
        files[name] = [{"query": row["prompt"], "meta": {"reply": row["completion"]}} for row in rows]
    for name, rows in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    config = {"model_name_or_path": "model", "train_dataset": "train.jsonl", "validation_dataset": "validation.jsonl"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | {"max_new_tokens": 4}))
    (tmp_path / "model").symlink_to(model_dir)
    world = tmp_path / "demo" / "world"  # as `tamis demo` leaves it
    world.mkdir(parents=True)
    for name, file in {"train": "train", "validation": "validation", "eval": "held_out"}.items():
        (world / f"{name}.jsonl").symlink_to(tmp_path / f"{file}.jsonl")
    (world / "model").symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_python(text: str, monkeypatch) -> dict:
    """A snippet as it stands, but for the model, and cheaper; the names that it leaves."""
    cheap = partial(tamis.BilevelConfig, max_steps=2, scout_epochs=1, disable_tqdm=True, **ON_A_CPU)
    monkeypatch.setattr(tamis, "BilevelConfig", cheap)
    names = {"pandas": pandas, "Tensor": Tensor}
    names |= {name: load_rows(f"{name}.jsonl", role="train_dataset") for name in ("train", "validation")}
    exec(NAMED.sub("model", text), names)
    return names


def test_the_quickstart_and_what_troubleshooting_does_next(folder, monkeypatch):
    for words in commands("docs/index.md"):
        run(words)
    assert all((folder / name).is_file() for name in ("scores/report.html", "clean/train.jsonl", "run/report.html"))
    described = re.findall(r"`(\w+)`", (ROOT / "docs/run_directory.md").read_text().split("## weights.parquet")[1])
    assert set(parquet.read_schema("run/weights.parquet").names) <= set(described)
    (snippet,) = blocks("docs/index.md", "python")
    assert run_python(snippet, monkeypatch)["trainer"].state.global_step == 2
    for words in commands("docs/troubleshooting.md"):
        run(words)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/compare.md",
        "docs/choosing.md",
        "docs/first_run.md",
        "docs/formats.md",
        "docs/run_directory.md",
        "docs/refining.md",
    ],
)
def test_the_commands_and_snippets_of_a_page(page, folder, monkeypatch):
    assert commands(page)
    for words in commands(page):
        run(words)
    for number, snippet in enumerate(blocks(page, "python")):
        run_python(snippet.replace('output_dir="run"', f'output_dir="snippet-{number}"'), monkeypatch)


def test_the_snippet_of_a_selector_is_python(monkeypatch, folder):
    (snippet,) = blocks("docs/method.md", "python")
    assert callable(run_python(snippet, monkeypatch)["next_scores"])


def test_rows_of_every_layout_that_is_shown_are_read(tmp_path):
    shown = [json.loads(text) for text in blocks("docs/formats.md", "json") + blocks("docs/index.md", "json")]
    for number, row in enumerate(shown):
        file = write_jsonl(tmp_path / f"{number}.jsonl", [row])
        names = {"prompt_column": "query", "response_column": "meta.reply"} if "query" in row else {}
        assert len(load_rows(file, role="train_dataset", **names)) == 1


def test_every_page_with_commands_is_run():
    with_commands = {
        f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if "```bash\ntamis" in path.read_text()
    }
    known = {"index", "compare", "choosing", "first_run", "formats", "run_directory", "refining", "troubleshooting"}
    assert with_commands == {f"docs/{name}.md" for name in known | {"clean_data"}}
