"""A GPU that is not there: tensors that say they are on "cuda" and are computed on the CPU.

What a GPU refuses is refused: operations on tensors of two devices, random numbers from a generator of the CPU. What
takes time on a GPU is counted: kernels that are launched, copies to it, and where the host waits for it. ::

    with pretended_gpu() as counts:
        model = SleepLM(config).to("cuda")
        ...
    print(counts.launches, counts.waits, counts.copies)

What torch knows of GPUs it learns when it is imported. So this has to be imported first, and is true for as long as the
process lives: use it in one of its own, as ``python -m pytest -p pretended_gpu tests/on_a_gpu.py`` does.
"""
# ruff: noqa: E402

import ctypes
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

SOURCE = Path(__file__).with_suffix(".cpp")


def load() -> None:
    """Compile and load what autograd asks for. Raises OSError or CalledProcessError where no C++ compiler works."""
    folder = Path(importlib.util.find_spec("torch").origin).parent
    content = (
        SOURCE.read_bytes() + Path(__file__).read_bytes() + f"{importlib.metadata.version('torch')} {folder}".encode()
    )
    shared = Path(tempfile.gettempdir(), f"pretended_gpu_{hashlib.sha256(content).hexdigest()[:16]}.so")
    if not shared.exists():
        made = shared.with_suffix(f".{os.getpid()}")  # another process may be making it, too
        how = ["-std=c++20", "-shared", "-fPIC", "-w", f"-I{folder}/include", SOURCE, "-o", made]
        libraries = [f"-L{folder}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}/lib"]
        subprocess.run([os.environ.get("CXX") or "g++", *how, *libraries], check=True, capture_output=True)
        os.replace(made, shared)
    ctypes.CDLL(str(shared))


if "torch" in sys.modules:
    raise ImportError("pretended_gpu has to be imported before torch")
load()

import torch
import torch.amp.autocast_mode
import torch.cuda.amp.common
import torch.nn.functional as F
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

GPU = torch.device("cuda", 0)
# After these the host knows something that only the GPU knew.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount"}
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MAY_MIX = {"copy_", "_to_copy", *INDEXING}
# Operators are counted as the kernels that CUDA runs for them: one, but for these. A slice's gradient is zeros and a
# copy; the rule's is two kernels.
KERNELS = {"slice_backward": 2, "select_backward": 2, "gated_delta_backward": 2, "_unsafe_view": 0}
# What CUDA has a kernel for and a CPU puts together; autograd asks whether there is one.
ON_CUDA = library.Library("aten", "IMPL", "CUDA")
for one in ("_fused_rms_norm", "silu_backward"):
    ON_CUDA.impl(one, lambda *_: None)


@dataclass
class Counts:
    """What happened on the GPU; kernels by their operator, waits and copies by operator and place."""

    launches: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()


COUNTS = Counts()


class OnGPU(torch.Tensor):
    """A tensor on the GPU; ``inner`` has its numbers, on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, **layout, device=GPU)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self) -> str:
        return f"on the pretended GPU: {self.inner!r}"

    def __reduce_ex__(self, protocol):
        return self.inner.detach().__reduce_ex__(protocol)  # what is saved is read on the CPU

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Everything(TorchDispatchMode):
    """Makes tensors on the GPU where they are asked for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Run an operator where its tensors are, or where it is told to."""
    name = func.overloadpacket.__name__
    tensors: list[torch.Tensor] = []
    mapped(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, (args, tuple(kwargs.values())))
    ours = [x for x in tensors if isinstance(x, OnGPU)]
    others = [x for x in tensors if not isinstance(x, OnGPU)]
    wanted = kwargs.get("device")
    there = bool(ours) if wanted is None else torch.device(wanted).type == "cuda"
    if name == "copy_":
        there = isinstance(args[0], OnGPU)
    _refuse(name, there, args, kwargs, ours, others)
    _count(func, name, there, args, ours, others)

    def inside(x: Any) -> Any:
        return x.inner if isinstance(x, OnGPU) else x

    def outside(x: Any) -> Any:
        return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x

    kwargs_inside = {name: mapped(inside, x) for name, x in kwargs.items()}
    if wanted is not None and there:
        kwargs_inside["device"] = torch.device("cpu")
    out = INSTEAD.get(name, in_float32(func) if name in PRODUCTS else func)(*mapped(inside, args), **kwargs_inside)
    if not there:
        return out
    out = mapped(outside, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and aliases(func) else out


def mapped(change: Any, x: Any) -> Any:
    """Return x with every part of it changed, through lists and tuples: torch's pytrees take half of all the time."""
    return type(x)(mapped(change, part) for part in x) if isinstance(x, (list, tuple)) else change(x)


def in_float32(product: Any) -> Any:
    """Return a product that multiplies in float32 and rounds, as CPUs without bfloat16 take a hundred times as long."""

    def rounded(*factors: Any, **named: Any) -> torch.Tensor:
        in_full = (x.float() if isinstance(x, torch.Tensor) and x.itemsize < 4 else x for x in factors)
        return product(*in_full, **named).to(factors[0].dtype)

    return rounded


plain_attention = F.scaled_dot_product_attention


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Choose as a GPU does: one kernel where there is no mask."""
    if not isinstance(q, OnGPU) or attn_mask is not None:
        return plain_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(q, k, v, None, True, dropout_p, is_causal, scale=scale)[0]


def attention(q, k, v, mask, with_sums, dropout=0.0, causal=False, **named):
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout, causal, **named)
    return out, sums, torch.zeros(()), torch.zeros(())


def attention_backward(d, q, k, v, mask, out, sums, seed, offset, dropout, wanted, causal=False, **named):
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return *backward(d, q, k, v, out, sums, dropout, causal, **named), None


INSTEAD = {  # a CPU computes it otherwise, or under another name
    "_fused_rms_norm_backward": torch._decomp.decompositions._fused_rms_norm_backward,
    "_scaled_dot_product_efficient_attention": attention,
    "_scaled_dot_product_efficient_attention_backward": attention_backward,
}


@functools.cache
def aliases(func: Any) -> set[str]:
    """Return what an operator returns of what it is given: "view", the same "written" to, or nothing."""
    infos = [returned.alias_info for returned in func._schema.returns]
    return {"written" if info.is_write else "view" for info in infos if info is not None}


def _refuse(name: str, there: bool, args: tuple, kwargs: dict[str, Any], ours: list, others: list) -> None:
    generator = kwargs.get("generator")
    if there and generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device.type}'")
    if name in INDEXING and not isinstance(args[0], OnGPU) and ours:
        raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")
    if ours and name not in MAY_MIX and any(x.ndim for x in others):
        shapes = ", ".join(f"{x.device} {tuple(x.shape)}" for x in (*ours, *others))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {shapes}")


def _count(func: Any, name: str, there: bool, args: tuple, ours: list, others: list) -> None:
    moved = name in ("copy_", "_to_copy")
    if moved and there and others and not (ours and name == "_to_copy"):
        COUNTS.copies[f"{name} {_place()}"] += 1
    if ours and (name in WAITS or (moved and not there)):
        COUNTS.waits[f"{name} {_place()}"] += 1
    if ours and name in INDEXING:
        for index in args[1]:
            if index is not None and (index.dtype == torch.bool or not isinstance(index, OnGPU)):
                COUNTS.waits[f"{name} {_place()}"] += 1
    if there and aliases(func) != {"view"} and not name.startswith(("empty", "new_empty", "_local_scalar")):
        COUNTS.launches[name] += KERNELS.get(name, 1)


def _place() -> str:
    """Return the line of the library that is at work, or of whoever else is outside torch."""
    frame, places = sys._getframe(1), {}
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.name != Path(__file__).name and "torch" not in path.parts:
            places.setdefault("sleepedu" in path.parts, f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return places.get(True) or places.get(False, "backward")


@contextmanager
def pretended_gpu() -> Iterator[Counts]:
    """Let "cuda" be a GPU that is not there meanwhile, and count from 0 what happens on it."""
    from sleepedu import fast  # now, because torch must not be imported before a GPU is pretended

    instead: dict[tuple[Any, str], Any] = {
        (fast, "_triton"): True,  # it is counted as if it were, and computed in C++
        (torch.utils._foreach_utils, "_foreach_supported_types"): [torch.Tensor, OnGPU, torch.nn.Parameter],
        (F, "scaled_dot_product_attention"): fused_attention,
        (os, "cpu_count"): lambda: 1,  # other processes would not know of this GPU
        (torch.cuda, "is_available"): lambda: True,
        (torch.cuda, "_lazy_init"): lambda: None,
        (torch.cuda, "device_count"): lambda: 1,
        (torch.cuda, "current_device"): lambda: 0,
        (torch.cuda, "synchronize"): lambda device=None: None,
        (torch.cuda, "get_device_name"): lambda device=None: "a pretended GPU",
        (torch.cuda, "get_device_properties"): lambda device=None: SimpleNamespace(total_memory=16e9),
        (torch.cuda, "is_bf16_supported"): lambda including_emulation=True: True,
        (torch.cuda, "is_current_stream_capturing"): lambda: False,
        (torch.cuda.amp.common, "amp_definitely_not_available"): lambda: False,
    }
    COUNTS.clear()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter's numbers are not its own
    with ExitStack() as stack:
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        for (module, name), value in instead.items():
            stack.enter_context(patch.object(module, name, value))
        stack.enter_context(Everything())
        yield COUNTS
