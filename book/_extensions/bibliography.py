"""The page of references, made from references.bib by `make fill`: a list with an anchor for every entry by its key.

A citation is a link that any viewer of notebooks can follow, such as bibliography.md#lee2026sleep.
"""

import re
from pathlib import Path

from pybtex.database import parse_file
from pybtex.plugin import find_plugin
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

BOOK = Path(__file__).resolve().parent.parent
PAGE = BOOK / "bibliography.md"


def bibliography() -> str:
    """Return the page's markdown."""
    style, markdown = find_plugin("pybtex.style.formatting", "plain")(), find_plugin("pybtex.backends", "markdown")()
    entries = []
    for entry in style.format_bibliography(parse_file(BOOK / "references.bib")):
        text = re.sub(r"\\([-.()])", r"\1", " ".join(entry.text.render(markdown).split()))
        text = re.sub(r"\*arXiv preprint arXiv:([\d.]+)\*", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
        entries.append(f'* <a id="{entry.key}"></a>{text}')
    return "\n".join(["# Bibliography", "", *entries, ""])


def name_entries(app: Sphinx, env: BuildEnvironment) -> None:
    """Tell MyST, which looks for a link's target among headings, of the anchors too."""
    keys = re.findall(r'<a id="(\w+)">', PAGE.read_text())
    env.metadata["book/bibliography"].setdefault("myst_slugs", {}).update({key: (0, key, key) for key in keys})


def setup(app: Sphinx) -> dict:
    app.connect("env-updated", name_entries)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    PAGE.write_text(bibliography())
