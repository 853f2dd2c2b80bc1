"""Put the table of all stored runs where the page of results has ``RESULTS``, and a small one where the first page has
``FINDINGS``: what a run says stands nowhere twice."""

import base64
import io
import re

from sphinx.application import Sphinx

from sleepedu.intervals import across_seeds
from sleepedu.lab.results import grouped
from sleepedu.lab.run_store import Run, stored_runs
from sleepedu.pictures.figures import PASS_COLOURS, new_figure

PAGE, FIRST_PAGE = "book/results", "book/intro"
RATES = {"math": ", rate 0.005"}  # where the overview does not take the recipe's
SIZES = {"graph": "laptop", "math": "laptop", "rule110": "held_out"}  # what stands for each task
# What the first page tells: the task and its page, the depth, and the runs of N = 1, N = 4 and N = 1 on more steps,
# each at the better one of the rates tried with three seeds.
FINDINGS = [
    ("graph", "[Following arrows](05_graph_retrieval.ipynb)", 4, "hops", ("N=1", "N=4", "N=1, 4x steps, rate 0.005")),
    (
        "math",
        "[Reasoning over sentences](07_math_reasoning.ipynb)",
        3,
        "operations",
        ("N=1", "N=4, rate 0.005", "N=1, 4x steps, rate 0.005"),
    ),
    ("rule110", "[Rule 110, rows of 20 cells](06_rule_110.ipynb)", 6, "steps", ("N=1", "N=4", "N=1, 2.68x steps")),
]
OVERVIEW = "Three panels, one a task: share of right answers against depth, a curve for each number of sleep passes."


def results_table(runs: list[Run]) -> str:
    """Return the table of all runs as HTML, one a task and size: accuracies, then what they cost."""
    parts = []
    for (name, size), models in grouped(runs).items():
        task = next(iter(models.values()))[0].make_task()
        tables = {model: across_seeds([run.table for run in group]) for model, group in models.items()}
        depths = list(next(iter(tables.values())))
        last = ["seeds", "steps", "trillion operations", "minutes"]
        head = "".join(f'<th scope="col">{text}</th>' for text in ["model", *map(str, depths), *last])
        lines = [f"<thead><tr>{head}</tr></thead>"]
        for model, group in models.items():
            steps = group[0].settings["train"]["steps"]
            minutes = sorted(run.provenance["seconds"] / 60 for run in group)
            spread = dict.fromkeys(f"{m:.1f}" for m in (minutes[0], minutes[-1]))  # one number where both are the same
            cost = [str(len(group)), f"{steps:,}", f"{group[0].operations / 1e12:.1f}", "–".join(spread)]
            cells = [
                f'<td style="--share: {a.accuracy:.2f}">{a.accuracy:.3f}<br>'
                f"<small>{a.low:.2f} to {a.high:.2f}</small></td>"
                for a in tables[model].values()
            ]
            lines.append(row(model, cells, cost))
        constants = [max(table[depth].majority for table in tables.values()) for depth in depths]
        lines.append(row("best constant answer", [f"<td>{share:.3f}</td>" for share in constants], [""] * 4))
        if task.floor is not None:
            lines.append(row("best guess without reading", [f"<td>{task.floor:.3f}</td>"] * len(depths), [""] * 4))
        table = "\n".join(lines)
        told = f"Share of right answers by {task.depth_name}."
        parts.append(f'## {name}, {size}\n\n{told}\n\n<table class="results" tabindex="0">\n{table}\n</table>\n')
    return "\n".join(parts)


def row(name: str, cells: list[str], cost: list[str]) -> str:
    return f'<tr><th scope="row">{name}</th>{"".join(cells)}{"".join(f"<td>{text}</td>" for text in cost)}</tr>'


def overview(runs: list[Run]) -> str:
    """Return the one picture of the page as HTML: what each N gets right in the three tasks."""
    models = {task: tables for (task, size), tables in grouped(runs).items() if size == SIZES.get(task)}
    titles = {task: re.match(r"\[(.*)\]", link)[1] for task, link, *_ in FINDINGS}
    with new_figure(9.6, 3.0, columns=len(models), sharey=True) as (figure, panels):
        for (task, of_task), axes in zip(models.items(), panels, strict=True):
            for n in (1, 2, 4, 8):
                if (label := f"N={n}{RATES.get(task, '')}") in of_task:
                    mean = across_seeds([run.table for run in of_task[label]])
                    right = [a.accuracy for a in mean.values()]
                    axes.plot(list(mean), right, marker="o", ms=4, color=PASS_COLOURS[n], label=f"N={n}")
            first = next(iter(of_task.values()))[0].make_task()
            axes.set(title=titles[task], xlabel=first.depth_name, xticks=first.depths, ylim=(-0.02, 1.04))
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        panels[0].legend()
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
    picture = base64.b64encode(drawn.getvalue().encode()).decode()
    return (
        f'<figure><img src="data:image/svg+xml;base64,{picture}" alt="{OVERVIEW}"><figcaption>'
        "Right answers by depth, means over the seeds: sentences at a rate of 0.005, as in chapter 7 (at 0.01 one pass "
        "has more from two operations on), the automaton on 20 cells. The tables below have the intervals, the "
        "controls and the costs.</figcaption></figure>\n"
    )


def findings_table(runs: list[Run]) -> str:
    """Return a line for each task as markdown: what four passes add, in accuracy, and what they cost."""
    models = grouped(runs)
    columns = [
        "right about",
        "N\u00a0=\u00a01",
        "N\u00a0=\u00a04",
        "cost of N\u00a0=\u00a04",
        "N\u00a0=\u00a01, trained longer",
        "at the cost of",
    ]
    rows = [columns, [":--"] + ["--:"] * 5]
    for name, title, depth, unit, labels in FINDINGS:
        kinds = [models[name, SIZES[name]][label] for label in labels]
        one, four, longer = (f"{across_seeds([run.table for run in kind])[depth].accuracy:.0%}" for kind in kinds)
        costs = [f"{kind[0].operations / kinds[0][0].operations:.1f}\u00a0×" for kind in kinds]
        rows.append([f"{title}, {depth} {unit}", one, four, costs[1], longer, costs[2]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fill_page(app: Sphinx | None, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        runs = stored_runs()
        source[0] = source[0].replace("OVERVIEW\n", overview(runs)).replace("RESULTS\n", results_table(runs))
    elif docname == FIRST_PAGE:
        source[0] = source[0].replace("FINDINGS\n", f"{findings_table(stored_runs())}\n")


def always_outdated(*_: object) -> list[str]:
    """Name the pages in every build: what they are made of is not in their files."""
    return [PAGE, FIRST_PAGE]


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("source-read", fill_page)
    app.connect("env-get-outdated", always_outdated)
    return {"parallel_read_safe": True}
