"""What a run shows: one bar or lines, warnings that concern the user, and nothing of the libraries below."""

import logging
import warnings

import datasets
import pytest
from conftest import pairs, write_jsonl
from rich.console import Console
from transformers.utils import logging as transformers_logging

from tamis import progress
from tamis.cli import main
from tamis.progress import Bar, track
from tamis.terminal import quiet_terminal

logger = logging.getLogger("tamis.somewhere")


@pytest.fixture
def on_a_terminal(monkeypatch):
    """As on a terminal of 100 columns; what it shows at the end is in the capture of stderr."""
    monkeypatch.setattr(progress, "CONSOLE", Console(stderr=True, force_terminal=True, width=100, color_system=None))
    yield
    progress.close_bars()


def lines_of(capfd) -> list[str]:
    return capfd.readouterr().err.splitlines()


def test_own_lines_and_warnings_come_through_and_information_of_others_does_not(capfd):
    with quiet_terminal("passive"):
        logger.info("rows")
        logger.debug("detail")
        logger.warning("few rows")
        logging.getLogger("other").info("chatter")
        logging.getLogger("other").warning("real")
        logging.getLogger("transformers").warning("also real")
    assert lines_of(capfd) == ["rows", "warning: few rows", "warning: real", "warning: also real"]


def test_warnings_for_developers_are_quiet_and_those_for_users_take_one_line(capfd):
    with quiet_terminal("passive"):
        warnings.filterwarnings("default", "the model", UserWarning)
        warnings.warn("renamed", FutureWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("'pin_memory' argument is set as true", UserWarning, stacklevel=1)
        warnings.warn("the model was not found\n in the cache", UserWarning, stacklevel=1)
    assert lines_of(capfd) == ["warning: the model was not found in the cache"]


def test_debug_brings_the_rest_back(capfd):
    are_shown = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    with quiet_terminal("debug"):
        assert are_shown == (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled())
        logger.debug("detail")
        logging.getLogger("other").info("chatter")
        with pytest.warns(FutureWarning, match="renamed"):
            warnings.warn("renamed", FutureWarning, stacklevel=1)
    assert lines_of(capfd) == ["detail", "chatter"]


def test_the_bars_of_datasets_are_off_while_a_run_goes_on(monkeypatch):
    calls = []
    monkeypatch.setattr(datasets, "are_progress_bars_disabled", lambda: False)
    monkeypatch.setattr(datasets, "disable_progress_bars", lambda: calls.append("off"))
    monkeypatch.setattr(datasets, "enable_progress_bars", lambda: calls.append("on"))
    with quiet_terminal("passive"):
        assert calls == ["off"]
    assert calls == ["off", "on"]


def test_everything_is_as_before_afterwards():
    def state():
        loggers = [logging.getLogger(name) for name in (None, "tamis", "transformers", "datasets", "huggingface_hub")]
        bars = datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
        return [(a.level, a.handlers[:], a.propagate) for a in loggers], bars, warnings.filters[:], warnings.showwarning

    transformers_logging.enable_progress_bar()
    before = state()
    with pytest.raises(KeyError), quiet_terminal("passive"):
        assert not transformers_logging.is_progress_bar_enabled()
        raise KeyError
    assert state() == before


def test_the_level_of_a_part(capfd):
    with quiet_terminal("passive", details_of=["tamis.compare"]):
        logger.info("rows")
        logger.warning("few rows")
        logging.getLogger("tamis.compare.runs").info("method 1")
    assert lines_of(capfd) == ["warning: few rows", "method 1"]


def test_there_is_one_bar_and_it_comes_back(on_a_terminal):
    def visible():
        return [task.description for task in progress._SCREEN.progress.tasks if task.visible]

    with Bar("training", 3) as bar:
        bar.advance()
        assert visible() == ["training"]
        for _ in track(range(2), "generating", 2):
            assert visible() == ["generating"]
        assert visible() == ["training"]
    assert progress._SCREEN.progress is None


def test_a_bar_is_closed_by_whoever_stops_early(on_a_terminal):
    with quiet_terminal("passive"):
        Bar("training", 3)
        assert progress._SCREEN.progress is not None
    assert progress._SCREEN.progress is None


def test_without_a_terminal_a_long_task_says_where_it_is(caplog, monkeypatch):
    caplog.set_level("INFO")
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    assert list(track("abcd", "scouting", 4)) == list("abcd")
    assert [record.getMessage() for record in caplog.records] == ["scouting: 2 of 4", "scouting: 4 of 4"]


def test_nothing_is_shown_where_nothing_is_to_be(on_a_terminal, caplog):
    for _ in track(range(2), "scouting", 2, is_shown=False):
        assert progress._SCREEN.progress is None
    assert not caplog.records


@pytest.fixture
def run(tmp_path, model_dir):
    """`tamis train` on 300 rows."""
    write_jsonl(tmp_path / "train.jsonl", pairs(200) + pairs(100, 300, wrong=True))
    write_jsonl(tmp_path / "validation.jsonl", pairs(10, 500))
    write_jsonl(tmp_path / "eval.jsonl", pairs(10, 600))

    def call(*extra):
        options = ["--model_name_or_path", model_dir, "--output_dir", str(tmp_path / "run")]
        for name in ("train", "validation", "eval"):
            options += [f"--{name}_dataset", str(tmp_path / f"{name}.jsonl")]
        options += ["--use_cpu", "--max_steps", "20", "--scout_epochs", "1", "--scout_learning_rate", "1e-3"]
        return main(["train", *options, *extra])

    return call


def test_a_run_prints_a_dozen_lines_and_one_for_each_logging_step(run, tmp_path, capfd):
    transformers_logging.enable_progress_bar()
    assert run() == 0
    out, err = capfd.readouterr()
    lines = err.splitlines()
    steps = [line for line in lines if line.startswith("training ")]
    assert [line.split(":")[0] for line in steps] == [f"training {k}/20" for k in (0, 10, 20, 20)]
    assert "training loss" in steps[1] and " left" in steps[1]
    assert len(lines) - len(steps) <= 15
    assert "\r" not in err and "Loading weights" not in err and "Warning" not in err

    names = [line.split("  ")[0] for line in out.splitlines()]
    held_out, files = ["held-out loss", "held-out match"], ["model", "weights"]
    assert names == [*held_out, "rows kept", *files, "look at them", "next", "clean rows"]
    assert " before, " in out and " of 300 (" in out and str(tmp_path / "run" / "weights.parquet") in out


def test_on_a_terminal_a_bar_takes_the_place_of_the_lines(run, on_a_terminal, monkeypatch, capfd):
    for module in ("terminal", "training_progress"):
        monkeypatch.setattr(f"tamis.{module}.CONSOLE", progress.CONSOLE)
    assert run() == 0
    out, err = capfd.readouterr()
    assert "training 10/20: " not in err
    assert "held-out loss" in out
    kept = [line for line in err.split("\n") if not line.startswith("\r") and "\x1b" not in line]
    assert 0 < len(kept) <= 15


def test_debug_shows_the_libraries(run, capfd):
    transformers_logging.enable_progress_bar()
    assert run("--log_level", "debug") == 0
    assert "Loading weights" in capfd.readouterr().err
