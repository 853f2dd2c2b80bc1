"""Two sliders, N and depth, over pictures of a real model's output.

In the rendered page the pictures are computed beforehand and a few lines of JavaScript show the right one: no kernel,
no other host. Where there is a kernel, ipywidgets sliders draw anew.
"""

import base64
import html
import io
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from PIL import Image

MOST_FRAMES, MOST_BYTES = 40, 300_000


def explore(
    draw: Callable[[Any, Any], Figure],
    passes: Sequence[int | str],
    depths: Sequence[int | str],
    describe: Callable[[Any, Any], str],
    names: tuple[str, str] = ("Sleep passes N", "Depth"),
) -> "Explorer":
    """Return an explorer that shows ``draw(N, depth)`` with ``describe(N, depth)`` in words, for every N and depth.

    passes, depths: the values of the two sliders, in order, numbers or words. describe: the picture in words, for
    readers who do not see it. Raises ValueError for empty sliders, or more than 40 pictures or 300 kB of them.
    """
    if not passes or not depths:
        raise ValueError(f"both sliders need a value: got passes {list(passes)} and depths {list(depths)}")
    if len(passes) * len(depths) > MOST_FRAMES:
        raise ValueError(f"{len(passes)} x {len(depths)} pictures are too many for a page: {MOST_FRAMES} at most")
    return Explorer(draw, describe, tuple(passes), tuple(depths), names)


@dataclass
class Explorer:
    """Two sliders over pictures; as a notebook's value it shows itself in whatever way the place allows."""

    draw: Callable[[Any, Any], Figure]
    describe: Callable[[Any, Any], str]
    passes: tuple[int | str, ...]
    depths: tuple[int | str, ...]
    names: tuple[str, str]
    _frames: dict[tuple[int | str, int | str], bytes] = field(default_factory=dict, repr=False)

    def frame(self, n: int | str, depth: int | str) -> bytes:
        """Return the picture for one N and depth as PNG with at most 64 colours."""
        if (n, depth) not in self._frames:
            self._frames[n, depth] = small_png(self.draw(n, depth))
        return self._frames[n, depth]

    def widget(self) -> ipywidgets.Widget:
        """Return live sliders, which draw when they are moved. Works in ipywidgets 7.7 and 8."""
        sliders = [
            ipywidgets.SelectionSlider(options=values, description=name, style={"description_width": "initial"})
            for name, values in zip(self.names, (self.passes, self.depths), strict=True)
        ]
        picture, words = ipywidgets.Image(format="png"), ipywidgets.HTML()

        def show(_change: object = None) -> None:
            n, depth = (slider.value for slider in sliders)
            picture.value = self.frame(n, depth)
            words.value = html.escape(self.describe(n, depth))

        for slider in sliders:
            slider.observe(show, "value")
        show()
        return ipywidgets.VBox([*sliders, picture, words])

    def page(self) -> str:
        """Return the sliders as HTML that needs no kernel. Raises ValueError when the pictures are too large."""
        pairs = [(n, depth) for n in self.passes for depth in self.depths]
        frames = [base64.b64encode(self.frame(*pair)).decode() for pair in pairs]
        size = sum(len(frame) for frame in frames)
        if size > MOST_BYTES:
            raise ValueError(f"the pictures take {size} bytes, {MOST_BYTES} at most: draw them smaller or fewer")
        words = [self.describe(*pair) for pair in pairs]
        key = f"explorer-{uuid.uuid4().hex[:8]}"
        controls = "".join(
            _CONTROL.format(id=f"{key}-{i}", name=html.escape(name), last=len(values) - 1, first=values[0])
            for i, (name, values) in enumerate(zip(self.names, (self.passes, self.depths), strict=True))
        )
        data = json.dumps({"values": [self.passes, self.depths], "frames": frames, "words": words})
        return _PAGE.format(
            id=key,
            controls=controls,
            first=frames[0],
            words=html.escape(words[0], quote=True),
            data=data.replace("</", "<\\/"),
        )

    def _repr_mimebundle_(self, include=None, exclude=None) -> dict[str, object]:
        bundle: dict[str, object] = {"text/plain": repr(self), "text/html": self.page()}
        widget = self.widget()
        if hasattr(widget, "_repr_mimebundle_"):  # ipywidgets 8; with 7 the page's own sliders serve
            bundle.update(widget._repr_mimebundle_() or {})
        return bundle


def small_png(figure: Figure, colours: int = 64) -> bytes:
    """Return a figure as a PNG of at most ``colours`` colours."""
    raw, small = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png")
    Image.open(raw).convert("RGB").quantize(colours, kmeans=1).save(small, format="png", optimize=True)
    return small.getvalue()


_CONTROL = """
<div class="explorer-control"><label for="{id}">{name}: <output for="{id}">{first}</output></label>
<input type="range" id="{id}" min="0" max="{last}" step="1" value="0"></div>"""

_PAGE = """<div class="explorer" id="{id}">
<style>
.explorer {{max-width: 42rem; padding: .75rem 1rem; border: 1px solid #8884; border-radius: .5rem}}
.explorer {{background: #fff; color: #222831}}
.explorer-control {{display: flex; flex-wrap: wrap; gap: .25rem 1rem; align-items: center; margin-bottom: .4rem}}
.explorer-control label {{flex: 0 0 11rem; font-weight: 600}}
.explorer-control output {{font-variant-numeric: tabular-nums}}
.explorer-control input {{flex: 1 1 12rem; min-width: 8rem; accent-color: #1f4e9e}}
.explorer-control input:focus-visible {{outline: 3px solid #1f4e9e; outline-offset: 3px}}
.explorer img {{max-width: 100%; height: auto; display: block; margin: .5rem auto 0}}
.explorer p {{margin: .5rem 0 0}}
</style>{controls}
<img src="data:image/png;base64,{first}" alt="{words}">
<p aria-live="polite">{words}</p>
<script type="application/json">{data}</script>
<script>
(() => {{
  const box = document.getElementById("{id}");
  const {{values, frames, words}} = JSON.parse(box.querySelector('script[type="application/json"]').textContent);
  const sliders = [...box.querySelectorAll("input")], shown = [...box.querySelectorAll("output")];
  const show = () => {{
    const at = sliders.map((slider) => Number(slider.value));
    at.forEach((index, i) => {{
      shown[i].textContent = values[i][index];
      sliders[i].setAttribute("aria-valuetext", values[i][index]);
    }});
    const frame = at[0] * values[1].length + at[1];
    box.querySelector("img").src = "data:image/png;base64," + frames[frame];
    box.querySelector("img").alt = words[frame];
    box.querySelector("p").textContent = words[frame];
  }};
  sliders.forEach((slider) => slider.addEventListener("input", show));
  show();
}})();
</script></div>"""
