"""Accuracy by depth, with the interval it is known to and the baseline it has to beat."""

import torch

from sleepedu import checks
from sleepedu.intervals import Accuracy, Table, wilson_interval
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import check_passes, run_episode
from sleepedu.tasks.base import Episode, Task, check_task
from sleepedu.tasks.random_streams import TESTING, stream

BATCH = 500  # examples that are read at once


@torch.no_grad()
def accuracy_by_depth(
    model: SleepLM, task: Task, passes: int, examples: int = 2000, seed: int = 0, batch: int = BATCH
) -> Table:
    """Return how often the model is right at every depth of the task, on ``examples`` fresh examples per depth.

    An answer of several tokens is right when all of them are. The interval is Wilson's. An example counts once however
    many questions it asks, because questions about the same graph or row are not independent; where they are, the
    interval is wider than it need be. Examples come from another random stream than training's; where a task is small,
    some may coincide.
    batch: examples read at once. Raises ValueError for N < 1, examples outside 1..10,000 batches, batch < 1, a seed
    outside 0..2^32 - 1, a vocabulary smaller than the task's or a scoring other than "each" and "all".
    """
    check_passes(passes)
    checks.whole("batch", batch, least=1)
    check_examples(examples, batch)
    check_task(task, model.config.vocabulary)
    device = model.head.weight.device
    table = {}
    for depth in task.depths:
        right, asked = 0.0, []
        for number, start in enumerate(range(0, examples, batch)):
            generator = stream(seed, TESTING, 10_000 * (depth + 1) + number)
            episode = task.sample(min(batch, examples - start), generator, depth)
            answers = run_episode(model, episode.to(device), passes).argmax(-1).cpu()
            right += _share_right(task, answers == episode.targets, episode.asked).sum().item()
            asked.append(episode)
        constant = _most_frequent_answer(task, asked)
        by_constant = sum(_share_right(task, _is_answer(e, constant), e.asked).sum().item() for e in asked)
        low, high = wilson_interval(right / examples, examples)
        table[depth] = Accuracy(right / examples, low, high, examples, by_constant / examples)
    return table


def check_examples(examples: int, batch: int = BATCH) -> None:
    """Raise ValueError unless so many examples can be drawn: the stream of each depth has 10,000 batches."""
    checks.whole("examples", examples, least=1, most=10_000 * batch)


def _share_right(task: Task, right: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Return for every example the share of its answers that count as right: (b,)."""
    if task.scoring == "all":
        return (right | ~asked).all(dim=1).double()
    # The model reads the right first token before it gives the second; decoding greedily, it would read its own. What
    # counts is the same: either they are equal, or the answer is wrong already.
    whole = right[asked].view(-1, task.answer_tokens).all(dim=1)
    right = right.masked_scatter(asked, whole.repeat_interleave(task.answer_tokens))
    return (right & asked).sum(dim=1) / asked.sum(dim=1).double()


def _most_frequent_answer(task: Task, episodes: list[Episode]) -> torch.Tensor:
    """Return the tokens of the best constant answer, (answer_tokens,)."""
    answers = torch.cat([e.targets[e.asked] for e in episodes]).view(-1, task.answer_tokens)
    answers, counts = answers.unique(dim=0, return_counts=True)
    return answers[counts.argmax()]


def _is_answer(episode: Episode, answer: torch.Tensor) -> torch.Tensor:
    """Return where (b, p) the target is what this answer, given to every question, has there."""
    answers = answer.repeat(int(episode.asked.sum()) // len(answer))
    return torch.zeros_like(episode.asked).masked_scatter(episode.asked, episode.targets[episode.asked] == answers)
