"""Where all random examples come from: one generator for every batch, which its seed, purpose and number determine.

Every model sees the same batches in the same order, and training and testing share none (or, where 32 bits cannot tell
all apart, as rarely as two random numbers do). The only other random numbers are a model's first weights, which
``torch.manual_seed`` fixes.
"""

import hashlib

import torch

from sleepedu import checks

TRAINING, TESTING = 0, 1  # the purposes
STRIDE = 1_000_003  # batches of one stream, before the next one begins


def stream(seed: int, purpose: int, number: int) -> torch.Generator:
    """Return the generator of one batch: the same for every model, another for every (seed, purpose, number).

    Raises ValueError for a seed outside 0..2^32 - 1.
    """
    checks.seed(seed)
    mixed = (seed * 2 + purpose) * STRIDE + number
    if number >= STRIDE or mixed >= 2**32:
        # The generator takes 32 bits of its seed and ignores the rest. Where these do not tell all streams apart, a
        # hash does: two of them are the same as rarely as two random numbers of 32 bits.
        mixed = int(hashlib.sha256(f"{seed} {purpose} {number}".encode()).hexdigest()[:8], 16)
    return torch.Generator().manual_seed(mixed)
