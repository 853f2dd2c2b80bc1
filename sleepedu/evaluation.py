"""Accuracy by depth, with the interval it is known to and the baseline it has to beat."""

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.intervals import Accuracy, Table, wilson_interval
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import check_passes, run_episode, sleep, wake
from sleepedu.tasks.base import UNSCORED, Episode, Task, check_task
from sleepedu.tasks.random_streams import TESTING, stream
from sleepedu.trace import SleepTrace

BATCH = 500  # examples that are read at once


def accuracy_by_depth(
    model: SleepLM, task: Task, passes: int, examples: int = 2000, seed: int = 0, batch: int = BATCH
) -> Table:
    """Return how often the model is right at every depth of the task, on ``examples`` fresh examples per depth.

    They come from another random stream than training's; where a task is small, some may coincide. The interval is
    Wilson's, and an example counts once however many questions it asks, as these are not independent; one that asks
    nothing does not count.
    batch: examples read at once. Raises ValueError for N < 1, examples outside 1..10,000 batches, batch < 1, a seed
    outside 0..2^32 - 1, a vocabulary smaller than the task's, another depth than asked for, or an unknown scoring.
    """
    return accuracy_by_pass(model, task, [passes], examples, seed, batch)[passes]


@torch.no_grad()
def accuracy_by_pass(
    model: SleepLM, task: Task, passes: Iterable[int], examples: int = 2000, seed: int = 0, batch: int = BATCH
) -> dict[int, Table]:
    """Return ``accuracy_by_depth`` of the model when woken after each of these numbers of passes: N -> table.

    Where the text is one window they are passes of one sleep: together they take no longer than the most of them.
    """
    for n in (passes := list(passes)):
        check_passes(n)
    tables: dict[int, Table] = {n: {} for n in passes}
    checks.whole("batch", batch, least=1)
    check_examples(examples, batch)
    check_task(task, model.config.vocabulary)
    checks.has_numbers(device := model.head.weight.device)
    for depth in task.depths:
        right, episodes = dict.fromkeys(tables, 0.0), []
        for number, start in enumerate(range(0, examples, batch)):
            generator = stream(seed, TESTING, 10_000 * (depth + 1) + number)
            episode = task.sample(min(batch, examples - start), generator, depth)
            if (episode.depth[episode.asked] != depth).any():
                raise ValueError(f"the {task.name} task was asked for depth {depth}, and its episode has others")
            for n, logits in _woken(model, episode.to(device), tables):
                hits = logits.argmax(-1).cpu() == episode.targets
                right[n] += _share_right(task, hits, episode.asked).sum().item()
            episodes.append(episode)
        asking = sum(int(episode.asked.any(dim=1).sum()) for episode in episodes)
        if not asking:
            raise ValueError(f"the {task.name} task asks nothing at depth {depth}: all its targets are {UNSCORED}")
        constant = _right_by_constant(task, episodes) / asking
        for n, table in tables.items():
            table[depth] = Accuracy(right[n] / asking, *wilson_interval(right[n] / asking, asking), asking, constant)
    return tables


def _woken(model: SleepLM, episode: Episode, passes: Collection[int]) -> Iterator[tuple[int, Tensor]]:
    """Return each N with its logits; from one sleep, where that leaves S after every pass as shorter ones would."""
    if len(passes) == 1 or episode.windows.shape[1] > 1 or model.config.eviction == "sliding" or model.fast_in_coda:
        return ((n, run_episode(model, episode, n)) for n in passes)
    sleep(model, episode.windows[:, 0], passes=max(passes), trace=(trace := SleepTrace()))
    return ((n, wake(model, episode.prompt, trace.S[0][n])) for n in passes)


def check_examples(examples: int, batch: int = BATCH) -> None:
    """Raise ValueError unless so many examples can be drawn: the stream of each depth has 10,000 batches."""
    checks.whole("examples", examples, least=1, most=10_000 * batch)


def _share_right(task: Task, right: Tensor, asked: Tensor) -> Tensor:
    """Return for every example the share of its answers that count as right, 0 where it asks nothing: (b,)."""
    if task.scoring == "all":
        return ((right | ~asked).all(dim=1) & asked.any(dim=1)).double()
    # The model reads the right first token before it gives the second; decoding greedily, it would read its own. What
    # counts is the same: either they are equal, or the answer is wrong already.
    whole = right[asked].view(-1, task.answer_tokens).all(dim=1)
    right = right.masked_scatter(asked, whole.repeat_interleave(task.answer_tokens))
    return (right & asked).sum(dim=1) / asked.sum(dim=1).clamp(min=1).double()


def _right_by_constant(task: Task, episodes: list[Episode]) -> float:
    """Return how many examples are right when every question gets the answer that is most frequent among them."""
    targets = torch.cat([e.targets for e in episodes])
    asked = torch.cat([e.asked for e in episodes])
    answers = targets[asked].view(-1, task.answer_tokens)  # of every question
    different, counts = answers.unique(dim=0, return_counts=True)
    constant = targets.masked_scatter(asked, different[counts.argmax()].repeat(len(answers)))
    return _share_right(task, constant == targets, asked).sum().item()
