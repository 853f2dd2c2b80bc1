"""Finish every page: an "Open in Colab" badge on each notebook, menus that open, no script twice,
what search engines and links to the page show of it, how to cite it, the live model; and a map of the site.

The repository's address comes from the book's configuration, and the site's from the repository's.
"""

import re
import shutil
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

import sleepedu

FOOTER = """\
<p>Text and code are under the <a href="{repository}/blob/{branch}/LICENSE">MIT licence</a>. To cite this book:
The sleepedu authors, <cite>{title}</cite>, version {version}, {year},
<a href="{site}">{site}</a>; for the method, please cite the paper
(<a href="{repository}/blob/{branch}/CITATION.cff">both, as data</a>).</p>
"""
FONT_AWESOME = ("scripts/fontawesome.*", "vendor/fontawesome")  # in _static; the book's icons are in icons.css


def name_the_site(app: Sphinx, config: Config) -> None:
    """Set the site's address, where GitHub publishes the repository's pages, unless configured; write the footer."""
    repository = config.html_theme_options["repository_url"]
    owner, name = urlsplit(repository).path.strip("/").split("/")
    config.html_baseurl = config.html_baseurl or f"https://{owner}.github.io/{name}/"
    config.html_theme_options["extra_footer"] = FOOTER.format(
        repository=repository,
        branch=config.html_theme_options.get("repository_branch", "main"),
        title=config.html_title,
        version=sleepedu.__version__,
        year=config.copyright,
        site=config.html_baseurl,
    )


def leave_header_empty(app: Sphinx, config: Config) -> None:
    """Keep the theme's search field out of the header, which the book hides.

    With it comes a second pair of menu buttons, and the theme's scripts serve the first it finds: those that are seen,
    on a phone the only way to the chapters, would do nothing.
    """
    config.html_theme_options["navbar_persistent"] = []


def add_badge(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Prepend the badge to the body of a page that was made from a notebook."""
    if Path(app.env.doc2path(pagename)).suffix != ".ipynb" or "body" not in context:
        return
    options = app.config.html_theme_options
    repository = urlsplit(options["repository_url"]).path.strip("/")
    branch = options.get("repository_branch", "main")
    target = f"https://colab.research.google.com/github/{repository}/blob/{branch}/{pagename}.ipynb"
    picture = context["pathto"]("_static/colab-badge.svg", resource=True)
    context["body"] = (
        f'<p class="colab-badge"><a href="{escape(target)}"><img src="{escape(picture)}" alt="Open in Colab" '
        f'width="117" height="20"></a></p>{context["body"]}'
    )


PANELS = {"live-here": ("weights", "model", "page"), "live-night": ("weights", "light_sleeper", "model", "night")}


def add_live_model(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Prepend the live model's style and scripts to a page with an element of a panel's class, which they fill."""
    for panel, names in PANELS.items():
        if re.search(f'class="[^"]*{panel}', context.get("body", "")):
            live = context["pathto"]("live", resource=True)
            scripts = [f'<script defer src="{live}/{name}.js"></script>' for name in names]
            context["body"] = "".join([f'<link rel="stylesheet" href="{live}/live.css">', *scripts, context["body"]])


def describe_page(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    """Add a description, the page's first sentences, and what is shown beside a link to it."""
    if doctree is None:  # search and the like
        return
    paragraph = next(doctree.findall(nodes.paragraph), None)
    text = " ".join(paragraph.astext().split()) if paragraph else app.config.html_title
    description = text if len(text) <= 300 else text[: text.rindex(" ", 0, 298)] + " …"
    title = next(doctree.findall(nodes.title)).astext()
    tags = {
        "og:title": title if title == app.config.html_title else f"{title} | {app.config.html_title}",
        "og:type": "article",
        "og:url": context.get("pageurl", ""),
        "og:description": description,
        "og:image": f"{app.config.html_baseurl}live/still.png",
        "og:image:alt": "A model of one sleep pass guesses at a question of three hops; a model of four answers it.",
        "twitter:card": "summary_large_image",
    }
    context["metatags"] += f'<meta name="description" content="{escape(description)}">\n' + "".join(
        f'<meta property="{name}" content="{escape(value)}">\n' for name, value in tags.items()
    )


def drop_needless_scripts(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Keep each script once: the theme's thebe support writes its constants twice, which is an error in a browser.

    And leave out the state of Jupyter's widgets, for the explorers are HTML of their own, and MathJax where there is
    no formula.
    """
    needless = ["widget-state"] + ["mathjax"] * ('class="math' not in context.get("body", ""))
    seen, scripts = set(), []
    for script in context.get("script_files", []):
        key = (str(script.filename or ""), str(script.attributes))
        if key not in seen and not any(word in str(key).lower() for word in needless):
            seen.add(key)
            scripts.append(script)
    context["script_files"] = scripts


def search_a_folder(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Find pages without excerpts where the book was opened from a folder: a browser may not read other files there."""
    if pagename == "search":
        body = 'if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;'
        app.add_js_file(None, body=body)


def finish_site(app: Sphinx, exception: Exception | None) -> None:
    """Write the map of the site for search engines, and leave out the fonts that no page uses."""
    if exception or app.builder.name != "html":
        return
    addresses = sorted(app.config.html_baseurl + app.builder.get_target_uri(page) for page in app.env.found_docs)
    lines = "".join(f"<url><loc>{escape(address)}</loc></url>\n" for address in addresses)
    Path(app.outdir, "sitemap.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{lines}</urlset>\n'
    )
    for pattern in FONT_AWESOME:
        for path in Path(app.outdir, "_static").glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", leave_header_empty)
    app.connect("config-inited", name_the_site)
    app.connect("html-page-context", describe_page)
    app.connect("html-page-context", search_a_folder)
    app.connect("html-page-context", add_badge)
    app.connect("html-page-context", add_live_model)
    app.connect("html-page-context", drop_needless_scripts, priority=900)
    app.connect("build-finished", finish_site)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
