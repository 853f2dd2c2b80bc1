"""Accuracy by depth, with the interval it is known to and the baseline it has to beat."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch

from sleepedu import checks
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import check_passes, run_episode
from sleepedu.tasks.base import Episode, Task
from sleepedu.training import TESTING, check_task, stream

Z95 = 1.959964  # the normal quantile of a two-sided 95% interval
BATCH = 500  # examples that are read at once
T95 = (math.nan, 12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its 95% interval: n examples, and what the best constant answer scores there."""

    accuracy: float
    low: float
    high: float
    n: int
    majority: float = math.nan

    @property
    def percent(self) -> str:
        """Percent right and its interval, as "29 (17-42)"."""
        return f"{100 * self.accuracy:.0f} ({100 * self.low:.0f}-{100 * self.high:.0f})"


Table = dict[int, Accuracy]  # depth -> accuracy


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
    check_task(model, task)
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


def wilson_interval(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's interval for a share observed on n independent examples: of 95%, or of z standard deviations."""
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    scale = 1 + z**2 / n
    # At the ends the two terms cancel, but for rounding, which must not leave the share itself outside.
    return min(share, max(0.0, (centre - reach) / scale)), max(share, min(1.0, (centre + reach) / scale))


def differ(one: Accuracy, other: Accuracy, comparisons: int = 1) -> bool:
    """Return whether two accuracies, measured on independent examples, are further apart than chance explains.

    That is, whether Newcombe's interval for their difference leaves out 0. comparisons: how many pairs are looked at;
    with probability 95% none of so many pairs of equal models differs (Bonferroni).
    """
    z = NormalDist().inv_cdf(1 - 0.05 / (2 * comparisons))
    more, less = (one, other) if one.accuracy >= other.accuracy else (other, one)
    low, _ = wilson_interval(more.accuracy, more.n, z)
    _, high = wilson_interval(less.accuracy, less.n, z)
    return more.accuracy - less.accuracy > math.hypot(more.accuracy - low, high - less.accuracy)


def differing(one: Table, other: Table, comparisons: int) -> list[int]:
    """Return the depths at which two tables of the same depths ``differ``, for as many comparisons."""
    return [depth for depth, accuracy in one.items() if differ(accuracy, other[depth], comparisons)]


def across_seeds(tables: list[Table]) -> Table:
    """Return the mean over runs that differ in their seed, with Student's 95% interval for that mean (clipped to 0..1).

    n is the number of runs; with a single run the interval is that run's own. Raises ValueError without any run.
    """
    if not tables:
        raise ValueError("there is no run to average")
    if len(tables) == 1:
        return tables[0]
    together = {}
    for depth in tables[0]:
        shares = torch.tensor([table[depth].accuracy for table in tables], dtype=torch.float64)
        reach = T95[min(len(tables), len(T95)) - 1] * shares.std().item() / math.sqrt(len(tables))
        mean = shares.mean().item()
        majority = sum(table[depth].majority for table in tables) / len(tables)
        together[depth] = Accuracy(mean, max(0.0, mean - reach), min(1.0, mean + reach), len(tables), majority)
    return together
