"""The explorer: its page, its widget, and what it refuses."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import ipywidgets
import matplotlib.pyplot as plt
import numpy
import pytest
from PIL import Image

from sleepedu.pictures import figures
from sleepedu.pictures.explorer import MOST_BYTES, MOST_FRAMES, explore, small_picture


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    assert plt.get_fignums() == []


def gradient(n, depth):
    with figures.new_figure(2, 1.5) as (figure, axes):
        axes.imshow(numpy.linspace(0, n * depth, 900).reshape(30, 30), vmin=0, vmax=20)
    return figure


def describe(n, depth):
    return f'N = {n}, depth = {depth}: "a" < b </script>'


class Page(HTMLParser):
    """The elements of a page, and the JSON in it."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.data, self.inside = [], "", None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = self.elements[-1]

    def handle_data(self, data):
        if self.inside == ("script", {"type": "application/json"}):
            self.data += data

    def handle_endtag(self, tag):
        self.inside = None

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_holds_every_picture_and_its_words():
    explorer = explore(gradient, (1, 2, 4), (1, 3), describe)
    page = Page(explorer.page())
    data = json.loads(page.data)
    pairs = [(n, depth) for n in (1, 2, 4) for depth in (1, 3)]
    assert data["values"] == [["1", "2", "4"], ["1", "3"]]
    assert data["words"] == [describe(*pair) for pair in pairs]
    assert [base64.b64decode(frame) for frame in data["frames"]] == [explorer.frame(*pair) for pair in pairs]
    assert len(set(data["frames"])) == 6
    (image,) = page.all("img")
    assert image["alt"] == describe(1, 1)
    assert image["src"] == "data:image/webp;base64," + data["frames"][0]
    assert len(page.all("script")) == 2, "no words may end the script early"


def test_words_on_a_slider_and_of_a_picture_are_no_part_of_the_page():
    words = "<!-- <script>"  # after which a browser takes the end of the script for a part of it
    page = Page(explore(lambda n, depth: gradient(1, 1), ("<b>one</b>",), (1,), lambda n, depth: words).page())
    assert page.all("b") == [] and "<" not in page.data
    assert json.loads(page.data)["words"] == [words] and json.loads(page.data)["values"] == [["<b>one</b>"], ["1"]]


def test_the_sliders_of_the_page_are_labelled_and_reach_every_value():
    page = Page(explore(gradient, (1, 2, 4), (1, 3), describe, names=("Passes", "a < b")).page())
    sliders = page.all("input")
    assert [slider["type"] for slider in sliders] == ["range", "range"]
    assert [(slider["min"], slider["max"], slider["value"]) for slider in sliders] == [("0", "2", "0"), ("0", "1", "0")]
    ids = [slider["id"] for slider in sliders]
    assert ids == [label["for"] for label in page.all("label")] == [shown["for"] for shown in page.all("output")]
    assert len(set(ids)) == 2
    assert any(p.get("aria-live") == "polite" for p in page.all("p"))


def test_the_sliders_open_where_they_are_told_and_a_map_leads_elsewhere():
    explorer = explore(gradient, (1, 2), (1, 3), describe, at=(2, 1), accuracy={(1, 1): 0.996, (2, 3): 0.25})
    page = Page(explorer.page())
    assert [slider["value"] for slider in page.all("input")] == ["1", "0"]
    assert page.all("img")[0]["alt"] == describe(2, 1) and json.loads(page.data)["map"] == [">99%", "", "", "25%"]
    passes, depths, words, _, cells = explorer.widget().children
    assert (passes.value, depths.value) == (2, 1)
    (cell,) = (cell for cell in cells.children if getattr(cell, "description", "") == "25%")
    cell.click()
    assert (passes.value, depths.value) == (2, 3) and words.value.startswith("N = 2, depth = 3")


def test_numbers_of_numpy_can_stand_on_a_slider():
    assert '"values": [["1", "2"], ["3"]]' in explore(gradient, numpy.arange(1, 3), numpy.array([3]), describe).page()


def test_two_explorers_on_one_page_do_not_share_ids():
    explorer = explore(gradient, (1,), (1,), describe)
    first, second = ({e["id"] for e in Page(explorer.page()).all("input")} for _ in range(2))
    assert not first & second


def test_the_page_needs_nothing_from_elsewhere():
    page = explore(gradient, (1, 2), (1,), describe).page()
    assert "http://" not in page and "https://" not in page and 'src="//' not in page


def test_a_picture_has_few_colours_and_is_drawn_once():
    drawn = []

    def draw(n, depth):
        drawn.append((n, depth))
        return gradient(n, depth)

    explorer = explore(draw, (1, 2), (1,), describe)
    picture = Image.open(io.BytesIO(explorer.frame(2, 1)))
    explorer.frame(2, 1)
    explorer.page()
    assert sorted(drawn) == [(1, 1), (2, 1)]
    assert picture.format == "WEBP" and picture.width == 440 and 4 < len(picture.getcolors(1000)) <= 64


def test_too_many_pictures_are_refused_before_any_is_drawn():
    def draw(n, depth):
        raise AssertionError("drawn")

    assert MOST_FRAMES == 40
    explore(draw, range(1, 9), range(1, 6), describe)
    with pytest.raises(ValueError, match="41 pictures are too many for a page: 40 at most"):
        explore(draw, range(41), [1], describe)


def test_pictures_that_are_too_large_are_refused(monkeypatch):
    explorer = explore(gradient, (1,), (1, 2), describe)
    size = sum(len(base64.b64encode(explorer.frame(1, depth))) for depth in (1, 2))
    assert MOST_BYTES == 500_000
    monkeypatch.setattr("sleepedu.pictures.explorer.MOST_BYTES", size)
    explorer.page()
    monkeypatch.setattr("sleepedu.pictures.explorer.MOST_BYTES", size - 1)
    with pytest.raises(ValueError, match=f"the pictures take {size} bytes, {size - 1} at most"):
        explorer.page()


@pytest.mark.parametrize("passes, depths", [((), (1,)), ((1,), ())])
def test_an_empty_slider_is_refused(passes, depths):
    with pytest.raises(ValueError, match="both sliders need a value"):
        explore(gradient, passes, depths, describe)


def test_the_widget_draws_anew_when_a_slider_moves():
    explorer = explore(gradient, (1, 2), (1, 3), describe, names=("Passes", "Hops"))
    passes, depths, words, picture = explorer.widget().children
    assert (passes.description, depths.description) == ("Passes", "Hops")
    assert picture.value == explorer.frame(1, 1)
    passes.value = 2
    assert picture.value == explorer.frame(2, 1)
    depths.value = 3
    assert picture.value == explorer.frame(2, 3)
    assert words.value == "N = 2, depth = 3: &quot;a&quot; &lt; b &lt;/script&gt;"
    assert isinstance(picture, ipywidgets.Image)


class Ring:
    """An example that draw and describe speak of; seed 13 cannot be made, seed 14 not be drawn at depth 3."""

    seed = 5

    def renew(self, seed):
        if seed == 13:
            raise RuntimeError("no <ring>")
        self.seed = seed

    def draw(self, n, depth):
        if (self.seed, depth) == (14, 3):
            raise RuntimeError("no picture")
        return gradient(n + self.seed % 7, depth)

    def describe(self, n, depth):
        return f"ring {self.seed}: N = {n}, depth = {depth}"

    def explorer(self):
        return explore(self.draw, (1, 2), (1, 3), self.describe, new_example=self.renew, seed=5)


def parts(widget):
    """Return what a reader uses and sees: sliders, seed, button, picture and words."""
    passes, depths, example, words, picture = widget.children
    return passes, depths, *example.children, picture, words


def test_the_button_draws_the_next_example_at_the_sliders_present_values():
    explorer = Ring().explorer()
    passes, depths, seed, button, picture, words = parts(explorer.widget())
    assert (seed.description, seed.value, button.description) == ("Seed", 5, "New example")
    passes.value, depths.value = 2, 3
    before = picture.value
    button.click()
    assert (seed.value, words.value) == (6, "ring 6: N = 2, depth = 3")
    assert picture.value == small_picture(gradient(2 + 6, 3)) != before
    button.click()
    assert (seed.value, words.value) == (7, "ring 7: N = 2, depth = 3")


def test_the_same_seed_gives_the_same_picture_and_no_frame_outlives_its_example():
    *_, depths, seed, button, picture, words = parts(Ring().explorer().widget())
    first = picture.value, words.value
    seed.value = 10
    tenth = picture.value, words.value
    assert tenth[0] != first[0] and tenth[1] == "ring 10: N = 1, depth = 1"
    depths.value = 3
    assert words.value == "ring 10: N = 1, depth = 3"
    seed.value, depths.value = 5, 1
    assert (picture.value, words.value) == first
    seed.value = 9
    button.click()
    assert (picture.value, words.value) == tenth


def test_seeds_stay_inside_their_limits():
    *_, seed, button, _, words = parts(Ring().explorer().widget())
    seed.value = -3
    assert seed.value == 0 and words.value.startswith("ring 0:")
    seed.value = 2**40
    assert seed.value == 2**32 - 1 and words.value.startswith("ring 4294967295:")
    button.click()
    assert seed.value == 0 and words.value.startswith("ring 0:")


def test_an_example_that_cannot_be_made_is_told_and_survived():
    passes, _, seed, button, picture, words = parts(Ring().explorer().widget())
    seed.value = 12
    before = picture.value
    button.click()
    assert seed.value == 13
    assert "RuntimeError: no &lt;ring&gt;" in words.value and picture.value == before
    passes.value = 2
    assert "RuntimeError" in words.value and picture.value == before, "never a picture of another seed than the box's"
    button.click()
    assert words.value == "ring 14: N = 2, depth = 1" and picture.value != before
    seed.value = 13
    seed.value = 14
    assert words.value == "ring 14: N = 2, depth = 1", "the example before is still there"


def test_a_picture_that_cannot_be_drawn_is_told_and_survived():
    _, depths, seed, button, picture, words = parts(Ring().explorer().widget())
    seed.value = 14
    before = picture.value
    depths.value = 3
    assert "RuntimeError: no picture" in words.value and picture.value == before
    depths.value = 1
    assert words.value == "ring 14: N = 1, depth = 1" and picture.value == before
    depths.value = 3
    button.click()
    assert words.value == "ring 15: N = 1, depth = 3" and picture.value != before


def test_the_page_and_a_second_widget_show_the_present_example():
    explorer = Ring().explorer()
    page = Page(explorer.page())
    *_, button, picture, words = parts(explorer.widget())
    button.click()
    renewed = json.loads(Page(explorer.page()).data)
    assert renewed["words"][0] == words.value and base64.b64decode(renewed["frames"][0]) == picture.value
    first = json.loads(page.data)
    assert all(old != new for key in ("frames", "words") for old, new in zip(first[key], renewed[key], strict=True))
    assert page.all("button") == [] and len(page.all("input")) == 2, "a page without a kernel cannot draw"
    passes, _, seed, *_, other = parts(explorer.widget())
    assert seed.value == 6
    seed.value = 8
    button.click()  # of the first widget, whose box says 6
    assert (words.value, other.value) == ("ring 7: N = 1, depth = 1", "ring 8: N = 1, depth = 1")
    passes.value = 2
    assert other.value == "ring 8: N = 2, depth = 1", "each widget shows the seed that its box says"


def test_the_first_picture_raises_where_it_is_asked_for():
    def draw(n, depth):
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        explore(draw, (1,), (1,), describe).widget()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"new_example": 7}, "new_example must be a function of a seed, or None, got 7"),
        ({"seed": -1}, "seed must lie in 0..4294967295, got -1"),
        ({"seed": 2**32}, "seed must lie in 0..4294967295, got 4294967296"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"at": (3, 1)}, "(3, 1) is no cell: passes are (1,), depths (1,)"),
        ({"accuracy": {(1, 2): 0.5}}, "(1, 2) is no cell: passes are (1,), depths (1,)"),
    ],
    ids=str,
)
def test_a_wrong_seed_or_example_is_refused(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        explore(gradient, (1,), (1,), describe, **{"new_example": print} | wrong)


def test_a_notebook_gets_page_and_widget():
    bundle = explore(gradient, (1,), (1,), describe)._repr_mimebundle_()
    assert bundle["text/html"].startswith('<div class="explorer"')
    assert bundle["text/plain"].startswith("Explorer(")
    view = bundle["application/vnd.jupyter.widget-view+json"]
    widget = ipywidgets.Label()
    if hasattr(widget, "_repr_mimebundle_"):  # how ipywidgets 8 itself names a view
        own = widget._repr_mimebundle_()["application/vnd.jupyter.widget-view+json"]
        assert view == own | {"model_id": view["model_id"]}
    assert len(view["model_id"]) == len(widget.model_id) and view["model_id"] != widget.model_id
