"""Accuracies and the intervals they are known to: of one run, of a difference, of a mean over seeds."""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

Z95 = 1.959964  # the normal quantile of a two-sided 95% interval


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
    """Return the mean over runs that differ in their seed, with Student's 95% interval for that mean (clipped to 0..1).

    n is the number of runs; with a single run the interval is that run's own. Raises ValueError without any run.
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
        together[depth] = Accuracy(mean, max(0.0, mean - reach), min(1.0, mean + reach), len(tables), majority)
    return together
