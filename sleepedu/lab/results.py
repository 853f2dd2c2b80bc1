"""The table of all stored runs: every task and model, means over seeds with their intervals, and what each cost."""

from collections import defaultdict

from sleepedu.evaluation import Table, across_seeds
from sleepedu.lab.experiments import Run
from sleepedu.lab.recipes import MODELS
from sleepedu.tasks import Task

LABELS = {
    "varied": "N=1 to {}",
    "transformer": "transformer",
    "kept": "keeps its cache",
    "longer": "N=1, 4x steps",
    "deeper": "N=1, 4x layers",
}


def grouped(runs: list[Run]) -> dict[tuple[str, str], dict[str, list[Run]]]:
    """Return the runs by (task, size), then by label, runs that differ in nothing but their seed together.

    Models stand in the order of ``MODELS``, N ascending.
    """
    order = list(MODELS)
    together: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))

    def place(run: Run) -> tuple:
        e = run.experiment
        return order.index(e.model), e.passes, e.carry, e.steps, e.learning_rate, e.seed

    for run in sorted(runs, key=place):
        e = run.experiment
        together[e.task, e.size][label(run)].append(run)
    return {key: dict(together[key]) for key in sorted(together)}


def label(run: Run) -> str:
    """Return what tables and figures call the run's model: "N=4" for a sleeper; a setting not the recipe's is named."""
    e = run.experiment
    words = [LABELS.get(e.model, "N={}").format(e.passes)]
    if e.carry != e.recipe.carry:
        words.append(e.carry)
    if e.steps:
        words.append(f"{e.steps:,} steps")
    if e.learning_rate:
        words.append(f"rate {e.learning_rate:g}")
    return ", ".join(words)


def lines(runs: list[Run]) -> list[str]:
    """Return the table as text for a terminal: runs that differ in their seed in one line, with all their names."""
    shown = []
    for (task, size), models in grouped(runs).items():
        shown += ["", f"{task}, {size}: accuracy by {_task(models).depth_name}"]
        for group in models.values():
            by_depth = "  ".join(f"{depth}: {a.accuracy:.3f}" for depth, a in _mean(group).items())
            name = group[0].name + "".join(f",{run.experiment.seed}" for run in group[1:])
            shown.append(f"  {name:36s}  {by_depth}")
    return shown[1:]


def markdown(runs: list[Run]) -> str:
    """Return the table as markdown, one table a task and size, for the book's page of results."""
    parts = []
    for (name, size), models in grouped(runs).items():
        task = _task(models)
        tables = {model: _mean(group) for model, group in models.items()}
        depths = list(next(iter(tables.values())))
        rows = [
            ["model", "seeds", "steps", "million tokens", "minutes", *(str(depth) for depth in depths)],
            [":--"] + ["--:"] * (len(depths) + 4),
        ]
        for model, group in models.items():
            cost = [run.provenance for run in group]
            rows.append(
                [
                    model,
                    str(len(group)),
                    f"{group[0].settings['train']['steps']:,}",
                    f"{cost[0]['tokens'] / 1e6:.1f}",
                    _range([made["seconds"] / 60 for made in cost]),
                    *(
                        f"{a.accuracy:.3f} <br> <small style='white-space: nowrap'>{a.low:.2f}–{a.high:.2f}</small>"
                        for a in tables[model].values()
                    ),
                ]
            )
        constants = [max(table[depth].majority for table in tables.values()) for depth in depths]
        rows.append(["best constant answer", "", "", "", "", *(f"{share:.3f}" for share in constants)])
        if task.floor is not None:
            rows.append(["best guess without reading", "", "", "", "", *[f"{task.floor:.3f}"] * len(depths)])
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"## {name}, {size}\n\nShare of right answers by {task.depth_name}.\n\n{table}\n")
    return "\n".join(parts)


def _mean(group: list[Run]) -> Table:
    return across_seeds([run.table for run in group])


def _range(minutes: list[float]) -> str:
    low, high = f"{min(minutes):.1f}", f"{max(minutes):.1f}"
    return low if low == high else f"{low}–{high}"


def _task(models: dict[str, list[Run]]) -> Task:
    return next(iter(models.values()))[0].make_task()
