"""A chapter in a real JupyterLab, in a browser: it runs, its explorer moves, and no raw markup is to be seen.

Part of `make soak`: it puts JupyterLab beside what the book needs, in an environment of its own.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest
import soak
from test_pages import browser  # noqa: F401, a fixture

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "_build" / "environments" / "jupyterlab"
CHAPTER = "05_graph_retrieval.ipynb"
# Everything in the page from the beginning: JupyterLab otherwise makes a cell when one scrolls to it.
SETTINGS = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}
RAW = re.compile(r"^(`{3}|:{3})\{|\{[a-z][\w:+-]*\}`|^\([\w-]+\)=$|:tags:", re.MULTILINE)

pytestmark = pytest.mark.skipif(not soak.SOAK, reason="it installs JupyterLab: make soak")


@pytest.fixture(scope="module")
def lab():
    """The address of a JupyterLab that has the book's packages and finds the library in this checkout."""
    python = FOLDER / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    (own,) = FOLDER.glob("lib/python*/site-packages")
    (own / "book.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    wanted = (Path(__file__).parent / "environments" / "jupyterlab.txt").read_text().split()
    subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted], check=True)
    settings = FOLDER / "share" / "jupyter" / "lab" / "settings"
    settings.mkdir(parents=True, exist_ok=True)
    (settings / "overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.copytree(ROOT / "book", FOLDER / "book", ignore=shutil.ignore_patterns("runs"))
    log = (FOLDER / "jupyterlab.log").open("w")
    options = [
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--notebook-dir={FOLDER / 'book'}",
    ]
    paths = os.environ | {"JUPYTER_PATH": str(Path(sysconfig.get_path("data"), "share", "jupyter"))}  # of widgets
    started = subprocess.Popen([python, "-m", "jupyterlab", *options], stdout=log, stderr=log, env=paths)
    address = f"http://127.0.0.1:{port}"
    for _ in range(120):
        time.sleep(0.5)
        assert started.poll() is None, Path(log.name).read_text()
        try:
            urllib.request.urlopen(f"{address}/api")
            break
        except OSError:
            continue
    yield address
    started.terminate()
    started.wait(30)


def test_a_chapter_runs_and_its_explorer_moves(lab, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(f"{lab}/lab/tree/{CHAPTER}?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    page.wait_for_timeout(3000)  # until all is rendered
    shown = page.locator(".jp-Notebook .jp-MarkdownOutput").all_inner_texts()
    assert len(shown) > 10 and not [text for text in shown if RAW.search(text)]

    page.locator(".lm-MenuBar-item", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-item", has_text=re.compile("^Run All Cells")).click()
    waiting = page.locator(".jp-CodeCell .jp-InputPrompt", has_text="*")
    waiting.first.wait_for(timeout=60_000)
    page.wait_for_function(
        "() => ![...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some((e) => e.innerText.includes('*'))",
        timeout=900_000,
    )
    errors = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]')
    assert errors.all_inner_texts() == []

    explorer = page.locator(".widget-vbox:has(.widget-image)").first
    explorer.scroll_into_view_if_needed()
    words = explorer.locator(".widget-html-content").first
    picture = explorer.locator("img").first
    before = words.inner_text(), picture.get_attribute("src")
    handle = explorer.locator(".noUi-handle").first
    handle.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function(
        "([e, was]) => e.innerText !== was", arg=[words.element_handle(), before[0]], timeout=120_000
    )
    assert picture.get_attribute("src") != before[1]
    words_box, picture_box = words.bounding_box(), picture.bounding_box()
    assert words_box["y"] < picture_box["y"] and picture_box["width"] <= 42 * 16
    soak.COUNTS["chapters run in JupyterLab"] += 1
    page.close()
