"""The trained models of the book's first page: their weights, rounded, as a script that needs no server.

``book/_extra/live/model.js`` is the same model in JavaScript and reads what is written here. A page opened from disk
may load scripts but no data, so the weights are a script too. Four models in eight bits would take half a megabyte in
base64, a third of it overhead. Here a matrix has one scale a row and a number is one printable character, 91 levels.

That is too coarse at one place. Queries and keys are divided by their length, so an error that is small beside a row's
largest weight is large beside a query that happens to be short: one of the models then lost its way from one node,
whenever it was asked for three hops from there. What a query is made of, the embedding, the projection and the taps of
the convolution, has two characters a number, 8,281 levels. The tests hold the rounded models to the stored tables.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sleepedu.lab.experiments import COMMITTED, Run, load
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.pictures import figures
from sleepedu.pictures.explorer import small_png
from sleepedu.sleep_loop import SleepTrace, sleep, wake
from sleepedu.tasks.graph_retrieval import LETTERS

PASSES = (1, 2, 3, 4)
FOLDER = Path("book/_extra/live")
DIGITS = 91  # a character is a digit; "#" is 0 and "}" is 90
FIRST, BACKSLASH, INSTEAD = 35, 92, 126  # a backslash would need escaping: "~" stands for it
EXAMPLE: dict[str, Any] = {
    "ring": [2, 5, 7, 0, 4, 1, 6, 3],
    "told": [4, 7, 2, 6, 0, 3, 5, 1],
    "start": 2,
    "hops": 3,
    "passes": 4,
}

_HEAD = """\
// The weights of the models in model.js. Written by `python -m sleepedu export-live`: do not edit.
globalThis.sleepeduLiveWeights = """


def export(directory: Path | str = FOLDER, runs: Path | str = COMMITTED) -> list[Path]:
    """Write weights.js and the picture that stands in for the live model, still.png; return their paths.

    runs: the folder that holds the four runs, one for every N. Raises FileNotFoundError or ValueError for a run that
    is missing or broken; nothing is written then.
    """
    text = script(find_runs(runs))
    picture = small_png(still(read_models(text)))
    files = {"weights.js": text.encode(), "still.png": picture}
    paths = [Path(directory) / name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        files.write(path, content)
    return paths


def find_runs(directory: Path | str = COMMITTED) -> list[Run]:
    """Return the run of every N in 1..4 that the page shows.

    Raises FileNotFoundError or ValueError for a run that is missing or broken.
    """
    return [load(Path(directory) / f"graph-laptop-sleep-N{passes}-seed0") for passes in PASSES]


def script(runs: Sequence[Run]) -> str:
    """Return weights.js: the task's words, the models' shape, and for every run its table and rounded weights.

    All runs must be of one task and one model. Raises ValueError otherwise, and for missing or broken weights.
    """
    task, config = runs[0].settings["task"], runs[0].settings["model"]
    if any(run.settings["task"] != task or run.settings["model"] != config for run in runs):
        raise ValueError(f"the runs {', '.join(run.name for run in runs)} are not of one task and one model")
    data = {
        "words": list(runs[0].make_task().words),
        "nodes": task["nodes"],
        "hops": task["hops"],
        "config": config,
        "example": EXAMPLE,
        "models": {str(run.settings["train"]["passes"]): _packed_run(run) for run in runs},
    }
    return f"{_HEAD}{json.dumps(data, indent=1)};\n"


def _packed_run(run: Run) -> dict[str, Any]:
    return {
        "run": run.name,
        "examples": next(iter(run.table.values())).n,
        "accuracy": {str(depth): accuracy.accuracy for depth, accuracy in run.table.items()},
        "weights": _packed_weights(run.load_model()),
    }


def _packed_weights(model: SleepLM) -> dict[str, Any]:
    packed: dict[str, Any] = {name: pack(tensor) for name, tensor in model.state_dict().items()}
    heads, _, key_size = model.config.state_shape
    for index in model.fast_layers:
        mixer, name = model.layers[index].mixer, f"layers.{index}.mixer"
        project = mixer.project.weight.detach()
        queries_and_keys = 2 * heads * key_size
        packed[f"{name}.project.weight"] = [pack(project[:queries_and_keys], 2), pack(project[queries_and_keys:])]
        packed[f"{name}.taps"] = pack(mixer.taps.detach(), 2)
    packed["embedding.weight"] = pack(model.embedding.weight.detach(), 2)
    return packed


def pack(tensor: Tensor, characters: int = 1) -> dict[str, Any]:
    """Return a vector (n,) as its 32-bit numbers, a matrix (rows, columns) rounded, with one scale for every row.

    characters: digits to base 91 a number; a row's numbers are rounded to 91 or 91^2 levels, evenly on both sides of 0.
    """
    numbers = tensor.numpy().astype("<f4")
    if numbers.ndim == 1:
        return {"numbers": _base64(numbers)}
    most = DIGITS**characters // 2
    scales = (np.abs(numbers).max(axis=1) / np.float32(most)).astype("<f4")
    divisors = np.where(scales == 0, 1, scales).astype("f8")
    levels = np.rint(numbers / divisors[:, None]).clip(-most, most).astype("i8") + most
    digits = np.stack([levels // DIGITS**place % DIGITS for place in reversed(range(characters))], axis=-1)
    codes = (digits + FIRST).astype("u1")
    codes[codes == BACKSLASH] = INSTEAD
    return {
        "columns": numbers.shape[1],
        "characters": characters,
        "scales": _base64(scales),
        "levels": codes.tobytes().decode("ascii"),
    }


def unpack(packed: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tensor:
    """Return the float32 tensor that ``pack`` made this from, with a matrix as it was rounded; a list has its rows."""
    if not isinstance(packed, Mapping):
        return torch.cat([unpack(part) for part in packed])
    if "numbers" in packed:
        return torch.from_numpy(_from_base64(packed["numbers"]))
    codes = np.frombuffer(packed["levels"].encode("ascii"), "u1").astype("i8")
    codes[codes == INSTEAD] = BACKSLASH
    characters = packed["characters"]
    places = DIGITS ** np.arange(characters)[::-1]
    levels = (codes.reshape(-1, packed["columns"], characters) - FIRST) @ places - DIGITS**characters // 2
    return torch.from_numpy(levels.astype("f4") * _from_base64(packed["scales"])[:, None])


def read_models(text: str) -> dict[int, SleepLM]:
    """Return the rounded model for every N in the text of a weights.js."""
    data = json.loads(text.removeprefix(_HEAD).rstrip(";\n"))
    models = {}
    for passes, stored in data["models"].items():
        models[int(passes)] = SleepLM(ModelConfig(**data["config"])).eval()
        models[int(passes)].load_state_dict({name: unpack(packed) for name, packed in stored["weights"].items()})
    return models


@torch.no_grad()
def ask(
    model: SleepLM, passes: int, ring: Sequence[int], told: Sequence[int], start: int, hops: int
) -> tuple[Tensor, SleepTrace]:
    """Tell a model a ring, let it sleep, and ask it one question: the logits (V,) and what happened in its sleep.

    ring: all nodes, in the order of the arrows. told: all nodes, in the order in which their arrows are told.
    """
    following = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
    window = torch.tensor([[node for start in told for node in (start, following[start])]])
    trace = SleepTrace()
    S = sleep(model, window, passes=passes, trace=trace)
    return wake(model, torch.tensor([[len(ring) + hops - 1, start]]), S)[0, -1], trace


def still(models: Mapping[int, SleepLM]) -> Figure:
    """Draw one question, the fast weights after every pass, and the answer, at the smallest and the largest N."""
    ring, told, start, hops = (EXAMPLE[name] for name in ("ring", "told", "start", "hops"))
    place = ring.index(start)
    walk = [LETTERS[ring[(place + step) % len(ring)]] for step in range(hops + 1)]
    shown = (min(models), max(models))
    with figures.new_figure(8.4, 3.6, len(shown), max(shown) + 1) as (figure, rows):
        for row, passes in zip(rows, shown, strict=True):
            logits, trace = ask(models[passes], passes, ring, told, start, hops)
            matrices = [torch.cat([*S[0][0]], dim=1) for S in trace.S[0][1:]]
            reach = torch.stack(matrices).abs().quantile(0.995).item()
            for number, picture in enumerate(row[:-1]):
                picture.axis("off")
                if number < passes:
                    heads = matrices[number].unflatten(1, (-1, 16)).transpose(0, 1)
                    square = torch.cat([torch.cat([*heads[:2]], dim=1), torch.cat([*heads[2:]], dim=1)])
                    picture.imshow(square.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
                    picture.set_title(f"pass {number + 1}", fontsize=9.5, loc="center")
            _draw_answer(row[-1], logits.softmax(-1), walk[-1], f"N = {passes}")
        figure.suptitle(f"Asked: {hops} hops after {walk[0]}. The arrows go {' → '.join(walk)}.", fontsize=11.5)
    return figure


def _draw_answer(axes, probabilities: Tensor, truth: str, title: str) -> None:
    top = probabilities[: len(EXAMPLE["ring"])].topk(4)  # of the nodes; the other words get next to nothing
    names = [LETTERS[node] for node in top.indices.tolist()]
    shades = [figures.RIGHT if name == truth else figures.WRONG for name in names]
    axes.barh(names, top.values.tolist(), color=shades, height=0.7)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50%", "100%"], title=title)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(labelsize=9)


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def _from_base64(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f4").astype("f4")
