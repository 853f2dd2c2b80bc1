"""Is a stored run what its settings give? Train it again and compare: history, accuracy by depth, weights.

On the processor, versions and number of threads of the stored run every number has to be the same, on the CPU at
least. Elsewhere rounding differs, and what was rounding grows from step to step; there no accuracy may differ by more
than chance explains. (Chance is taken to be that of two sets of examples. Both tables are of the same set, so this errs
towards "reproduced".)
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sleepedu.fast import without_compiled_rule
from sleepedu.intervals import Accuracy, differing
from sleepedu.lab.experiments import train_and_store
from sleepedu.lab.run_store import Run, find_device, load_run
from sleepedu.training import History, TrainConfig

# What rounding can depend on, as it stands in a run's provenance; a run from before one was noted did without.
ALIKE = ("device", "processor", "threads", "ranks", "compiled", "recomputed", "kernel", "python", "torch", "numpy")


@dataclass(frozen=True)
class Comparison:
    """What became of a run when it was trained again: a line for each part, and whether it counts as reproduced."""

    lines: list[str]
    reproduced: bool


def reproduce(
    run: Run, directory: Path | str | None = None, watch: Callable[[History, TrainConfig], None] | None = None
) -> Comparison:
    """Train a stored run again from its settings and compare; what is trained is kept in ``directory``, if any.

    It takes the device and the threads of the stored run, and compiles and recomputes as that did; without the rule in
    C++ where that had none. Raises ValueError where its settings are no longer those of today's recipe, ``directory``
    holds the run itself, or its device is not there.
    """
    if run.experiment.settings != run.settings:
        raise ValueError(
            f"the recipe of {run.name} has changed since it was stored: this library cannot train it again"
        )
    made, threads = run.provenance, torch.get_num_threads()
    device = find_device(made["device"])
    with tempfile.TemporaryDirectory() if directory is None else nullcontext(directory) as folder:
        path = Path(folder) / run.name
        if path.resolve() == run.path.resolve():
            raise ValueError(f"{folder} holds the stored run itself: train it again in another folder")
        if (path / "run.json").exists():
            return compare(run, load_run(path))
        examples = next(iter(run.table.values())).n
        compile, recompute = made.get("compiled", False), made.get("recomputed", False)
        torch.set_num_threads(made["threads"])
        try:
            with nullcontext() if made.get("kernel", False) else without_compiled_rule():
                again = train_and_store(
                    run.experiment, path, device, watch, examples, compile=compile, recompute=recompute
                )
        finally:
            torch.set_num_threads(threads)
        assert again is not None  # only other ranks get none, and there are no others
        return compare(run, again)


def compare(run: Run, again: Run) -> Comparison:
    """Compare a run with the same one trained again. Raises ValueError when it is one of other settings."""
    if again.settings != run.settings:
        raise ValueError(f"{again.path} is of a run with other settings: train again in another folder")
    was, became = ({name: r.provenance.get(name, False) for name in ALIKE} for r in (run, again))
    other = [f"{name} {was[name]}, now {became[name]}" for name in ALIKE if was[name] != became[name]]
    lines = ["made     " + (f"differently: {'; '.join(other)}" if other else "on the same machine and versions")]

    same_history = replace(run.history, seconds=[]) == replace(again.history, seconds=[])
    ending = f"differs: last loss {run.history.loss[-1]} stored, {again.history.loss[-1]} now"
    lines.append(f"history  {f'identical: {len(run.history.step)} entries' if same_history else ending}")

    def shown(a: Accuracy) -> str:
        return f"{a.accuracy:.4f} ({a.low:.3f} - {a.high:.3f})"

    apart = differing(run.table, again.table, len(run.table))
    for depth, stored in run.table.items():
        verdict, now = "identical", ""
        if again.table[depth] != stored:
            verdict = "differs by MORE than chance" if depth in apart else "differs by chance"
            now = f", now {shown(again.table[depth])}"
        lines.append(f"depth {depth:<3d}{verdict}: stored {shown(stored)}{now}")

    gap = 0.0
    if run.weights:
        old, new = (r.load_model().state_dict() for r in (run, again))
        gap = max((old[name] - new[name]).abs().max().item() for name in old)
        lines.append(f"weights  {f'differ by up to {gap:.2g}' if gap else 'identical: bit for bit'}")
    else:
        lines.append("weights  not stored, so not compared")

    reproduced = not apart and (bool(other) or (same_history and run.table == again.table and not gap))
    lines.append("reproduced" if reproduced else "NOT reproduced")
    return Comparison(lines, reproduced)
