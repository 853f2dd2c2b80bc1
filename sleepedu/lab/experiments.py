"""Experiments: an ``Experiment`` says what is trained, ``run`` returns the stored run or trains it now."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from sleepedu import files
from sleepedu.checkpoint import Checkpoint
from sleepedu.evaluation import accuracy_by_depth, check_examples
from sleepedu.fast.compiling import can_compile
from sleepedu.lab import run_store
from sleepedu.lab.recipes import Experiment
from sleepedu.lab.run_store import Run, find_device, load_run, save_run
from sleepedu.model import SleepLM
from sleepedu.training import History, TrainConfig, rank_and_ranks, train


def run(
    experiment: Experiment,
    device: str = "auto",
    directory: Path | str = run_store.OWN,
    watch: Callable[[History, TrainConfig], None] | None = None,
    examples: int = 2000,
    *,
    compile: bool | None = None,
    recompute: bool = False,
    committed: bool = True,
) -> Run | None:
    """Return the stored run with this experiment's settings, or train, evaluate and store it now.

    Looks in the committed store, unless told not to, then in ``directory``, where a new run goes; an interrupted run is
    resumed.
    watch, recompute: as in ``train``; so is compile, where None means where it can and pays, in a run of 1,000 steps or
    more on a CPU. Under ``torchrun`` the ranks train together; the first one stores the run, the others return None.
    Raises ValueError for a device that is unknown or not there, or examples outside 1..5,000,000; BlockingIOError when
    another process is training the same run; OSError when it cannot be written.
    """
    check_examples(examples)
    where = find_device(device)  # a stored run needs none, but who asked for one in vain should know
    stores = [run_store.COMMITTED, Path(directory)]
    for store in stores if committed else stores[1:]:
        path = store / experiment.name
        if (path / "run.json").exists() and (found := load_run(path)).settings == experiment.settings:
            if store != run_store.COMMITTED:
                Checkpoint(path).remove()  # there is one when the run was killed as it finished
            return found
    task, config, checkpoint = experiment.make_task(), experiment.train_config, Checkpoint(path)
    if compile is None:
        compile = where.type == "cpu" and config.steps >= 1000 and can_compile(where)
    with ExitStack() as stack:
        with ranks_together(where, config.batch):
            rank, ranks = rank_and_ranks()
            if rank == 0:
                stack.enter_context(files.sole_use(path))  # until the run is stored
            torch.manual_seed(experiment.seed)
            model = SleepLM(experiment.model_config).to(where)
            history = train(model, task, config, watch, checkpoint, compile=compile, recompute=recompute)
        if rank:
            return None
        table = accuracy_by_depth(model, task, experiment.passes, examples, seed=experiment.seed)
        made = {"compiled": compile and can_compile(where), "recomputed": recompute, "ranks": ranks}
        stored = save_run(path, experiment, model, history, table, made)
        checkpoint.remove()
        return stored


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
