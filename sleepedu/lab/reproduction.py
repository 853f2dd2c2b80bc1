"""Is a stored run what its settings give? Train it again and compare: history, accuracy by depth, weights.

On the processor, versions and number of threads of the stored run every number has to be the same, on the CPU at
least. Elsewhere rounding differs, and what was rounding grows from step to step; there no accuracy may differ by more
than chance explains. (Chance is taken to be that of two sets of examples. Both tables are of the same set, so this errs
towards "reproduced".)
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from sleepedu.fast import without_cpp
from sleepedu.intervals import differing
from sleepedu.lab import experiments, results
from sleepedu.lab.run_store import Run
from sleepedu.training import History, TrainConfig

# What rounding can depend on, as it stands in a run's provenance; a run from before one was noted did without.
ALIKE = ("device", "processor", "threads", "ranks", "compiled", "recomputed", "kernel", "python", "torch", "numpy")


def reproduce(
    run: Run, directory: Path | str | None = None, watch: Callable[[History, TrainConfig], None] | None = None
) -> tuple[list[str], bool]:
    """Train a stored run again from its settings and ``compare``; what is trained is kept in ``directory``, if any.

    It takes the device and the threads of the stored run, and compiles and recomputes as that did; without the rule in
    C++ where that had none. Raises ValueError where its settings are no longer those of today's recipe, ``directory``
    holds the run itself, or its device is not there.
    """
    if run.experiment.settings != run.settings:
        raise ValueError(
            f"the recipe of {run.name} has changed since it was stored: this library cannot train it again"
        )
    made, threads = run.provenance, torch.get_num_threads()
    how = {"compile": made.get("compiled", False), "recompute": made.get("recomputed", False), "committed": False}
    examples = next(iter(run.table.values())).n
    with tempfile.TemporaryDirectory() if directory is None else nullcontext(directory) as folder:
        if Path(folder, run.experiment.name).resolve() == run.path.resolve():
            raise ValueError(f"{folder} holds the stored run itself: train it again in another folder")
        torch.set_num_threads(made["threads"])
        try:
            with nullcontext() if made.get("kernel", False) else without_cpp():
                again = experiments.run(run.experiment, made["device"], folder, watch, examples, **how)
        finally:
            torch.set_num_threads(threads)
        assert again is not None  # only other ranks get none, and there are no others
        return compare(run, again)


def compare(run: Run, again: Run) -> tuple[list[str], bool]:
    """Return what became of a run that was trained again, in lines, and whether it counts as reproduced.

    Raises ValueError when it is one of other settings.
    """
    if again.settings != run.settings:
        raise ValueError(f"{again.path} is of a run with other settings: train again in another folder")
    was, became = ({name: r.provenance.get(name, False) for name in ALIKE} for r in (run, again))
    other = "; ".join(f"{name} {was[name]}, now {became[name]}" for name in ALIKE if was[name] != became[name])
    same_history = replace(run.history, seconds=[]) == replace(again.history, seconds=[])
    losses = f"differs: last loss {run.history.loss[-1]} stored, {again.history.loss[-1]} now"
    gap, weights = 0.0, "not stored, so not compared"
    if run.weights:
        old, new = (r.load_model().state_dict() for r in (run, again))
        gap = max((old[name] - new[name]).abs().max().item() for name in old)
        weights = f"differ by up to {gap:.2g}" if gap else "identical: bit for bit"
    apart = differing(again.table, run.table, len(run.table))
    chance = "MORE than chance explains" if apart else "chance"
    reproduced = not apart and (bool(other) or (same_history and again.table == run.table and not gap))
    return [
        "made      " + (f"differently: {other}" if other else "on the same machine and versions"),
        "history   " + ("identical" if same_history else losses),
        "weights   " + weights,
        "accuracy  " + ("identical" if again.table == run.table else f"differs by {chance}"),
        *results.beside_stored(again.table, run, apart),
        "reproduced" if reproduced else "NOT reproduced",
    ], reproduced
