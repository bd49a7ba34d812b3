"""The report in a real Chromium: no request, no error, fits a phone, blurred text comes clear."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from spo.report import write_report
from tests.example_run import ODD_TEXT, write_example_run

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs the package 'playwright' (extra 'dev')"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(write_example_run(tmp_path_factory.mktemp("runs") / "example"))


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """An open page with everything it asked for and complained about."""

    def __init__(self, context: playwright.BrowserContext, file: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page = context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message))
        self.page.goto(file.as_uri(), wait_until="load")


@pytest.fixture
def visit(browser: playwright.Browser, page_file: Path) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.set_default_timeout(5000)
    yield Visit(context, page_file)
    context.close()


def test_no_request_and_no_complaint(visit: Visit, page_file: Path) -> None:
    outside = [url for url in visit.requests if not url.startswith("data:")]
    assert outside == [page_file.as_uri()]
    assert visit.complaints == []
    broken = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert visit.page.evaluate(broken) == 0
    assert visit.page.evaluate("document.images.length") >= 15


def test_odd_text_is_text(visit: Visit) -> None:
    shown = visit.page.locator(".text").first.text_content()
    assert shown == ODD_TEXT.strip().replace("\x00", "\u2400")
    assert visit.page.evaluate("document.scripts.length") == 1


def blur(visit: Visit) -> str:
    text = visit.page.locator(".veil:has(button) .text").first
    return str(text.evaluate("element => getComputedStyle(element).filter"))


def test_a_click_shows_the_text(visit: Visit) -> None:
    assert "blur" in blur(visit)
    text = visit.page.locator(".veil:has(button) .text").first
    assert text.get_attribute("aria-hidden") == "true"
    visit.page.locator("button.reveal").first.click()
    assert blur(visit) == "none"
    assert text.get_attribute("aria-hidden") is None
    assert visit.page.locator(".veil.on").count() > 0, "the others stay blurred"


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_shows_the_text(visit: Visit, key: str) -> None:
    visit.page.locator("button.reveal").first.focus()
    visit.page.keyboard.press(key)
    assert blur(visit) == "none"


def test_one_button_for_all(visit: Visit) -> None:
    button = visit.page.locator("#reveal-all")
    before = visit.page.locator(".veil.on").count()
    button.click()
    assert visit.page.locator(".veil.on").count() == 0
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert visit.page.locator(".veil.on").count() == before > 0


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_page_fits_the_screen(visit: Visit, width: int) -> None:
    visit.page.set_viewport_size({"width": width, "height": 800})
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_pages_get_dark_plots(visit: Visit) -> None:
    plot = visit.page.locator("figure picture img").first
    plot.scroll_into_view_if_needed()
    light = plot.evaluate("image => image.currentSrc")
    visit.page.emulate_media(color_scheme="dark")
    visit.page.wait_for_function(
        "light => document.querySelector('figure picture img').currentSrc !== light", arg=light
    )
    background = "getComputedStyle(document.body).backgroundColor"
    assert visit.page.evaluate(background) == "rgb(18, 22, 26)"


def test_print_hides_toxic_text_and_buttons(visit: Visit) -> None:
    visit.page.emulate_media(media="print")
    assert not visit.page.locator(".veil.on .text").first.is_visible()
    assert not visit.page.locator("#reveal-all").is_visible()
    assert visit.page.locator("figure picture img").first.is_visible()
