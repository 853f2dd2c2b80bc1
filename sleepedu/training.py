"""Training through the sleep, end to end: Muon for hidden matrices, AdamW for the rest.

A run depends on its settings and seed alone: batch i is drawn from a generator seeded by (seed, i), and after it N,
where that varies. So every N sees the same data in the same order, and a run that was interrupted goes on exactly where
it stood. Under ``torchrun`` the ranks share each of these batches among them, and the result is the same to rounding.
"""

import contextlib
import ctypes
import importlib.util
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sleepedu import checks, distributed, files
from sleepedu.checkpoint import Checkpoint, History, Progress
from sleepedu.fast import cpp as kernel
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import check_passes, run_episode
from sleepedu.tasks.base import UNSCORED, Episode, Task

TRAINING, TESTING = 0, 1  # the two streams of examples
STRIDE = 1_000_003  # batches of one stream, before the next one begins
COMPILED = ("blocks", "write")  # the model's methods that run a pass


@dataclass(frozen=True)
class TrainConfig:
    """Everything that shapes a training run besides the task and the model.

    passes: N, or (fewest, most) to draw N anew for every batch, all equally likely. steps x batch examples.
    learning_rate: Muon's, for hidden matrices; adam_learning_rate: for embeddings, head, gates and vectors. warmup:
    steps up, then stable, then down to zero over the last ``decay`` part of the run. autocast: "", or "bfloat16" /
    "float16" for mixed precision (S stays float32). Raises ValueError for values that cannot train.
    """

    passes: int | tuple[int, int] = 1
    steps: int = 1000
    batch: int = 64
    seed: int = 0
    learning_rate: float = 0.01
    adam_learning_rate: float = 0.002
    warmup: int = 50
    decay: float = 0.3
    weight_decay: float = 1e-4
    clip: float = 1.0
    autocast: str = ""

    def __post_init__(self):
        if isinstance(self.passes, list):
            raise ValueError(f"passes must be N or a tuple, (fewest, most), got {self.passes}")
        for passes in self.range_of_passes:
            check_passes(passes)
        if len(self.range_of_passes) != 2 or self.range_of_passes[0] > self.range_of_passes[1]:
            raise ValueError(f"passes must be N or (fewest, most), got {self.passes}")
        checks.seed(self.seed)
        checks.whole("steps", self.steps, least=1)
        checks.whole("batch", self.batch, least=1)
        checks.whole("warmup", self.warmup, least=0)
        for name in ("learning_rate", "adam_learning_rate", "clip", "weight_decay", "decay"):
            checks.finite(name, getattr(self, name))
        for name in ("learning_rate", "adam_learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.weight_decay < 0 or not 0 <= self.decay <= 1:
            raise ValueError(
                "weight_decay must not be negative and decay must lie in 0..1, "
                f"got {self.weight_decay} and {self.decay}"
            )
        if self.autocast not in ("", "bfloat16", "float16"):
            raise ValueError(f"autocast {self.autocast!r} is unknown: use '', 'bfloat16' or 'float16'")

    @property
    def range_of_passes(self) -> tuple[int, int]:
        """The fewest and the most passes that a batch may get, both N where N is fixed."""
        return self.passes if isinstance(self.passes, tuple) else (self.passes, self.passes)

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step (from 0): warm-up, stable, linear decay."""
        up = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        down = self.decay * self.steps
        return min(up, (self.steps - step) / down) if down else up


def train(
    model: SleepLM,
    task: Task,
    config: TrainConfig,
    directory: Path | str | None = None,
    watch: Callable[[History, TrainConfig], None] | None = None,
    *,
    compile: bool = False,
    recompute: bool = False,
) -> History:
    """Train a model on a task, end to end through its sleep, and return the history of the run.

    With a directory, a checkpoint is kept there while training; called again with the same settings it resumes from
    it. Ctrl-C and SIGTERM then wait for the end of the step and a last checkpoint; a second one does not wait. A
    checkpoint that cannot be written, on a full disk say, is a warning: training goes on and the last one is kept.
    ``watch`` is called after every history entry (``print_progress`` shows a line). The model keeps its device.
    Inside ``distributed.process_group`` all ranks train together, and only the first keeps checkpoints and watches.
    compile: let ``torch.compile`` merge the blocks' small operations, which costs up to a minute at the beginning and
    makes a step 15 to 40% faster, by task and machine; where there is no compiler, training goes on without.
    recompute: as in ``run_episode``, much less memory for about a third more time.
    Raises ValueError when the model's vocabulary is smaller than the task's, the task asks nothing or is scored in no
    known way, the batch does not divide among the ranks, or the directory's checkpoint is broken or of other settings;
    BlockingIOError when another process trains in that directory; FloatingPointError when the loss is no longer a
    number.
    """
    check_task(model, task)
    distributed.check_batch(config.batch)
    device = model.head.weight.device
    if device.type == "cpu":
        keep_freed_memory()
    optimizers = make_optimizers(model, config)
    # A rank's gradients are so many times larger before they are averaged; 2^16 is where torch begins.
    scale = 2.0**16 / distributed.ranks()
    scaler = torch.amp.GradScaler(device.type, scale, enabled=config.autocast == "float16")
    history = History(majority_loss=majority_loss(task), tokens_per_step=config.batch * tokens_per_example(task))
    answer: nn.Module = Answer(model, recompute)
    fewest, most = config.range_of_passes
    if distributed.ranks() > 1:
        # What gets no gradient (inject, at N = 1) gets none in any step; static_graph is how one says so. Where N
        # changes, it has to be looked for in every step.
        fixed = fewest == most
        answer = DistributedDataParallel(answer, static_graph=fixed, find_unused_parameters=not fixed)
    if compile and not can_compile(device):
        warnings.warn("there is no compiler here, so training goes on without torch.compile", stacklevel=2)
        compile = False

    every = max(1, config.steps // 200)
    with contextlib.ExitStack() as stack:
        progress = Progress(sums=torch.zeros(3))
        checkpoint = None
        if directory is not None:
            settings = {"task": asdict(task), "model": asdict(model.config), "train": asdict(config)}
            checkpoint = stack.enter_context(
                Checkpoint(Path(directory), model, optimizers, scaler, settings, task.name)
            )
            checkpoint.resume(history, progress)
        sums = progress.sums.to(device)
        started = time.perf_counter() - progress.seconds
        model.train()
        if compile:
            stack.enter_context(compiled_blocks(model))
        for step in range(progress.step, config.steps):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * config.rate(step)
            generator = stream(config.seed, TRAINING, step)
            batch = task.sample(config.batch, generator)
            passes = int(torch.randint(fewest, most + 1, (), generator=generator))
            # The ranks' mean is that of the whole batch, also where one has more scored tokens than another.
            count = int(batch.asked.sum()) / distributed.ranks()
            sums += learn(answer, distributed.share(batch).to(device), passes, optimizers, scaler, config, count)
            progress.step, progress.counted = step + 1, progress.counted + 1
            if not (step + 1) % every or step + 1 == config.steps:
                mean_loss, mean_accuracy, mean_norm = distributed.mean(sums / progress.counted).tolist()
                if not math.isfinite(mean_loss + mean_norm):
                    raise FloatingPointError(
                        f"the loss is {mean_loss} and the norm of its gradient {mean_norm} by step {step + 1}: "
                        f"lower learning_rate (now {config.learning_rate}) "
                        "or clip; the last checkpoint is kept"
                    )
                history.step.append(step + 1)
                history.loss.append(round(mean_loss, 5))
                history.accuracy.append(round(mean_accuracy, 5))
                history.seconds.append(round(time.perf_counter() - started, 2))
                sums.zero_()
                progress.counted = 0
                if distributed.is_first() and watch is not None:
                    watch(history, config)
            if checkpoint is not None and checkpoint.is_due(progress, config.steps):
                progress.sums, progress.seconds = sums.cpu(), time.perf_counter() - started
                checkpoint.save(history, progress)
    model.eval()
    return history


def check_task(model: SleepLM, task: Task) -> None:
    """Raise ValueError unless the model knows as many words as the task has, and it is known how the task is scored."""
    if model.config.vocabulary < len(task.words):
        raise ValueError(f"the task has {len(task.words)} words, the model a vocabulary of {model.config.vocabulary}")
    if task.scoring not in ("each", "all"):
        raise ValueError(f"scoring {task.scoring!r} of the {task.name} task is unknown: use 'each' or 'all'")


def learn(
    answer: nn.Module,
    episode: Episode,
    passes: int,
    optimizers: list[torch.optim.Optimizer],
    scaler: torch.amp.GradScaler,
    config: TrainConfig,
    count: float = 0,
) -> Tensor:
    """Take one step on an episode: sleep N passes, answer, score, follow the gradient back, clip it, move.

    Return what is measured, (3,): loss (nats a scored token), share right, and the gradient's norm. count: as in
    ``score``.
    """
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    kind = episode.prompt.device.type
    with torch.autocast(kind, getattr(torch, config.autocast or "bfloat16"), enabled=bool(config.autocast)):
        logits = answer(episode, passes)
    loss, accuracy = score(logits.float(), episode, count)
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(answer.parameters(), config.clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    # The scaler of float16 meets infinite gradients on purpose and skips them; anywhere else they end the run.
    return torch.stack((loss.detach(), accuracy, torch.zeros_like(norm) if scaler.is_enabled() else norm))


def keep_freed_memory() -> None:
    """Let this process keep the memory that one step frees for the next, instead of handing it back to the system.

    The GNU C library hands large blocks back at once, and the system clears every page anew before it gives it out
    again: a tenth of the time of a training step at laptop size. With another C library nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # what there is instead, on other systems
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes, as high as every version takes it
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile finds what it needs: a C++ compiler for the CPU, Triton for a GPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return kernel.compiler() is not None


@contextlib.contextmanager
def compiled_blocks(model: SleepLM) -> Iterator[None]:
    """Run the model's passes through torch.compile meanwhile: the same numbers, to rounding, from fewer operations."""
    # What cannot be compiled after all runs as it is. The blocks run many times before gradients are averaged, so
    # there is nothing to split them for (optimize_ddp).
    with torch._dynamo.config.patch(suppress_errors=True, optimize_ddp=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the compiler's own
        for name in COMPILED:
            setattr(model, name, torch.compile(getattr(model, name), dynamic=False))
        try:
            yield
        finally:
            for name in COMPILED:
                vars(model).pop(name, None)  # the method of the class is there again
            torch._dynamo.reset()  # it compiles a function for so many models and then no more


class Answer(nn.Module):
    """An episode's logits as a module's forward: the one call whose gradients DistributedDataParallel averages."""

    def __init__(self, model: SleepLM, recompute: bool = False):
        super().__init__()
        self.model, self.recompute = model, recompute

    def forward(self, episode: Episode, passes: int) -> Tensor:
        return run_episode(self.model, episode, passes, recompute=self.recompute)


def score(logits: Tensor, episode: Episode, count: float = 0) -> tuple[Tensor, Tensor]:
    """Return the masked cross-entropy (nats a scored token) and the share of scored tokens that are right.

    logits: (b, p, V) for the episode's prompt. count: scored tokens to divide by; 0 means those of the episode.
    """
    asked = episode.asked
    logits, targets = logits[asked], episode.targets[asked]
    count = count or len(targets)
    right = (logits.detach().argmax(-1) == targets).sum()
    # Sums, because a rank's rows may have no scored token, and the mean of nothing is no number.
    return F.cross_entropy(logits, targets, reduction="sum") / count, right / count


def make_optimizers(model: SleepLM, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Return torch's Muon for the matrices inside the blocks, AdamW for everything else.

    Gates count with the rest: they are a few rows, not a hidden matrix. Betas, decay and schedule as in section 6.
    """
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and name.endswith("weight") and name.startswith(("layers.", "inject."))
        (hidden if matrix and ".gates." not in name else rest).append(parameter)
    optimizers = [
        torch.optim.Muon(hidden, lr=config.learning_rate, weight_decay=config.weight_decay, momentum=0.95),
        torch.optim.AdamW(
            rest, lr=config.adam_learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        ),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def stream(seed: int, purpose: int, number: int) -> torch.Generator:
    """Return the generator of one batch: the same for every model, another for every (seed, purpose, number).

    Raises ValueError for a seed outside 0..2^32 - 1.
    """
    checks.seed(seed)
    mixed = (seed * 2 + purpose) * STRIDE + number
    if number >= STRIDE or mixed >= 2**32:
        # The generator takes 32 bits of its seed and ignores the rest. Where these do not tell all streams apart, a
        # hash does: two of them are the same as rarely as two random numbers of 32 bits.
        mixed = int(files.checksum(f"{seed} {purpose} {number}".encode())[:8], 16)
    return torch.Generator().manual_seed(mixed)


def tokens_per_example(task: Task) -> int:
    """Return how many tokens a model reads in one example, windows and prompt."""
    return task.windows * task.window + task.prompt_length


def majority_loss(task: Task) -> float:
    """Return the loss of the best constant answer, in nats a scored token: the answers' entropy over 4,096 examples.

    Raises ValueError for episodes that ask nothing.
    """
    episode = task.sample(4096, stream(0, TESTING, 0))
    if not episode.asked.any():
        raise ValueError(f"the {task.name} task asks nothing: all its targets are {UNSCORED}")
    answers = episode.targets[episode.asked].view(-1, task.answer_tokens)
    share = answers.unique(dim=0, return_counts=True)[1].double() / len(answers)
    return round(float(-(share * share.log()).sum()) / task.answer_tokens, 5)


def print_progress(history: History, config: TrainConfig) -> None:
    """Show the run so far in one line: rewritten in place in a terminal, ten lines in all in a notebook or a log."""
    step, seconds = history.step[-1], history.seconds[-1]
    last = step == config.steps
    in_place = sys.stdout.isatty()
    tenth = step * 10 // config.steps
    if not in_place and len(history.step) > 1 and tenth == history.step[-2] * 10 // config.steps:
        return
    passes = " to ".join(str(n) for n in sorted(set(config.range_of_passes)))
    line = (
        f"N={passes}  step {step}/{config.steps}  loss {history.loss[-1]:.3f} "
        f"(best constant {history.majority_loss:.3f})  right {history.accuracy[-1]:.0%}  "
        f"{seconds:.0f} s, {seconds / step * (config.steps - step):.0f} s left"
    )
    print(f"\r{line:<110}" if in_place else line, end="" if in_place and not last else "\n", flush=True)


def parameter_count(parameters: Iterable[Tensor]) -> int:
    """Return how many numbers the parameters hold."""
    return sum(parameter.numel() for parameter in parameters)
