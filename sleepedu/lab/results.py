"""The table of all stored runs: every task and model, means over seeds with their intervals, and what each cost."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sleepedu.intervals import Table, across_seeds, paired
from sleepedu.lab.recipes import MODELS
from sleepedu.lab.run_store import Run


def grouped(runs: list[Run]) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """Return the runs by (task, size), then by label: those of one recipe that differ in their seed alone.

    Models stand in the order of ``MODELS``, N ascending.
    """

    def place(run: Run) -> tuple:
        e = run.experiment
        return e.task, e.size, list(MODELS).index(e.model), e.passes, e.steps, e.learning_rate, label(run), e.seed

    together: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=place):
        together[run.experiment.task, run.experiment.size][label(run)].append(run)
    return {key: dict(models) for key, models in together.items()}


def label(run: Run) -> str:
    """Return what tables and figures call the run's model: "N=4" for a sleeper; a setting not the recipe's is named."""
    e = run.experiment
    start = e.trained_from.removeprefix(f"{e.task}-{e.size}-").rpartition("-seed")[0]
    words = [
        MODELS[e.model].format(e.passes),
        f"{e.times_the_steps:.3g}x steps" if e.times_the_steps != 1 else "",
        *e.departures,
        f"{e.steps:,} steps" if e.steps else "",
        f"rate {e.learning_rate:g}" if e.learning_rate else "",
        f"from {start}" if start else "",
        e.precision,
    ]
    return ", ".join(filter(None, words))


def in_words(one: list[Run], other: list[Run]) -> dict[str, list[int]]:
    """Return at which depths runs of one kind are ahead of those of another, and so on, as ``paired`` puts it."""
    by_seed = ({run.experiment.seed: run.table for run in runs} for runs in (one, other))
    found: dict[str, list[int]] = defaultdict(list)
    for depth, pair in paired(*by_seed).items():
        found[pair.word].append(depth)
    return dict(found)


def in_a_line(one: list[Run], other: list[Run]) -> str:
    """Return what ``in_words`` does as text, depths in a row as a span: "not told apart at 1; ahead at 2–4"."""
    return "; ".join(f"{word} at {_spans(depths)}" for word, depths in in_words(one, other).items())


def _spans(depths: Sequence[int]) -> str:
    first = [depth for depth in depths if depth - 1 not in depths]
    last = [depth for depth in depths if depth + 1 not in depths]
    return ", ".join(f"{a}–{b}" if b > a else str(a) for a, b in zip(first, last, strict=True))


def aligned(rows: Sequence[Mapping[Any, Any]]) -> list[str]:
    """Return rows with the same names as the lines of a table: numbers with three digits, of a timing its median."""

    def shown(value: Any) -> str:
        value = value["ms"] if isinstance(value, dict) else value
        return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)

    words = [[str(name) for name in rows[0]], *([shown(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in words]


def beside_stored(table: Table, run: Any, differs: Sequence[int]) -> list[str]:
    """Return the accuracies of a run measured anew as the lines of a table, marked at the depths where they differ."""
    stored = {d: {"stored": a.accuracy, "": "differs" if d in differs else ""} for d, a in run.table.items()}
    return aligned([{run.make_task().depth_name: d, **asdict(a), **stored[d]} for d, a in table.items()])


def in_lines(runs: list[Run]) -> list[str]:
    """Return the table as text for a terminal: runs that differ in their seed alone in one line, with their names."""
    shown = []
    for (name, size), models in grouped(runs).items():
        alike: dict[str, list[Run]] = defaultdict(list)
        for run in (run for kind in models.values() for run in kind):  # an older recipe's has the label of today's
            own = {"train": {**run.settings["train"], "seed": 0}, "trained_from": ""}
            alike[label(run) + str(run.settings | own)].append(run)
        depths = sorted({depth for kind in alike.values() for depth in kind[0].table})
        rows = []
        for first, *others in alike.values():
            mean = across_seeds([run.table for run in (first, *others)])
            names = first.name + "".join(f",{run.experiment.seed}" for run in others)
            by_depth = {d: mean[d].accuracy if d in mean else None for d in depths}
            rows.append({f"{name}, {size}: accuracy by {first.make_task().depth_name}": names} | by_depth)
        shown += ["", *aligned(rows)]
    return shown[1:]
