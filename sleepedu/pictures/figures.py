"""One function per kind of picture, one look for all: each takes numbers and returns a matplotlib Figure.

Colours are safe for colour-blind readers, and every N has the same colour everywhere. A figure is closed before it is
returned, so that a notebook shows it once, as the value of its cell.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sleepedu.intervals import Table, across_seeds

INK, FAINT, RIGHT, WRONG = "#222831", "#B8BEC6", "#0B7A53", "#C2410C"
PASS_COLOURS = {1: "#D98200", 2: "#2E9BD6", 3: "#0B8F6A", 4: "#1F4E9E", 8: "#6B3FA0"}
OTHER_COLOURS = ("#7A7F87", "#B0417A", "#8C6D1F", "#3D8A8A")
BEST_CONSTANT: Any = {"color": INK, "ls": (0, (4, 3)), "lw": 1.2, "label": "best constant answer"}
BESIDE: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "fontsize": 10}  # where a legend stands
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow", "figure.constrained_layout.use"), True),
    "grid.color": "#E7EAEE",
    "figure.dpi": 110,
    "font.size": 11,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "lines.linewidth": 2,
}


@contextmanager
def new_figure(
    width: float = 6.4, height: float = 3.8, rows: int = 1, columns: int = 1, **options: Any
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes in the book's style, also for a chapter that draws something of its own.

    The axes are one Axes or an array of them, as ``plt.subplots`` makes them, which takes the options.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), **options)
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def colour(label: str, position: int = 0) -> str:
    """Return the colour of a curve: that of its N for labels such as "N=4", otherwise one by position."""
    of_passes = {f"N={n}": shade for n, shade in PASS_COLOURS.items()}
    return of_passes.get(label, OTHER_COLOURS[position % len(OTHER_COLOURS)])


def accuracy_by_depth(tables: Mapping[str, Sequence[Table]], depth_name: str, what: str = "right answers") -> Figure:
    """Draw accuracy against depth, a curve per label: mean, 95% interval as a band, every seed as a dot.

    tables: label -> one table per seed. The dashed line is the best constant answer. The axes end at 0 and 1, where a
    band over seeds need not. Raises ValueError without a table.
    """
    if not tables:
        raise ValueError("there is nothing to draw: tables is empty")
    with new_figure(6.4, 3.9) as (figure, axes):
        for position, (label, seeds) in enumerate(tables.items()):
            mean = across_seeds(list(seeds))
            depths, found, shade = list(mean), mean.values(), colour(label, position)
            axes.fill_between(depths, [a.low for a in found], [a.high for a in found], color=shade, alpha=0.15, lw=0)
            axes.plot(depths, [a.accuracy for a in found], color=shade, marker="o", ms=4, label=label)
            for table in seeds if len(seeds) > 1 else ():
                axes.plot(depths, [table[d].accuracy for d in depths], ls="", marker=".", ms=4, color=shade, alpha=0.6)
        axes.plot(depths, [a.majority for a in found], **BEST_CONSTANT)
        axes.set(xlabel=depth_name, ylabel=what, ylim=(-0.02, 1.04), xticks=depths)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.legend(**BESIDE)
    return figure


def learning_curves(histories: Mapping[str, Sequence[Any]]) -> Figure:
    """Draw the loss against the step of training, a curve per run, a colour per label.

    histories: label -> what ``train`` returned, once per run. The dashed line is the loss of the best constant answer.
    Raises ValueError without a history.
    """
    if not any(histories.values()):
        raise ValueError("there is nothing to draw: histories is empty")
    with new_figure(6.4, 3.6) as (figure, axes):
        for position, (label, runs) in enumerate(histories.items()):
            style: Any = {"color": colour(label, position), "lw": 1.5, "alpha": 0.9}
            for number, history in enumerate(runs):
                axes.plot(history.step, history.loss, label=None if number else label, **style)
        axes.axhline(history.majority_loss, **BEST_CONSTANT)
        axes.set(xlabel="training step", ylabel="loss (nats an answer)")
        axes.set_ylim(bottom=0)
        axes.legend(**BESIDE)
    return figure


def lines(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_name: str, y_name: str) -> Figure:
    """Draw labelled curves, each a pair of x and y values, with plain axes."""
    palette = list(PASS_COLOURS.values())
    with new_figure(6.4, 3.6) as (figure, axes):
        for position, (label, (x, y)) in enumerate(curves.items()):
            shade = colour(label, position) if label.startswith("N=") else palette[position % len(palette)]
            axes.plot(x, y, color=shade, marker="o" if len(x) <= 16 else None, ms=4, label=label)
        axes.set(xlabel=x_name, ylabel=y_name)
        if len(curves) > 1:
            axes.legend(**BESIDE)
    return figure
