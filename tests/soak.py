"""How often kills, mutated files and properties are tried: short in `make test`, long in `make soak`."""

import os
from collections import Counter, defaultdict

SOAK = os.environ.get("SOAK") == "1"
COUNTS: Counter[str] = Counter()  # what was tried, shown at the end of the tests
LARGEST: defaultdict[str, float] = defaultdict(float)  # the largest errors that were found, shown likewise


def size(test: int, soak: int) -> int:
    """Return how often to try: so many times in `make test`, so many in `make soak`."""
    return soak if SOAK else test
