"""The parser of the commands: TRL's, with one line for what it does not know.

Settings come from flags, from a YAML file (`--config run.yaml`), or both; flags win.
"""

import argparse
import difflib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser

from tamis.help import OPTIONS

_SCALARS = (bool, int, float)
_BOTH_SPELLINGS = re.compile(r"(--\w+)/[\w/-]+")  # --max_steps/--max-steps


class StrictParser(TrlParser):
    """TRL's parser without abbreviations; what is wrong ends in one line, a ValueError, with the nearest name."""

    def __init__(self, dataclass_types: Any, **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        types = {name: kind for dataclass in dataclass_types for name, kind in get_type_hints(dataclass).items()}
        kinds = {
            n: {kind} if get_origin(kind) in (None, list, dict) else set(get_args(kind)) for n, kind in types.items()
        }
        self._needs_value = {name for name, found in kinds.items() if not found & {str, type(None)}}
        self._takes_one = {name for name, found in kinds.items() if found <= {str, *_SCALARS, type(None)}}

    def error(self, message: str) -> NoReturn:
        """In place of the usage of some hundred options and `sys.exit`.

        Raises:
            ValueError: always.
        """
        text = _BOTH_SPELLINGS.sub(r"\1", message.removeprefix("argument "))
        raise ValueError(f"{text}{'' if text.endswith(('?', '.')) else '.'} See {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See `argparse`; nothing is left over.

        Raises:
            ValueError: an option is not known.
        """
        for flag in (arg.partition("=")[0] for arg in args or () if arg.startswith("--")):
            # Before argparse misses an option that is required: it may be the one that is misspelt.
            if flag not in self._option_string_actions:
                self.error(f"unknown option {flag}{did_you_mean(flag.lstrip('-'), self.names(), '--')}")
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"'{left[0]}' belongs to no option")
        for name, value in vars(found).items():
            if name.endswith("_kwargs") and isinstance(value, str) and not _is_object(value):
                self.error(f"""--{name} takes a JSON object, as '{{"key": 1}}', got {value!r}""")
        return found, left

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """See [`~trl.TrlParser`].

        Raises:
            ValueError: the YAML file cannot be read, or holds what is no option.
        """
        parts = [p for arg in args or () for p in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
        if parts.count("--config") > 1:
            raise ValueError("--config is given twice. Put the settings into one YAML file")
        if "--config" in parts:
            self._config = _config_path(parts)
            _refuse_bad_yaml(self._config)
        return super().parse_args_and_config(parts, **kwargs)

    def set_defaults_with_config(self, **config: Any) -> list[str]:
        """See [`~trl.TrlParser`].

        Raises:
            ValueError: a key is no option, or its value is of the wrong kind.
        """
        names = self.names()
        for key in config:
            if key not in names:
                raise ValueError(f"{self._config}: unknown key '{key}'{did_you_mean(key, names) or '. Correct it'}")
        actions = {action.dest: action for action in self._actions if action.dest in config}
        return super().set_defaults_with_config(**{n: self._plain(a, config[n]) for n, a in actions.items()})

    def _plain(self, action: argparse.Action, value: Any) -> Any:
        """A value of YAML as argparse takes it: as text, which it then converts and checks as it does a flag."""
        if value is None and action.dest in self._needs_value:
            raise ValueError(f"{self._config}: {action.dest} has no value. Give it one, or remove the line")
        if action.dest in self._takes_one and isinstance(value, list | dict):
            raise ValueError(f"{self._config}: {action.dest} takes one value, got {value!r}. Correct it")
        if action.nargs == "+" and isinstance(value, str | int | float):
            return [value]
        if isinstance(value, _SCALARS):
            value = str(value)
        if isinstance(value, str) and action.choices and value not in map(str, action.choices):
            known = ", ".join(map(str, action.choices))
            raise ValueError(f"{self._config}: unknown {action.dest} {value!r}: choose one of {known}")
        return value

    def names(self) -> list[str]:
        """Names of all options, those of the short help first."""
        known = dict.fromkeys(a.dest for a in self._actions if a.option_strings and a.dest != argparse.SUPPRESS)
        return [*(name for name in OPTIONS if name in known), *(name for name in known if name not in OPTIONS)]


def _config_path(args: Sequence[str]) -> str:
    place = args.index("--config") + 1
    if place == len(args) or args[place].startswith("--"):
        raise ValueError("--config takes the name of a YAML file")
    if not Path(args[place]).is_file():
        raise ValueError(f"{args[place]}: no such file. Check --config")
    return args[place]


def _refuse_bad_yaml(path: str) -> None:
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise ValueError(f"{path}: not valid YAML ({reason}). Correct it") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path}: not a list of names and values, as `learning_rate: 2e-4`. Correct it")
    if not isinstance(config.get("env", {}), dict):
        raise ValueError(f"{path}: env takes names and values of environment variables. Correct it")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of a sentence about an unknown name: the known one that is nearest to it, or nothing.

    Args:
        known: the first of them are preferred.
        prefix: what is written before a name.
    """
    plain = name.replace("-", "_").lower()
    nearest = difflib.get_close_matches(plain, known, 1, 0.8)
    # A part of a name, as in `--model` or `--batch_size`, resembles shorter ones more than the one that has it.
    nearest = nearest or ([k for k in known if plain in k] if len(plain) > 3 else [])
    nearest = nearest or difflib.get_close_matches(plain, known, 1, 0.6)
    return f"; did you mean {prefix}{nearest[0]}?" if nearest else ""
