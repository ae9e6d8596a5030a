"""The site of the documents: built as strictly as it can be, with every page in its menu."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not included in the" not in done.stderr, done.stderr
    return folder


def test_every_document_is_a_page(site):
    for path in (ROOT / "docs").glob("*.md"):
        page = site / "index.html" if path.stem == "index" else site / path.stem / "index.html"
        assert page.is_file(), path


def test_the_api_is_that_of_the_docstrings(site):
    text = (site / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("tamis.BilevelTrainer", "tamis.Selector.next_scores", "tamis.bilevel.row_coefficients"):
        assert f'id="{name}"' in text, name
