"""That every figure and table shows what it was given."""

import re

import matplotlib.pyplot as plt
import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from sleepedu.intervals import Accuracy
from sleepedu.pictures import draw_episode, figures, show_table
from sleepedu.tasks import CellularAutomaton
from sleepedu.training import History


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def table(*shares):
    return {d: Accuracy(share, share - 0.1, share + 0.1, 100, 0.25) for d, share in enumerate(shares, start=1)}


def curve(figure, label):
    return next(line for line in figure.axes[0].lines if line.get_label() == label)


def test_accuracy_by_depth_draws_means_bands_and_the_baseline():
    tables = {"N=1": [table(0.9, 0.1), table(0.7, 0.3)], "N=4": [table(1.0, 0.8)]}
    figure = figures.accuracy_by_depth(tables, "hops k")
    assert isinstance(figure, Figure)
    assert curve(figure, "N=1").get_ydata().tolist() == pytest.approx([0.8, 0.2])
    assert curve(figure, "N=4").get_ydata().tolist() == [1.0, 0.8]
    assert list(curve(figure, "best constant answer").get_ydata()) == [0.25, 0.25]
    assert len(figure.axes[0].collections) == 2, "a band for every curve"
    band = figure.axes[0].collections[1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.7, 1.1))
    dots = [line for line in figure.axes[0].lines if line.get_linestyle() == "None"]
    assert [list(line.get_ydata()) for line in dots] == [[0.9, 0.1], [0.7, 0.3]]
    assert figure.axes[0].get_xlabel() == "hops k"


def test_every_N_has_one_colour_everywhere():
    first = figures.accuracy_by_depth({"N=2": [table(0.5)], "N=4": [table(0.5)]}, "k")
    second = figures.lines({"N=4": ([1, 2], [3, 4])}, "x", "y")
    assert curve(first, "N=4").get_color() == second.axes[0].lines[0].get_color() == figures.PASS_COLOURS[4]
    assert len(set(figures.PASS_COLOURS.values())) == len(figures.PASS_COLOURS)
    for other in ("N=", "N=1, four times as long"):
        assert figures.colour(other) not in figures.PASS_COLOURS.values()
    two = figures.lines({"N=2, inject": ([1], [1]), "N=4, inject": ([1], [1])}, "x", "y")
    assert curve(two, "N=2, inject").get_color() != curve(two, "N=4, inject").get_color()


def test_learning_curves():
    history = History([10, 20], [2.0, 1.0], [0.1, 0.6], majority_loss=1.79)
    figure = figures.learning_curves({"N=2": [history, history]})
    line = curve(figure, "N=2")
    assert list(line.get_xdata()) == [10, 20] and list(line.get_ydata()) == [2.0, 1.0]
    constants = [line for line in figure.axes[0].lines if line.get_label() == "best constant answer"]
    assert [list(line.get_ydata()) for line in constants] == [[1.79, 1.79]]


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: figures.accuracy_by_depth({}, "k"), "there is nothing to draw: tables is empty"),
        (lambda: figures.learning_curves({}), "there is nothing to draw: histories is empty"),
        (lambda: figures.learning_curves({"N=1": []}), "there is nothing to draw: histories is empty"),
    ],
)
def test_what_cannot_be_drawn_is_named(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_lines_have_a_colour_each_and_their_axes_names():
    figure = figures.lines({"a": ([1, 2], [3, 4]), "b": ([1, 2], [4, 5])}, "length", "seconds")
    assert curve(figure, "b").get_ydata().tolist() == [4, 5]
    assert (figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()) == ("length", "seconds")
    assert curve(figure, "a").get_color() != curve(figure, "b").get_color()


@pytest.mark.parametrize("ask, asked", [("every", 3), ("first", 1)])
def test_the_automaton_says_what_was_asked_and_answered(ask, asked):
    task = CellularAutomaton(cells=3, steps=(1,), ask=ask)
    episode = task.sample(1, torch.Generator().manual_seed(0))
    right = episode.targets[0]
    wrong = right.clone()
    wrong[0] = 1 - right[0]
    for answers, label in ((None, "asked, t = 1"), (right, "the model: all right"), (wrong, "the model: 1 wrong")):
        (axes,) = draw_episode(task, episode, 0, answers).axes
        assert label in [text.get_text() for text in axes.get_yticklabels()]
        diagram = axes.collections[0].get_array()
        assert diagram.shape == (2, 3) and diagram[1, :asked].tolist() == right.tolist()
        dark = [patch.get_facecolor()[:3] != (1, 1, 1) for patch in axes.patches[asked:]]
        assert dark == ([] if answers is None else answers.bool().tolist())
        assert [text.get_text() for text in axes.texts] == ["×"] * (answers is wrong)


def test_a_figure_that_fails_is_closed_too():
    with pytest.raises(ValueError, match="no run"):
        figures.accuracy_by_depth({"N=1": []}, "hops k")
    with pytest.raises(RuntimeError), figures.new_figure():
        raise RuntimeError
    left = plt.get_fignums()
    plt.close("all")
    assert left == []


def test_the_style_stays_in_the_figure():
    before = dict(plt.rcParams)
    with figures.new_figure(rows=2, columns=2) as (figure, axes):
        assert axes.shape == (2, 2)
    assert dict(plt.rcParams) == before
    assert figure.get_size_inches().tolist() == [6.4, 3.8]


# Tables


def shown(*rows, **how):
    """What a notebook would get of a table: the page, cell by cell, and the text."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sleepedu.pictures.tables.display", found.append)
        show_table(*rows, **how)
    data, _ = DisplayFormatter().format(*found)
    cells = re.findall(r'<(t[hd]) style="text-align: (\w+)">(.*?)</t[hd]>', data["text/html"])
    width = len(rows[0])
    return [cells[i : i + width] for i in range(0, len(cells), width)], data["text/plain"], data["text/html"]


def test_a_table_has_numbers_alike_and_to_the_right():
    rows = [["N=1", 0.12345, 12000, Accuracy(0.5, 0.25, 0.75, 9)], ["a & b", 1.0, -3, ""]]
    page, text, html = shown(["", "seconds", "steps", "right"], *rows, caption="x < y")
    assert page[0] == [
        *[("td", "left", ""), ("th", "right", "seconds")],
        *[("th", "right", "steps"), ("th", "right", "right")],
    ]
    assert page[1] == [
        *[("th", "left", "N=1"), ("td", "right", "0.123")],
        *[("td", "right", "12,000"), ("td", "right", "50 (25,\N{NO-BREAK SPACE}75)")],
    ]
    assert page[2] == [
        *[("th", "left", "a &amp; b"), ("td", "right", "1")],
        *[("td", "right", "-3"), ("td", "right", "")],
    ]
    assert "<caption>x &lt; y</caption>" in html and html.count("<thead>") == html.count("<tbody>") == 1
    assert text.splitlines() == [
        "x < y",
        "       seconds   steps        right",
        "N=1      0.123  12,000  50 (25,\N{NO-BREAK SPACE}75)",
        "a & b        1      -3",
    ]


def test_words_in_a_column_put_it_to_the_left():
    page, text, html = shown(["N", "what"], [1, "ahead"], [2, 1234.5])
    assert [[side for _, side, _ in row] for row in page] == [["right", "left"]] * 3
    assert text == "N  what\n1  ahead\n2  1,234" and "<caption>" not in html


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "there is nothing to show: no row beneath ['a', 'b']"),
        ([[1, 2], [3]], "a row must have a cell for each of ['a', 'b'], got [3]"),
        (["ab"], "a row must have a cell for each of ['a', 'b'], got 'ab'"),
    ],
)
def test_a_table_whose_rows_do_not_fit_is_refused(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        show_table(["a", "b"], *rows)


def test_a_table_outside_a_notebook_is_text(capsys):
    show_table(["N", "right"], [1, "29%"])
    assert capsys.readouterr().out == "N  right\n1    29%\n"
