"""Two sliders, N and depth, over pictures of a real model's output.

In the rendered page the pictures are computed beforehand and a few lines of JavaScript show the right one: no kernel,
no other host. Where there is a kernel, ipywidgets sliders draw anew, and a button draws another example. ``jupyter
nbconvert --execute`` makes a page of these, for which it asks another host, unless it is told to keep no state of
widgets: ``--ExecutePreprocessor.store_widget_state=False``.
"""

import base64
import html
import io
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

from sleepedu import checks

MOST_FRAMES, MOST_BYTES = 40, 500_000
STYLE = {"description_width": "initial"}
PAGE = Template(Path(__file__).with_name("explorer.html").read_text(encoding="utf-8"))


@dataclass
class Explorer:
    """Two sliders over ``draw(N, depth)`` with ``describe(N, depth)`` in words; as a cell's value it shows itself.

    passes, depths: the values of the two sliders, in order, numbers or words. describe: the picture in words, for
    readers who do not see it. new_example: makes the example of a seed the one that draw and describe speak of, or
    raises and leaves the one before; with it, a reader who has a kernel gets a button and a box for the seed.
    seed: that of the present example; the first one is there already. Frames and page are of the present example.
    at: N and depth to open at, the first of both unless given. accuracy: the share of right answers over many examples
    by (N, depth), as a map whose cells can be chosen. Raises ValueError for empty sliders, more than 40 pictures or
    500 kB of them, a seed outside 0..2^32 - 1, a new_example that cannot be called, or a cell that is not there.
    """

    draw: Callable[[Any, Any], Figure]
    passes: Sequence[int | str]
    depths: Sequence[int | str]
    describe: Callable[[Any, Any], str]
    names: tuple[str, str] = ("Sleep passes N", "Depth")
    new_example: Callable[[int], None] | None = None
    seed: int = 0
    at: tuple[Any, ...] = ()
    accuracy: Mapping[tuple[Any, Any], float] = field(default_factory=dict)
    _frames: dict[tuple[int | str, int | str], bytes] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        self.passes, self.depths = tuple(self.passes), tuple(self.depths)
        if not self.passes or not self.depths:
            raise ValueError(f"both sliders need a value: got passes {self.passes} and depths {self.depths}")
        frames = len(self.passes) * len(self.depths)
        if frames > MOST_FRAMES:
            raise ValueError(f"{frames} pictures are too many for a page: {MOST_FRAMES} at most")
        if self.new_example is not None and not callable(self.new_example):
            raise ValueError(f"new_example must be a function of a seed, or None, got {self.new_example!r}")
        checks.seed(self.seed)
        self.at = tuple(self.at) or (self.passes[0], self.depths[0])
        for n, depth in (self.at, *self.accuracy):
            if n not in self.passes or depth not in self.depths:
                raise ValueError(f"({n}, {depth}) is no cell: passes are {self.passes}, depths {self.depths}")

    def frame(self, n: int | str, depth: int | str) -> bytes:
        """Return the picture for one N and depth as WebP, of at most 64 colours."""
        if (n, depth) not in self._frames:
            self._frames[n, depth] = small_picture(self.draw(n, depth))
        return self._frames[n, depth]

    def widget(self) -> ipywidgets.Widget:
        """Return live sliders, with new_example also a seed and a button, which draw when they are used.

        What goes wrong when they are used is said in the words, and the picture stays. Works in ipywidgets 7.7 and 8.
        """
        sliders = [
            ipywidgets.SelectionSlider(options=values, value=value, description=name, style=STYLE)
            for name, values, value in zip(self.names, (self.passes, self.depths), self.at, strict=True)
        ]
        seed = ipywidgets.BoundedIntText(self.seed, min=0, max=checks.MOST_SEED, description="Seed")
        button = ipywidgets.Button(description="New example")
        words, picture = ipywidgets.HTML(), ipywidgets.Image(format="webp", layout={"max_width": "100%"})

        def show() -> None:
            if seed.value != self.seed and self.new_example is not None:
                self._frames.clear()
                self.new_example(seed.value)
                self.seed = seed.value
            n, depth = (slider.value for slider in sliders)
            picture.value, words.value = self.frame(n, depth), html.escape(self.describe(n, depth))
            picture.layout.width = f"{Image.open(io.BytesIO(picture.value)).width // 2}px"

        def changed(_change: object) -> None:
            try:
                show()
            except Exception as error:  # a notebook shows nothing of what a callback raises
                told = f"This could not be drawn, and the picture is the one of before: {type(error).__name__}: {error}"
                words.value = html.escape(told)

        def next_seed(_button: object) -> None:
            seed.value = (seed.value + 1) % (checks.MOST_SEED + 1)

        for control in (*sliders, seed):
            control.observe(changed, "value")
        button.on_click(next_seed)
        show()
        parts = [*sliders, *([] if self.new_example is None else [ipywidgets.HBox([seed, button])]), words, picture]
        if self.accuracy:
            parts.append(self._map(sliders))
        return ipywidgets.VBox(parts, layout={"max_width": "42rem"})

    def _map(self, sliders: list[ipywidgets.SelectionSlider]) -> ipywidgets.Widget:
        """Return the map of accuracies, a button for every cell, which moves the sliders there."""

        def cell(*pair: Any) -> ipywidgets.Widget:
            button = ipywidgets.Button(description=percent(self.accuracy.get(pair)), layout={"width": "auto"})

            def choose(_button: object) -> None:
                for slider, value in zip(sliders, pair, strict=True):
                    slider.value = value

            button.on_click(choose)
            return button

        grid = [ipywidgets.Label(text) for text in (self.names[0], *map(str, self.depths))]
        for n in self.passes:
            grid += [ipywidgets.Label(str(n)), *(cell(n, depth) for depth in self.depths)]
        layout = {"grid_template_columns": f"auto repeat({len(self.depths)}, 1fr)"}
        return ipywidgets.GridBox(grid, layout=layout)

    def page(self) -> str:
        """Return the sliders as HTML that needs no kernel. Raises ValueError when the pictures are too large."""
        pairs = [(n, depth) for n in self.passes for depth in self.depths]
        frames = [base64.b64encode(self.frame(*pair)).decode() for pair in pairs]
        size = sum(len(frame) for frame in frames)
        if size > MOST_BYTES:
            raise ValueError(f"the pictures take {size} bytes, {MOST_BYTES} at most: draw them smaller or fewer")
        words = [self.describe(*pair) for pair in pairs]
        steps = [list(map(str, values)) for values in (self.passes, self.depths)]  # NumPy's numbers are none in JSON
        cells = [percent(self.accuracy.get(pair)) for pair in pairs] if self.accuracy else []
        data = json.dumps({"values": steps, "frames": frames, "words": words, "map": cells})
        data = data.replace("<", "\\u003c")  # neither a tag nor a comment may begin in a script
        here = pairs.index(self.at)
        shown = {"id": f"explorer-{uuid.uuid4().hex[:8]}", "frame": frames[here], "words": html.escape(words[here])}
        for i, (name, values) in enumerate(zip(self.names, (self.passes, self.depths), strict=True)):
            place = values.index(self.at[i])
            shown |= {f"name{i}": html.escape(name), f"last{i}": str(len(values) - 1), f"at{i}": str(place)}
            shown[f"first{i}"] = html.escape(str(values[place]))
        return PAGE.substitute(shown, data=data)

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        # Put together here: a widget of ipywidgets 8 would return this, one of 7 only displays itself.
        view = {"version_major": 2, "version_minor": 0, "model_id": self.widget().model_id}
        return {"text/plain": repr(self), "text/html": self.page(), "application/vnd.jupyter.widget-view+json": view}


explore = Explorer  # what a cell says, as a verb


def percent(share: float | None) -> str:
    """Return a share as the map says it, with nothing where nothing was measured."""
    return "" if share is None else ">99%" if 0.995 <= share < 1 else f"{share:.0%}"  # 100% is all of them


def small_picture(figure: Figure, format: str = "webp") -> bytes:
    """Return a figure as a picture of at most 64 colours, twice as large as it is shown: sharp on any screen."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=2 * figure.dpi)
    few: Image.Image = Image.open(raw).convert("RGB").quantize(64, kmeans=1)
    few = few.convert("RGB") if format == "webp" else few  # which knows no palettes
    few.save(small, format=format, lossless=True, quality=100, method=4)  # 6 takes 30 times as long for as many bytes
    return small.getvalue()
