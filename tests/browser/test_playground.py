"""The playground in a real Chromium against the running application: keyboard, phone, refusals."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from tests.local_endpoint import ALL, USE, local_endpoint

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the package 'playwright' (extra 'dev')"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
SHOTS = os.environ.get("SPO_SCREENSHOTS")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    app, _ = local_endpoint(tmp_path_factory.mktemp("endpoint"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and time.monotonic() < end:
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def visit(
    browser: playwright.Browser, address: str, *, key: str = ALL, width: int = 1280
) -> tuple[playwright.Page, list[str]]:
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.set_default_timeout(20000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{address}/#key={key}")
    page.wait_for_selector("#vector option", state="attached")
    return page, complaints


@pytest.mark.parametrize("width", [1280, 360])
def test_two_answers_side_by_side_with_the_receipt(
    browser: playwright.Browser, address: str, width: int
) -> None:
    page, complaints = visit(browser, address, width=width)
    assert "key" not in page.url, "the key does not stay in the address"
    page.click("#sample")
    page.fill("#tokens", "12")
    page.fill("#temperature", "1")
    page.focus("#text")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#steered-receipt.confirmed")
    page.wait_for_function("document.getElementById('plain').textContent.length > 0")
    page.wait_for_function("!document.getElementById('go').disabled")
    assert len(str(page.text_content("#plain")).split()) == 12
    assert len(str(page.text_content("#steered")).split()) == 12
    assert "polite version 1" in str(page.text_content("#steered-receipt"))
    assert page.text_content("#plain-receipt") == "No vector, as asked."
    overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(overflow) <= 0, "no sideways scrolling"
    assert complaints == []
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"playground-{width}.png"), full_page=True)
    page.context.close()


def test_everything_is_reached_by_tab(browser: playwright.Browser, address: str) -> None:
    page, _ = visit(browser, address)
    page.focus("#key")
    reached = ["key"]
    for _step in range(9):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    wanted = "key vector text file sample coefficient tokens temperature go"
    assert [name for name in reached if name in wanted.split()] == wanted.split()
    page.context.close()


def test_a_refusal_is_shown_where_the_answer_would_be(
    browser: playwright.Browser, address: str
) -> None:
    page, _ = visit(browser, address, key=USE)
    page.fill("#tokens", "4")
    page.click("#go")
    page.wait_for_selector("#plain.failed")
    assert "unsteered model and this key may not ask" in str(page.text_content("#plain"))
    page.wait_for_selector("#steered-receipt.confirmed")
    page.context.close()
