"""One function per kind of picture, one look for all: each takes numbers and returns a matplotlib Figure.

Colours are safe for colour-blind readers, and every N has the same colour everywhere. A figure is closed before it is
returned, so that a notebook shows it once, as the value of its cell.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sleepedu.intervals import Table, across_seeds

INK, FAINT, RIGHT, WRONG = "#222831", "#B8BEC6", "#0B7A53", "#C2410C"
PASS_COLOURS = {1: "#D98200", 2: "#2E9BD6", 3: "#0B8F6A", 4: "#1F4E9E", 8: "#6B3FA0"}
OTHER_COLOURS = ("#7A7F87", "#B0417A", "#8C6D1F", "#3D8A8A")
# A node's edge and what fills it.
PLAIN_NODE, ASKED_NODE = (FAINT, "white"), (PASS_COLOURS[4], "#DCE8FA")
RIGHT_NODE, WRONG_NODE = (RIGHT, "#D8F0E4"), (WRONG, "#FBE3D6")
CENTRED: Any = {"ha": "center", "va": "center"}
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

    tables: label -> one table per seed. The dashed line is the best constant answer. Raises ValueError without a table.
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


def learning_curves(histories: Mapping[str, Sequence[Any]], value: str = "loss") -> Figure:
    """Draw loss or accuracy against the step of training, a curve per run, a colour per label.

    histories: label -> what ``train`` returned, once per run. value: "loss" or "accuracy". The dashed line is the loss
    of the best constant answer. Raises ValueError for another word, or without a history.
    """
    if value not in ("loss", "accuracy"):
        raise ValueError(f"value {value!r} is unknown: use loss or accuracy")
    if not any(histories.values()):
        raise ValueError("there is nothing to draw: histories is empty")
    with new_figure(6.4, 3.6) as (figure, axes):
        for position, (label, runs) in enumerate(histories.items()):
            style: Any = {"color": colour(label, position), "lw": 1.5, "alpha": 0.9}
            for number, history in enumerate(runs):
                axes.plot(history.step, getattr(history, value), label=None if number else label, **style)
        if value == "loss":
            axes.axhline(history.majority_loss, **BEST_CONSTANT)
        axes.set(xlabel="training step", ylabel="loss (nats an answer)" if value == "loss" else "right answers")
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


def ring(following: Sequence[int], names: Sequence[str], walk: Sequence[int], answer: int | None = None) -> Figure:
    """Draw a directed cycle with one walk along its arrows.

    following[i] is the node after node i, -1 for a node that is not in the cycle. Nodes stand in the order of their
    names, as a reader of shuffled edges meets them. answer: the node a model gave, marked right or wrong.
    """
    nodes = [node for node, after in enumerate(following) if after >= 0]
    angle = {node: math.pi / 2 - 2 * math.pi * i / len(nodes) for i, node in enumerate(nodes)}
    place = {node: (math.cos(a), math.sin(a)) for node, a in angle.items()}
    walked = set(itertools.pairwise(walk))
    hops, kinds = len(walk) - 1, {walk[0]: ASKED_NODE}
    title = f"{hops} hop{'s' * (hops > 1)} after {names[walk[0]]}: {names[walk[-1]]}"
    if answer is not None:
        title += f"   the model says {names[answer]}" + (" (right)" if answer == walk[-1] else " (wrong)")
        kinds[answer] = WRONG_NODE
    kinds[walk[-1]] = RIGHT_NODE
    with new_figure(4.4, 4.4) as (figure, axes):
        for node in nodes:
            on_walk = (node, following[node]) in walked
            shade, width = (PASS_COLOURS[4], 2.4) if on_walk else (FAINT, 1.2)
            _arrow(axes, place[node], place[following[node]], shade, width, bend=0.12, zorder=2 if on_walk else 1)
            _node(axes, place[node], names[node], kinds.get(node, PLAIN_NODE), size=25)
        axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", title=title)
        axes.axis("off")
    return figure


def space_time(diagram: Sequence[Sequence[int]], asked: Sequence[int], given: Sequence[int] | None = None) -> Figure:
    """Draw an automaton's rows from top to bottom, the bits that are asked for framed, and a model's answers beneath.

    diagram: (steps + 1, cells). asked: the cells of the last row that are asked for. given: a bit for each of those.
    """
    rows, cells, last = len(diagram), len(diagram[0]), len(diagram) - 1
    ticks: list[tuple[float, str]] = [(0, "read, t = 0"), (last, f"asked, t = {last}")]
    with new_figure(min(6.4, 0.36 * cells + 1.4), 0.32 * (rows + 2 * (given is not None)) + 0.9) as (figure, axes):
        for y, row in enumerate(diagram):
            for x, bit in enumerate(row):
                _cell(axes, x, y, bit, frame=PASS_COLOURS[4] if y == last and x in asked else None)
        if given is not None:
            below = rows + 0.5
            wrong = [x for x, bit in zip(asked, given, strict=True) if bit != diagram[last][x]]
            for x, bit in zip(asked, given, strict=True):
                _cell(axes, x, below, bit, frame=WRONG if x in wrong else RIGHT)
            for x in wrong:
                axes.text(x + 0.5, below + 0.5, "×", **CENTRED, color=WRONG, fontsize=13, weight="bold")
            ticks.append((below, "the model: " + (f"{len(wrong)} wrong" if wrong else "all right")))
        axes.set(xlim=(-0.1, cells + 0.1), ylim=(ticks[-1][0] + 1.1, -0.1), aspect="equal", xticks=[])
        axes.set_yticks([y + 0.5 for y, _ in ticks], [label for _, label in ticks])
        _without_frame(axes)
    return figure


def dependencies(
    shows: Mapping[str, str],
    arrows: Mapping[str, Mapping[str, str]],
    asked: Sequence[str],
    given: Mapping[str, str] | None = None,
) -> Figure:
    """Draw what depends on what, by number of operations, the names that are asked framed, wrong answers crossed out.

    shows: what is right for every name. arrows[name][source]: what is done to the source to get there, nothing for a
    name that depends on none. given: a model's answer for every name asked.
    """

    def operations(name: str) -> int:
        return 1 + sum(map(operations, arrows[name])) if arrows[name] else 0

    column = {name: operations(name) for name in shows}
    columns = {x: [name for name in shows if column[name] == x] for x in sorted(set(column.values()))}
    place: dict[str, tuple[float, float]] = {}
    for rank, names in columns.items():  # a name stands near what it depends on, which keeps arrows from crossing
        names.sort(key=lambda name: sum(place[source][1] for source in arrows[name]) / max(1, len(arrows[name])))
        place |= {name: (rank, i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    tallest = max(len(names) for names in columns.values())
    wrong = {name: answer for name, answer in (given or {}).items() if answer != shows[name]}
    kinds = dict.fromkeys(asked, ASKED_NODE) | dict.fromkeys(given or (), RIGHT_NODE) | dict.fromkeys(wrong, WRONG_NODE)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    with new_figure(1.35 * (max(columns) + 1) + 0.4, 0.85 * tallest + 1.2) as (figure, axes):
        for name in arrows:
            x, y = place[name]
            for source, done in arrows[name].items():
                left, before = place[source]
                bend = 0.45 / (x - left) if x - left > 1 else 0.0  # a long arrow bends around the columns between
                bend = -bend if before > y else bend
                _arrow(axes, (left, before), (x, y), PASS_COLOURS[4], 1.5, -bend, zorder=1)
                middle = (x + left) / 2 + bend * (y - before) * 0.3, (y + before) / 2 - bend * (x - left) * 0.75
                axes.text(*middle, done, **CENTRED, fontsize=10, bbox=box, zorder=2)
            _node(axes, (x, y), shows[name], kinds.get(name, PLAIN_NODE), size=24)
            axes.text(x, y + 0.34, name, **CENTRED, fontsize=9, zorder=4)
            if name in wrong:
                axes.text(x + 0.22, y - 0.26, f"×{wrong[name]}", va="center", color=WRONG, weight="bold", zorder=4)
        if given is not None:
            axes.set_title("the model: " + (f"{len(wrong)} of {len(given)} wrong (×)" if wrong else "all right"))
        axes.set(xlim=(-0.5, max(columns) + 0.5), ylim=(tallest / 2 + 0.1, -tallest / 2 - 0.05))
        axes.set(xlabel="operations", xticks=range(max(columns) + 1), yticks=[])
        _without_frame(axes)
    return figure


def _without_frame(axes: Any) -> None:
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)


def _node(axes: Any, place: tuple[float, float], text: str, kind: tuple[str, str], size: float) -> None:
    edge, fill = kind
    axes.plot(*place, marker="o", ms=size, mec=edge, mfc=fill, mew=2, zorder=3)
    axes.text(*place, text, **CENTRED, fontsize=11, zorder=4)


def _arrow(axes: Any, source: tuple, target: tuple, shade: str, width: float, bend: float, zorder: int) -> None:
    arrow = {"arrowstyle": "-|>", "color": shade, "lw": width, "shrinkA": 13, "shrinkB": 13}
    arrow["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", xy=target, xytext=source, zorder=zorder, arrowprops=arrow)


def _cell(axes: Any, x: float, y: float, bit: int, frame: str | None) -> None:
    """Draw one bit; a frame stands out from its neighbours."""
    line: Any = {"edgecolor": frame, "lw": 1.8, "zorder": 3} if frame else {"edgecolor": FAINT, "lw": 0.6, "zorder": 2}
    axes.add_patch(plt.Rectangle((x, y), 1, 1, facecolor="#2B3440" if bit else "white", **line))
