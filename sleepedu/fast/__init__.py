"""What is only fast, behind one door: ``fast_rule`` gives the numbers of any rule by the best road there is here.

Where a rule corrects what is stored that is C++ on a CPU (``cpp``) and Triton on a GPU (``gpu``), elsewhere the chunks.
``compiling`` has what else makes a training step faster, ``precision`` the numbers that it computes in.
"""

import importlib.util
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sleepedu.fast import cpp, operator
from sleepedu.fast_weights import check_inputs, gated_delta_chunked

_triton: bool = importlib.util.find_spec("triton") is not None
_shapes: bool = True  # on "meta" it counts as compiled
_cpp: bool | None = None  # a plain value, which torch.compile can read; None until it is first asked for


def fast_rule(name: str, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the rule of that name (``model.RULES``) the fastest way there is here; ValueError as in the rules."""
    if name in ("delta", "hebbian"):  # they forget nothing
        log_a = torch.zeros_like(log_a)
    if name == "hebbian":  # and it writes all
        b = torch.ones_like(b)
    if name in ("gated", "hebbian"):
        return gated_delta_chunked(q, k, v, log_a, b, S, corrects=False)
    if name not in ("delta", "gated_delta"):
        raise ValueError(f"there is no fast form of a rule {name!r}: give it one here")
    return gated_delta_fast(q, k, v, log_a, b, S)


def gated_delta_fast(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``gated_delta`` the fastest way there is here: compiled where it can be, else by ``gated_delta_chunked``.

    There is compiled code for float32 and the sizes in ``operator.MULTIPLES``; inside ``torch.func`` it is the chunks.
    Raises ValueError as the rules do; its gradient MemoryError where a CPU has no memory for S after each token.
    """
    check_inputs(q, k, v, log_a, b, S)
    multiple = operator.ON_A_GPU if q.is_cuda else operator.MULTIPLES.get(q.shape[-1], 1)
    fits = q.shape[-1] in operator.MULTIPLES and v.shape[-1] % multiple == 0 and q.dtype == torch.float32
    available = {"cpu": cpp_is_available, "cuda": triton_is_available, "meta": lambda: _shapes}.get(q.device.type)
    if fits and available is not None and not torch._C._are_functorch_transforms_active() and available():
        return operator.GatedDelta.apply(q, k, v, log_a, b, S)
    return gated_delta_chunked(q, k, v, log_a, b, S)


def cpp_is_available() -> bool:
    """Return whether the rule runs in C++ where it can; the first time, compile it."""
    global _cpp
    if _cpp is None:
        _cpp = cpp.compiled_code() is not None
    return _cpp


def triton_is_available() -> bool:
    """Return whether the rule runs in Triton on a GPU."""
    return _triton


def without_compiled_rule() -> Any:
    """Return a context without the rule in C++ and in Triton: it runs in chunks there."""
    return patch.multiple(__name__, _cpp=False, _triton=False, _shapes=False)


def is_traced() -> bool:
    """Return whether torch.compile, torch.func or the recording of a CUDA graph is looking on: nothing may be kept."""
    seen = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return seen or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
