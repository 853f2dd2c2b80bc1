"""Put an "Open in Colab" badge on top of every notebook page; the address comes from the book's configuration."""

from html import escape
from pathlib import Path
from urllib.parse import urlsplit

from sphinx.application import Sphinx


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


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", add_badge)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
