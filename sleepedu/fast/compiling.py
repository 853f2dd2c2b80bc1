"""What makes a training step faster and changes no number but by rounding: torch.compile, and memory that is kept."""

import contextlib
import ctypes
import importlib.util
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sleepedu.fast import cpp_is_available
from sleepedu.fast.cpp import compiled_code


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile finds what it needs: C++ that works and Python.h, and for a GPU Triton as well."""
    here = compiled_code() is not None and Path(sysconfig.get_path("include"), "Python.h").exists()
    return here and (device.type == "cpu" or importlib.util.find_spec("triton") is not None)


def pays(steps: int, device: torch.device) -> bool:
    """Return whether to compile a training of so many steps: it can be, and wins back the minute that it takes."""
    return steps >= 1000 and can_compile(device)


@contextlib.contextmanager
def compiled_blocks(model: Any) -> Iterator[None]:
    """Run a model's ``blocks`` through torch.compile meanwhile: the same numbers, to rounding, in fewer kernels.

    A laptop step then takes 76 to 89% of the time, by task and machine. Where there is no compiler, or something cannot
    be compiled after all, it runs as it is.
    """
    if not can_compile(next(model.parameters()).device):
        warnings.warn("there is no compiler here that works, so training goes on without torch.compile", stacklevel=4)
        yield
        return
    cpp_is_available()  # so that it is known when the compiler comes to it
    # The blocks run many times before gradients are averaged: there is nothing to split them for (optimize_ddp).
    with torch._dynamo.config.patch(suppress_errors=True, optimize_ddp=False), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the compiler's own
        model.blocks = torch.compile(model.blocks, dynamic=False)
        try:
            yield
        finally:
            del model.blocks  # the method of the class is there again
            torch._dynamo.reset()  # it compiles a function for so many models and then no more


def keep_freed_memory() -> None:
    """Let this process keep the memory that one step frees for the next, instead of handing it back to the system.

    The GNU C library hands large blocks back at once, and the system clears every page anew before it gives it out
    again: a compiled laptop step of four passes takes 67 ms with this and 77 without. Elsewhere nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # what there is instead, on other systems
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, in bytes, as high as every version takes it
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
