"""What a dataclass of settings is made with: fields with their help, what was given, and what has no effect."""

import logging
import re
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from enum import Enum
from typing import Any, Literal, get_args, get_origin

logger = logging.getLogger(__name__)

# Messages name a setting and its value so: `max_steps`, `selector='none'`, `refine_fraction=0`.
_SETTING = re.compile(r"`([a-z]\w*)(?:=(?:')?([^`']*)(?:')?)?`")

# Not for a replay: a secret, what becomes of an earlier run, and what `config.yaml` tells of the run it came from.
_NOT_REPLAYED = ("hub_token", "resume_from_checkpoint", "overwrite_output_dir", "run_info")


def setting(default: Any, help: str, **options: Any) -> Any:
    """A field of a settings dataclass; ``options`` are those of its command line argument."""
    return field(default=default, metadata={"help": help, **options})


def given_fields(arguments: Any) -> dict[str, Any]:
    """The plain values of a dataclass that differ from their defaults, as `--config` reads them."""
    defaults = {
        f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(arguments)
    }
    given = {n: getattr(arguments, n) for n in defaults}
    given = {n: v.value if isinstance(v, Enum) else v for n, v in given.items()}
    given = {n: v for n, v in given.items() if v != defaults[n] and n not in _NOT_REPLAYED}
    return {n: v for n, v in given.items() if isinstance(v, bool | int | float | str | list | dict | None)}


def warn_without_effect(given: Iterable[str], inactive: dict[str, list[str]]) -> None:
    """The one way in which a setting without effect is said.

    Args:
        given: names of the settings that the user has set.
        inactive: names of settings that change nothing, under the reason why they do not.
    """
    reasons = {name: reason for reason, names in reversed(inactive.items()) for name in names}
    for name in given:
        if name in reasons:
            logger.warning(f"{name} is set but has no effect: {reasons[name]}")


def as_flags(text: str) -> str:
    """A message as the command line says it: the settings that it names, in backticks, as flags."""
    return _SETTING.sub(_as_flag, text)


def _as_flag(setting: re.Match[str]) -> str:
    name, value = setting.groups()
    return f"--{name}" if value in (None, "", "True") else f"--{name} {value}"  # a bare flag is True


def first_line(error: Exception) -> str:
    """The first line of what another library says, without its full stop; empty where it says nothing."""
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


class FlagFormatter(logging.Formatter):
    """Shows the messages of a log by `as_flags`."""

    def format(self, record: logging.LogRecord) -> str:
        """See [`logging.Formatter`]."""
        return as_flags(super().format(record))


def as_number(name: str, value: Any) -> str:
    """A number as text, always written in the same way.

    Raises:
        ValueError: it is none.
    """
    try:
        return f"{float(value):g}"
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number or 'auto', got {value!r}") from None


def choices_of(annotation: Any) -> tuple[Any, ...]:
    """What a Literal allows, or a Literal or None; () for any other annotation."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    parts = [part for part in get_args(annotation) if get_origin(part) is Literal]
    return (None, *get_args(parts[0])) if parts else ()
