"""The form of the chapters: `make form` prints it, chapter by chapter, and then what is above its limit.

The goal is the same for every chapter. A ceiling is where a chapter stands that is not there yet; it only comes down.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

CHAPTERS = sorted((Path(__file__).resolve().parent.parent / "book").glob("[0-9]*.ipynb"))
GOAL = {
    **{"words": 2500, "cells": 40, "longest": 35, "folded": 35, "width": 84},
    **{"raw": 0, "sliders": 0.5, "median": 10},
}
CEILINGS: dict[str, dict[str, float]] = {"06": {"median": 15}, "12": {"median": 16}}
# Directives, roles and targets, which only Jupyter Book understands, and links within a page, which it does not find.
RAW = re.compile(r"^ *(?:`{3,}|:{3,}|~{3,})\{|\{[a-zA-Z][\w:+-]*\}`|^\([\w-]+\)=$|\]\(#", re.MULTILINE)


@dataclass(frozen=True)
class Form:
    """What is counted in a chapter: `median` and `longest` are lines of code that is shown, `folded` of the rest."""

    words: int
    cells: int
    median: float
    longest: int
    folded: int
    width: int
    equations: int
    sliders: float | None  # the share of the chapter's lines that stand above them; None without any
    raw: int


def measure(notebook: dict) -> Form:
    """Return the form of a notebook."""
    cells = [(cell["cell_type"], "".join(cell["source"]), cell["metadata"]) for cell in notebook["cells"]]
    prose = "\n\n".join(text for kind, text, _ in cells if kind == "markdown")
    unsaid = r"^```.*?^```$|\[[^]]*\]\(bibliography[^)]*\)|\]\([^)]*\)|<[^>]*>"
    spoken = re.sub(unsaid, " ", prose, flags=re.MULTILINE | re.DOTALL)
    code = [(text.splitlines(), metadata.get("tags", [])) for kind, text, metadata in cells if kind == "code"]
    shown = [len(lines) for lines, tags in code if not {"hide-input", "hide-cell"} & set(tags)]
    folded = [len(lines) for lines, tags in code if {"hide-input", "hide-cell"} & set(tags)]
    lines = [len(text.splitlines()) for _, text, _ in cells]
    sliders = [i for i, (kind, text, _) in enumerate(cells) if kind == "code" and re.search(r"^explore\(", text, re.M)]
    return Form(
        words=len(re.findall(r"[^\W\d_][\w'’-]*", spoken)),
        cells=len(cells),
        median=median(shown),
        longest=max(shown),
        folded=max(folded, default=0),
        width=max(len(line) for lines, _ in code for line in lines),
        equations=len(re.findall(r"\$\$.+?\$\$", prose, flags=re.DOTALL)),
        sliders=sum(lines[: sliders[0]]) / sum(lines) if sliders else None,
        raw=len(RAW.findall(prose)),
    )


def read(chapter: Path) -> Form:
    """Return the form of a chapter."""
    return measure(json.loads(chapter.read_text()))


def too_much(name: str, form: Form) -> Iterator[str]:
    """Say what of a chapter is above its limit."""
    for what, most in (GOAL | CEILINGS.get(name[:2], {})).items():
        found = getattr(form, what)
        if found is None:
            yield f"{name}: no {what}"
        elif found > most:
            yield f"{name}: {what} {found:,.4g}, {most:,} at most"


def main() -> int:
    print("chapter                    words  cells  median  longest  folded  width  equations  sliders at  raw")
    wrong = []
    for chapter in CHAPTERS:
        form = read(chapter)
        place = "none" if form.sliders is None else f"{form.sliders:.0%}"
        print(
            f"{chapter.stem:26s} {form.words:5,} {form.cells:6} {form.median:7g} {form.longest:8} {form.folded:7} "
            f"{form.width:6} {form.equations:10} {place:>11s} {form.raw:4}"
        )
        wrong += too_much(chapter.stem, form)
    print(f"goal: at most {', '.join(f'{what} {most:,}' for what, most in GOAL.items())}")
    print(*(wrong or ["No chapter is above its limits."]), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
