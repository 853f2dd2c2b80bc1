"""The trained models that run in the book's pages: their weights, rounded, as a script that needs no server.

``python book/live_model.py`` writes them anew: weights.js with a model for every N, and light_sleeper.js with one that was
trained with one to eight passes, for the page that leaves it asleep.

``_extra/live/model.js`` is the same model in JavaScript and reads what is written here. A page opened from disk
may load scripts but no data, so the weights are a script too. A matrix has one scale a row, and a number is a printable
character, 91 levels. Queries and keys are divided by their length, so an error that is small beside a row's largest
weight is large beside a query that happens to be short. What a query is made of, the embedding, the projection and the
taps of the convolution, has two characters a number. The tests hold the rounded models to the stored tables.
"""

import argparse
import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from torch import Tensor

from sleepedu import storage
from sleepedu.lab.probes import probe_run
from sleepedu.lab.run_store import COMMITTED, load_run
from sleepedu.model import SleepLM
from sleepedu.pictures import figures
from sleepedu.pictures.explorer import small_picture
from sleepedu.sleep_loop import sleep, wake
from sleepedu.tasks.graph_retrieval import LETTERS
from sleepedu.trace import SleepTrace

PASSES = (1, 2, 3, 4)
RUNS = tuple(f"graph-laptop-sleep-N{passes}-seed0" for passes in PASSES)  # the names of the runs that the page shows
LIGHT_SLEEPER = "graph-laptop-varied-N8-seed0"
FOLDER = Path(__file__).parent / "_extra" / "live"
# The 91 digits that a number is written in; a backslash would need escaping.
DIGITS = np.frombuffer(bytes(range(ord("#"), ord("~"))).replace(b"\\", b"~"), "u1")
RING, TOLD, START, HOPS = [2, 5, 7, 0, 4, 1, 6, 3], [4, 7, 2, 6, 0, 3, 5, 1], 2, 3  # the example, as in ``ask``

_HEAD = """\
// The weights of {what} in model.js. Written by `python book/live_model.py`: do not edit.
globalThis.sleepeduLiveWeights{where} = {data};
"""


def export(runs: Sequence[Any], light_sleeper: Any, directory: Path | str = FOLDER) -> list[Path]:
    """Write weights.js, light_sleeper.js, and the picture that stands in for the live model, still.png; return their paths.

    runs: as in ``script``. Raises ValueError as that does, and OSError; nothing is written for a run that is broken.
    """
    models = {run.settings["train"]["passes"]: run.load_model() for run in runs}
    files = {
        "weights.js": script(runs).encode(),
        "light_sleeper.js": light_sleeper_script(light_sleeper, runs[0]).encode(),
        "still.png": small_picture(still(models), "png"),
    }
    for name, content in files.items():
        storage.write(Path(directory, name), content)
    return [Path(directory, name) for name in files]


def script(runs: Sequence[Any]) -> str:
    """Return weights.js: the task's words, the models' shape, and for every run its table, probes and rounded weights.

    runs: stored runs, each of another N, with their name, settings, table, load_model() and make_task(). Raises
    ValueError when they are not of one task and one model, and what load_model raises for missing or broken weights.
    "probes" is what chapter 9 reads from S, for every pass and number of hops; "reach" the size at which the one
    colour scale of all fast weights ends.
    """
    task, config = _one_kind(runs)
    loaded = {run.settings["train"]["passes"]: run.load_model() for run in runs}
    models = {
        str(passes): {
            "run": run.name,
            "examples": next(iter(run.table.values())).n,
            "accuracy": {str(depth): accuracy.accuracy for depth, accuracy in run.table.items()},
            "probes": probe_run(run).each["S"][:passes],
            "weights": _pack_model(model),
        }
        for run, (passes, model) in zip(runs, loaded.items(), strict=True)
    }
    data = {
        "words": list(runs[0].make_task().words),
        "nodes": task["nodes"],
        "hops": task["hops"],
        "config": config,
        "example": {"ring": RING, "told": TOLD, "start": START, "hops": HOPS, "passes": max(PASSES)},
        "reach": round(reach(loaded), 2),
        "models": models,
    }
    return _HEAD.format(what="the models", where="", data=json.dumps(data, indent=1))


def light_sleeper_script(run: Any, beside: Any) -> str:
    """Return light_sleeper.js: one more model beside those of weights.js. Raises ValueError where it is of another kind."""
    _one_kind([run, beside])
    data = {"run": run.name, "weights": _pack_model(run.load_model())}
    return _HEAD.format(what="one more model", where='.models["1 to 8"]', data=json.dumps(data, indent=1))


def _one_kind(runs: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the runs' one task and one model."""
    task, config = runs[0].settings["task"], runs[0].settings["model"]
    if any(run.settings["task"] != task or run.settings["model"] != config for run in runs):
        raise ValueError(f"the runs {', '.join(run.name for run in runs)} are not of one task and one model")
    return task, config


def _pack_model(model: SleepLM) -> dict[str, Any]:
    weights, (heads, _, key_size) = model.state_dict(), model.config.state_shape
    packed: dict[str, Any] = {name: pack_weights(tensor) for name, tensor in weights.items()}
    for index in model.fast_layers:
        project, taps = f"layers.{index}.mixer.project.weight", f"layers.{index}.mixer.taps"
        parts = weights[project].tensor_split([2 * heads * key_size])  # queries and keys, everything else
        packed[project] = [pack_weights(part, characters) for part, characters in zip(parts, (2, 1), strict=True)]
        packed[taps] = pack_weights(weights[taps], 2)
    return packed | {"embedding.weight": pack_weights(weights["embedding.weight"], 2)}


def pack_weights(tensor: Tensor, characters: int = 1) -> dict[str, Any]:
    """Return a vector (n,) as its 32-bit numbers, a matrix (rows, columns) rounded, with one scale for every row.

    characters: digits to base 91 a number; a row's numbers are rounded to 91 or 91^2 levels, evenly on both sides of 0.
    """
    numbers = tensor.numpy().astype("<f4")
    if numbers.ndim == 1:
        return {"numbers": _base64(numbers)}
    base = len(DIGITS)
    most = base**characters // 2
    scales = (np.abs(numbers).max(axis=1) / np.float32(most)).astype("<f4")
    divisors = np.where(scales == 0, 1, scales).astype("f8")
    levels = np.rint(numbers / divisors[:, None]).clip(-most, most).astype("i8") + most
    digits = np.stack(np.unravel_index(levels, [base] * characters), axis=-1)
    text = DIGITS[digits].tobytes().decode("ascii")
    return {"columns": numbers.shape[1], "characters": characters, "scales": _base64(scales), "levels": text}


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


def reach(models: Mapping[int, SleepLM]) -> float:
    """Return the size that all but one number in 200 of S stay below, at the N where that is largest."""
    traces = (ask(model, passes, RING, TOLD, START, HOPS)[1] for passes, model in models.items())
    return max(trace.stack(0)[1:].abs().quantile(0.995).item() for trace in traces)


def still(models: Mapping[int, SleepLM]) -> Figure:
    """Draw one question, the fast weights after every pass, and the answer, at the smallest and the largest N.

    It has the shape of the pictures that are shown beside a link to the page, 1200 to 630.
    """
    place = RING.index(START)
    walk = [LETTERS[RING[(place + step) % len(RING)]] for step in range(HOPS + 1)]
    shown, most = (min(models), max(models)), reach(models)
    with figures.new_figure(8.4, 4.41, len(shown), max(shown) + 1) as (figure, rows):
        for row, passes in zip(rows, shown, strict=True):
            logits, trace = ask(models[passes], passes, RING, TOLD, START, HOPS)
            matrices = trace.stack(0)[1:, 0, 0]  # (passes, heads, d_v, d_k)
            for picture in row[:-1]:
                picture.axis("off")
            for number, (picture, S) in enumerate(zip(row, matrices, strict=False), start=1):
                square = rearrange(S, "(two more) v k -> (two v) (more k)", two=2).numpy()
                picture.imshow(square, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
                picture.set_title(f"pass {number}", fontsize=9.5, loc="center")
            _draw_answer(row[-1], logits.softmax(-1), walk[-1], f"N = {passes}")
        question = f"{HOPS} hops after {walk[0]}? The arrows went {' → '.join(walk)}, and are gone."
        figure.suptitle(f"Language models that sleep\n{question}", fontsize=13)
    return figure


def _draw_answer(axes: Any, probabilities: Tensor, truth: str, title: str) -> None:
    top = probabilities[: len(RING)].topk(4)  # of the nodes; the other words get next to nothing
    names = [LETTERS[node] for node in top.indices.tolist()]
    shades = [figures.RIGHT if name == truth else figures.WRONG for name in names]
    axes.barh(names, top.values.tolist(), color=shades, height=0.7)
    axes.set(xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "50%", "100%"], title=title)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(labelsize=9)


def _base64(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the models that run in the book's pages.")
    parser.add_argument("--runs", type=Path, default=COMMITTED, help="folder to take the runs from")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        runs = [load_run(options.runs / name) for name in (*RUNS, LIGHT_SLEEPER)]
        written = export(runs[:-1], runs[-1], options.to)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {storage.first_line(error)}\n")
    for path in written:
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
