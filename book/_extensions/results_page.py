"""Put the table of all stored runs where the page of results has ``RESULTS``, and a small one where the first page has
``FINDINGS``: what a run says stands nowhere twice."""

import json

from sphinx.application import Sphinx

from sleepedu.intervals import across_seeds
from sleepedu.lab.results import grouped
from sleepedu.lab.run_store import COMMITTED, Run, stored_runs

PAGE, FIRST_PAGE = "book/results", "book/intro"
# What the first page tells: the task and its page, the depth, and the runs of N = 1, N = 4 and N = 1 on four times the
# steps, each at the better one of the rates tried with three seeds.
FINDINGS = [
    ("graph", "[Following arrows](05_graph_retrieval.ipynb)", 3, "hops", ("N=1", "N=4", "N=1, 4x steps, rate 0.005")),
    (
        "math",
        "[Reasoning over sentences](07_math_reasoning.ipynb)",
        3,
        "operations",
        ("N=1", "N=4, rate 0.005", "N=1, 4x steps, rate 0.005"),
    ),
    ("rule110", "[Rule 110, an automaton](06_rule_110.ipynb)", 5, "steps", ("N=1", "N=4", "N=1, 4x steps")),
]


def results_table(runs: list[Run]) -> str:
    """Return the table of all runs as markdown, one a task and size."""
    parts = []
    for (name, size), models in grouped(runs).items():
        task = next(iter(models.values()))[0].make_task()
        tables = {model: across_seeds([run.table for run in group]) for model, group in models.items()}
        depths = list(next(iter(tables.values())))
        rows = [
            ["model", "seeds", "steps", "trillion operations", "minutes", *map(str, depths)],
            [":--"] + ["--:"] * (len(depths) + 4),
        ]
        for model, group in models.items():
            steps = group[0].settings["train"]["steps"]
            minutes = sorted(run.provenance["seconds"] / 60 for run in group)
            spread = dict.fromkeys(f"{m:.1f}" for m in (minutes[0], minutes[-1]))  # one number where both are the same
            row = [model, str(len(group)), f"{steps:,}", f"{group[0].operations / 1e12:.1f}", "–".join(spread)]
            for a in tables[model].values():
                interval = f"<small style='white-space: nowrap'>{a.low:.2f} to {a.high:.2f}</small>"
                row.append(f"{a.accuracy:.3f} <br> {interval}")
            rows.append(row)
        constants = [max(table[depth].majority for table in tables.values()) for depth in depths]
        rows.append(["best constant answer", "", "", "", "", *(f"{share:.3f}" for share in constants)])
        if task.floor is not None:
            rows.append(["best guess without reading", "", "", "", "", *[f"{task.floor:.3f}"] * len(depths)])
        table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
        parts.append(f"## {name}, {size}\n\nShare of right answers by {task.depth_name}.\n\n{table}\n")
    return "\n".join(parts)


def findings_table(runs: list[Run]) -> str:
    """Return a line for each task as markdown: what four passes add, in accuracy, and what they cost."""
    models = grouped(runs)
    steps = json.loads((COMMITTED / "benchmark" / "cpu.json").read_text())["step"]
    milliseconds = {(row["task"], row["size"], row["passes"]): row["compiled"]["ms"] for row in steps}
    columns = [
        "right about",
        "N\u00a0=\u00a01",
        "N\u00a0=\u00a04",
        "cost of N\u00a0=\u00a04",
        "N\u00a0=\u00a01, trained 4\u00a0× longer",
    ]
    rows = [columns, [":--"] + ["--:"] * 4]
    for name, title, depth, unit, labels in FINDINGS:
        tables = [across_seeds([run.table for run in models[name, "laptop"][label]]) for label in labels]
        longer = milliseconds[name, "laptop", 4] / milliseconds[name, "laptop", 1]
        shares = [f"{table[depth].accuracy:.0%}" for table in tables]
        rows.append([f"{title}, {depth} {unit}", *shares[:2], f"{longer:.1f}\u00a0×", shares[2]])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def fill_page(app: Sphinx | None, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        source[0] = source[0].replace("RESULTS\n", results_table(stored_runs()))
    elif docname == FIRST_PAGE:
        source[0] = source[0].replace("FINDINGS\n", f"{findings_table(stored_runs())}\n")


def always_outdated(*_: object) -> list[str]:
    """Name the pages in every build: what they are made of is not in their files."""
    return [PAGE, FIRST_PAGE]


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("source-read", fill_page)
    app.connect("env-get-outdated", always_outdated)
    return {"parallel_read_safe": True}
