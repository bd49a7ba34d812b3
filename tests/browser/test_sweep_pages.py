"""A sweep's report, Optuna's dashboard and TensorBoard in a real Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spo.sweep.dashboards import Board, dashboards, links
from spo.sweep.outcome import Outcome
from spo.sweep.page import write_page
from tests.browser.test_report_page import CHROMIUM, FLAGS, playwright
from tests.example_sweep import finished_sweep

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    made = finished_sweep(tmp_path_factory.mktemp("sweeps"), search={"trials": 12, "concurrent": 1})
    write_page(made)
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: playwright.Browser) -> Iterator[playwright.Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    context.close()


@pytest.fixture(scope="module")
def boards(outcome: Outcome) -> Iterator[list[Board]]:
    with dashboards(outcome.folder, optuna_port=0, tensorboard_port=0) as running:
        yield running


def test_the_report_is_whole_and_asks_for_nothing(page: playwright.Page, outcome: Outcome) -> None:
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(outcome.folder.report.as_uri())
    assert [url for url in requests if not url.startswith("data:")] == [
        outcome.folder.report.as_uri()
    ]
    assert complaints == []
    broken = "[...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert page.evaluate(broken) == 0
    assert page.evaluate("document.images.length") >= 3
    text = page.inner_text("main")
    assert "python -m jobs.pipeline --config" in text
    assert "words <0> & more" in text or "words <1> & more" in text
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_toxic_answers_are_blurred_until_clicked(page: playwright.Page, outcome: Outcome) -> None:
    page.goto(outcome.folder.report.as_uri())
    before = page.locator(".veil.on").count()
    assert before > 0
    page.locator(".veil.on button").first.click()
    assert page.locator(".veil.on").count() == before - 1


def test_optuna_dashboard_shows_the_study(page: playwright.Page, boards: list[Board]) -> None:
    page.goto(boards[0].url)
    page.get_by_text("spo-sweep").first.click()
    page.get_by_text("steering.coefficient").first.wait_for()


def test_tensorboard_shows_settings_against_objectives(
    page: playwright.Page, boards: list[Board]
) -> None:
    page.goto(f"{boards[1].url}#hparams")
    page.get_by_text("steering.coefficient").first.wait_for()
    page.get_by_text("objective/toxicity").first.wait_for()


def test_the_links_name_everything(outcome: Outcome, boards: list[Board]) -> None:
    shown = links(boards, outcome.folder, "127.0.0.1:8265")
    assert boards[0].url in shown
    assert f"{boards[1].url}#hparams" in shown
    assert "Ray dashboard: http://127.0.0.1:8265" in shown
    assert str(outcome.folder.report) in shown


def test_the_dashboards_end_with_the_block(outcome: Outcome) -> None:
    with dashboards(outcome.folder) as running:
        processes = [board.process for board in running]
    assert all(process.poll() is not None for process in processes)
    assert Path(outcome.folder.storage).is_file()
