"""The Triton kernels under Triton's interpreter, on a CPU: prints the largest errors as JSON; ``test_gpu.py`` runs it.

The interpreter shows that the formulas and the indices are right, neither races nor speed. `python tests/gpu_kernels.py
cuda` tries the same kernels on a GPU.
"""

import json
import os
import sys

DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch  # noqa: E402

from sleepedu.fast import gpu, operator  # noqa: E402
from sleepedu.fast_weights import gated_delta  # noqa: E402

NAMES = ["o", "S", "dq", "dk", "dv", "dlog_a", "db", "dS"]
SHAPES = ((2, 2, 1, 16, 16), (1, 1, 24, 64, 64), (2, 1, 33, 32, 16), (1, 1, 75, 16, 64), (1, 1, 9, 128, 128))
GATES = {"usual": 0.5, "strong": 30.0, "ends": float("inf")}


def inputs(batch: int, heads: int, length: int, d_k: int, d_v: int, strongest: float) -> list[torch.Tensor]:
    """Return q, k, v, log_a, b, S and the gradients of o and S, laid out as projections are."""
    draw = torch.Generator().manual_seed(length)
    q, k, v, do = (
        torch.randn(batch, length, heads, size, generator=draw).transpose(1, 2) for size in (d_k, d_k, d_v, d_v)
    )
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    log_a = -min(strongest, 100.0) * torch.rand(batch, heads, length, generator=draw) ** 4
    if strongest == float("inf"):
        log_a[..., length // 2] = -torch.inf
        log_a[..., :1] = 0.0
    b = 2 * torch.rand(batch, heads, length, generator=draw)
    S, dS = torch.randn(2, batch, heads, d_v, d_k, generator=draw)
    return [q, k, v, log_a, b, S, do, dS]


def by_kernels(q, k, v, log_a, b, S, do, dS):
    o, w, S_end = operator.results_of(q, k, v, log_a, b, S)
    gpu.forward(q, k, v, log_a, b, S, o, w, S_end)
    gradients = operator.gradients_of(q, k, v, log_a, b, S, w, do, dS)
    gpu.backward(q, k, v, log_a, b, S, w, do, dS, *gradients)
    return o, S_end, *gradients


def by_tokens(*given):
    *given, do, dS = (x.double() for x in given)
    given = [x.requires_grad_() for x in given]
    o, S_end = gated_delta(*given)
    gradients = torch.autograd.grad((o, S_end), given, (do, dS))
    # exp has a gradient of 0 at -inf; 0 times inf on the way there is none.
    return (x.detach().nan_to_num() for x in (o, S_end, *gradients))


def errors(shape: tuple[int, ...], strongest: float) -> dict[str, float]:
    """Return the largest error of every result, relative to its own largest number."""
    given = inputs(*shape, strongest)
    found = (x.cpu().double() for x in by_kernels(*(x.to(DEVICE) for x in given)))
    pairs = zip(NAMES, found, by_tokens(*given), strict=True)
    return {name: ((x - y).abs().max() / y.abs().max().clamp(min=1e-30)).item() for name, x, y in pairs}


def largest_errors() -> dict[str, dict[str, float]]:
    found = {f"{shape} {gates}": errors(shape, GATES[gates]) for shape in SHAPES for gates in GATES}
    for precision in ("tf32", "tf32x3") if DEVICE == "cpu" else ():  # other programs; the interpreter multiplies alike
        gpu.precision_of_products = lambda precision=precision: precision
        found |= {f"{shape} as in {precision}": errors(shape, GATES["usual"]) for shape in SHAPES[1:]}
    return found


if __name__ == "__main__":
    print(json.dumps(largest_errors()))
