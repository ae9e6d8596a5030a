"""The command line: `tamis train`, `check`, `score`, `select`, `report`, `compare` and `demo`.

Results go to stdout, everything else to stderr. A wrong input ends with one line on stderr and exit code 2, before any
model is loaded. What needs torch is imported where it is used: the help and the version are there at once.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

from tamis.help import short_help
from tamis.stopping import Stopped, StopSignals

USAGE = """usage: tamis COMMAND [options]

  train   fine-tune a model on doubtful rows under the guidance of trusted ones; learns a weight for every row
  check   say what a run would meet: bad rows, copies, what is trained on, time, memory and disk
  score   weigh every row without training: how likely it is right
  select  write the rows that a run or a scoring keeps, in files of their own format
  report  write a page on a run: what was learned, why rows were dropped, every row to look at
  compare tell on your own data whether it pays: tamis beside plain SFT, mixing and rivals, on equal tokens
  demo    make a small world and compare tamis with its alternatives on it (CPU, a few minutes)

`tamis COMMAND --help` lists the options, `tamis --version` tells the version."""
logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command `tamis`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    code = _run(argv)
    try:
        sys.stdout.flush()
    except OSError as error:  # of a file or a pipe that results are sent to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter fails once more at its exit
        if code == 0:
            print(f"tamis: stdout cannot be written ({error.strerror}): see to where it goes", file=sys.stderr)
            code = 1
    return code


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    command, options = argv[0], argv[1:]
    if "--version" in argv:
        print(f"tamis {version('tamis')}")
        return 0
    if command not in _RUN:
        print(f"tamis: there is no command '{command}'\n{USAGE}", file=sys.stderr)
        return 2
    if command in ("train", "check", "score", "compare") and ("-h" in options or "--help" in options):
        print(short_help(command), end="")
        return 0
    with ExitStack() as terminal:
        try:
            with StopSignals() as stop:
                return _RUN[command](options, terminal, stop)
        except Stopped as stopped:
            code, text = stopped.exit_code, str(stopped)
        except Exception as error:
            from tamis.errors import explain

            explained = explain(error, command)
            if explained is None:
                raise
            code, text = explained
            # One line for the user; where it came from for whoever looks into it.
            logger.debug("traceback", exc_info=True)
        terminal.close()  # the bar, before the line
        print(f"tamis {command}: {text}", file=sys.stderr)
        return code


def _run_train(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    from tamis.run import train
    from tamis.summary import format_summary, summarize

    if (settings := _settings("train", options, terminal)) is None:
        return 0
    data, args, model_args = settings
    # The summary tells what the run has changed: by the model as it was.
    has_held_out = data.eval_dataset is not None
    args.eval_on_start = args.eval_on_start or has_held_out
    train(data, args, model_args, stop=stop, shows_row=True)
    if args.process_index == 0:
        print(format_summary(summarize(str(args.output_dir), has_held_out=has_held_out)))
    return 0


def _run_check(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    import json

    from tamis.check.command import check
    from tamis.check.show import show
    from tamis.terminal import quiet_terminal

    if (settings := _settings("check", options, terminal)) is None:
        return 0
    data, args, model_args, asked = settings
    terminal.enter_context(quiet_terminal(args.log_level, details_of=()))
    report = check(data, args, model_args, measures=asked.measure)
    if args.process_index == 0:
        if asked.json:
            print(json.dumps(report.to_dict(), indent=1))
        else:
            show(report)
        for error in report.errors:
            print(f"tamis check: {error}", file=sys.stderr)
    return report.exit_code


def _run_score(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    from tamis.run import score
    from tamis.summary import format_summary, summarize_scores

    if (settings := _settings("score", options, terminal)) is None:
        return 0
    data, args, model_args = settings
    score(data, args, model_args, stop=stop)
    if args.process_index == 0:
        print(format_summary(summarize_scores(str(args.output_dir))))
    return 0


def _run_compare(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    from tamis.compare.own.command import PAGE, TABLE, compare
    from tamis.summary import format_summary

    details = ("tamis.compare", "tamis.training_progress")
    if (settings := _settings("compare", options, terminal, details)) is None:
        return 0
    stop.hint = ": the same command goes on after the runs that are finished"
    found = compare(*settings)
    print(found.text())
    print(format_summary([("page", found.folder / PAGE), ("table", found.folder / TABLE)]))
    return 1 if found.errors else 0


def _settings(command: str, options: list[str], terminal: ExitStack, details_of: Sequence[str] = ("tamis",)) -> Any:
    """What the options say; None where they ask for the whole help, which is printed.

    Args:
        details_of: the parts of tamis that are heard, see `quiet_terminal`.
    """
    from tamis.terminal import quiet_terminal
    from tamis.train_parser import make_train_parser

    parser = make_train_parser(command)
    if "--help_all" in options:
        print(parser.format_help(), end="")
        return None
    with quiet_terminal("passive"):
        settings = parser.parse_args_and_config(options)
    args = settings[1]
    log_level = args.log_level if args.process_index == 0 else args.log_level_replica
    terminal.enter_context(quiet_terminal(log_level, details_of))
    return settings


def _arguments(
    options: list[str], kind: Any, command: str, *, first: str | None = None, usage: str | None = None
) -> Any:
    """The settings of a command that has a dataclass of its own.

    Args:
        first: the setting that may come first, without its name.
    """
    from tamis.parser import StrictParser

    if first and options and not options[0].startswith("-"):
        options = [f"--{first}", *options]
    (arguments,) = StrictParser((kind,), prog=f"tamis {command}", usage=usage).parse_args_and_config(options)
    return arguments


def _run_select(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    from tamis.curation.select import SelectArguments, select
    from tamis.summary import format_summary
    from tamis.terminal import quiet_terminal

    usage = "tamis select RUN --output_dir DIR [options]"
    arguments = _arguments(options, SelectArguments, "select", first="weights", usage=usage)
    terminal.enter_context(quiet_terminal("passive"))
    print(format_summary(select(arguments)))
    return 0


def _run_report(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    from tamis.report.page import ReportArguments, report
    from tamis.terminal import quiet_terminal

    arguments = _arguments(options, ReportArguments, "report", first="run", usage="tamis report RUN [options]")
    terminal.enter_context(quiet_terminal("warning"))
    if arguments.serve:
        from tamis.report.serve import serve

        stop.hint = ""
        serve(arguments)
    print(report(arguments))
    return 0


def _run_demo(options: list[str], terminal: ExitStack, stop: StopSignals) -> int:
    from tamis.demo.run import DemoArguments, run_demo
    from tamis.terminal import quiet_terminal

    arguments = _arguments(options, DemoArguments, "demo")
    # Eleven runs: a line for each, and what they warn of.
    terminal.enter_context(quiet_terminal(arguments.log_level, details_of=("tamis.demo", "tamis.compare")))
    run_demo(arguments)
    return 0


_RUN = {
    "train": _run_train, "check": _run_check, "score": _run_score, "select": _run_select, "report": _run_report,
    "compare": _run_compare, "demo": _run_demo,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
