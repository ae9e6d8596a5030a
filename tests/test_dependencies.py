"""What tamis is built on: declared, pinned within its ranges, and under licences that let anyone use it."""

import ast
import re
import sys
import tomllib
from importlib.metadata import metadata, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINS = [
    line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"
]
# MPL 2.0 binds changes of its own files alone.
PERMISSIVE = re.compile(
    r"MIT|BSD|Apache|ISC|MPL|Mozilla Public|PSF|Python Software Foundation|CNRI|BSL-1.0|Zlib|CC0|0BSD", re.IGNORECASE
)
COPYLEFT = re.compile(r"\b[AL]?GPL", re.IGNORECASE)


def licence(name: str) -> str:
    """What a package says of itself: an expression, classifiers, or the first line of a text."""
    found = metadata(name)
    classifiers = [text.split("::")[-1] for text in found.get_all("Classifier") or [] if text.startswith("License")]
    text = (found.get("License") or "").split("\n")[0]
    return found.get("License-Expression") or ", ".join(classifiers) or text


@pytest.mark.parametrize("pin", PINS)
def test_every_pinned_package_may_be_used_by_anyone(pin):
    found = licence(pin.split("==")[0])
    assert PERMISSIVE.search(found) and not COPYLEFT.search(found), found


def test_pins_are_within_the_ranges_of_the_package():
    pinned = {canonicalize_name(pin.split("==")[0]): pin.split("==")[1] for pin in PINS}
    extras = PROJECT["optional-dependencies"]
    for text in [*PROJECT["dependencies"], *extras["dev"], *extras["docs"]]:
        asked = Requirement(text)
        assert asked.specifier.contains(pinned[canonicalize_name(asked.name)]), text


def test_what_is_imported_is_declared():
    """Whatever the modules of tamis import is a dependency, or part of an extra."""
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    declared = {canonicalize_name(Requirement(text).name) for text in texts}
    distributions = packages_distributions()
    imported = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"tamis"}
    names = {canonicalize_name(distributions.get(module, [module])[0]) for module in others}
    assert "torch" in names and names - declared == set()
