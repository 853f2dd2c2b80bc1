"""Is a stored run what its settings give? Train it again and compare: history, accuracy by depth, weights.

On the processor, versions and number of threads of the stored run every number has to be the same, on the CPU at
least. Elsewhere rounding differs, and what was rounding grows from step to step; there no accuracy may differ by more
than chance explains. (Chance is taken to be that of two sets of examples. Both tables are of the same set, so this errs
towards "reproduced".)
"""

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sleepedu.checkpoint import History
from sleepedu.evaluation import differing
from sleepedu.fast import cpp as kernel
from sleepedu.lab.experiments import Run, find_device, load, train_and_store
from sleepedu.training import TrainConfig

ALIKE = (
    "device",
    "processor",
    "threads",
    "ranks",
    "compiled",
    "recomputed",
    "kernel",
    "python",
    "torch",
    "numpy",
)  # what rounding can depend on


@dataclass(frozen=True)
class Comparison:
    """What became of a run when it was trained again: a line for each part, and whether it counts as reproduced."""

    lines: list[str]
    reproduced: bool


def reproduce(
    run: Run, directory: Path | str | None = None, watch: Callable[[History, TrainConfig], None] | None = None
) -> Comparison:
    """Train a stored run again from its settings and compare; what is trained is kept in ``directory``, if any.

    It takes the device and the threads of the stored run, and compiles and recomputes as that did; without the compiled
    rule where that had none. Raises ValueError where its settings are no longer those of today's recipe, ``directory``
    holds the run itself, or its device is not there.
    """
    if run.experiment.settings != run.settings:
        raise ValueError(
            f"the recipe of {run.name} has changed since it was stored: this library cannot train it again"
        )
    made = run.provenance
    device, threads = find_device(made["device"]), torch.get_num_threads()
    with tempfile.TemporaryDirectory() if directory is None else nullcontext(directory) as folder:
        path = Path(folder) / run.name
        if path.resolve() == run.path.resolve():
            raise ValueError(f"{folder} holds the stored run itself: train it again in another folder")
        try:
            torch.set_num_threads(made["threads"])
            if (path / "run.json").exists():
                again = load(path)
            else:
                examples = next(iter(run.table.values())).n
                how = {"compile": made.get("compiled", False), "recompute": made.get("recomputed", False)}
                with nullcontext() if made.get("kernel", False) else kernel.without():
                    trained = train_and_store(run.experiment, path, device, watch, examples, **how)
                assert trained is not None  # only other ranks get none, and there are no others
                again = trained
            return compare(run, again)
        finally:
            torch.set_num_threads(threads)


def compare(run: Run, again: Run) -> Comparison:
    """Compare a run with the same one trained again. Raises ValueError when it is one of other settings."""
    if again.settings != run.settings:
        raise ValueError(f"{again.path} is of a run with other settings: train again in another folder")
    made, now = run.provenance, again.provenance
    was, became = ({name: found.get(name, False) for name in ALIKE} for found in (made, now))
    other = [f"{name} {was[name]}, now {became[name]}" for name in ALIKE if was[name] != became[name]]
    lines = ["made     " + (f"differently: {'; '.join(other)}" if other else "on the same machine and versions")]

    old, new = ({**asdict(r.history), "seconds": None} for r in (run, again))
    same = [old == new]
    ending = f"differs: last loss {run.history.loss[-1]} stored, {again.history.loss[-1]} now"
    lines.append(f"history  {f'identical: {len(run.history.step)} entries' if same[-1] else ending}")

    apart = differing(run.table, again.table, len(run.table))
    for depth, stored in run.table.items():
        measured = again.table[depth]
        same.append(stored == measured)
        verdict = "identical" if same[-1] else "differs by MORE than chance" if depth in apart else "differs by chance"
        found = f"{stored.accuracy:.4f} ({stored.low:.3f} - {stored.high:.3f})"
        now_found = "" if same[-1] else f", now {measured.accuracy:.4f} ({measured.low:.3f} - {measured.high:.3f})"
        lines.append(f"depth {depth:<3d}{verdict}: stored {found}{now_found}")

    if run.weights:
        old, new = (r.load_model().state_dict() for r in (run, again))
        gap = max((old[name] - new[name]).abs().max().item() for name in old)
        same.append(gap == 0)
        lines.append(f"weights  {'identical: bit for bit' if same[-1] else f'differ by up to {gap:.2g}'}")
    else:
        lines.append("weights  not stored, so not compared")

    reproduced = not apart and (bool(other) or all(same))
    lines.append("reproduced" if reproduced else "NOT reproduced")
    return Comparison(lines, reproduced)
