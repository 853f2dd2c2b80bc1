"""One function per kind of picture, one look for all: each takes numbers and returns a matplotlib Figure.

Colours are safe for colour-blind readers, and every N has the same colour everywhere. A figure is closed before it is
returned, so that a notebook shows it once, as the value of its cell.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from sleepedu.evaluation import Table, across_seeds

if TYPE_CHECKING:
    from sleepedu.checkpoint import History
    from sleepedu.sleep_loop import SleepTrace

INK, FAINT, RIGHT, WRONG = "#222831", "#B8BEC6", "#0B7A53", "#C2410C"
PASS_COLOURS = {1: "#D98200", 2: "#2E9BD6", 3: "#0B8F6A", 4: "#1F4E9E", 8: "#6B3FA0"}
OTHER_COLOURS = ("#7A7F87", "#B0417A", "#8C6D1F", "#3D8A8A")
STYLE: Any = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "savefig.dpi": 110,
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E7EAEE",
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.constrained_layout.use": True,
}


def _figure(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in the book's style, and close the figure before handing it out."""

    @wraps(draw)
    def styled(*arguments, **named) -> Figure:
        with plt.rc_context(STYLE):
            before = set(plt.get_fignums())
            try:
                return draw(*arguments, **named)
            finally:
                for number in set(plt.get_fignums()) - before:
                    plt.close(number)

    return styled


@contextmanager
def new_figure(
    width: float = 6.4, height: float = 3.8, rows: int = 1, columns: int = 1
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its axes in the book's style, for a chapter that draws something of its own."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=(width, height))  # one Axes, or an array of them
        try:
            yield figure, axes
        finally:
            plt.close(figure)


def colour(label: str, position: int = 0) -> str:
    """Return the colour of a curve: that of its N for labels such as "N=4", otherwise one by position."""
    of_passes = {f"N={n}": shade for n, shade in PASS_COLOURS.items()}
    return of_passes.get(label, OTHER_COLOURS[position % len(OTHER_COLOURS)])


def _check_some(name: str, given: object) -> None:
    if not given:
        raise ValueError(f"there is nothing to draw: {name} is empty")


@_figure
def accuracy_by_depth(tables: Mapping[str, Sequence[Table]], depth_name: str, what: str = "right answers") -> Figure:
    """Draw accuracy against depth, a curve per label: mean, 95% interval as a band, every seed as a dot.

    tables: label -> one table per seed. The dashed line is the best constant answer. Raises ValueError without a table.
    """
    _check_some("tables", tables)
    figure, axes = plt.subplots(figsize=(6.4, 3.9))
    for position, (label, seeds) in enumerate(tables.items()):
        mean = across_seeds(list(seeds))
        depths, shade = list(mean), colour(label, position)
        axes.fill_between(
            depths, [a.low for a in mean.values()], [a.high for a in mean.values()], color=shade, alpha=0.15, lw=0
        )
        axes.plot(depths, [a.accuracy for a in mean.values()], color=shade, marker="o", ms=4, label=label)
        for table in seeds if len(seeds) > 1 else ():
            axes.plot(depths, [table[d].accuracy for d in depths], ls="", marker=".", ms=4, color=shade, alpha=0.6)
    axes.plot(
        depths, [a.majority for a in mean.values()], color=INK, ls=(0, (4, 3)), lw=1.2, label="best constant answer"
    )
    axes.set(xlabel=depth_name, ylabel=what, ylim=(-0.02, 1.04), xticks=depths)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return figure


@_figure
def learning_curves(histories: Mapping[str, Sequence["History"]], against: str = "step", value: str = "loss") -> Figure:
    """Draw loss or accuracy while training, a curve per run, a colour per label.

    against: "step", "tokens" or "seconds". value: "loss" or "accuracy". The dashed line is the loss of the best
    constant answer. Raises ValueError for another word, or without a history.
    """
    names = {"step": "training step", "tokens": "tokens read (millions)", "seconds": "seconds of training"}
    if against not in names:
        raise ValueError(f"against {against!r} is unknown: use one of {', '.join(names)}")
    if value not in ("loss", "accuracy"):
        raise ValueError(f"value {value!r} is unknown: use loss or accuracy")
    _check_some("histories", any(histories.values()))
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for position, (label, runs) in enumerate(histories.items()):
        for number, history in enumerate(runs):
            x: Any = {
                "step": history.step,
                "tokens": [step * history.tokens_per_step / 1e6 for step in history.step],
                "seconds": history.seconds,
            }[against]
            axes.plot(
                x,
                getattr(history, value),
                color=colour(label, position),
                lw=1.5,
                alpha=0.9,
                label=None if number else label,
            )
    if value == "loss":
        axes.axhline(history.majority_loss, color=INK, ls=(0, (4, 3)), lw=1.2, label="best constant answer")
    axes.set(xlabel=names[against], ylabel="loss (nats an answer)" if value == "loss" else "right answers")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return figure


@_figure
def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_name: str, y_name: str, log_x: bool = False
) -> Figure:
    """Draw labelled curves, each a pair of x and y values, with plain axes."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    palette = list(PASS_COLOURS.values())
    for position, (label, (x, y)) in enumerate(curves.items()):
        shade = colour(label, position) if label.startswith("N=") else palette[position % len(palette)]
        axes.plot(x, y, color=shade, marker="o" if len(x) <= 16 else None, ms=4, label=label)
    axes.set(xlabel=x_name, ylabel=y_name)
    if log_x:
        axes.set_xscale("log", base=2)
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=10)
    return figure


@_figure
def ring(following: Sequence[int], names: Sequence[str], walk: Sequence[int], answer: int | None = None) -> Figure:
    """Draw a directed cycle with one walk along its arrows.

    following[i] is the node after node i, -1 for a node that is not in the cycle. Nodes stand in the order of their
    names, as a reader of shuffled edges meets them. answer: the node a model gave, marked right or wrong.
    """
    nodes = [node for node, after in enumerate(following) if after >= 0]
    angle = {node: math.pi / 2 - 2 * math.pi * i / len(nodes) for i, node in enumerate(nodes)}
    place = {node: (math.cos(a), math.sin(a)) for node, a in angle.items()}
    figure, axes = plt.subplots(figsize=(4.4, 4.4))
    walked = list(itertools.pairwise(walk))
    for node in nodes:
        on_walk = (node, following[node]) in walked
        axes.annotate(
            "",
            xy=place[following[node]],
            xytext=place[node],
            zorder=2 if on_walk else 1,
            arrowprops={
                "arrowstyle": "-|>",
                "color": PASS_COLOURS[4] if on_walk else FAINT,
                "lw": 2.4 if on_walk else 1.2,
                "shrinkA": 13,
                "shrinkB": 13,
                "connectionstyle": "arc3,rad=0.12",
            },
        )
    for node in nodes:
        edge, fill = FAINT, "white"
        if node == walk[0]:
            edge, fill = PASS_COLOURS[4], "#DCE8FA"
        if node == walk[-1]:
            edge, fill = RIGHT, "#D8F0E4"
        if answer is not None and node == answer != walk[-1]:
            edge, fill = WRONG, "#FBE3D6"
        axes.plot(*place[node], marker="o", ms=25, mec=edge, mfc=fill, mew=2, zorder=3)
        axes.text(*place[node], names[node], ha="center", va="center", fontsize=11, zorder=4)
    hops = len(walk) - 1
    title = f"{hops} hop{'s' * (hops > 1)} after {names[walk[0]]}: {names[walk[-1]]}"
    if answer is not None:
        title += f"   the model says {names[answer]}" + (" (right)" if answer == walk[-1] else " (wrong)")
    axes.set_title(title)
    axes.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal")
    axes.axis("off")
    return figure


@_figure
def space_time(diagram: Sequence[Sequence[int]], asked: Sequence[int], given: Sequence[int] | None = None) -> Figure:
    """Draw an automaton's rows from top to bottom, the bits that are asked for framed, and a model's answers beneath.

    diagram: (steps + 1, cells). asked: the cells of the last row that are asked for. given: a bit for each of those.
    """
    rows, cells = len(diagram), len(diagram[0])
    figure, axes = plt.subplots(figsize=(min(6.4, 0.36 * cells + 1.4), 0.32 * (rows + 2 * (given is not None)) + 0.9))
    last = rows - 1
    for y, row in enumerate(diagram):
        for x, bit in enumerate(row):
            framed = y == last and x in asked
            axes.add_patch(_cell(x, y, bit, edge=PASS_COLOURS[4] if framed else FAINT, wide=framed))
    ticks: list[tuple[float, str]] = [(0, "read, t = 0"), (last, f"asked, t = {last}")]
    if given is not None:
        below = rows + 0.5
        for x, bit in zip(asked, given, strict=True):
            right = bit == diagram[last][x]
            axes.add_patch(_cell(x, below, bit, edge=RIGHT if right else WRONG, wide=True))
            if not right:
                axes.text(x + 0.5, below + 0.5, "×", color=WRONG, ha="center", va="center", fontsize=13, weight="bold")
        wrong = sum(bit != diagram[last][x] for x, bit in zip(asked, given, strict=True))
        ticks.append((below, "the model: " + ("all right" if not wrong else f"{wrong} wrong")))
    axes.set(xlim=(-0.1, cells + 0.1), ylim=(ticks[-1][0] + 1.1, -0.1), aspect="equal", xticks=[])
    axes.set_yticks([y + 0.5 for y, _ in ticks], [label for _, label in ticks])
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _cell(x: float, y: float, bit: int, edge: str, wide: bool):
    return plt.Rectangle(
        (x, y),
        1,
        1,
        facecolor="#2B3440" if bit else "white",
        edgecolor=edge,
        lw=1.8 if wide else 0.6,
        zorder=3 if wide else 2,
    )


@_figure
def dependencies(
    shows: Mapping[str, str],
    column: Mapping[str, int],
    arrows: Mapping[str, Mapping[str, str]],
    asked: Sequence[str],
    given: Mapping[str, str] | None = None,
) -> Figure:
    """Draw what depends on what, every name in its column, the names that are asked framed, wrong answers crossed out.

    shows: what is right for every name. column: operations that it takes. arrows[name][source]: what is done to the
    source to get there, nothing for a name that depends on none. given: a model's answer for every name asked.
    """
    columns = {x: [name for name in shows if column[name] == x] for x in sorted(set(column.values()))}
    place: dict[str, tuple[float, float]] = {}
    for rank, names in columns.items():  # a name stands near what it depends on, which keeps arrows from crossing
        names.sort(key=lambda name: sum(place[source][1] for source in arrows[name]) / max(1, len(arrows[name])))
        place |= {name: (rank, i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    tallest = max(len(names) for names in columns.values())
    figure, axes = plt.subplots(figsize=(1.35 * (max(columns) + 1) + 0.4, 0.85 * tallest + 1.2))
    for name, sources in arrows.items():
        (x, y), wrong = place[name], given is not None and given.get(name, shows[name]) != shows[name]
        for source, label in sources.items():
            left, before = place[source]
            bend = 0.45 / (x - left) if x - left > 1 else 0.0  # a long arrow bends around the columns between
            bend = -bend if before > y else bend
            along = {"arrowstyle": "-|>", "color": PASS_COLOURS[4], "lw": 1.5, "shrinkA": 13, "shrinkB": 13}
            along["connectionstyle"] = f"arc3,rad={-bend}"
            axes.annotate("", xy=(x, y), xytext=place[source], zorder=1, arrowprops=along)
            middle = (x + left) / 2 + bend * (y - before) * 0.3, (y + before) / 2 - bend * (x - left) * 0.75
            background = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
            axes.text(*middle, label, ha="center", va="center", fontsize=10, bbox=background, zorder=2)
        edge, fill = FAINT, "white"
        if name in asked:
            edge, fill = PASS_COLOURS[4], "#DCE8FA"
        if given is not None and name in given:
            edge, fill = (WRONG, "#FBE3D6") if wrong else (RIGHT, "#D8F0E4")
        axes.plot(x, y, marker="o", ms=24, mec=edge, mfc=fill, mew=2, zorder=3)
        axes.text(x, y, shows[name], ha="center", va="center", fontsize=11, zorder=4)
        axes.text(x, y + 0.34, name, ha="center", va="center", fontsize=9, zorder=4)
        if given is not None and wrong:
            axes.text(
                x + 0.22, y - 0.26, f"×{given[name]}", color=WRONG, ha="left", va="center", weight="bold", zorder=4
            )
    if given is not None:
        mistakes = sum(answer != shows[name] for name, answer in given.items())
        axes.set_title("the model: " + ("all right" if not mistakes else f"{mistakes} of {len(given)} wrong (×)"))
    axes.set(
        xlim=(-0.5, max(columns) + 0.5), ylim=(tallest / 2 + 0.1, -tallest / 2 - 0.05), yticks=[], xlabel="operations"
    )
    axes.set_xticks(range(max(columns) + 1))
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


@_figure
def fast_weights(trace: "SleepTrace") -> Figure:
    """Draw S after every pass, a row per head, on one colour scale: of the first example, in the last window.

    Of several fast-weight layers it is the first. Blue is negative, red positive, white zero.
    """
    passes = trace.stack()[1:, 0, 0].cpu()  # (n, heads, d_v, d_k)
    heads = passes.shape[1]
    reach = passes.abs().quantile(0.995).item()
    figure, axes = plt.subplots(
        heads, len(passes), figsize=(1.25 * len(passes) + 0.6, 1.25 * heads + 0.4), squeeze=False
    )
    for n, S in enumerate(passes):
        for head in range(heads):
            picture = axes[head][n]
            picture.imshow(S[head].numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
            picture.set(xticks=[], yticks=[])
            picture.grid(False)
            if head == 0:
                picture.set_title(f"pass {n + 1}", fontsize=10)
            if n == 0:
                picture.set_ylabel(f"head {head + 1}", fontsize=10)
    return figure


@_figure
def pass_changes(traces: Mapping[str, "SleepTrace"], window: int = -1) -> Figure:
    """Draw how much every pass changes the first layer's S, ``|S_n - S_(n-1)| / |S_n|``, a curve per trace.

    Raises ValueError without a trace.
    """
    _check_some("traces", traces)
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for position, (label, trace) in enumerate(traces.items()):
        change = trace.changes(window)[:, 0].tolist()
        axes.plot(range(1, len(change) + 1), change, marker="o", color=colour(label, position), label=label)
    axes.set(xlabel="pass n", ylabel="change of S in this pass", xticks=range(1, len(change) + 1))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=10)
    return figure


@_figure
def shares(
    panels: Mapping[str, Mapping[str, Sequence[float]]], columns: Sequence[object], x_name: str, floor: float = 0.0
) -> Figure:
    """Draw shares as grids of numbers in percent, two panels side by side or, with many columns, one below the other.

    panels: title -> row -> a share for each column, nan where there is none. White is ``floor`` and below, dark blue 1.
    Raises ValueError without a panel.
    """
    _check_some("panels", panels)
    wide = len(columns) > 5
    across = 1 if wide else min(2, len(panels))
    down = -(-len(panels) // across)
    tallest = [max(len(rows) for rows in list(panels.values())[i * across : (i + 1) * across]) for i in range(down)]
    figure, grid = plt.subplots(
        down,
        across,
        figsize=(4.8, sum(0.34 * rows + 0.42 for rows in tallest) + 0.45),
        squeeze=False,
        height_ratios=tallest,
    )
    blues = LinearSegmentedColormap.from_list("blues", ["white", "#A9C2E8", PASS_COLOURS[4]])
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for position, (axes, (title, rows)) in enumerate(zip(grid.flat, panels.items(), strict=False)):
        values = torch.tensor([list(row) for row in rows.values()])
        axes.pcolormesh(values, cmap=blues, vmin=floor, vmax=1.0, edgecolors="white", lw=2)
        for y, x in values.isfinite().nonzero().tolist():
            share = values[y, x].item()
            dark = (share - floor) / (1 - floor) > 0.75
            axes.text(x + 0.5, y + 0.5, f"{100 * share:.0f}", ha="center", va="center", color="white" if dark else INK)
        missing = tallest[position // across] - len(rows)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows) + missing, 0), title=title)
        axes.set_xticks([x + 0.5 for x in range(len(columns))], [str(column) for column in columns])
        axes.set_yticks([y + 0.5 for y in range(len(rows))], list(rows))
        axes.tick_params(length=0)
        axes.grid(False)
        if position + across >= len(panels):
            axes.set_xlabel(x_name)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure
