"""What is only fast, behind one door: ``gated_delta_fast`` gives the numbers of ``gated_delta``, by the best road here.

On a CPU that is C++ (``cpp``), elsewhere and without a compiler the chunks. ``compiling`` has what else makes a
training step faster.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from sleepedu.fast import cpp
from sleepedu.fast_weights import check_inputs, gated_delta_chunked

_cpp: bool | None = None  # a plain value, which torch.compile can read; None until it is first asked for


def gated_delta_fast(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``gated_delta`` the fastest way there is here: compiled on a CPU, by ``gated_delta_chunked`` elsewhere.

    There is compiled code for float32 and the sizes in ``cpp.MULTIPLES``; inside ``torch.func`` (grad, vmap, jvp, and
    gradients of gradients) it is the chunks. Raises ValueError as the rules do; its
    gradient MemoryError where S after each token does not fit into memory.
    """
    check_inputs(q, k, v, log_a, b, S)
    multiple = cpp.MULTIPLES.get(q.shape[-1])
    fits = multiple is not None and v.shape[-1] % multiple == 0 and not torch._C._are_functorch_transforms_active()
    if fits and q.dtype == torch.float32 and q.device.type == "cpu" and cpp_is_available():
        return cpp.GatedDelta.apply(q, k, v, log_a, b, S)
    return gated_delta_chunked(q, k, v, log_a, b, S)


def cpp_is_available() -> bool:
    """Return whether the rule runs in C++ where it can; the first time, compile it."""
    global _cpp
    if _cpp is None:
        _cpp = cpp.compiled_code() is not None
    return _cpp


@contextlib.contextmanager
def without_cpp() -> Iterator[None]:
    """Do without the rule in C++ meanwhile."""
    global _cpp
    before, _cpp = _cpp, False
    try:
        yield
    finally:
        _cpp = before
