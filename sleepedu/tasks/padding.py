"""Texts of different lengths in rows of one length."""

import torch
from torch import Tensor


def pad_left(tokens: Tensor, length: int, padding: int) -> Tensor:
    """Return the tokens of every row (b, any) that are no padding, at the right end of a row of ``length``."""
    kept = tokens != padding
    text = torch.full((len(tokens), length), padding)
    text[torch.arange(length) >= length - kept.sum(dim=1, keepdim=True)] = tokens[kept]
    return text
