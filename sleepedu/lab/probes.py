"""What is in S after each pass: linear probes, and the controls that say how much of it is the probe's own work.

A probe is a ridge regression from S to labels it has to name: the node k hops after every node of a graph, or every
bit of an automaton's row t steps on. It is fitted on some examples, its penalty is chosen on others, and what it scores
is measured on a third part. No ring of nodes, and no row of bits, is in two parts. Chapter 9.
"""

import json
import math
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sleepedu import checks, files
from sleepedu.evaluation import Accuracy, Table, wilson_interval
from sleepedu.lab.experiments import COMMITTED, OWN, Run
from sleepedu.lab.provenance import machine
from sleepedu.model import FastWeights, ModelConfig, SleepLM
from sleepedu.sleep_loop import SleepTrace, check_passes, sleep
from sleepedu.tasks import CellularAutomaton, GraphRetrieval, Task
from sleepedu.tasks.base import Episode
from sleepedu.tasks.cellular_automaton import space_time
from sleepedu.training import TESTING, stream

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
EXAMPLES = 1  # the number of the test stream they are drawn from; accuracy_by_depth begins at 10,000
CHUNK = 500

Parts = tuple[Tensor, Tensor, Tensor]  # the same of the examples to fit, to choose and to test


@dataclass(frozen=True)
class Settings:
    """What a table of probes depends on besides the run.

    passes: the sleep is probed after pass 1, 2, ..., up to this one. episodes: examples drawn, of which 5/8 are to
    fit, 1/8 to choose the penalty and 1/4 to test, less what occurs twice. seed: of the examples and of the untrained
    model. Raises ValueError for passes < 1 or fewer than 100 episodes.
    """

    passes: int = 8
    episodes: int = 10_000
    seed: int = 0

    def __post_init__(self):
        check_passes(self.passes)
        checks.whole("episodes", self.episodes, least=100)  # to fit, choose and test
        checks.seed(self.seed)


@dataclass(frozen=True)
class Probes:
    """How often each reader names the right label after each pass, on examples that it was not fitted on.

    each[reader][n - 1] has a share for every step in ``steps``, nan where the task has no such question; labels are
    counted one by one. whole: the same, where an example counts when all its labels are right. A reader that does not
    depend on the sleep has one row. examples: how many there were to "fit", "choose" and "test". weights: the hash of
    the file of weights that was probed.
    """

    run: str
    weights: str
    settings: Settings
    steps: tuple[int, ...]
    examples: dict[str, int]
    each: dict[str, list[list[float]]]
    whole: dict[str, list[list[float]]]
    provenance: dict[str, Any] = field(default_factory=dict)

    def table(self, reader: str, n: int = 1, whole: bool = False) -> Table:
        """Return what a reader scores after pass n: step -> accuracy, with the interval of as many test examples.

        Raises ValueError for a reader or pass that is not there.
        """
        shares = self.whole if whole else self.each
        if reader not in shares:
            raise ValueError(f"reader {reader!r} is unknown: use one of {', '.join(shares)}")
        if n not in range(1, self.settings.passes + 1):
            raise ValueError(f"pass n must lie in 1..{self.settings.passes}, got {n}")
        tested, constant = self.examples["test"], shares["constant"][0]
        row = shares[reader][min(n, len(shares[reader])) - 1]
        return {
            step: Accuracy(share, *wilson_interval(share, tested), tested, constant[position])
            for position, (step, share) in enumerate(zip(self.steps, row, strict=True))
            if not math.isnan(share)
        }

    def json(self) -> str:
        """Return everything as JSON, as it is stored, with null for nan."""
        stored = {"version": VERSION, **asdict(self)}
        for shares in (stored["each"], stored["whole"]):
            for reader, rows in shares.items():
                shares[reader] = [[None if math.isnan(share) else share for share in row] for row in rows]
        text = json.dumps(stored, indent=1, allow_nan=False)
        # A row of numbers is one line. No line ends inside a string, so a bracket at the end of one begins a list.
        return re.sub(r"\[\n[^\[\]{}]*\]", lambda row: " ".join(row[0].split()), text) + "\n"

    def lines(self) -> list[str]:
        """Return the tables as text: a line per reader and pass."""
        counts = ", ".join(f"{count:,} to {part}" for part, count in self.examples.items())
        shown = [f"{self.run}: {counts}; right labels, then whole examples right"]
        for reader, rows in self.each.items():
            shown += ["", f"{reader}: {READERS[reader]}"]
            shown.append(" " * 6 + "".join(f"{step:7d}" for step in self.steps) * 2)
            for n, row in enumerate(rows, start=1):
                shares = [*row, *self.whole[reader][n - 1]]
                name = f"pass {n}" if len(rows) > 1 else ""
                shown.append(f"{name:6s}" + "".join(f"{share:7.3f}" for share in shares))
        return shown


def of(run: Run, settings: Settings | None = None, directory: Path | str = OWN) -> Probes:
    """Return the stored probes of a run with these settings, or make and store them now (about half a minute).

    Looks in the committed store, then in ``directory``, where new ones go.
    Raises ValueError for a run that cannot be probed (see ``probe``) or probes or weights that are broken,
    FileNotFoundError for a run without weights, OSError when the probes cannot be written.
    """
    settings = settings or Settings()
    weights = run.weights[:16]
    for store in (COMMITTED, Path(directory)):
        path = store / "probes" / f"{run.name}.json"
        if path.exists():
            found = load(path)
            if found.settings == settings and found.weights == weights:
                return found
    started = time.perf_counter()
    made = probe(run.load_model(), run.make_task(), settings)
    provenance = {**machine(torch.device("cpu")), "seconds": round(time.perf_counter() - started, 1)}
    found = Probes(run.name, weights, settings, **made, provenance=provenance)
    path = Path(directory) / "probes" / f"{run.name}.json"
    files.write(path, found.json().encode())
    return load(path)


def load(path: Path | str) -> Probes:
    """Return stored probes. Raises FileNotFoundError where there are none, ValueError where they are broken."""
    path = Path(path)
    try:
        stored = json.loads(path.read_text())
        if stored.pop("version") != VERSION:
            raise ValueError(f"{path} is of another version than {VERSION}, which this library reads")
        stored |= {"settings": Settings(**stored["settings"]), "steps": tuple(stored["steps"])}
        for shares in (stored["each"], stored["whole"]):
            for reader, rows in shares.items():
                shares[reader] = [[math.nan if share is None else share for share in row] for row in rows]
        return Probes(**stored)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is broken ({type(error).__name__}: {files.first_line(error)}): delete it and make it again"
        ) from error


def probe(model: SleepLM, task: Task, settings: Settings) -> dict[str, Any]:
    """Return the probes of a model as plain numbers: ``steps``, ``examples``, ``each`` and ``whole`` of ``Probes``.

    Raises ValueError for a model without fast weights, a task other than a graph with names of one token or an
    automaton of one row, asked for all bits, in one window, or too few different examples.
    """
    _questions(task)
    if not model.fast_layers:
        raise ValueError(f"layout {model.config.layout!r} has no fast weights to probe: use one with 'g'")
    steps, parts = _examples(task, settings)
    wanted = [labels for _, labels in parts]
    truth, classes = wanted[2], int(wanted[0].max()) + 1
    facts = [F.one_hot(labels[:, 0], classes).flatten(1) for labels in wanted]
    untrained = _read_untrained(model.config, task, settings)
    answers = {
        **_read(model, task, settings),
        "untrained S": untrained["S"],
        "untrained query": untrained["query"],
        "facts": [read_out(facts, wanted, classes)],
        "constant": [wanted[0].mode(dim=0).values.expand_as(truth)],
    }

    def shares(whole: bool) -> dict[str, list[list[float]]]:
        return {reader: [_share_right(given, truth, whole) for given in answers[reader]] for reader in READERS}

    counts = dict(zip(("fit", "choose", "test"), (len(labels) for labels in wanted), strict=True))
    return {"steps": steps, "examples": counts, "each": shares(False), "whole": shares(True)}


@lru_cache(maxsize=1)
def _examples(task: Task, settings: Settings) -> tuple[tuple[int, ...], list[tuple[Tensor, Tensor]]]:
    """Return the steps, and windows (b, l) and labels (b, steps, items) to fit, to choose and to test with.

    They are drawn once for all readers.
    """
    episode = task.sample(settings.episodes, stream(settings.seed, TESTING, EXAMPLES))
    steps, labels = hidden_states(task, episode)
    parts = split(episode.windows.flatten(1), labels[:, 0], stream(settings.seed, TESTING, EXAMPLES + 1))
    if min(map(len, parts)) < 2:
        counts = ", ".join(str(len(part)) for part in parts)
        raise ValueError(
            f"{settings.episodes} episodes have {counts} different examples to fit, choose and test with, "
            "and each takes 2: draw more episodes, or of a larger task"
        )
    return steps, [(episode.windows[part, 0], labels[part]) for part in parts]


@lru_cache(maxsize=2)
def _read_untrained(config: ModelConfig, task: Task, settings: Settings) -> dict[str, list[Tensor]]:
    """Return what is read from a model with random weights, once for all runs of one form and task."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return _read(SleepLM(config).eval(), task, settings)


def _read(model: SleepLM, task: Task, settings: Settings) -> dict[str, list[Tensor]]:
    """Return the labels (test, steps, items) that every reader of a model names after each pass."""
    steps, parts = _examples(task, settings)
    windows, wanted = zip(*parts, strict=True)
    classes = int(wanted[0].max()) + 1
    generators = (stream(settings.seed, TESTING, EXAMPLES + 2) for _ in wanted)
    shuffled = (y[torch.randperm(len(y), generator=g)] for y, g in zip(wanted, generators, strict=True))
    both = [torch.cat(pair, dim=1) for pair in zip(wanted, shuffled, strict=True)]
    answers: dict[str, list[Tensor]] = {reader: [] for reader in ("S", "shuffled", "query", "awake")}
    for S in _asleep(model, windows, settings.passes):
        flat = [torch.cat([matrix.flatten(1) for matrix in part], dim=1) for part in S]
        read = read_out(flat, both, classes).split(len(steps), dim=1)
        named = (*read, *_ask_all(model, S, wanted, steps, _questions(task), classes))
        for reader, given in zip(answers, named, strict=True):
            answers[reader].append(given)
    return answers


def hidden_states(task: Task, episode: Episode) -> tuple[tuple[int, ...], Tensor]:
    """Return steps, and the labels a computation goes through: (b, steps, items) int64; the first are what was read.

    A graph: the node k hops after every node, k = 1, 2, ... An automaton: every bit after t = 0, 1, ... steps.
    Raises ValueError for a task that is neither, or in another form than ``probe`` takes.
    """
    _questions(task)
    if isinstance(task, GraphRetrieval):
        steps = range(1, task.hops + 1)
        maps = [task.successors(episode)]
        for _ in steps[1:]:
            maps.append(maps[0].gather(1, maps[-1]))
        return tuple(steps), torch.stack(maps, dim=1)
    assert isinstance(task, CellularAutomaton)  # there are no other questions
    steps = range(max(task.steps) + 1)
    return tuple(steps), space_time(episode.windows[:, 0], task.rule, steps[-1]).long()


def _questions(task: Task) -> dict[int, tuple[Tensor, slice]]:
    """Return for every step that can be asked: a prompt (p,) about all items in turn, and where it asks for them."""
    if isinstance(task, GraphRetrieval) and task.name_tokens == task.windows == 1 and not task.shortest:
        nodes = torch.arange(task.nodes)
        words = {k: torch.full_like(nodes, task.words.index(f"+{k}")) for k in range(1, task.hops + 1)}
        return {k: (torch.stack((word, nodes), dim=1).flatten(), slice(1, None, 2)) for k, word in words.items()}
    if isinstance(task, CellularAutomaton) and task.ask == "every":
        return {t: (torch.full((task.cells,), task.words.index(f"?{t}")), slice(None)) for t in task.steps}
    raise ValueError(
        f"the task {task} has no probe: use a graph with name_tokens=1, windows=1 and shortest=0, "
        "or an automaton with ask='every'"
    )


def split(windows: Tensor, content: Tensor, generator: torch.Generator) -> Parts:
    """Return the numbers of the examples to fit, choose and test with; every content (b, items) is in one part only.

    An example whose window (b, L) occurred before is left out, and so is one to choose or test with whose content did.
    """
    new = _first_of_each(windows)
    content = content[new].unique(dim=0, return_inverse=True)[1]
    place = torch.randperm(int(content.max()) + 1, generator=generator)[content] / (content.max() + 1)
    first = torch.zeros(len(new), dtype=torch.bool).index_fill(0, _first_of_each(content[:, None]), True)
    chosen, tested = (place >= 5 / 8) & (place < 3 / 4), place >= 3 / 4
    return new[place < 5 / 8], new[chosen & first], new[tested & first]


def _first_of_each(rows: Tensor) -> Tensor:
    """Return the numbers of the rows (b, items) that no row before them equals, in order."""
    which = rows.unique(dim=0, return_inverse=True)[1]
    first = torch.full((int(which.max()) + 1,), len(rows))
    return first.scatter_reduce(0, which, torch.arange(len(rows)), "amin").sort().values


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
    least = torch.full((wanted.shape[1],), math.inf, dtype=torch.double)
    answers = torch.zeros(len(test), *wanted.shape[1:3], dtype=torch.long)
    for ridge in RIDGES:
        scaled = weights / (variance.clamp_min(0) + ridge)[:, None]
        error = ((choose @ scaled).view_as(aim) + base - aim).square().mean(dim=(0, 2, 3))
        better = error < least
        least = error.minimum(least)
        given = ((test @ scaled).view(-1, *base.shape) + base).argmax(dim=-1)
        answers[:, better] = given[:, better]
    return answers


@torch.no_grad()
def _asleep(model: SleepLM, windows: Iterable[Tensor], passes: int) -> Iterable[list[FastWeights]]:
    """Yield, for one pass after the other, S of all windows (b, l): a tuple over layers for each part."""
    kept: list[list[list[FastWeights]]] = []
    for part in windows:
        traces = [SleepTrace() for _ in part.split(CHUNK)]
        for trace, tokens in zip(traces, part.split(CHUNK), strict=True):
            sleep(model, tokens, passes=passes, trace=trace)
            trace.h.clear()
        kept.append([trace.S[0] for trace in traces])
    for n in range(1, passes + 1):
        yield [tuple(torch.cat(layer) for layer in zip(*(S[n] for S in part), strict=True)) for part in kept]


def _ask_all(
    model: SleepLM,
    S: list[FastWeights],
    wanted: Parts,
    steps: tuple[int, ...],
    questions: dict[int, tuple[Tensor, slice]],
    classes: int,
) -> tuple[Tensor, Tensor]:
    """Return the labels named by a probe of what queries read, and by the model: (test, steps, items), -1 unasked."""
    by_query, awake = (torch.full_like(wanted[2], -1) for _ in range(2))
    for position, step in enumerate(steps):
        if step not in questions:
            continue
        prompt, asked = questions[step]
        awake[:, position] = query(model, prompt, S[2], asked)[0].argmax(dim=-1)
        found = [_reads(model, prompt, part, asked) for part in S]
        for item in range(wanted[2].shape[2]):
            labels = [part[:, position, item, None, None] for part in wanted]
            read = read_out([reads[:, item] for reads in found], labels, classes)
            by_query[:, position, item] = read[:, 0, 0]
    return by_query, awake


@torch.no_grad()
def query(model: SleepLM, prompt: Tensor, S: FastWeights, asked: slice = slice(None)) -> tuple[Tensor, Tensor]:
    """Wake and put the same prompt (p,) to every S: logits (b, asked, V), and what its queries read, (b, asked, size).

    What is read is S q of all heads and fast-weight layers, S being as given: without what the prompt itself writes.
    """
    logits, reads = [], []

    def read(block, entering: tuple, left: tuple) -> None:
        h, S = entering[:2]
        if S is not None:
            q = block.mixer.rule_inputs(block.mixer_norm(h), S.dtype)[0][:, :, asked]  # (b, heads, asked, d_k)
            seen.append(torch.einsum("bhvk,bhpk->bphv", S, q).flatten(2))

    hooks = [block.register_forward_hook(read) for block in model.layers]
    try:
        for chunk in zip(*(matrix.split(CHUNK) for matrix in S), strict=True):
            seen: list[Tensor] = []
            h, _ = model.blocks(model.embed(prompt.expand(len(chunk[0]), -1)), chunk)
            logits.append(model.out(h[:, asked]))
            reads.append(torch.cat(seen, dim=-1))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(logits), torch.cat(reads)


def _reads(model: SleepLM, prompt: Tensor, S: FastWeights, asked: slice) -> Tensor:
    """Return what ``query`` says is read, sooner where there is one fast-weight layer: its q does not depend on S."""
    _, heads, d_v, d_k = S[0].shape
    if len(S) > 1 or d_v < d_k:
        return query(model, prompt, S, asked)[1]
    eye = torch.eye(d_v, d_k, dtype=S[0].dtype).expand(1, heads, d_v, d_k)  # an S that reads q itself
    q = query(model, prompt, (eye,), asked)[1].unflatten(-1, (heads, d_v))[0, :, :, :d_k]
    return torch.einsum("bhvk,phk->bphv", S[0], q).flatten(2)


def _share_right(given: Tensor, truth: Tensor, whole: bool) -> list[float]:
    """Return the share of right labels, or of examples with all labels right, for every step; nan where unasked."""
    right = given == truth
    shares = (right.all(dim=2) if whole else right.double().mean(dim=2)).double().mean(dim=0)
    return [round(share, 5) for share in shares.where((given >= 0).any(dim=2).any(dim=0), math.nan).tolist()]


def turns(trace: SleepTrace) -> Tensor:
    """Return the angle in degrees between S of one pass and the next, as vectors, from pass 2 on, mean over the batch.

    (passes - 1, layers, heads), of the last window. 90 degrees is what two unrelated matrices have between them.
    """
    S = trace.stack()[1:].flatten(-2)
    return F.cosine_similarity(S[1:], S[:-1], dim=-1).clamp(-1, 1).acos().rad2deg().mean(dim=2)


def singular_values(trace: SleepTrace) -> Tensor:
    """Return the singular values of S after every pass, largest first, mean over the batch.

    (passes, layers, heads, min(d_v, d_k)), of the last window.
    """
    return torch.linalg.svdvals(trace.stack()[1:]).mean(dim=2)
