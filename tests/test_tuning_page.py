"""What the page on tuning says of a run is what the run says: rate, steps and accuracies."""

import re

from sleepedu.lab import run_store

PAGE = run_store.COMMITTED.parent / "how_the_runs_were_tuned.md"
ROW = re.compile(r"\| [^|]*`([\w.-]+-seed)([\d,]+)` \|(.*)\|$")


def test_every_row_is_that_of_its_runs():
    stores = (None, run_store.COMMITTED / "tuning")  # a name that both have is a trial's here
    runs = {run.name: run for store in stores for run in run_store.stored_runs(store)}
    depths, rows = [], 0
    for line in PAGE.read_text().splitlines():
        if re.match(r"\| runs? \|", line):
            names = [name.strip() for name in line.strip("|").split("|")]
            depths = [int(re.match(r"\d+", name)[0]) for name in names if re.match(r"\d", name)]
        if row := ROW.match(line):
            rows += 1
            group = [runs[row[1] + seed] for seed in row[2].split(",")]
            rate, *others = [cell.strip() for cell in row[3].split("|")]
            settings = group[0].settings["train"]
            assert {run.settings["train"]["learning_rate"] for run in group} == {float(rate)}, line
            for cell in others[: -len(depths)]:
                assert cell in (f"{settings['steps']:,}", f"{settings['adam_learning_rate']:g}"), line
            means = [sum(run.table[depth].accuracy for run in group) / len(group) for depth in depths]
            assert [f"{mean:.2f}" for mean in means] == others[-len(depths) :], line
    assert rows > 40
