"""What is in S after each pass: linear probes, and the controls that say how much of it is the probe's own work.

A probe is a ridge regression from S to labels it has to name: the node k hops after every node of a graph, or every
bit of an automaton's row t steps on. It is fitted on some examples, its penalty chosen on others, its score measured
on a third part. No ring of nodes, and no row of bits, is in two parts. Chapter 9.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sleepedu import checks, files
from sleepedu.intervals import Accuracy, Table, wilson_interval
from sleepedu.lab import run_store
from sleepedu.lab.run_store import Run
from sleepedu.model import FastWeights, SleepLM
from sleepedu.sleep_loop import check_passes, sleep, wake
from sleepedu.tasks import CellularAutomaton, Episode, GraphRetrieval, Task
from sleepedu.tasks.cellular_automaton import space_time
from sleepedu.tasks.random_streams import TESTING, stream
from sleepedu.trace import SleepTrace

VERSION = 1  # of the stored form
# From S: a linear probe of all of it, one of what the model's own query reads, and the model itself, woken. The same
# probes for a model of the same form with random weights, and the first for the labels of other examples. Without S: a
# linear probe of what was read, and the most frequent label.
READERS = ("S", "query", "awake", "untrained S", "untrained query", "shuffled", "facts", "constant")
RIDGES = tuple(10.0**power for power in range(-6, 3))  # penalties, for features of variance 1
EXAMPLES = 1  # the number of the test stream they are drawn from; accuracy_by_depth begins at 10,000
CHUNK = 500  # examples that are read at once

Shares = dict[str, list[list[float | None]]]  # reader -> pass -> step


@dataclass(frozen=True)
class Settings:
    """What a table of probes depends on besides the run; raises ValueError for passes < 1 or episodes < 100."""

    passes: int = field(default=8, metadata={"help": "probe after pass 1 to this one"})
    episodes: int = field(default=10_000, metadata={"help": "drawn: 5/8 to fit, 1/8 to choose, 1/4 to test with"})
    seed: int = field(default=0, metadata={"help": "of the examples and of the untrained model"})

    def __post_init__(self):
        check_passes(self.passes)
        checks.whole("episodes", self.episodes, least=100)
        checks.seed(self.seed)


@dataclass(frozen=True)
class Probes:
    """How often each reader names the right label after each pass, on examples that it was not fitted on."""

    run: str
    weights: str  # the beginning of their checksum
    settings: Settings
    steps: tuple[int, ...]
    examples: dict[str, int]  # how many there were to "fit", "choose" and "test"
    each: Shares  # of all labels; None for a step that the task has no question for, one row where nothing sleeps
    whole: Shares  # of all examples: those with all their labels right
    provenance: dict[str, Any]

    def table(self, reader: str, n: int = 1, whole: bool = False) -> Table:
        """Return what a reader scores after pass n: step -> accuracy, with the interval of as many test examples.

        Raises ValueError for a reader or pass that is not there.
        """
        shares, tested = self.whole if whole else self.each, self.examples["test"]
        if reader not in shares:
            raise ValueError(f"reader {reader!r} is unknown: use one of {', '.join(shares)}")
        if n not in range(1, self.settings.passes + 1):
            raise ValueError(f"pass n must lie in 1..{self.settings.passes}, got {n}")
        row = shares[reader][min(n, len(shares[reader])) - 1]
        return {
            step: Accuracy(share, *wilson_interval(share, tested), tested, constant or 0.0)
            for step, share, constant in zip(self.steps, row, shares["constant"][0], strict=True)
            if share is not None
        }

    def json(self) -> str:
        """Return everything as JSON, as it is stored."""
        return run_store.readable_json({"version": VERSION, **asdict(self)})


def probe_run(run: Run, settings: Settings | None = None, directory: Path | str = run_store.OWN) -> Probes:
    """Return the stored probes of a run with these settings, or make and store them now (about half a minute).

    Looks in the committed store, then in ``directory``, where new ones go. Raises ValueError or OSError for a run that
    has no weights or cannot be probed, and for stored probes that are broken.
    """
    settings, weights = settings or Settings(), run.weights[:16]
    for store in (run_store.COMMITTED, Path(directory)):
        path = store / "probes" / f"{run.name}.json"
        if path.exists():
            found = load_probes(path)
            if found.settings == settings and found.weights == weights:
                return found
    started = time.perf_counter()
    made = probe_model(run.load_model(), run.make_task(), settings)
    provenance = {**run_store.machine(torch.device("cpu")), "seconds": round(time.perf_counter() - started, 1)}
    files.write(path, Probes(run.name, weights, settings, **made, provenance=provenance).json().encode())
    return load_probes(path)


def load_probes(path: Path | str) -> Probes:
    """Return stored probes. Raises FileNotFoundError where there are none, ValueError where they are broken."""
    content = Path(path).read_bytes()
    try:
        stored = json.loads(content)
        if stored.pop("version") != VERSION:
            raise ValueError(f"this library reads version {VERSION}")
        return Probes(**stored | {"settings": Settings(**stored["settings"]), "steps": tuple(stored["steps"])})
    except Exception as error:  # broken bytes lead anywhere
        raise run_store.broken(Path(path), error) from error


@torch.no_grad()
def probe_model(model: SleepLM, task: Task, settings: Settings) -> dict[str, Any]:
    """Return the probes of a model as plain numbers: ``steps``, ``examples``, ``each`` and ``whole`` of ``Probes``.

    Raises ValueError for a model without fast weights, a task that ``hidden_states`` refuses, or too few examples.
    """
    if not model.fast_layers:
        raise ValueError(f"layout {model.config.layout!r} has no fast weights to probe: use one with 'g'")
    draw = partial(stream, settings.seed, TESTING)
    episode = task.sample(settings.episodes, draw(EXAMPLES))
    steps, states, prompts = hidden_states(task, episode)
    parts = split(episode.windows.flatten(1), states[:, 0], draw(EXAMPLES + 1))
    counts = [len(part) for part in parts]
    if min(counts) < 2:
        told = f"{settings.episodes} episodes have {', '.join(map(str, counts))} different examples to fit, choose and"
        raise ValueError(f"{told} test with, and each takes 2: draw more episodes, or of a larger task")
    classes, labels = int(states.max()) + 1, [states[part] for part in parts]
    both = [torch.cat((y, y[torch.randperm(len(y), generator=draw(EXAMPLES + 2))]), dim=1) for y in labels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        untrained = SleepLM(model.config).eval()

    named: dict[str, list[Tensor]] = defaultdict(list)
    for prefix, one in (("", model), ("untrained ", untrained)):
        passes = [_after_each_pass(one, episode.windows[part, 0], settings.passes) for part in parts]
        for S in zip(*passes, strict=True):
            flat = [torch.cat([matrix.flatten(1) for matrix in part], dim=1) for part in S]
            own, shuffled = read_out(flat, both, classes).split(len(steps), dim=1)
            query, awake = _ask(one, prompts, S, labels, classes)
            for reader, given in (("S", own), ("shuffled", shuffled), ("query", query), ("awake", awake)):
                named[prefix + reader].append(given)
    named["facts"] = [read_out([F.one_hot(y[:, 0], classes).flatten(1) for y in labels], labels, classes)]
    named["constant"] = [labels[0].mode(dim=0).values.expand_as(labels[2])]

    def shares(given: Tensor, whole: bool) -> list[float | None]:
        right = (given == labels[2]).double()  # (test, steps, items)
        share = (right.amin(dim=2) if whole else right.mean(dim=2)).mean(dim=0).tolist()
        return [round(x, 5) if label >= 0 else None for x, label in zip(share, given[0, :, 0], strict=True)]

    each, whole = ({r: [shares(given, w) for given in named[r]] for r in READERS} for w in (False, True))
    examples = dict(zip(("fit", "choose", "test"), counts, strict=True))
    return {"steps": steps, "examples": examples, "each": each, "whole": whole}


def _after_each_pass(model: SleepLM, windows: Tensor, passes: int) -> list[FastWeights]:
    """Return S of all windows (b, l) after pass 1, 2, ... of one sleep."""
    chunks = []
    for tokens in windows.split(CHUNK):
        sleep(model, tokens, passes=passes, trace=(trace := SleepTrace()))
        chunks.append(trace.S[0][1:])
    return [tuple(map(torch.cat, zip(*after, strict=True))) for after in zip(*chunks, strict=True)]


def _ask(
    model: SleepLM, prompts: list[Tensor | None], S: Sequence[FastWeights], labels: list[Tensor], classes: int
) -> tuple[Tensor, Tensor]:
    """Return the labels (test, steps, items) by a probe of what queries read, and as woken; -1 where none can ask."""
    query, awake = torch.full_like(labels[2], -1), torch.full_like(labels[2], -1)
    for step, prompt in enumerate(prompts):
        if prompt is not None:
            items = labels[2].shape[2]
            asked = slice(len(prompt) // items - 1, None, len(prompt) // items)
            awake[:, step] = wake(model, prompt.expand(len(labels[2]), -1), S[2])[:, asked].argmax(dim=-1)
            reads = [read_by_query(model, prompt, part, asked) for part in S]
            for item in range(items):
                wanted = [y[:, step, item, None, None] for y in labels]
                query[:, step, item] = read_out([x[:, item] for x in reads], wanted, classes)[:, 0, 0]
    return query, awake


def hidden_states(task: Task, episode: Episode) -> tuple[tuple[int, ...], Tensor, list[Tensor | None]]:
    """Return the steps of a computation, the labels after each, and a prompt (p,) that asks for all of these in turn.

    A graph: the node k hops after every node, k = 1, 2, ... An automaton: every bit after t = 0, 1, ... steps, where 0
    is what was read, and None the prompt for a t that cannot be asked. Labels: (b, steps, items) int64.
    Raises ValueError for a task other than a graph in one window with names of one token or an automaton of one row.
    """
    if isinstance(task, GraphRetrieval) and task.name_tokens == task.windows == 1 and not task.shortest:
        maps, nodes, steps = [task.successors(episode)], torch.arange(task.nodes), tuple(range(1, task.hops + 1))
        for _ in steps[1:]:
            maps.append(maps[0].gather(1, maps[-1]))
        words = [torch.full_like(nodes, task.words.index(f"+{k}")) for k in steps]
        return steps, torch.stack(maps, dim=1), [torch.stack((word, nodes), dim=1).flatten() for word in words]
    if isinstance(task, CellularAutomaton) and task.ask == "every":
        steps = tuple(range(max(task.steps) + 1))
        asked = {t: torch.full((task.cells,), task.words.index(f"?{t}")) for t in task.steps}
        return steps, space_time(episode.windows[:, 0], task.rule, steps[-1]).long(), [asked.get(t) for t in steps]
    allowed = "a graph with name_tokens=1, windows=1 and shortest=0, or an automaton with ask='every'"
    raise ValueError(f"the task {task} has no probe: use {allowed}")


def split(windows: Tensor, content: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of the examples to fit, choose and test with; every content (b, items) is in one part only.

    An example whose window (b, L) occurred before is left out, and so is one to choose or test with whose content did.
    """
    new = torch.from_numpy(np.sort(np.unique(windows.numpy(), axis=0, return_index=True)[1]))
    kinds, first, which = np.unique(content[new].numpy(), axis=0, return_index=True, return_inverse=True)
    place = torch.randperm(len(kinds), generator=generator)[which.ravel()] / len(kinds)
    once = torch.zeros(len(new), dtype=torch.bool)
    once[first] = True
    return new[place < 5 / 8], new[(place >= 5 / 8) & (place < 3 / 4) & once], new[(place >= 3 / 4) & once]


def read_out(features: Sequence[Tensor], labels: Sequence[Tensor], classes: int) -> Tensor:
    """Fit a linear probe and return the labels that it gives the test examples: (test, steps, items).

    features: (b, size) of the examples to fit, to choose and to test; labels: (b, steps, items) of the same. Labels are
    encoded one-hot and fitted by ridge regression on standardised features; the largest value names the class. For
    every step the penalty of ``RIDGES`` is taken that has the least squared error on the examples to choose.
    """
    fit, choose, test = (part.double() for part in features)
    mean, spread = fit.mean(dim=0), fit.std(dim=0)
    spread = spread.where(spread > 1e-6 * spread.max(), math.inf)  # what never varies tells nothing
    fit, choose, test = ((part - mean) / spread for part in (fit, choose, test))
    wanted, aim = (F.one_hot(part, classes).double() for part in labels[:2])
    base = wanted.mean(dim=0)
    variance, basis = torch.linalg.eigh(fit.T @ fit / len(fit))
    weights = basis.T @ (fit.T @ (wanted - base).flatten(1)) / len(fit)
    choose, test = choose @ basis, test @ basis
    least = torch.full((wanted.shape[1],), math.inf, dtype=torch.double)
    answers = torch.zeros(len(test), *wanted.shape[1:3], dtype=torch.long)
    for ridge in RIDGES:
        scaled = weights / (variance.clamp_min(0) + ridge)[:, None]
        error = ((choose @ scaled).view_as(aim) + base - aim).square().mean(dim=(0, 2, 3))
        better = error < least
        least = error.minimum(least)
        answers[:, better] = ((test @ scaled).view(-1, *base.shape) + base).argmax(dim=-1)[:, better]
    return answers


@torch.no_grad()
def read_by_query(model: SleepLM, prompt: Tensor, S: FastWeights, asked: slice) -> Tensor:
    """Return what the queries of a prompt (p,) read from each S, where it asks something: (b, asked, size).

    That is S q of all heads and fast-weight layers, S being as given: without what the prompt itself writes.
    """
    h, left, reads = model.embed(prompt.expand(len(S[0]), -1)), iter(S), []
    for block in model.layers:
        before = next(left) if block.has_fast_weights else None
        if before is not None:
            q = block.mixer.rule_inputs(block.mixer_norm(h), before.dtype).q[:, :, asked]  # (b, heads, asked, d_k)
            reads.append(torch.einsum("bhvk,bhpk->bphv", before, q).flatten(2))
        h, _ = block(h, before)
    return torch.cat(reads, dim=-1)
