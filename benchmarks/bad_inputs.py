"""What `tamis train` says to inputs that cannot work: every case of `tests/test_error_cases.py`, with its message.

    python benchmarks/bad_inputs.py --output_dir runs/bad_inputs [--quick]

Each case is a call of the command in a folder of small files and a model that are right, but for what is named.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from common import finish, make_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import test_error_cases as cases
from conftest import tiny_model, tiny_tokenizer


@contextlib.contextmanager
def folder_of_a_user(model_dir: Path) -> Iterator[Path]:
    """The working directory: right files, a model, and things to trip over."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases.make_files(folder, model_dir)
        cases.make_things_to_trip_over(folder, model_dir)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def said(options: list[str], without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Exit code and last line of the command; whether it left anything behind."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = cases.run(options, without)
    line = next(line for line in reversed(err.getvalue().splitlines()) if line.startswith("tamis"))
    line = line.replace(f"{Path.cwd()}/", "")
    return {"exit_code": code, "message": line, "leaves_nothing": not Path("run").exists()}


def inputs() -> Iterator[tuple[str, str, str, list[str], tuple[str, ...]]]:
    """Kind, what is given, the text of the file that is spoiled, options, and options that are left out."""
    for options, _ in cases.OPTIONS:
        yield "the options", options, "", options.split(), ()
    for option, _ in cases.MISSING:
        yield "the options", f"no {option}", "", [], (option,)
    for text, _ in cases.YAML:
        yield "run.yaml, given by --config", text, "run.yaml", ["--config", "run.yaml"], ()
    for text, _ in cases.TRAIN_DATASETS:
        yield "run.yaml, given by --config", text, "run.yaml", ["--config", "run.yaml"], ("--train_dataset",)
    for text, _ in cases.ROWS:
        yield "the rows of train.jsonl", text, "train.jsonl", [], ()


def measure(model_dir: Path, every: int) -> list[dict[str, Any]]:
    """A row for each input."""
    rows = []
    for kind, given, spoiled, options, without in list(inputs())[::every]:
        with folder_of_a_user(model_dir) as folder:
            if spoiled:
                (folder / spoiled).write_text(given)
            rows.append({"kind": kind, "input": given, **said(options, without)})
    return rows


def main() -> None:
    arguments = make_parser(__doc__, quick="every tenth input: shows that it runs", seeds=()).parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        tokenizer = tiny_tokenizer()
        tokenizer.save_pretrained(name)
        tiny_model(tokenizer).save_pretrained(name)
        for target, stand_in in cases.WITHOUT_EXTRAS.items():
            stack.enter_context(mock.patch(target, stand_in))
        rows = measure(Path(name), 10 if arguments.quick else 1)
    finish(arguments, rows, {})


if __name__ == "__main__":
    main()
