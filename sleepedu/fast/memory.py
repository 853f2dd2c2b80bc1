"""How much memory a GPU would need, counted without taking any: tensors on the device "meta" have shapes alone."""

import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made meanwhile that are still alive: ``now``, and the ``most`` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(made) if isinstance(x, Tensor)):
            if storage._cdata not in self.alive:
                self.alive.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return made

    def _freed(self, storage: int, size: int) -> None:
        self.alive.remove(storage)
        self.now -= size


def most_bytes(function: Callable[[], object]) -> int:
    """Return how many bytes the tensors that a function makes on "meta" take together, at most.

    Attention counts as on a GPU, which keeps no matrix of scores, and so does the rule. What the kernels themselves use
    meanwhile does not count, nor does autocast: all is float32, which is the most that it can be.
    """
    with patch.object(F, "scaled_dot_product_attention", _attention), Memory() as memory:
        function()
    return memory.most


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, is_causal: bool = False, **_: Any) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # heads that are shared
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, 0.0, is_causal)[0]
