"""The built book, opened from disk in a real browser with the network cut."""

import gzip
import io
import os
import re
import shutil
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import live_model as live
import print_book
import pytest
import torch
from PIL import Image
from test_live import read_light_sleeper, read_models

from sleepedu.sleep_loop import sleep, wake
from sleepedu.trace import SleepTrace

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "_build" / "html" / "book"
CHAPTERS = [f"book/{path.stem}" for path in sorted((ROOT / "book").glob("[0-9]*.ipynb"))]
OTHERS = [
    f"book/{name}"
    for name in ("intro", "results", "provenance", "how_the_runs_were_tuned", "notation", "api", "bibliography")
]
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
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield opened
        opened.close()


@contextmanager
def opened(browser, name, **settings):
    """One page of the book; what it asked of other hosts and what went wrong in it are kept on the page object."""
    if not (PAGES / "intro.html").exists():
        pytest.fail("the book is not built: run `make book` first")
    context = browser.new_context(**({"viewport": {"width": 1200, "height": 900}} | settings))
    page = context.new_page()
    page.requests_outside, page.problems = [], []

    def decide(route):
        if route.request.url.startswith(("file:", "data:", "blob:")):
            route.continue_()
        else:
            page.requests_outside.append(route.request.url)
            route.abort()

    context.route("**/*", decide)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
    page.goto((ROOT / "_build" / "html" / f"{name}.html").as_uri())
    page.wait_for_load_state("load")
    page.name = name
    yield page
    context.close()


@pytest.fixture(scope="module", params=CHAPTERS + OTHERS)
def page(request, browser):
    """Every page in turn, opened once for all the tests that leave it as it is."""
    with opened(browser, request.param) as page:
        yield page


@pytest.fixture(scope="module", params=CHAPTERS + OTHERS)
def page_to_change(request, browser):
    """Every page once more, for the tests that move, turn and colour it, each from where the one before has left it."""
    with opened(browser, request.param) as page:
        yield page


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


def test_sliders_move_by_keyboard(page_to_change):
    page = page_to_change
    explorers = page.locator(".explorer").all()
    if page.name in CHAPTERS:
        assert explorers, "every chapter has an interactive figure"
    for explorer in explorers:
        for slider in explorer.locator("input[type=range]").all():
            last = int(slider.get_attribute("max"))
            slider.focus()
            page.keyboard.press("Home")
            before = (explorer.locator("img").get_attribute("src"), explorer.locator("p").inner_text())
            for _ in range(last):
                page.keyboard.press("ArrowRight")
            assert int(slider.input_value()) == last
            state = (explorer.locator("img").get_attribute("src"), explorer.locator("p").inner_text())
            assert last == 0 or state != before, "moving the slider must change the picture and its description"
            assert explorer.locator("img").get_attribute("alt") == explorer.locator("p").inner_text()
        for cell in explorer.locator("button").all()[:2]:
            cell.press("Enter")
            assert cell.get_attribute("aria-pressed") == "true"
            chosen = explorer.locator("output").all_inner_texts()
            assert all(f" {value}" in cell.get_attribute("aria-label") for value in chosen)
        for slider in explorer.locator("input[type=range]").all():
            assert explorer.locator(f"label[for='{slider.get_attribute('id')}']").inner_text()


def test_page_fits_a_phone(page_to_change):
    page = page_to_change
    for width in (320, 360):
        page.set_viewport_size({"width": width, "height": 740})
        page.wait_for_timeout(200)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width + 1


# Most of the time of a check goes into the contrast of code, token by token. A token's colours follow from its class
# and from the kind of block it is in: one of each stands for the others, whose text stays. Inner tokens come first.
THIN_OUT_CODE = """() => {
  const seen = new Set();
  for (const block of document.querySelectorAll("pre, dt.sig")) {
    const kind = [block.parentElement, block.closest(".cell_input, .cell_output, .admonition, .live")];
    const copy = block.cloneNode(true);
    for (const token of [...copy.querySelectorAll("span, em")].reverse()) {
      if (token.children.length) continue;
      const key = [...kind, token.parentElement, token].map((element) => element?.className).join("/");
      if (seen.has(key)) token.replaceWith(token.textContent);
      seen.add(key);
    }
    block.replaceWith(copy);
  }
}"""
# Solutions are folded away until someone asks for them; a check sees only what is to be seen.
UNFOLD = """() => {
  for (const button of document.querySelectorAll(".toggle-button-hidden")) button.click();
  for (const details of document.querySelectorAll("details")) details.open = true;
}"""
# The rules whose verdict hangs on the theme. Everything else is the same in both.
COLOURS = ["color-contrast", "link-in-text-block"]


# What a reader who sees badly, or does not use a mouse, would stumble over, by the rule that has to notice it.
BARRIERS = {
    "image-alt": "document.querySelector('article figure img').removeAttribute('alt')",
    "label": "document.querySelector('.explorer label').remove()",
    "color-contrast": """document.head.append(Object.assign(document.createElement("style"),
        {textContent: "pre .k { color: #555 !important }"}))""",
    "scrollable-region-focusable": """document.querySelector("article").insertAdjacentHTML("beforeend",
        "<div style='height: 3em; overflow: auto'>" + "<p>too long</p>".repeat(5) + "</div>")""",
}


def prepare_check(page):
    """Load axe into a page in which everything is typeset, unfolded, and free of colours halfway to others."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.evaluate("window.MathJax?.startup?.promise.then(() => null)")
    page.evaluate(UNFOLD)
    page.evaluate(THIN_OUT_CODE)
    page.add_style_tag(content="*, ::before, ::after { transition: none !important; animation: none !important }")
    page.evaluate(axe.Axe().axe_script)
    # To axe a formula is a picture and a header with nothing else is empty. A screen reader finds MathML in it.
    headers = "th:not([role]):not(:has(mjx-assistive-mml math))"
    page.evaluate("(s) => axe.configure({rules: [{id: 'empty-table-header', selector: s}]})", headers)


# 300 ms after a change of width the theme looks which boxes scroll now. Two frames later the page knows of the change,
# and its own clock says when the theme has looked: on a busy machine ours may be seconds ahead.
UNTIL_SETTLED = """() => new Promise((settled) =>
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(settled, 400))))"""


def show(page, theme, width):
    page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
    if page.viewport_size["width"] != width:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate(UNTIL_SETTLED)


def violations(page, rules=None, where="html"):
    """What axe has against a part of a prepared page as it stands: for each broken rule its name and one line more."""
    # Without preload: style sheets cannot be read over again from a page that was opened from disk.
    options = {"resultTypes": ["violations"], "preload": False} | ({"runOnly": rules} if rules else {})
    found = page.evaluate("async ([where, options]) => (await axe.run(where, options)).violations", [where, options])
    return {
        rule["id"]: f"{rule['id']} ({rule['impact']}), {len(rule['nodes'])} nodes, first {rule['nodes'][0]['target']}: "
        f"{rule['nodes'][0]['html'][:200]}"
        for rule in found
    }


def test_an_automated_check_finds_no_barrier(page_to_change):
    page = page_to_change
    prepare_check(page)
    for height in (2000, 1000):  # who scrolls up is shown a button back to the top
        page.evaluate(f"scrollTo(0, {height})")
        page.wait_for_timeout(50)
    found = []
    for width in (1200, 400):
        for theme, rules in (("light", None), ("dark", COLOURS)):
            show(page, theme, width)
            found += [f"{theme}, {width} px: {line}" for line in violations(page, rules).values()]
    assert not found, "\n".join([page.name, *found])


def test_the_automated_check_finds_barriers_where_there_are_some(browser):
    with opened(browser, CHAPTERS[0]) as page:
        prepare_check(page)
        show(page, "dark", 400)
        for barrier in BARRIERS.values():
            page.evaluate(barrier)
        assert violations(page).keys() == BARRIERS.keys()


def test_in_the_dark_a_figure_stands_on_the_page_itself(browser):
    with opened(browser, CHAPTERS[4]) as page:
        corners = {}
        for theme in ("light", "dark"):
            show(page, theme, 1200)
            box = page.locator('.bd-content img[src*="_images/"]').first
            box.scroll_into_view_if_needed()
            drawn = Image.open(io.BytesIO(box.screenshot())).convert("RGB")
            corners[theme] = drawn.getpixel((3, 3)), drawn.getpixel((drawn.width - 4, drawn.height - 4))
            ground = re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert corners[theme] == (tuple(map(int, ground[:3])),) * 2
        assert min(corners["light"][0]) > 250 and max(corners["dark"][0]) < 40


@pytest.mark.parametrize("menu", ["primary", "secondary"])
def test_the_menus_of_a_phone_open_by_keyboard(menu, browser):
    """To the chapters, and within one; what they show passes the automated check."""
    with opened(browser, CHAPTERS[0], viewport={"width": 400, "height": 900}) as page:
        prepare_check(page)
        dialog = page.locator(f"#pst-{menu}-sidebar-modal")
        assert not dialog.is_visible()
        press(page, f".bd-header-article .{menu}-toggle", "Enter")
        assert dialog.locator("nav a:visible").count() > 5
        for theme in ("light", "dark"):
            show(page, theme, 400)
            dialog.locator("nav a:visible").nth(2).hover()
            assert violations(page) == {}
        page.keyboard.press("Escape")
        assert not dialog.is_visible()


@pytest.fixture
def intro(browser):
    """The page with the live model; whatever a test did there, nothing went wrong and nobody else was asked."""
    with opened(browser, "book/intro") as page:
        yield page
        assert page.problems == [] and page.requests_outside == []


@pytest.fixture(scope="module")
def live_models():
    return read_models((ROOT / "book" / "_extra" / "live" / "weights.js").read_text())


def press(page, selector, key, times=1):
    page.locator(selector).focus()
    for _ in range(times):
        page.keyboard.press(key)


def choose(page, passes, hops):
    """Move both sliders by keyboard."""
    for name, value in (("passes", passes), ("hops", hops)):
        press(page, f"#live-{name}", "Home")
        press(page, f"#live-{name}", "ArrowRight", value - int(page.locator(f"#live-{name}").get_attribute("min")))
        assert page.locator(f"output[for=live-{name}]").inner_text() == str(value)


@pytest.mark.parametrize("passes", live.PASSES)
def test_the_live_model_is_the_library_s(passes, intro, live_models):
    generator = torch.Generator().manual_seed(passes)
    for hops in (1, 2, 3, 4):
        ring, told = (torch.randperm(8, generator=generator).tolist() for _ in range(2))
        following = dict(pairwise([*ring, ring[0]]))
        edges = [[node, following[node]] for node in told]
        for start in (ring[0], told[0]):
            logits, trace = live.ask(live_models[passes], passes, ring, told, start, hops)
            given = intro.evaluate("a => sleepeduLive.answer(...a)", [passes, edges, hops, start])
            torch.testing.assert_close(torch.tensor(given), logits, atol=1e-3, rtol=0)
        slept = intro.evaluate(
            "a => sleepeduLive.sleep(...a).map((S) => S.map((T) => T.map((M) => M.map((row) => [...row]))))",
            [passes, edges],
        )
        expected = torch.stack([S[0][0] for S in trace.S[0][1:]])
        torch.testing.assert_close(torch.tensor(slept)[:, 0], expected, atol=1e-3, rtol=1e-4)


ASKED = "3 hops after C: the arrows go C → F → H → A."


def fully_seen(page, selector):
    """Whether every element that is meant lies in the window as it stands."""
    inside = """es => es.length > 0 && es.every((e) => { const box = e.getBoundingClientRect();
        return box.height && box.top >= 0 && box.bottom <= innerHeight && box.left >= 0 && box.right <= innerWidth })"""
    return page.locator(selector).evaluate_all(inside)


@pytest.mark.parametrize("width, height", [(1300, 850), (390, 844)])
def test_the_first_screen_shows_a_wrong_answer_beside_a_right_one(width, height, browser):
    with opened(browser, "book/intro", viewport={"width": width, "height": height}) as page:
        for part in ("article h1", "article section > p >> nth=0", ".live-controls", ".live-verdict"):
            assert fully_seen(page, part), part
        assert fully_seen(page, ".live-lane h2"), "and both models"
        assert fully_seen(page, ".live-lane, .live-ring") == (width == 1300), "on a phone the rest is below"
        assert page.locator(".live-verdict").inner_text() == f"{ASKED} N = 1 says H: wrong. N = 4 says A: right."
        assert page.locator(".live-lane h2").all_inner_texts() == [
            "N = 1 3 hops: 25% right over 2,000 rings",
            "N = 4 3 hops: 100% right over 2,000 rings",
        ], "the stored runs'"


def read_out(page, lane, passes):
    """How the hops are shaded that can be read from S after a pass."""
    cells = page.locator(f".live-lane >> nth={lane} >> .live-pass >> nth={passes - 1} >> .live-read-out i")
    return [cell.get_attribute("class") for cell in cells.all()]


def test_a_sleep_is_played_pass_by_pass(intro):
    intro.clock.install()
    verdict, answers = intro.locator(".live-verdict"), intro.locator(".live-answers")
    press(intro, "#live-sleep", "Enter")
    assert verdict.get_attribute("role") == "status" and "gone to sleep" in verdict.inner_text()
    assert answers.all_inner_texts() == ["asleep", "asleep"]
    intro.clock.run_for(700)
    assert verdict.inner_text().startswith("Pass 1 of 4.") and "1 hop 91%, 2 hops 41%" in verdict.inner_text()
    assert "H" in answers.nth(0).inner_text() and answers.nth(1).inner_text() == "asleep"
    assert intro.locator(".live-node.wrong").inner_text() == "H"
    intro.clock.run_for(1600)
    assert read_out(intro, 1, 2) == ["most", "most", "half", "few"] and read_out(intro, 1, 3) == [""] * 4
    intro.clock.run_for(3200)
    assert verdict.inner_text().endswith("N = 4 says A: right.") and read_out(intro, 1, 4) == ["most"] * 4
    press(intro, "#live-sleep", "Space")
    choose(intro, 3, 2)
    assert "N = 3 says H: right." in verdict.inner_text(), "a change ends the play"
    intro.clock.run_for(5000)
    assert "N = 3 says H: right." in verdict.inner_text()


def test_who_wants_no_motion_sleeps_a_pass_a_press(browser):
    with opened(browser, "book/intro", reduced_motion="reduce") as page:
        for count in (1, 2, 3):
            press(page, "#live-sleep", "Enter")
            assert page.locator(".live-verdict").inner_text().startswith(f"Pass {count} of 4.")
            assert page.locator(".live-lane >> nth=1 >> .live-pass.waiting").count() == 4 - count
        press(page, "#live-sleep", "Enter")
        assert page.locator(".live-verdict").inner_text().endswith("N = 4 says A: right.")
        names = "es => es.map((e) => getComputedStyle(e).animationName)"
        assert set(page.locator(".live-pass").evaluate_all(names)) == {"none"}


def test_the_map_of_accuracies_chooses_passes_and_hops(intro):
    cells = intro.locator(".live-map button")
    assert cells.all_inner_texts()[:4] == ["98.4%", "32%", "25%", "24%"], "the stored run's"
    press(intro, ".live-map button >> nth=7", "Enter")  # N = 2, 4 hops
    assert intro.locator(".live-lane h2").all_inner_texts()[1] == "N = 2 4 hops: 94% right over 2,000 rings"
    pressed = [cell.get_attribute("aria-label") for cell in cells.all() if cell.get_attribute("aria-pressed") == "true"]
    assert pressed == ["N = 1, 4 hops: 24%", "N = 2, 4 hops: 94%"]
    press(intro, ".live-map button >> nth=0", "Enter")
    assert "1 hop after C" in intro.locator(".live-verdict").inner_text()


def test_one_scale_serves_both_models(intro):
    """With a scale of its own each N would reach the darkest colour."""
    reach = """es => es.map((canvas) => { const d = canvas.getContext("2d").getImageData(0, 0, 33, 33).data;
        return Math.max(...Array.from({length: 33 * 33}, (_, i) => Math.abs(d[4 * i] - d[4 * i + 2]))) })"""
    one, *_, four = intro.locator(".live-pass:not(.unused) canvas").evaluate_all(reach)
    assert one < four / 2


def test_the_live_ring_is_redrawn_by_keyboard(intro):
    nodes, verdict = intro.locator(".live-node"), intro.locator(".live-verdict")
    before = nodes.all_inner_texts()
    press(intro, ".live-node >> nth=1", "Enter")
    assert nodes.nth(1).get_attribute("aria-pressed") == "true"
    assert before[1] in intro.locator(".live-hint").inner_text()
    press(intro, ".live-node >> nth=6", "Space")
    after = nodes.all_inner_texts()
    assert (after[1], after[6]) == (before[6], before[1])
    assert " → ".join(after[:4]) in verdict.inner_text(), "the walk follows the arrows that are drawn"
    assert nodes.nth(1).get_attribute("aria-label") == f"{after[1]}, with an arrow to {after[2]}"
    told = intro.locator(".live-tokens span").all_inner_texts()
    assert sorted(told) == sorted(f"{a} {b}" for a, b in pairwise([*after, after[0]]))

    press(intro, "#live-start", "ArrowDown")
    assert "after D" in verdict.inner_text()
    press(intro, "#live-shuffle", "Enter")
    again = nodes.all_inner_texts()
    assert sorted(again) == sorted(before)
    press(intro, "#live-retell", "Enter")
    assert nodes.all_inner_texts() == again, "the same ring"


def test_live_controls_have_names_and_show_where_the_focus_is(intro):
    for control in intro.locator(".live :is(input, select)").all():
        assert intro.locator(f"label[for='{control.get_attribute('id')}']").inner_text()
    for squares in intro.locator(".live-pass").all():
        assert "pass" in squares.get_attribute("aria-label")
    intro.locator("#live-hops").focus()
    for _ in range(intro.locator(".live :is(input, select, button)").count()):
        style = (
            "(() => { const s = getComputedStyle(document.activeElement); return s.outlineStyle + s.outlineWidth })()"
        )
        assert intro.evaluate("document.activeElement.closest('.live') !== null"), (
            "the tab key goes through all of them"
        )
        assert intro.evaluate(style) == "solid3px"
        intro.keyboard.press("Tab")
    assert intro.evaluate("document.activeElement.closest('.live')") is None


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_automated_check_finds_no_barrier_in_a_wrong_answer(theme, intro):
    prepare_check(intro)
    show(intro, theme, 1200)
    press(intro, ".live-node >> nth=1", "Enter")
    assert intro.locator(".live-node.wrong, .live-answers .wrong").count() == 2
    assert violations(intro, where=".live") == {}
    press(intro, "#live-sleep", "Enter")
    assert "asleep" in intro.locator(".live-answers >> nth=1").inner_text()
    assert violations(intro, where=".live") == {}


@pytest.mark.parametrize("width", [320, 360, 768, 1600])
def test_the_live_model_fits(width, intro):
    intro.set_viewport_size({"width": width, "height": 800})
    box = intro.locator(".live").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    outside = """() => [...document.querySelectorAll('.live *')].filter((e) => e.getBoundingClientRect().right >
        document.querySelector('.live').getBoundingClientRect().right + 1).map((e) => e.outerHTML.slice(0, 80))"""
    assert intro.evaluate(outside) == []


def test_the_heat_maps_follow_the_theme(intro):
    pixel = "[...document.querySelector('.live canvas').getContext('2d').getImageData(0, 0, 33, 33).data].slice(0, 64)"
    colours = []
    for theme in ("light", "dark"):
        intro.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        intro.wait_for_timeout(50)
        colours.append(intro.evaluate(pixel))
    assert colours[0] != colours[1]


def test_a_sleep_takes_less_than_a_blink(intro):
    """A change of N or of the ring; a question alone takes much less. Ten times as long as it needs on an idle core."""
    edges = [[node, (node + 1) % 8] for node in range(8)]
    timed = "(edges) => { const t = performance.now(); sleepeduLive.sleep(4, edges); return performance.now() - t }"
    assert min(intro.evaluate(timed, edges) for _ in range(5)) < 250


def test_without_scripts_a_picture_stands_there(browser):
    with opened(browser, "book/intro", java_script_enabled=False) as page:
        assert page.locator("#fig-live img").is_visible()
        assert "Scripts are off" in page.locator("article").inner_text()
        assert page.locator(".live").count() == 0


# Which chapters have a panel, and how what it says begins as it opens.
LIVE = {
    "book/04_the_sleep_loop": "Pass 1 of 4. What can be read from S of N = 4 by now: 1 hop 91%",
    "book/05_graph_retrieval": f"{ASKED} N = 1 says H: wrong. N = 4 says A: right.",
    "book/09_inside_a_sleep": "4 hops after C: the arrows go C → F → H → A → E. N = 1 says A: wrong. N = 4 says E:",
}


def test_only_pages_that_show_the_live_model_load_it(page):
    loaded = [script for script in page.locator("script[src]").all() if "/live/" in script.get_attribute("src")]
    assert len(loaded) == {"book/intro": 3, **dict.fromkeys(LIVE, 3), NIGHT: 4}.get(page.name, 0)
    assert page.locator(".live-here, .live-night, .live").count() == (2 if loaded else 0)


NIGHT = "book/11_how_long_to_sleep"


def test_a_long_night_is_the_library_s(browser, live_models):
    """What the panel of chapter 11 counts is what PyTorch answers, and the change of S what the chapter defines."""
    with opened(browser, NIGHT) as page:
        press(page, "#night-passes", "End")
        lanes = page.locator(".live-long")
        models = {"2": live_models[2], "1 to 8": read_light_sleeper()}
        following = dict(zip(live.RING, [*live.RING[1:], live.RING[0]], strict=True))
        window = torch.tensor([[node for start in live.TOLD for node in (start, following[start])]])
        verdict = page.locator(".live-verdict").inner_text()
        assert verdict.startswith("Woken after 16 passes. ")
        for lane, (name, model) in zip(lanes.all(), models.items(), strict=True):
            trace = SleepTrace()
            with torch.no_grad():
                sleep(model, window, passes=16, trace=trace)
                right = [
                    [
                        sum(
                            wake(model, torch.tensor([[7 + k, start]]), S)[0, -1].argmax().item()
                            == live.RING[(place + k) % 8]
                            for place, start in enumerate(live.RING)
                        )
                        for S in trace.S[0][1:]
                    ]
                    for k in (1, 2, 3, 4)
                ]
            assert lane.locator("i").all_inner_texts() == [str(count) for row in right for count in row]
            known = sum(row[-1] for row in right)
            before, after = (torch.cat([layer.flatten() for layer in trace.S[0][n]]) for n in (15, 16))
            change = ((after - before).norm() / after.norm()).item()
            assert f"N = {name}: {known} of 32 walks right; the last pass changed S by {change:.0%}." in verdict


def test_a_long_night_is_moved_by_keyboard(browser):
    with opened(browser, NIGHT) as page:
        cells, verdict = page.locator(".live-long >> nth=0 >> i"), page.locator(".live-verdict")
        assert page.locator(".live-night > p").inner_text() == page.locator(".live-night").get_attribute("data-say")
        assert verdict.inner_text().startswith("Woken after 8 passes. N = 2: ")
        assert cells.nth(7).inner_text() != "" == cells.nth(8).inner_text()
        prepare_check(page)
        page.clock.install()
        press(page, "#night-sleep", "Enter")
        assert verdict.inner_text().startswith("Woken after one pass. ")
        page.clock.run_for(1100)
        assert verdict.inner_text().startswith("Woken after 3 passes. ")
        page.clock.run_for(9000)
        assert verdict.inner_text().startswith("Woken after 16 passes. ")
        first = cells.all_inner_texts()
        page.evaluate("Math.random = () => 0.3")  # the same other ring every time
        press(page, "#night-shuffle", "Enter")
        assert cells.all_inner_texts() != first, "another ring"
        press(page, "#night-trained", "ArrowRight", 2)
        assert "N = 4: " in verdict.inner_text()
        cells.nth(2).click()
        assert verdict.inner_text().startswith("Woken after 3 passes. ") and cells.nth(3).inner_text() == ""
        for theme in ("light", "dark"):
            show(page, theme, 390)
            assert violations(page, where=".live-night") == {}
        assert page.problems == [] and page.requests_outside == []


@pytest.mark.parametrize("name", LIVE)
def test_a_chapter_sleeps_in_its_page(name, browser):
    with opened(browser, name) as page:
        place, verdict, answers = (page.locator(part) for part in (".live-here", ".live-verdict", ".live-answers"))
        assert page.locator(".live-here > p").inner_text() == place.get_attribute("data-say")
        assert verdict.inner_text().startswith(LIVE[name])
        prepare_check(page)
        page.clock.install()
        waiting = page.locator(".live-lane >> nth=1 >> .live-pass.waiting")
        press(page, "#live-sleep", "Enter")
        assert waiting.count() == 4 and answers.all_inner_texts() == ["asleep"] * 2
        assert violations(page, where=".live-here") == {}
        page.clock.run_for(700)
        assert waiting.count() == 3 and answers.nth(0).inner_text() != "asleep" == answers.nth(1).inner_text()
        page.clock.run_for(4800)
        assert waiting.count() == 0 and re.search("N = 4 says [AE]: right.$", verdict.inner_text())
        drawn = page.locator(".live-pass:not(.unused) canvas").evaluate_all("es => es.map((e) => e.toDataURL())")
        assert len(set(drawn)) == 5, "every pass has changed S"
        press(page, "#live-retell", "Enter")
        assert page.locator(".live-lane >> nth=1 >> canvas >> nth=3").evaluate("e => e.toDataURL()") != drawn[-1]
        for theme in ("light", "dark"):
            show(page, theme, 390)
            assert violations(page, where=".live-here") == {}
        assert page.problems == [] and page.requests_outside == []


@pytest.mark.parametrize("name", [*LIVE, NIGHT])
def test_on_paper_and_without_scripts_a_chapter_has_no_panel(name, browser):
    for settings in ({"java_script_enabled": False}, {}):
        with opened(browser, name, **settings) as page:
            page.emulate_media(media="print" if page.locator(".live").count() else "screen")
            assert not page.locator(".live-here, .live-night").is_visible()


def test_on_paper_the_first_page_has_its_picture(intro):
    intro.emulate_media(media="print")
    assert intro.locator("#fig-live img").is_visible() and not intro.locator(".live").is_visible()


def test_two_panels_in_a_page_leave_each_other_alone(intro):
    intro.evaluate("document.querySelector('.live').remove()")
    intro.evaluate("document.querySelector('article').append(document.querySelector('#fig-live').cloneNode())")
    intro.add_script_tag(path=ROOT / "book" / "_extra" / "live" / "page.js")
    ids = intro.locator(".live [id]").evaluate_all("es => es.map((e) => e.id)")
    assert len(ids) == len(set(ids)) == 12
    press(intro, "#live-hops-2", "Home")
    first, second = intro.locator(".live-verdict").all_inner_texts()
    assert first.startswith(ASKED) and second.startswith("1 hop after C")


# ---- What a site has.


def test_a_page_says_what_it_is(page):
    """To search engines, and beside a link to it."""
    site = "https://sleepedu.github.io/sleepedu/"
    assert page.locator("link[rel=canonical]").get_attribute("href") == f"{site}{page.name}.html"
    assert len(page.locator("meta[name=description]").get_attribute("content")) in range(50, 301)
    assert page.locator("meta[property='og:title']").get_attribute("content").endswith("Language models that sleep")
    picture = page.locator("meta[property='og:image']").get_attribute("content")
    assert (ROOT / "_build" / "html" / picture.removeprefix(site)).exists()
    icon = page.locator("link[rel=icon]").get_attribute("href")
    assert (ROOT / "_build" / "html" / page.name).parent.joinpath(icon).exists()


def test_a_page_says_how_to_cite_edit_and_report(page):
    footer = page.locator(".bd-footer-content").inner_text()
    assert "MIT licence" in footer and "To cite this book" in footer and "None" not in footer
    links = page.locator(".bd-header-article a").evaluate_all("links => links.map((link) => link.href)")
    source = "ipynb" if page.name in CHAPTERS else "md"
    assert any(link.endswith(f"edit/main/{page.name}.{source}") for link in links)
    assert any("/issues/new" in link for link in links)


def test_the_map_of_the_site_has_every_page():
    listed = re.findall("<loc>(.*)</loc>", (ROOT / "_build" / "html" / "sitemap.xml").read_text())
    assert listed == [f"https://sleepedu.github.io/sleepedu/{name}.html" for name in sorted(CHAPTERS + OTHERS)]


def test_an_address_that_does_not_exist_leads_to_the_first_page(browser):
    with opened(browser, "404") as page:
        targets = page.locator("a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
        assert targets[0] == "https://sleepedu.github.io/sleepedu/book/intro.html" and page.requests_outside == []
        assert page.problems == [] and page.locator("h1").count() == 1


def test_pages_bring_nothing_that_they_do_not_use(page):
    text = (ROOT / "_build" / "html" / f"{page.name}.html").read_text()
    assert "fontawesome" not in text.lower() and "widget-state" not in text
    assert page.locator("script[src*=mathjax]").count() == (page.locator(".math").count() > 0)


def test_every_icon_is_drawn(page):
    drawn = """icons => icons.filter((icon) => getComputedStyle(icon).maskImage.startsWith('linear-gradient'))
        .map((icon) => icon.outerHTML)"""
    assert page.locator(":is(.fa, .fas, .fab, .fa-solid, .fa-brands)").evaluate_all(drawn) == []


def test_a_first_visit_is_small(browser):
    """Compressed as a server sends it; pictures and fonts are compressed already."""
    with opened(browser, "404") as page:
        loaded = set()
        page.on("request", lambda request: loaded.add(request.url.split("?")[0]))
        page.goto((PAGES / "intro.html").as_uri())
        page.wait_for_load_state("load")
        paths = [Path(unquote(urlsplit(url).path)) for url in loaded if url.startswith("file:")]
    assert len(paths) > 10 and sum(len(gzip.compress(path.read_bytes())) for path in paths) < 700_000


def test_links_lead_from_page_to_page_of_the_pdf():
    joined = print_book.join(PAGES.parent)
    text = joined.read_text()
    joined.unlink()
    places, targets = set(re.findall(' id="([^"]+)"', text)), set(re.findall('href="#([^"]+)"', text))
    assert {"05_graph_retrieval", "results"} <= targets <= places and text.count("<article") == len(CHAPTERS + OTHERS)


def test_search_works_from_a_folder(browser):
    with opened(browser, "search") as page:
        page.goto(f"{page.url}?q=eviction")
        page.wait_for_function("document.querySelectorAll('#search-results li').length > 3")
        assert page.problems == []
