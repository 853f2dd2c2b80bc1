"""Chapters stay within their limits and are plain notebooks; what is not is found."""

import re

import book_form
import pytest
from first_cell import first_cell

BOOK = book_form.CHAPTERS[0].parent


def cell(kind, text, *tags):
    return {"cell_type": kind, "source": text.splitlines(keepends=True), "metadata": {"tags": list(tags)}}


@pytest.mark.parametrize("chapter", book_form.CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_is_within_its_limits(chapter):
    assert list(book_form.too_much(chapter.stem, book_form.read(chapter))) == []


@pytest.mark.parametrize("chapter", book_form.CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_begins_by_installing_the_library_of_its_branch_or_tag(chapter):
    cells = book_form.json.loads(chapter.read_text())["cells"]
    assert next("".join(c["source"]) for c in cells if c["cell_type"] == "code") == first_cell(), "make fill"


@pytest.mark.parametrize("chapter", book_form.CHAPTERS, ids=lambda path: path.stem)
def test_what_is_folded_says_what_it_does_wherever_it_is_opened(chapter):
    """In the book by its prompt, in JupyterLab by the first line that it leaves, on Colab by the form's title."""
    for c in book_form.json.loads(chapter.read_text())["cells"]:
        metadata = c["metadata"]
        if {"hide-input", "hide-cell"} & set(metadata.get("tags", [])):
            assert c["source"][0] == f"# @title {metadata['mystnb']['code_prompt_show']}\n"
            assert metadata["jupyter"] == {"source_hidden": True} and metadata["cellView"] == "form"


@pytest.mark.parametrize("chapter", book_form.CHAPTERS, ids=lambda path: path.stem)
def test_a_place_for_the_live_model_is_empty_where_nothing_fills_it(chapter):
    """In Jupyter, on Colab and on paper: a line by itself, whose words are an attribute."""
    for c in book_form.json.loads(chapter.read_text())["cells"]:
        for part in "".join(c["source"]).split("\n\n"):
            empty = re.fullmatch(r'<div class="live-(here|night)"[^<>\n]*></div>', part)
            assert empty or not re.search("live-(here|night)", part)


def test_the_page_of_references_is_that_of_the_file_and_has_all_that_is_cited():
    bibliography = pytest.importorskip("bibliography", reason="pybtex, of the book's environment, reads the file")
    page = bibliography.PAGE.read_text()
    assert page == bibliography.bibliography(), "make fill"
    pages = [path.read_text() for path in [*book_form.CHAPTERS, *BOOK.glob("*.md")]]
    cited = {key for text in pages for key in re.findall(r"\(bibliography\.md#(\w+)\)", text)}
    assert cited and cited <= set(re.findall(r'<a id="(\w+)">', page))


def test_prose_is_counted_without_code_formulas_and_citations():
    text = "# Two words\n\nDon't count $$S = 0$$ [(Hebb 1949)](bibliography.md#hebb), but [this](a.ipynb).\n\n"
    text += "```text\nx y\n```"
    form = book_form.measure({"cells": [cell("markdown", text), cell("code", "x = 1")]})
    assert (form.words, form.equations, form.raw, form.sliders) == (7, 1, 0, None)


def test_code_is_measured_where_it_is_seen():
    cells = [cell("code", "1\n" * 3), cell("code", "2\n" * 50, "hide-input"), cell("code", "x = 10\nexplore(x)")]
    form = book_form.measure({"cells": [*cells, cell("markdown", "the end\n" * 5)]})
    assert (form.cells, form.median, form.longest, form.folded) == (4, 2.5, 3, 50)
    assert (form.width, form.sliders) == (10, 53 / 60)
    assert list(book_form.too_much("a chapter", form)) == [
        "a chapter: folded 50, 35 at most",
        "a chapter: sliders 0.8833, 0.5 at most",
    ]


@pytest.mark.parametrize(
    "text",
    ["```{exercise} One\n```", ":::{note}\n:::", "after {cite}`hebb`", "{py:func}`x`", "(here)=\n# A", "[a](#a)"],
)
def test_markup_that_not_every_place_understands_is_found(text):
    notebook = {"cells": [cell("markdown", f"Before.\n\n{text}\n"), cell("code", "1")]}
    assert book_form.measure(notebook).raw == 1
    assert list(book_form.too_much("a chapter", book_form.measure(notebook))) == [
        "a chapter: raw 1, 0 at most",
        "a chapter: no sliders",
    ]
