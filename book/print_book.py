"""The built book as one PDF, _build/language-models-that-sleep.pdf, printed by Chromium. ``make pdf``.

The pages are joined into one, print.html, so that links between them lead from page to page of the PDF.
"""

import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from bs4 import BeautifulSoup, Tag
from playwright.sync_api import sync_playwright

BUILT = Path(__file__).resolve().parent.parent / "_build"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
LEFT_OUT = (
    ".headerlink, .colab-badge, .onlyprint, script, link, noscript, .explorer input, .copybtn"  # of no use on paper
)
STYLE = """
@page { size: A4; margin: 18mm 17mm 20mm; }
html { font-size: 9.5pt; }
body { background: white; }
article.bd-article { padding: 0 !important; }
article + article { break-before: page; }
h1, h2, h3 { break-after: avoid; }
pre, div:is(.cell, .cell_input, .cell_output, .highlight, .admonition) { break-inside: auto !important; }
figure, table, .explorer { break-inside: avoid; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; font-size: 7.5pt; }
div:is(.cell_output, .cell_input, .pst-scrollable-table-container) { overflow: visible !important; }
table { font-size: 8.5pt; }
/* The widest table has 17 columns, and what overflows would shrink the whole book. */
#results table { font-size: 5.5pt; line-height: 1.2; }
#results :is(td, th) { padding: 1px 2px; }
#results small { white-space: normal !important; }
mjx-assistive-mml { display: none !important; }
img, svg { max-width: 100% !important; }
details > summary { display: none; }
"""


def place(name: str, fragment: str = "") -> str:
    """Return the id that a place in a page has in the joined one."""
    return f"{name}--{fragment}" if fragment else name


def prepare(path: Path, names: set[str]) -> Tag:
    """Return a page's article: its ids and links those of the joined page, its folded parts unfolded."""
    article = BeautifulSoup(path.read_text(), "html.parser").select_one("article.bd-article")
    for useless in article.select(LEFT_OUT):
        useless.decompose()
    for element in article.select("[id]"):
        element["id"] = place(path.stem, element["id"])
    for folded in article.select("details"):
        folded["open"] = ""
    for link in article.select("a[href]"):
        target = urlsplit(link["href"])
        name = Path(target.path).stem if target.path else path.stem
        if not target.scheme and name in names:
            link["href"] = f"#{place(name, target.fragment)}"
    article["id"] = path.stem
    return article


def join(html: Path) -> Path:
    """Write all pages, in the book's order, as one: print.html, beside them."""
    first = BeautifulSoup((html / "book" / "intro.html").read_text(), "html.parser")
    paths = [html / "book" / "intro.html"]
    paths += [html / "book" / link["href"] for link in first.select("nav.bd-links a.internal") if link["href"] != "#"]
    with_formulas = BeautifulSoup(paths[2].read_text(), "html.parser")
    scripts = [script for script in with_formulas.select("script") if "mathjax" in str(script).lower()]
    names = {path.stem for path in paths}
    head = [*first.select("title, head link[rel=stylesheet]"), *scripts]
    articles = [prepare(path, names) for path in paths]
    joined = html / "book" / "print.html"
    joined.write_text(
        '<!DOCTYPE html><html lang="en" data-theme="light"><head><meta charset="utf-8">'
        f"{''.join(map(str, head))}<style>{STYLE}</style></head><body>{''.join(map(str, articles))}</body></html>"
    )
    return joined


def print_pdf(page: Path, pdf: Path) -> None:
    """Print a page, once its formulas are typeset. Raises FileNotFoundError where there is no browser."""
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise FileNotFoundError("no Chromium or Chrome on this machine: install one or set CHROMIUM to its path")
    number = '<div style="width: 100%; font-size: 8pt; text-align: center"><span class="pageNumber"></span></div>'
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page()
        tab.set_default_timeout(300_000)
        tab.goto(page.as_uri())
        tab.evaluate("window.MathJax?.startup.promise.then(() => null)")
        tab.pdf(
            path=pdf,
            print_background=True,
            prefer_css_page_size=True,
            outline=True,
            tagged=True,
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=number,
        )
        chromium.close()


def main() -> None:
    if not (BUILT / "html" / "book" / "intro.html").exists():
        sys.exit("the book is not built: run `make book` first")
    pdf = BUILT / "language-models-that-sleep.pdf"
    joined = join(BUILT / "html")
    try:
        print_pdf(joined, pdf)
    except FileNotFoundError as error:
        sys.exit(str(error))
    finally:
        joined.unlink()
    print(f"{pdf}: {pdf.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
