"""The page in a real browser: Chromium by Playwright, where both are installed (`pip install playwright`)."""

import json
import shutil

import numpy as np
import pytest
from test_page import HOSTILE, scouted

from tamis.report.page import render
from tamis.report.run_folder import read_run

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def shown(chromium, tmp_path):
    """Open the page of a run whose rows are numbered and, by the last of them, hostile."""
    rows = [{"prompt": f"question {i}", "completion": f"answer {i} " + ["even", "odd"][i % 2]} for i in range(116)]
    run = scouted(tmp_path, rows + HOSTILE, np.linspace(0.995, 0.005, 120))
    file = tmp_path / "report.html"
    file.write_text(render(read_run(str(run))), encoding="utf-8")
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page, seen = context.new_page(), []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on(
        "request", lambda request: seen.append(request.url) if not request.url.startswith(("file:", "blob:")) else None
    )
    page.goto(f"file://{file}")
    page.wait_for_selector("html[data-ready]")
    yield page
    assert seen == [], "no console message, no error, no request"
    context.close()


def cells(page, field):
    return page.locator(f'.tabulator-row [tabulator-field="{field}"]').all_inner_texts()


def test_orders_and_pages(shown):
    assert cells(shown, "row")[:2] == ["119", "118"] and shown.get_by_text("Showing 1-50 of 120 rows").is_visible()
    shown.get_by_role("button", name="Best first").click()
    assert cells(shown, "row")[0] == "0"
    shown.get_by_role("button", name="Border first").click()
    assert set(cells(shown, "row")[:2]) == {"59", "60"}
    shown.locator('.tabulator-col[tabulator-field="row"]').click()
    assert cells(shown, "row")[0] == "0", "sorted by a column"
    shown.locator(".tabulator-page", has_text="Next").click()
    assert cells(shown, "row")[0] == "50"


def test_search_and_filter(shown):
    shown.keyboard.press("/")
    shown.keyboard.type("answer 11 odd")
    shown.get_by_text("Showing 1-4 of 4 rows").wait_for()
    assert sorted(cells(shown, "row")) == ["11", "111", "113", "115"]
    shown.locator("#filter").select_option("kept")
    shown.get_by_text("Showing 1-1 of 1 rows").wait_for()
    assert cells(shown, "row") == ["11"]


def test_rows_are_read_and_marks_exported(shown, tmp_path):
    shown.locator(".tabulator-row").first.click()
    dialog = shown.locator("#detail")
    assert "row 119, dropped" in dialog.inner_text() and "A trusted row near it" in dialog.inner_text()
    shown.keyboard.press("d")
    shown.keyboard.press("ArrowRight")
    assert "row 118" in dialog.inner_text() and "{{ 7 * 7 }}" in dialog.inner_text()
    shown.keyboard.press("Escape")
    shown.get_by_role("button", name="Best first").click()
    shown.locator(".tabulator-row").first.focus()
    shown.keyboard.press("Enter")
    shown.get_by_role("button", name="I disagree").click()
    shown.keyboard.press("Escape")
    with shown.expect_download() as download:
        shown.get_by_role("button", name="Export 2 marks").click()
    download.value.save_as(tmp_path / "marks.jsonl")
    marks = [json.loads(line) for line in (tmp_path / "marks.jsonl").read_text().splitlines()]
    assert [(mark["source"], mark["row"], mark["keep"]) for mark in marks] == [
        ("a.jsonl", 0, False),
        ("a.jsonl", 119, True),
    ]
    shown.reload()
    shown.get_by_role("button", name="Export 2 marks").wait_for()


def test_scripts_in_rows_are_inert(shown):
    assert cells(shown, "prompt")[2:4] == [HOSTILE[1]["prompt"], HOSTILE[0]["prompt"]]
    shown.locator(".tabulator-row").nth(3).click()
    assert shown.locator("#response").inner_text() == HOSTILE[0]["completion"]
    assert shown.evaluate("window.hit") is None and shown.locator("img").count() == 0


def test_light_and_dark(shown):
    def paper():
        return shown.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    shown.locator("#theme").click()
    assert paper() != light
    shown.reload()
    assert paper() != light, "remembered"


def test_nothing_is_wider_than_a_telephone(shown):
    shown.set_viewport_size({"width": 390, "height": 800})
    shown.reload()
    shown.wait_for_selector("html[data-ready]")
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
