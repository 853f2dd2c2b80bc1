"""Accuracies and the intervals they are known to: of one run, of a difference, of a mean over seeds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z95 = 1.959964  # the normal quantile of a two-sided 95% interval


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers with its 95% interval: n examples; what one answer to all questions scores."""

    accuracy: float
    low: float
    high: float
    n: int
    majority: float = math.nan

    @property
    def percent(self) -> str:
        """Percent right and its interval, as "29 (17, 42)"."""
        return f"{100 * self.accuracy:.0f} ({100 * self.low:z.0f}, {100 * self.high:z.0f})"


Table = dict[int, Accuracy]  # depth -> accuracy


def wilson_interval(share: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's interval for a share observed on n independent examples: of 95%, or of z standard deviations.

    SciPy's takes whole numbers of successes only, and an example with several questions can be half right.
    """
    centre = share + z**2 / (2 * n)
    reach = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    scale = 1 + z**2 / n
    # At the ends the two terms cancel, but for rounding, which must not leave the share itself outside.
    return min(share, max(0.0, (centre - reach) / scale)), max(share, min(1.0, (centre + reach) / scale))


def differing(one: Table, other: Table, comparisons: int) -> list[int]:
    """Return the depths at which tables measured on independent examples are further apart than chance explains.

    That is, where Newcombe's interval for the difference leaves out 0, at 95% for so many comparisons together.
    """
    z = NormalDist().inv_cdf(1 - 0.05 / (2 * comparisons))
    found = []
    for depth in one:
        less, more = sorted((one[depth], other[depth]), key=lambda a: a.accuracy)
        low, high = wilson_interval(more.accuracy, more.n, z)[0], wilson_interval(less.accuracy, less.n, z)[1]
        if more.accuracy - less.accuracy > math.hypot(more.accuracy - low, high - less.accuracy):
            found.append(depth)
    return found


def across_seeds(tables: list[Table]) -> Table:
    """Return the mean over runs that differ in their seed, with Student's 95% interval for that mean.

    It reaches as far to either side, and with few seeds far apart below 0 or above 1: then the seeds say hardly more
    than that it is a share. n is the number of runs; with a single run the interval is that run's own (Wilson's).
    Raises ValueError without any run.
    """
    if not tables:
        raise ValueError("there is no run to average")
    if len(tables) == 1:
        return tables[0]
    from scipy.special import stdtrit  # in here, as SciPy takes half a second to load

    together = {}
    for depth in tables[0]:
        shares = np.array([table[depth].accuracy for table in tables])
        mean, error = shares.mean().item(), shares.std(ddof=1).item() / len(shares) ** 0.5
        reach = float(stdtrit(len(shares) - 1, 0.975)) * error
        majority = sum(table[depth].majority for table in tables) / len(tables)
        together[depth] = Accuracy(mean, mean - reach, mean + reach, len(tables), majority)
    return together


class Paired(NamedTuple):
    """How one kind of run stands to another at one depth: on n seeds, by Student's paired test."""

    difference: float  # mean over the seeds
    p: float
    n: int

    @property
    def word(self) -> str:
        """What may be said at 95%, "ahead", "behind" or "not told apart"; and of how many seeds, if under five."""
        if self.n == 1:
            return "not tested (1 seed)"
        apart = "ahead" if self.difference > 0 else "behind"
        return (apart if self.p < 0.05 else "not told apart") + f" ({self.n} seeds)" * (self.n < 5)


def paired(one: Mapping[int, Table], other: Mapping[int, Table]) -> dict[int, Paired]:
    """Return, for every depth, how runs of one kind stand to those of another, compared on the seeds that both have.

    one, other: seed -> table. Runs of one seed saw the same examples in the same order, so what a seed does to both
    falls out of the difference. Each depth is tested by itself. Raises ValueError where no seed is in both.
    """
    if not (seeds := sorted(one.keys() & other.keys())):
        raise ValueError(f"no seed is in both: {sorted(one)} and {sorted(other)}")
    from scipy.stats import ttest_rel  # in here, as above

    found = {}
    for depth in one[seeds[0]]:
        left, right = ([kind[seed][depth].accuracy for seed in seeds] for kind in (one, other))
        apart = np.array(left) - np.array(right)
        certain = float(not apart.any())  # where all differ by the same, which leaves nothing to test
        p = float(ttest_rel(left, right).pvalue) if np.ptp(apart) else certain
        found[depth] = Paired(apart.mean().item(), p, len(seeds))
    return found
