"""The page that says where every number comes from names every figure of the book, and only runs that there are."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

from sleepedu.lab import run_store

BOOK = Path(__file__).resolve().parent.parent / "book"
PAGE = (BOOK / "provenance.md").read_text()


def figures_of_the_book() -> list[str]:
    names = re.findall(r"^:name: (fig-\S+)", (BOOK / "intro.md").read_text(), re.MULTILINE)
    for chapter in sorted(BOOK.glob("[0-9]*.ipynb")):
        notebook = json.loads(chapter.read_text())
        names += [c["metadata"].get("mystnb", {}).get("figure", {}).get("name") for c in notebook["cells"]]
    return sorted(name for name in names if name)


def test_every_figure_is_named_once():
    assert sorted(re.findall(r"\{numref\}`(fig-[^`]+)`", PAGE)) == figures_of_the_book()


def test_every_source_is_there():
    stored = [run.name for run in run_store.stored_runs()]
    named = set(re.findall(r"`((?:graph|rule110|math)-[^`]+)`", PAGE))
    assert len(named) > 12
    for pattern in named:
        assert any(fnmatch(run, pattern) for run in stored), f"no stored run is called {pattern}"
    for path in re.findall(r"`(book/runs/[a-z]+(?:/[a-z]+\.json)?)`", PAGE):
        assert (BOOK.parent / path).exists()
