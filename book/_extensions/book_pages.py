"""Finish every page: an "Open in Colab" badge on each notebook, menus that open, lists with entries, no script twice.

The repository's address comes from the book's configuration.
"""

from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from sphinx.application import Sphinx
from sphinx.config import Config


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


def mark_list_entries(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Give bibliography entries the role of what they are, entries of a list.

    docutils writes doc-biblioentry, which ARIA has withdrawn: a screen reader would announce a list of nothing.
    """
    if "body" in context:
        context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')


def drop_repeated_scripts(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Keep each script once: the theme's thebe support writes its constants twice, which is an error in a browser."""
    seen, scripts = set(), []
    for script in context.get("script_files", []):
        key = (str(script.filename or ""), str(script.attributes))
        if key not in seen:
            seen.add(key)
            scripts.append(script)
    context["script_files"] = scripts


def setup(app: Sphinx) -> dict:
    app.connect("config-inited", leave_header_empty)
    app.connect("html-page-context", add_badge)
    app.connect("html-page-context", mark_list_entries)
    app.connect("html-page-context", drop_repeated_scripts, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
