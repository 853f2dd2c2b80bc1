"""The built book, opened from disk in a real browser with the network cut."""

import os
import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "_build" / "html" / "book"
CHAPTERS = [f"book/{path.stem}" for path in sorted((ROOT / "book").glob("[0-9]*.ipynb"))]
OTHERS = ["book/intro", "book/notation", "book/api", "book/bibliography"]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

playwright = pytest.importorskip("playwright.sync_api")


def find_browser() -> str | None:
    return os.environ.get("CHROMIUM") or next((path for name in BROWSERS if (path := shutil.which(name))), None)


@pytest.fixture(scope="session")
def browser():
    path = find_browser()
    if path is None:
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("no Chromium or Chrome on this machine: install one or set CHROMIUM to its path")
    if not (PAGES / "intro.html").exists():
        pytest.fail("the book is not built: run `make book` first")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield opened
        opened.close()


@pytest.fixture(params=CHAPTERS + OTHERS)
def page(request, browser):
    """One page of the book; what it asked of other hosts and what went wrong in it are kept on the page object."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    opened.requests_outside, opened.problems = [], []

    def decide(route):
        if route.request.url.startswith(("file:", "data:", "blob:")):
            route.continue_()
        else:
            opened.requests_outside.append(route.request.url)
            route.abort()

    context.route("**/*", decide)
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    opened.on("console", lambda m: opened.problems.append(m.text) if m.type == "error" else None)
    opened.goto((ROOT / "_build" / "html" / f"{request.param}.html").as_uri())
    opened.wait_for_load_state("load")
    opened.name = request.param
    yield opened
    context.close()


def test_page_is_whole(page):
    assert page.locator("article h1").count() == 1
    assert page.requests_outside == []
    assert page.problems == []
    assert page.locator("main").inner_text().strip()
    for broken in ("Traceback (most recent call last)", "{{", "WARNING:"):
        assert broken not in page.locator("main").inner_text()


def test_formulas_are_typeset(page):
    if not page.locator(".math").count():
        pytest.skip("no formula on this page")
    page.wait_for_function("document.querySelectorAll('mjx-container').length > 0", timeout=20_000)
    assert page.locator("mjx-merror, mjx-container [data-mjx-error]").count() == 0


def test_every_picture_has_a_description(page):
    for picture in page.locator("article img").all():
        words = picture.get_attribute("alt") or ""
        assert len(words) > 12 or words == "Open in Colab", f"{picture.get_attribute('src')[:80]}: {words!r}"
        assert not re.search(r"\.(png|svg)$", words), f"the description is a file name: {words}"


def test_every_figure_has_a_caption(page):
    for figure in page.locator("main figure").all():
        assert len(figure.locator("figcaption").inner_text()) > 30


def test_chapters_have_a_badge_for_colab(page):
    if page.name not in CHAPTERS:
        pytest.skip("not a chapter")
    target = page.locator(".colab-badge a").get_attribute("href")
    assert target.startswith("https://colab.research.google.com/github/") and target.endswith(f"{page.name}.ipynb")


def test_sliders_move_by_keyboard(page):
    explorers = page.locator(".explorer").all()
    if page.name in CHAPTERS:
        assert explorers, "every chapter has an interactive figure"
    for explorer in explorers:
        seen = {(explorer.locator("img").get_attribute("src"), explorer.locator("p").inner_text())}
        for slider in explorer.locator("input[type=range]").all():
            last = int(slider.get_attribute("max"))
            slider.focus()
            for _ in range(last):
                page.keyboard.press("ArrowRight")
            assert int(slider.input_value()) == last
            state = (explorer.locator("img").get_attribute("src"), explorer.locator("p").inner_text())
            assert last == 0 or state not in seen, "moving the slider must change the picture and its description"
            assert explorer.locator("img").get_attribute("alt") == explorer.locator("p").inner_text()
            seen.add(state)
        for slider in explorer.locator("input[type=range]").all():
            assert explorer.locator(f"label[for='{slider.get_attribute('id')}']").inner_text()


def test_page_fits_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_timeout(200)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= 361
