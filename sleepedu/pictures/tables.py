"""Tables of words and numbers, the same in every chapter: HTML for a page, text where there is none."""

from collections.abc import Sequence
from html import escape
from typing import Any

from IPython.display import HTML, display

from sleepedu.intervals import Accuracy


class _Table(HTML):
    def __init__(self, page: str, text: str):
        super().__init__(page)
        self.text = text

    def __repr__(self) -> str:
        return self.text


def show_table(head: Sequence[str], *rows: Sequence[Any], caption: str = "") -> None:
    """Show rows beneath a head, in a notebook or as text; the first cell of a row names it.

    Numbers have three digits, an Accuracy is percent right with its interval, words stay as they are. A column stands
    to the right where a number begins every cell. Raises ValueError without a row, or for one that does not fit.
    """
    if not rows:
        raise ValueError(f"there is nothing to show: no row beneath {list(head)}")
    for row in (head, *rows):
        if isinstance(row, str) or len(row) != len(head):
            raise ValueError(f"a row must have a cell for each of {list(head)}, got {row!r}")
    words = [list(map(str, head)), *(list(map(_word, row)) for row in rows)]
    columns = list(zip(*words, strict=True))
    widths = [max(map(len, column)) for column in columns]
    sides = ["right" if all(map(_begins_with_a_number, cells)) else "left" for _, *cells in columns]
    text, page = [caption] * bool(caption), []
    for number, row in enumerate(words):
        parts = list(zip(row, widths, sides, strict=True))
        text.append("  ".join(cell.rjust(w) if side == "right" else cell.ljust(w) for cell, w, side in parts).rstrip())
        kinds = ["th" if cell and not (number and at) else "td" for at, cell in enumerate(row)]
        cells = zip(kinds, sides, map(escape, row), strict=True)
        page.append("".join(f'<{kind} style="text-align: {side}">{cell}</{kind}>' for kind, side, cell in cells))
    title = f"<caption>{escape(caption)}</caption>" * bool(caption)
    top, *body = (f"<tr>{cells}</tr>" for cells in page)
    whole = f'<table class="dataframe">{title}<thead>{top}</thead><tbody>{"".join(body)}</tbody></table>'
    display(_Table(whole, "\n".join(text)))


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, Accuracy):  # an interval is not broken in two
        return value.percent.replace(", ", ",\N{NO-BREAK SPACE}")
    return f"{value:,}" if isinstance(value, int) else str(value)


def _begins_with_a_number(cell: str) -> bool:
    return not cell or cell.lstrip("+-−")[:1].isdigit()
