"""The command line: `tamis train` and `tamis demo`.

Settings come from flags, from a YAML file (`--config run.yaml`), or both; flags win. Results go to stdout, everything
else to stderr. A wrong input ends with one line on stderr and exit code 2, before any model is loaded.
"""

import logging
import sys
from dataclasses import fields
from typing import Any

from yaml import YAMLError

from tamis.stopping import Stopped, StopSignals

USAGE = """usage: tamis COMMAND [options]

  train   fine-tune a model on doubtful rows under the guidance of trusted ones; learns a weight for every row
  demo    make a small world and compare tamis with its alternatives on it (CPU, a few minutes)

`tamis COMMAND --help` lists the options."""


def make_train_parser() -> Any:
    """The parser of `tamis train`: TRL's, with its options in groups."""
    from transformers import TrainingArguments
    from trl import ModelConfig, SFTConfig, TrlParser

    from tamis.config import REFINING_FIELDS, BilevelConfig
    from tamis.run import DataArguments

    transformers_own = {f.name for f in fields(TrainingArguments)}
    trl_own = {f.name for f in fields(SFTConfig)} - transformers_own
    titles = ("data", "selection and its two levels", "online refining", "model and LoRA", "rows to tokens", "training")

    def title_of(dtype: Any, name: str) -> str:
        if dtype is DataArguments:
            return "data"
        if dtype is ModelConfig:
            return "model and LoRA"
        if name in REFINING_FIELDS:
            return "online refining"
        if name in transformers_own:
            return "training"
        return "rows to tokens" if name in trl_own else "selection and its two levels"

    class GroupedParser(TrlParser):
        def _add_dataclass_arguments(self, dtype: Any) -> None:
            if not hasattr(self, "_groups"):
                self._groups: Any = {title: self.add_argument_group(title) for title in titles}
            self._dtype = dtype
            super()._add_dataclass_arguments(dtype)

        def _parse_dataclass_field(self, parser: Any, field: Any) -> None:  # type: ignore[override]
            TrlParser._parse_dataclass_field(self._groups[title_of(self._dtype, field.name)], field)

    dataclass_types: Any = (DataArguments, BilevelConfig, ModelConfig)
    return GroupedParser(dataclass_types, prog="tamis train")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command `tamis`; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    command, options = argv[0], argv[1:]
    if command not in ("train", "demo"):
        print(f"tamis: there is no command '{command}'\n{USAGE}", file=sys.stderr)
        return 2
    try:
        with StopSignals() as stop:
            return _run(command, options, stop)
    except Stopped as stopped:
        print(f"tamis {command}: {stopped}", file=sys.stderr)
        return stopped.exit_code


def _run(command: str, options: list[str], stop: StopSignals) -> int:
    from tamis.checkpoint import ResumableError
    from tamis.losses import NonFiniteLossError
    from tamis.settings import FlagFormatter, as_flags

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(FlagFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("tamis").setLevel(logging.INFO)
    try:
        return _run_train(options, stop) if command == "train" else _run_demo(options)
    except (NonFiniteLossError, ResumableError) as error:
        print(f"tamis {command}: {as_flags(str(error))}", file=sys.stderr)
        return 1
    except (ValueError, OSError, YAMLError) as error:
        # One line for the user; where it came from for whoever looks into it.
        logging.getLogger("tamis").debug("traceback", exc_info=True)
        print(f"tamis {command}: {as_flags(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


def _run_train(options: list[str], stop: StopSignals) -> int:
    from tamis.run import train

    data, args, model_args = make_train_parser().parse_args_and_config(options)
    metrics = train(data, args, model_args, stop=stop, shows_row=True)
    for name in ("eval_loss", "eval_teacher_forced_match"):
        if name in metrics:
            print(f"{name} {metrics[name]:.4f}")
    print(f"weights {args.output_dir}/weights.parquet")
    if args.refines:
        print(f"responses {args.output_dir}/refinements.parquet")
    print(f"model {args.output_dir}")
    return 0


def _run_demo(options: list[str]) -> int:
    from trl import TrlParser

    from tamis.demo.run import DemoArguments, run_demo

    dataclass_types: Any = (DemoArguments,)
    (arguments,) = TrlParser(dataclass_types, prog="tamis demo").parse_args_and_config(options)
    run_demo(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
