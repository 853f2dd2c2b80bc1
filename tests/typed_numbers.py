"""Numbers that a chapter's prose states and nothing on its page gives: `make numbers`, after `make book`.

A share or a decimal fraction in prose should stand in what a cell printed, or in code, or follow from a citation beside
it. What is listed was typed by somebody, and may come to disagree with the page. Settings that are explained and the
paper's own numbers are meant to be typed: read the list.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXECUTED = ROOT / "_build" / "jupyter_execute" / "book"
NUMBER = re.compile(r"(?<![\w.,^{])(\d+(?:\.\d+)?)(?:\s?%|(?<=\.\d)|(?<=\.\d\d)|(?<=\.\d\d\d))(?![\w^])")
QUIET = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|^\|.*$", re.DOTALL | re.MULTILINE)


def backing(cells: list[dict]) -> set[float]:
    """Return every number in code and in text outputs, also as percent and rounded as prose would."""
    texts = []
    for cell in cells:
        if cell["cell_type"] == "code":
            texts.append("".join(cell["source"]))
            for output in cell["outputs"]:
                data = output.get("data", {})
                kinds = ("text/plain", "text/html", "text/markdown")
                told = ["".join(text) for text in (output.get("text", ""), *(data.get(kind, "") for kind in kinds))]
                texts += [text for text in told if len(text) < 100_000]  # not the pictures of an explorer
    found = {float(number) for text in texts for number in re.findall(r"\d+\.?\d*", text)}
    percent = {100 * number for number in found if number <= 1}
    return {round(number, digits) for number in found | percent for digits in (0, 1, 2)}


def unbacked(notebook: dict) -> list[str]:
    """Return the sentences with a number that nothing gives, the number first."""
    known, listed = backing(notebook["cells"]), []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            prose = QUIET.sub(" ", "".join(cell["source"]))
            for sentence in re.split(r"(?<=[.:;])\s+", prose):
                if "bibliography.md#" not in sentence:
                    numbers = [m[1] for m in NUMBER.finditer(sentence) if float(m[1]) not in known]
                    listed += [f"{number}: {' '.join(sentence.split())}" for number in numbers]
    return listed


def main() -> None:
    if not EXECUTED.exists():
        sys.exit("the book is not built: run `make book` first")
    for path in sorted(EXECUTED.glob("[0-9]*.ipynb")):
        listed = unbacked(json.loads(path.read_text()))
        print(f"{path.stem}: {len(listed)}")
        print(*(f"    {line}" for line in listed), sep="\n", end="\n" * bool(listed))


if __name__ == "__main__":
    main()
