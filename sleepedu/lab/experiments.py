"""Experiments: ``run`` returns a stored run or trains it now; ``reproduce`` trains one again and compares."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sleepedu import storage
from sleepedu.checkpoint import Checkpoint
from sleepedu.evaluation import accuracy_by_depth, check_examples
from sleepedu.fast import without_compiled_rule
from sleepedu.fast.compiling import can_compile, pays
from sleepedu.fast.memory import most_bytes
from sleepedu.fast.precision import choose_precision
from sleepedu.intervals import differing
from sleepedu.lab import results, run_store
from sleepedu.lab.recipes import Experiment
from sleepedu.lab.run_store import Run, find_device, load_run, save_run
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.sleep_loop import run_episode
from sleepedu.tasks.base import Episode
from sleepedu.training import History, TrainConfig, rank_and_ranks, score, train

# What rounding can depend on, as it stands in a run's provenance; and what a run had from before it was noted.
ALIKE = ("device", "processor", "threads", "ranks", "compiled", "recomputed", "kernel", "python", "torch", "numpy")
BEFORE = {**dict.fromkeys((*ALIKE, "together"), False), "muon": "bfloat16", "precision": "float32"}


def run(
    experiment: Experiment,
    device: str = "auto",
    directory: Path | str = run_store.OWN,
    watch: Callable[[History, TrainConfig], None] | None = None,
    examples: int = 2000,
    *,
    compile: bool | None = None,
    recompute: bool | None = None,
    committed: bool = True,
    starts: Path | str | None = None,
) -> Run | None:
    """Return the stored run with this experiment's settings, or train, evaluate and store it now.

    Looks in the committed store, if it may, then in ``directory``, where a new run goes; an interrupted run is resumed.
    watch, compile, recompute: as in ``train``; compile=None compiles where it can and pays, in a run of 1,000 steps or
    more, recompute=None does as the recipe. starts: the folder with the run that the experiment goes on from, instead
    of ``directory``. Under ``torchrun`` the ranks train together; the first one stores the run, the others return None.
    Raises ValueError for a device that is unknown, not there or too small, or examples outside 1..5,000,000;
    BlockingIOError when another process trains the same run; OSError when it cannot be written; and what
    ``settings_and_weights`` raises.
    """
    check_examples(examples)
    where = find_device(device)  # a stored run needs none, but who asked for one in vain should know
    settings, weights = settings_and_weights(experiment, directory if starts is None else starts)
    path = Path(directory, experiment.name)
    if committed and (found := finished(run_store.COMMITTED / experiment.name, settings)) is not None:
        return found
    if (found := finished(path, settings)) is not None:
        Checkpoint(path).remove()  # there is one when the run was killed as it finished
        return found
    task, config, checkpoint = experiment.make_task(), experiment.train_config, Checkpoint(path)
    if compile is None:
        compile = pays(config.steps, where)
    recompute = experiment.recipe.recompute if recompute is None else recompute
    with ExitStack() as stack:
        with ranks_together(where, config.batch):
            rank, ranks = rank_and_ranks()
            if where.type == "cuda":
                check_memory(experiment, config.batch // ranks, recompute, torch.cuda.get_device_properties(where))
            if rank == 0:
                stack.enter_context(storage.sole_use(path))  # until the run is stored
            torch.manual_seed(experiment.seed)
            model = SleepLM(experiment.model_config).to(where)
            model.load_state_dict(weights, strict=False)  # those there are: another carry may need more, or less
            history = train(model, task, config, watch, checkpoint, compile=compile, recompute=recompute)
        if rank:
            return None
        table = accuracy_by_depth(model, task, experiment.passes, examples, seed=experiment.seed)
        made = {"precision": choose_precision(config.precision, where), "compiled": compile and can_compile(where)}
        made |= {"recomputed": recompute, "ranks": ranks}
        save_run(path, experiment, settings, model, history, table, made)
        checkpoint.remove()
        return load_run(path)


def finished(path: Path, settings: dict[str, Any]) -> Run | None:
    """Return the run in the folder ``path``, if one of these settings is finished there."""
    found = load_run(path) if (path / "run.json").exists() else None
    return found if found is not None and found.settings == settings else None


def settings_and_weights(experiment: Experiment, store: Path | str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return an experiment's settings, with the checksum of what it goes on from, and the weights of that, if any.

    Looks for the run in ``store``, then where ``load_run`` does. Raises what that and ``load_model`` raise, and
    ValueError for a run of another task, shape or rule.
    """
    if not (name := experiment.trained_from):
        return experiment.settings, {}
    run = load_run(path if (path := Path(store, name)).exists() else name)
    model = replace(ModelConfig(**run.settings["model"]), carry=experiment.carry, eviction=experiment.eviction)
    for found, wanted in ((run.make_task(), experiment.make_task()), (model, experiment.model_config)):
        for field, value in asdict(wanted).items():
            if (its := getattr(found, field)) != value:
                raise ValueError(f"{name} was trained with {field} {its!r}: it cannot go on with {value!r}")
    return {**experiment.settings, "trained_from": run.weights_checksum}, run.load_model().state_dict()


def step_bytes(experiment: Any, batch: int, recompute: bool) -> dict[str, int]:
    """Return the bytes of parameters, of what optimizers keep of them, and of a step's gradients and all else.

    experiment: an ``Experiment`` or a ``FineTuning``, whose models compute again block by block.
    """
    task, model = experiment.make_task(), experiment.form()
    model.recompute, of_passes = recompute, recompute and type(model) is SleepLM
    count = -(-batch // experiment.train_config.parts)
    windows = torch.zeros(count, task.windows, task.window, dtype=torch.long, device="meta")
    prompt = torch.zeros(count, task.prompt_length, dtype=torch.long, device="meta")

    def step() -> None:
        episode = Episode(windows, prompt, prompt, prompt)
        score(run_episode(model, episode, experiment.passes, recompute=of_passes), episode)[0].backward()

    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    parameters = sum(weight.nbytes for weight in model.parameters())
    # Of what is trained AdamW keeps two, and Muon one: at most this much.
    return {"parameters": parameters, "optimizers": 2 * trained, "step": most_bytes(step)}


def check_memory(experiment: Any, batch: int, recompute: bool, card: Any) -> None:
    """Raise ValueError, which says what would fit, where a step leaves less than a tenth of a card's memory free."""

    def needed(batch: int, recompute: bool) -> float:
        return sum(step_bytes(experiment, batch, recompute).values()) / 1e9

    room, all_of_it = 0.9 * card.total_memory / 1e9, needed(batch, recompute)
    if all_of_it > room:
        less, one = needed(batch, True), needed(1, True)
        most = 1 + int((room - one) / (less - one) * (batch - 1)) if one < room < less else 0  # it grows with the batch
        fits = f"a batch of {most} would fit" if most else "take a smaller model or window, or a GPU that has more"
        fits = f"--recompute takes {less:.1f}" if less < room else fits
        told = f"a step of {experiment.name} takes {all_of_it:.1f} GB of memory, there is room for {room:.1f}"
        raise ValueError(f"{told}: {fits}")


def reproduce(
    stored: Run, directory: Path | str | None = None, watch: Callable[[History, TrainConfig], None] | None = None
) -> tuple[list[str], bool]:
    """Train a stored run again from its settings and ``compare``; what is trained is kept in ``directory``, if any.

    It takes the device and the threads of the stored run, and compiles and recomputes as that did; without the rule in
    C++ where that had none. Raises ValueError where its settings are no longer those of today's recipe, ``directory``
    holds the run itself, or its device is not there.
    """
    if settings_and_weights(stored.experiment, stored.path.parent)[0] != stored.settings:
        raise ValueError(f"the recipe of {stored.name}, or its start, has changed since: train it where it was made")
    made, threads = stored.provenance, torch.get_num_threads()
    how: dict[str, Any] = {"starts": stored.path.parent, "committed": False}
    how |= {"compile": made.get("compiled", False), "recompute": made.get("recomputed", False)}
    examples = next(iter(stored.table.values())).n
    with tempfile.TemporaryDirectory() if directory is None else nullcontext(directory) as folder:
        if Path(folder).resolve() == stored.path.parent.resolve():
            raise ValueError(f"{folder} holds the stored run itself: train it again in another folder")
        if (path := Path(folder, stored.experiment.name)).joinpath("run.json").exists():
            return compare(stored, load_run(path))
        torch.set_num_threads(made["threads"])
        try:
            with nullcontext() if made.get("kernel", False) else without_compiled_rule():
                again = run(stored.experiment, made["device"], folder, watch, examples, **how)
        finally:
            torch.set_num_threads(threads)
        assert again is not None  # only other ranks get none, and there are no others
        return compare(stored, again)


def compare(stored: Run, again: Run) -> tuple[list[str], bool]:
    """Return what became of a run that was trained again, in lines, and whether it counts as reproduced.

    On the processor, versions and number of threads of the stored run, and made in the same way, every number has to be
    the same. Elsewhere rounding differs, and what was rounding grows from step to step; there no accuracy may differ by
    more than chance explains. (Chance is taken to be that of two sets of examples. Both tables are of the same set, so
    this errs towards "reproduced".) Raises ValueError when it is a run of other settings.
    """
    if again.settings != stored.settings:
        raise ValueError(f"{again.path} is of a run with other settings: train again in another folder")
    was, became = ({name: r.provenance.get(name, before) for name, before in BEFORE.items()} for r in (stored, again))
    other = "; ".join(f"{name} {was[name]}, now {became[name]}" for name in BEFORE if was[name] != became[name])
    same_history = replace(stored.history, seconds=[]) == replace(again.history, seconds=[])
    losses = f"differs: last loss {stored.history.loss[-1]} stored, {again.history.loss[-1]} now"
    gap, weights = 0.0, "not stored, so not compared"
    if stored.weights_checksum:
        old, new = (r.load_model().state_dict() for r in (stored, again))
        gap = max((old[name] - new[name]).abs().max().item() for name in old)
        weights = f"differ by up to {gap:.2g}" if gap else "identical: bit for bit"
    apart = differing(again.table, stored.table, len(stored.table))
    chance = "MORE than chance explains" if apart else "chance"
    reproduced = not apart and (bool(other) or (same_history and again.table == stored.table and not gap))
    return [
        "made      " + (f"differently: {other}" if other else "on the same machine and versions"),
        "history   " + ("identical" if same_history else losses),
        "weights   " + weights,
        "accuracy  " + ("identical" if again.table == stored.table else f"differs by {chance}"),
        *results.beside_stored(again.table, stored, apart),
        "reproduced" if reproduced else "NOT reproduced",
    ], reproduced


def torchrun_rank() -> int | None:
    """Return the rank that torchrun gave this process, None without torchrun."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


@contextmanager
def ranks_together(device: torch.device, batch: int) -> Iterator[None]:
    """Bring the processes that torchrun started into one group meanwhile; do nothing without torchrun or in a group.

    Raises ValueError, on every rank alike, for fewer CUDA devices than ranks here or a batch that does not divide among
    the ranks; ConnectionError where another rank has failed.
    """
    if torchrun_rank() is None or dist.is_initialized():
        yield
        return
    ranks, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if batch % ranks:
        raise ValueError(f"a batch of {batch} does not divide into equal shares for {ranks} ranks")
    if device.type == "cuda":
        if torch.cuda.device_count() < here:
            raise ValueError(f"every rank needs a CUDA device: this machine has {torch.cuda.device_count()} for {here}")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield
    except RuntimeError as error:
        if "by peer" in str(error):  # as Gloo says it
            raise ConnectionError("another rank has failed") from error
        raise
    # After an error the group is left to the end of the process: to take it down can mean to wait for the others.
    dist.destroy_process_group()
