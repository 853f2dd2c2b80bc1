"""Put the table of all stored runs where the page of results has ``RESULTS``: what a run says stands nowhere twice."""

from sphinx.application import Sphinx

from sleepedu.intervals import across_seeds
from sleepedu.lab.results import grouped
from sleepedu.lab.run_store import Run, stored_runs

PAGE = "book/results"


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


def fill_page(app: Sphinx | None, docname: str, source: list[str]) -> None:
    if docname == PAGE:
        source[0] = source[0].replace("RESULTS\n", results_table(stored_runs()))


def always_outdated(*_: object) -> list[str]:
    """Name the page in every build: what it is made of is not in its file."""
    return [PAGE]


def setup(app: Sphinx) -> dict[str, object]:
    app.connect("source-read", fill_page)
    app.connect("env-get-outdated", always_outdated)
    return {"parallel_read_safe": True}
