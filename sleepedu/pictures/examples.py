"""An example of a task as a picture: what is asked, the way to the answer, and what a model answered."""

import itertools
import math
from functools import singledispatch
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from sleepedu.pictures.figures import FAINT, PASS_COLOURS, RIGHT, WRONG, new_figure
from sleepedu.tasks import CellularAutomaton, Episode, GraphRetrieval, MathReasoning, Task
from sleepedu.tasks.cellular_automaton import space_time
from sleepedu.tasks.math_reasoning import Facts

# A node's edge and what fills it.
PLAIN_NODE, ASKED_NODE = (FAINT, "white"), (PASS_COLOURS[4], "#DCE8FA")
RIGHT_NODE, WRONG_NODE = (RIGHT, "#D8F0E4"), (WRONG, "#FBE3D6")
CENTRED: Any = {"ha": "center", "va": "center"}


def draw_episode(task: Task, episode: Episode, index: int = 0, answers: Tensor | None = None, **how: Any) -> Figure:
    """Draw one example of a task, with given answers (p,) beside the right ones where there are any.

    Of a graph's questions it shows the first, or number ``query=``. Raises NotImplementedError for a task that has no
    picture (``task.text`` always works) and ValueError for an episode that is not of the task.
    """
    wanted = (task.windows, task.window, task.prompt_length)
    found = (*episode.windows.shape[1:], episode.prompt.shape[1])
    if found != wanted:
        sizes = "{} windows of {} tokens and a prompt of {}"
        raise ValueError(f"the {task.name} task has {sizes.format(*wanted)}, the episode {sizes.format(*found)}")
    answers = None if answers is None else answers.cpu()
    return _picture(task, episode.to("cpu"), index, answers, **how)


@singledispatch
def _picture(task: Task, episode: Episode, index: int, answers: Tensor | None) -> Figure:
    raise NotImplementedError(f"the {task.name} task has no picture: use text()")


@_picture.register
def _graph(task: GraphRetrieval, episode: Episode, index: int, answers: Tensor | None, query: int = 0) -> Figure:
    """Draw the ring with the walk of one question; nodes stand in the order of their names, as a reader meets them."""

    def spell(tokens: Tensor) -> str:
        return "".join(task.words[token] for token in tokens.tolist()).removesuffix("_") or "_"

    def question(tokens: Tensor) -> Tensor:
        return tokens.view(task.queries, -1)[query]

    following, names = task.successors(episode)[index].tolist(), list(task.names)
    walk = [names.index(spell(question(episode.prompt[index])[1 : 1 + task.name_tokens]))]
    for _ in range(int(question(episode.depth[index]).max())):
        walk.append(following[walk[-1]])
    nodes = [node for node, after in enumerate(following) if after >= 0]
    angle = {node: math.pi / 2 - 2 * math.pi * i / len(nodes) for i, node in enumerate(nodes)}
    place = {node: (math.cos(a), math.sin(a)) for node, a in angle.items()}
    walked = set(itertools.pairwise(walk))
    hops, kinds = len(walk) - 1, {walk[0]: ASKED_NODE}
    title = f"{hops} hop{'s' * (hops > 1)} after {names[walk[0]]}: {names[walk[-1]]}"
    if answers is not None:
        answer = spell(question(answers)[question(episode.asked[index])])  # which need not be a name
        title += f"   the model says {answer}" + (" (right)" if answer == names[walk[-1]] else " (wrong)")
        kinds |= {node: WRONG_NODE for node in nodes if names[node] == answer}
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


@_picture.register
def _automaton(task: CellularAutomaton, episode: Episode, index: int, answers: Tensor | None) -> Figure:
    """Draw the first row as far as its first question, the bits that are asked there framed, and answers beneath."""
    t = episode.depth[index, 0]
    diagram = space_time(episode.windows[index, 0], task.rule, int(t)).tolist()
    asked = [0] if task.ask == "first" else (episode.depth[index] == t).nonzero().flatten().tolist()
    last, height, bits = len(diagram) - 1, len(diagram) + (0 if answers is None else 2), ("white", "#2B3440")
    frame: Any = {"lw": 1.8, "zorder": 3}
    labels: dict[float, str] = {0: "read, t = 0", last: f"asked, t = {last}"}
    with new_figure(min(6.4, 0.36 * task.cells + 1.4), 0.32 * height + 0.9) as (figure, axes):
        axes.pcolormesh(diagram, cmap=ListedColormap(bits), vmin=0, vmax=1, edgecolors=FAINT, lw=0.6)
        for x in asked:
            axes.add_patch(Rectangle((x, last), 1, 1, fill=False, edgecolor=PASS_COLOURS[4], **frame))
        if answers is not None:
            below, given = last + 1.5, dict(zip(asked, answers[asked].tolist(), strict=True))
            wrong = [x for x, bit in given.items() if bit != diagram[last][x]]
            for x, bit in given.items():
                edge = WRONG if x in wrong else RIGHT
                axes.add_patch(Rectangle((x, below), 1, 1, facecolor=bits[bit], edgecolor=edge, **frame))
            for x in wrong:
                axes.text(x + 0.5, below + 0.5, "×", **CENTRED, color=WRONG, fontsize=13, weight="bold", zorder=4)
            labels[below] = "the model: " + (f"{len(wrong)} wrong" if wrong else "all right")
        axes.set(xlim=(-0.1, task.cells + 0.1), ylim=(max(labels) + 1.1, -0.1), aspect="equal", xticks=[])
        axes.set_yticks([y + 0.5 for y in labels], list(labels.values()))
        _without_frame(axes)
    return figure


@_picture.register
def _dials(task: MathReasoning, episode: Episode, index: int, answers: Tensor | None) -> Figure:
    """Draw what depends on what, by number of operations; when one dial is asked, only what its answer takes.

    The dials that are asked are framed, wrong answers crossed out.
    """
    facts, asked = task.facts(episode, index), task.asked_dials(episode, index)
    dials = facts if task.ask == "every" else _derive(facts, next(iter(asked)), task.digits)
    shows = {dial: _derive(facts, dial, task.digits)[dial] for dial in dials}

    def operations(dial: str) -> int:
        return 1 + sum(map(operations, facts[dial][2])) if facts[dial][2] else 0

    columns: dict[int, list[str]] = {}
    for dial in dials:
        columns.setdefault(operations(dial), []).append(dial)
    place: dict[str, tuple[float, float]] = {}
    for rank, names in sorted(columns.items()):  # a dial stands near what it depends on, so that few arrows cross
        names.sort(key=lambda dial: sum(place[source][1] for source in facts[dial][2]) / max(1, len(facts[dial][2])))
        place |= {dial: (rank, i - (len(names) - 1) / 2) for i, dial in enumerate(names)}
    tallest, kinds, wrong = max(map(len, columns.values())), dict.fromkeys(asked, ASKED_NODE), {}
    if answers is not None:
        given = {dial: task.words[int(answers[i])] for dial, i in asked.items()}
        wrong = {dial: answer for dial, answer in given.items() if answer != str(shows[dial])}
        kinds = dict.fromkeys(given, RIGHT_NODE) | dict.fromkeys(wrong, WRONG_NODE)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
    with new_figure(1.35 * (max(columns) + 1) + 0.4, 0.85 * tallest + 1.2) as (figure, axes):
        for dial, (x, y) in place.items():
            number, form, sources = facts[dial]
            for source in sources:
                left, before = place[source]
                bend = 0.45 / (x - left) if x - left > 1 else 0.0  # a long arrow bends around the columns between
                bend = -bend if before > y else bend
                _arrow(axes, (left, before), (x, y), PASS_COLOURS[4], 1.5, -bend, zorder=1)
                middle = (x + left) / 2 + bend * (y - before) * 0.3, (y + before) / 2 - bend * (x - left) * 0.75
                done = {"more": f"+{number}", "less": f"−{number}"}.get(form, "+")
                axes.text(*middle, done, **CENTRED, fontsize=10, bbox=box, zorder=2)
            _node(axes, (x, y), str(shows[dial]), kinds.get(dial, PLAIN_NODE), size=24)
            axes.text(x, y + 0.34, dial, **CENTRED, fontsize=9, zorder=4)
            if dial in wrong:
                axes.text(x + 0.22, y - 0.26, f"×{wrong[dial]}", va="center", color=WRONG, weight="bold", zorder=4)
        if answers is not None:
            axes.set_title("the model: " + (f"{len(wrong)} of {len(asked)} wrong (×)" if wrong else "all right"))
        axes.set(xlim=(-0.5, max(columns) + 0.5), ylim=(tallest / 2 + 0.1, -tallest / 2 - 0.05))
        axes.set(xlabel="operations", xticks=range(max(columns) + 1), yticks=[])
        _without_frame(axes)
    return figure


def _derive(facts: Facts, dial: str, digits: int) -> dict[str, int]:
    """Return what a dial shows, and before it every dial that this takes."""
    number, form, sources = facts[dial]
    shown: dict[str, int] = {}
    for source in sources:
        shown |= _derive(facts, source, digits)
    terms = [shown[source] for source in sources] + [int(digit) for digit in number]
    return shown | {dial: (terms[0] - terms[1] if form == "less" else sum(terms)) % digits}


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
