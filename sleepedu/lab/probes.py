"""What is in S after each pass: linear probes, and the controls that say how much of it is the probe's own work.

A probe is a ridge regression from S to labels it has to name: the node k hops after every node of a graph, or every
bit of an automaton's row t steps on. It is fitted on some examples, its penalty is chosen on others, and what it scores
is measured on a third part. No ring of nodes, and no row of bits, is in two parts. Chapter 9.
"""

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sleepedu import checks, storage
from sleepedu.intervals import Accuracy, Table, wilson_interval
from sleepedu.lab import run_store
from sleepedu.lab.run_store import Run
from sleepedu.model import FastWeights, SleepLM
from sleepedu.sleep_loop import check_passes, sleep, wake
from sleepedu.tasks import CellularAutomaton, GraphRetrieval, Task
from sleepedu.tasks.base import Episode
from sleepedu.tasks.cellular_automaton import space_time
from sleepedu.tasks.random_streams import TESTING, stream
from sleepedu.trace import SleepTrace

VERSION = 1  # of the stored form
READERS = {
    "S": "a linear probe of all of S",
    "query": "a linear probe of what the model's own query reads from S",
    "awake": "the model itself, woken after the pass",
    "untrained S": "the probe of all of S, for a model of the same form with random weights",
    "untrained query": "the probe of what a query reads, for that model",
    "shuffled": "the probe of all of S, fitted to the labels of other examples",
    "facts": "a linear probe of what was read, without a model",
    "constant": "the most frequent label, whatever was read",
}
RIDGES = tuple(10.0**power for power in range(-6, 3))  # penalties, for features of variance 1
STREAM = 1  # the number of the test stream they are drawn from; accuracy_by_depth begins at 10,000
CHUNK = 500  # examples that are read at once


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
    """How often each reader names the right label after each pass, on examples that it was not fitted on.

    each[reader][n - 1] has a share for every step in ``steps``, None where the task has no such question; labels are
    counted one by one. whole: the same, where an example counts when all its labels are right. A reader that does not
    depend on the sleep has one row. examples: how many there were to "fit", "choose" and "test". weights: the hash of
    the file of weights that was probed.
    """

    run: str
    weights: str
    settings: Settings
    steps: tuple[int, ...]
    examples: dict[str, int]
    each: dict[str, list[list[float | None]]]
    whole: dict[str, list[list[float | None]]]
    provenance: dict[str, Any]

    def table(self, reader: str, n: int = 1, whole: bool = False) -> Table:
        """Return what a reader scores after pass n: step -> accuracy, with the interval of as many test examples.

        Raises ValueError for a reader or pass that is not there.
        """
        shares = self.whole if whole else self.each
        tested, (constants,) = self.examples["test"], shares["constant"]
        checks.one_of("reader", reader, shares)
        checks.whole("pass n", n, least=1, most=self.settings.passes)
        row = shares[reader][min(n, len(shares[reader])) - 1]
        return {
            step: Accuracy(share, *wilson_interval(share, tested), tested, constant or 0.0)
            for step, share, constant in zip(self.steps, row, constants, strict=True)
            if share is not None
        }


def probe_run(run: Run, settings: Settings | None = None, directory: Path | str = run_store.OWN) -> Probes:
    """Return the stored probes of a run with these settings, or make and store them now (about half a minute).

    Looks in the committed store, then in ``directory``, where new ones go.
    Raises ValueError for a run that cannot be probed (see ``probe_model``) or probes or weights that are broken,
    FileNotFoundError for a run without weights, OSError when the probes cannot be written.
    """
    settings, weights = settings or Settings(), run.weights_checksum[:16]
    for store in (run_store.COMMITTED, Path(directory)):
        path = store / "probes" / f"{run.name}.json"
        if path.exists():
            found = load_probes(path)
            if found.settings == settings and found.weights == weights:
                return found
    started = time.perf_counter()
    made = probe_model(run.load_model(), run.make_task(), settings)
    provenance = {**run_store.machine(torch.device("cpu")), "seconds": round(time.perf_counter() - started, 1)}
    stored = {"version": VERSION, **asdict(Probes(run.name, weights, settings, **made, provenance=provenance))}
    storage.write(path, run_store.readable_json(stored).encode())
    return load_probes(path)


def load_probes(path: Path | str) -> Probes:
    """Return stored probes. Raises FileNotFoundError where there are none, ValueError where they are broken."""
    content = Path(path).read_bytes()
    with storage.reading(Path(path)):
        stored = json.loads(content)
        if stored.pop("version") != VERSION:
            raise ValueError(f"this library reads version {VERSION}")
        return Probes(**stored | {"settings": Settings(**stored["settings"]), "steps": tuple(stored["steps"])})


@torch.no_grad()
def probe_model(model: SleepLM, task: Task, settings: Settings) -> dict[str, Any]:
    """Return the probes of a model as plain numbers: ``steps``, ``examples``, ``each`` and ``whole`` of ``Probes``.

    Raises ValueError for a model without fast weights, a task other than a graph with names of one token or an
    automaton of one row, asked for all bits, in one window, or too few different examples.
    """
    if not model.fast_layers:
        raise ValueError(f"layout {model.config.layout!r} has no fast weights to probe: use one with 'g'")
    checks.has_numbers(model.head.weight.device)
    episode = task.sample(settings.episodes, stream(settings.seed, TESTING, STREAM))
    steps, states = hidden_states(task, episode)
    classes = int(states.max()) + 1
    parts = split(episode.windows.flatten(1), states[:, 0], stream(settings.seed, TESTING, STREAM + 1))
    examples = {name: len(part) for name, part in zip(("fit", "choose", "test"), parts, strict=True)}
    if min(examples.values()) < 2:
        raise ValueError(
            f"{settings.episodes} episodes have {', '.join(map(str, examples.values()))} different examples to fit, "
            "choose and test with, and each takes 2: draw more episodes, or of a larger task"
        )
    windows, labels = [episode.windows[part, 0] for part in parts], [states[part] for part in parts]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        untrained = SleepLM(model.config).to(model.head.weight).eval()
    answers = _read(model, task, settings, windows, labels)
    answers |= {f"untrained {reader}": x for reader, x in _read(untrained, task, settings, windows, labels).items()}
    facts = [F.one_hot(part[:, 0], classes).flatten(1) for part in labels]
    answers["facts"] = [read_out(facts, labels, classes)]
    answers["constant"] = [labels[0].mode(dim=0).values.expand_as(labels[2])]

    each, whole = {}, {}
    for reader in READERS:
        right = [(given, given == labels[2]) for given in answers[reader]]
        each[reader] = [_shares(given, same.double().mean(dim=2)) for given, same in right]
        whole[reader] = [_shares(given, same.all(dim=2).double()) for given, same in right]
    return {"steps": steps, "examples": examples, "each": each, "whole": whole}


def _shares(given: Tensor, right: Tensor) -> list[float | None]:
    """Return the mean of right (test, steps) for every step, None where nothing was asked."""
    asked = (given >= 0).any(dim=2).any(dim=0).tolist()
    return [round(share, 5) if known else None for share, known in zip(right.mean(dim=0).tolist(), asked, strict=True)]


def _read(
    model: SleepLM, task: Task, settings: Settings, windows: list[Tensor], labels: list[Tensor]
) -> dict[str, list[Tensor]]:
    """Return the labels (test, steps, items) that every reader of a model names after each pass.

    windows: (b, l) of the examples to fit, to choose and to test; labels: (b, steps, items) of the same.
    """
    device = model.head.weight.device
    windows, labels = [part.to(device) for part in windows], [part.to(device) for part in labels]
    classes, questions = int(torch.cat(labels).max()) + 1, _questions(task)
    others = (torch.randperm(len(y), generator=stream(settings.seed, TESTING, STREAM + 2)) for y in labels)
    both = [torch.cat((y, y[other]), dim=1) for y, other in zip(labels, others, strict=True)]
    answers: dict[str, list[Tensor]] = {reader: [] for reader in ("S", "shuffled", "query", "awake")}
    for S in zip(*(_after_each_pass(model, part, settings.passes) for part in windows), strict=True):
        flat = [torch.cat([matrix.flatten(1) for matrix in part], dim=1) for part in S]
        read = read_out(flat, both, classes).split(len(questions), dim=1)
        by_query, awake = (torch.full_like(labels[2], -1) for _ in range(2))
        for position, question in enumerate(questions.values()):
            if question is None:
                continue
            prompt, asked = question[0].to(device), question[1]
            awake[:, position] = wake(model, prompt.expand(len(labels[2]), -1), S[2])[:, asked].argmax(dim=-1)
            reads = [read_by_query(model, prompt, part, asked) for part in S]
            for item in range(labels[2].shape[2]):
                wanted = [y[:, position, item, None, None] for y in labels]
                by_query[:, position, item] = read_out([x[:, item] for x in reads], wanted, classes)[:, 0, 0]
        for given, named in zip(answers.values(), (*read, by_query, awake), strict=True):
            given.append(named.cpu())
    return answers


def _after_each_pass(model: SleepLM, windows: Tensor, passes: int) -> list[FastWeights]:
    """Return S of all windows (b, l) after pass 1, 2, ... of one sleep."""
    chunks = []
    for tokens in windows.split(CHUNK):
        trace = SleepTrace()
        sleep(model, tokens, passes=passes, trace=trace)
        chunks.append(trace.S[0][1:])
    return [tuple(map(torch.cat, zip(*after, strict=True))) for after in zip(*chunks, strict=True)]


def hidden_states(task: Task, episode: Episode) -> tuple[tuple[int, ...], Tensor]:
    """Return steps, and the labels a computation goes through: (b, steps, items) int64; the first are what was read.

    A graph: the node k hops after every node, k = 1, 2, ... An automaton: every bit after t = 0, 1, ... steps.
    Raises ValueError for a task that is neither, or in another form than ``probe_model`` takes.
    """
    steps = tuple(_questions(task))
    if isinstance(task, CellularAutomaton):
        return steps, space_time(episode.windows[:, 0], task.rule, steps[-1]).long()
    assert isinstance(task, GraphRetrieval)  # there are no other questions
    maps = [task.successors(episode)]
    while len(maps) < len(steps):
        maps.append(maps[0].gather(1, maps[-1]))
    return steps, torch.stack(maps, dim=1)


def _questions(task: Task) -> dict[int, tuple[Tensor, slice] | None]:
    """Return for every step a prompt (p,) about all items in turn, and where it asks; None for what cannot be asked."""
    if isinstance(task, GraphRetrieval) and task.name_tokens == task.windows == 1 and not task.shortest:
        nodes, hops = torch.arange(task.nodes), range(1, task.hops + 1)
        words = (torch.full_like(nodes, task.words.index(f"+{k}")) for k in hops)
        prompts = (torch.stack((word, nodes), dim=1).flatten() for word in words)
        return {k: (prompt, slice(1, None, 2)) for k, prompt in zip(hops, prompts, strict=True)}
    if isinstance(task, CellularAutomaton) and task.ask != "first":
        asked = {t: (torch.full((task.cells,), task.words.index(f"?{t}")), slice(None)) for t in task.steps}
        return {t: asked.get(t) for t in range(max(task.steps) + 1)}
    raise ValueError(
        f"the task {task} has no probe: use a graph with name_tokens=1, windows=1 and shortest=0, "
        "or an automaton with ask='every' or 'mixed'"
    )


def split(windows: Tensor, content: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the numbers of the examples to fit, choose and test with; every content (b, items) is in one part only.

    An example whose window (b, L) occurred before is left out, and so is one to choose or test with whose content did.
    """
    new = torch.from_numpy(np.sort(np.unique(windows.numpy(), axis=0, return_index=True)[1]))
    kinds, first, which = np.unique(content[new].numpy(), axis=0, return_index=True, return_inverse=True)
    place = torch.randperm(len(kinds), generator=generator)[which.ravel()] / len(kinds)
    once = torch.zeros(len(new), dtype=torch.bool)
    once[first] = True
    chosen, tested = (place >= 5 / 8) & (place < 3 / 4), place >= 3 / 4
    return new[place < 5 / 8], new[chosen & once], new[tested & once]


def read_out(features: Iterable[Tensor], labels: Iterable[Tensor], classes: int) -> Tensor:
    """Fit a linear probe and return the labels that it gives the test examples: (test, steps, items).

    features: (b, size) of the examples to fit, to choose and to test; labels: (b, steps, items) of the same. Every
    label is encoded one-hot and fitted by ridge regression on standardised features; the class with the largest value
    is the answer. The penalty is the one of ``RIDGES`` with the least squared error on the examples to choose, for
    every step by itself. Those to test are used for nothing but the answers.
    """
    fit, choose, test = (part.double() for part in features)
    mean, spread = fit.mean(dim=0), fit.std(dim=0)
    spread = spread.where(spread > 1e-6 * spread.max(), math.inf)  # what never varies tells nothing
    fit, choose, test = ((part - mean) / spread for part in (fit, choose, test))
    wanted, aim, _ = (F.one_hot(part, classes).double() for part in labels)
    base = wanted.mean(dim=0)
    variance, basis = torch.linalg.eigh(fit.T @ fit / len(fit))
    weights = basis.T @ (fit.T @ (wanted - base).flatten(1)) / len(fit)
    choose, test = choose @ basis, test @ basis
    least = test.new_full((wanted.shape[1],), math.inf)
    answers = test.new_zeros(len(test), *wanted.shape[1:3], dtype=torch.long)
    for ridge in RIDGES:
        scaled = weights / (variance.clamp_min(0) + ridge)[:, None]
        error = ((choose @ scaled).view_as(aim) + base - aim).square().mean(dim=(0, 2, 3))
        better = error < least
        least = error.minimum(least)
        given = ((test @ scaled).view(-1, *base.shape) + base).argmax(dim=-1)
        answers[:, better] = given[:, better]
    return answers


@torch.no_grad()
def read_by_query(model: SleepLM, prompt: Tensor, S: FastWeights, asked: slice = slice(None)) -> Tensor:
    """Return what the queries of a prompt (p,) read from each S, where it asks something: (b, asked, size).

    That is S q of all heads and fast-weight layers, S being as given: without what the prompt itself writes.
    """
    h, left, reads = model.embed(prompt[None]), iter(S), []
    for block in model.layers:
        before = next(left) if block.has_fast_weights else None
        if before is not None:
            q = block.mixer.rule_inputs(block.mixer_norm(h), before.dtype).q[:, :, asked]  # (b, heads, asked, d_k)
            reads.append(torch.einsum("bhvk,bhpk->bphv", before, q.expand(len(before), -1, -1, -1)).flatten(2))
            if len(reads) == len(S):
                break
            h = h.expand(len(before), -1, -1)  # until here it was the same for every S, and computed once
        h, _ = block(h, before)
    return torch.cat(reads, dim=-1)
