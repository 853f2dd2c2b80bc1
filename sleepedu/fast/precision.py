"""In which numbers a training step computes its large products; S, the gates and the weights stay float32."""

import contextlib
from collections.abc import Iterator

import torch

PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")


def choose_precision(precision: str, device: torch.device) -> str:
    """Return the precision that a device computes in: the one asked for, or for "auto" the best that it has.

    That is bfloat16 on a GPU that has it (from an A100 on), float16 on an older one, such as a T4, and float32 on a
    CPU. Raises ValueError for one that the device does not have.
    """
    if device.type != "cuda":
        if precision == "tf32":
            raise ValueError(f"precision 'tf32' is a GPU's: on a {device.type} use float32 or bfloat16")
        return "float32" if precision == "auto" else precision
    has_both = torch.cuda.is_bf16_supported(including_emulation=False)  # from sm80 on: bfloat16, and TF32
    if precision in ("tf32", "bfloat16") and not has_both:
        raise ValueError(f"precision {precision!r} is not to be had on {torch.cuda.get_device_name()}: use float16")
    return precision if precision != "auto" else "bfloat16" if has_both else "float16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the context in which a step answers at a chosen precision."""
    halved = precision.endswith("16")
    # Nothing is kept of what was cast: a recorded step casts the weights of its own time.
    return torch.autocast(device.type, getattr(torch, precision) if halved else None, halved, cache_enabled=False)


@contextlib.contextmanager
def tf32(precision: str, device: torch.device) -> Iterator[None]:
    """Let a GPU compute what is left of float32 products in TF32 meanwhile, unless float32 was asked for."""
    if device.type != "cuda":  # some versions of torch warn even who asks
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision != "float32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
