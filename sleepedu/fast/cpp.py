"""The gated delta rule on a CPU, in C++: the recurrence itself, with the rows of S in the processor's registers.

A GPU is kept busy by the large matrix products of ``gated_delta_chunked``. A CPU core does better token after token:
each row of S learns by itself, a few rows at a time stay in registers for the whole window, and nothing is written
but what is asked for. ``gated_delta.cpp`` says how. It is compiled once on a machine, in seconds, and kept in torch's
own folder for such things (``torch.hub.get_dir``), where a process finds it in 0.06 s.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("gated_delta.cpp")
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", "-w")
# The first that the compiler takes: not everyone has OpenMP, and Apple's compiler has its own word for "native".
FURTHER = (("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",), ())


@functools.cache
def compiled_code() -> ctypes.CDLL | None:
    """Return the compiled code, or None where it cannot be had: no compiler, no room for a file, or none that works."""
    program = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++"))), "")
    run: Callable = functools.partial(subprocess.run, capture_output=True, timeout=60, check=True)
    for further in FURTHER if program else ():
        # It may not run, or not end, or make what cannot be loaded; and there may be no folder to write to.
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            compiler = (program, *FLAGS, *further, SOURCE)
            # Source, headers, the compiler's version and what this processor can do: all that it is made of.
            made_of = run((*compiler, "-E", "-dD")).stdout
            kept = Path(torch.hub.get_dir(), f"gated_delta_{hashlib.sha256(made_of).hexdigest()[:16]}.so")
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(kept))
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                made = Path(folder) / "gated_delta.so"
                run((*compiler, "-o", made))
                code = ctypes.CDLL(str(made))
                with contextlib.suppress(OSError):  # by a name of one's own first: others may be doing the same
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(shutil.copy(made, kept.with_suffix(f".{os.getpid()}")), kept)
            return code
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, *found: Tensor) -> None:
    """Compute o, w and S after the last token into ``found``."""
    _call("gated_delta_forward", q, k, v, log_a.exp(), b, S, *found)


def backward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, *others: Tensor) -> None:
    """Compute the six gradients into the last of ``others``, which begin with w and the gradients of o and S."""
    if _call("gated_delta_backward", q, k, v, log_a.exp(), b, S, *others):
        raise MemoryError(f"there is no memory for S after each of {q.shape[2]:,} tokens: take a shorter window")


class _Tensor(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "next"))]


def _call(name: str, q: Tensor, k: Tensor, v: Tensor, *others: Tensor) -> int:
    sizes = (ctypes.c_int64 * 6)(*q.shape, v.shape[-1], torch.get_num_threads())
    # The last axis of what belongs to a channel has to be dense; the gates have none.
    tensors = [x if x.ndim == 3 or x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, *others)]
    given = [_Tensor(x.data_ptr(), *x.stride()[:3]) for x in tensors]
    return getattr(compiled_code(), name)(sizes, *map(ctypes.byref, given))
