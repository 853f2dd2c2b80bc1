"""A few small operations of the layers, with their gradients written out.

At the sizes of this book a training step is hundreds of small operations on small tensors, and what autograd keeps and
revisits for each of them takes longer than the matrix products. These do the same in half as many. A compiler merges
small operations by itself, and does it best with the plain formula.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # added to the mean square, so that a vector of zeros has a norm


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (..., d) divided by its root mean square, times weight (d,): the same as torch's ``rms_norm``."""
    if torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, EPSILON)
    return _RMSNorm.apply(x, weight)


def convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Return SiLU of a causal convolution of every channel: x (b, l, c) and taps (reach, c) -> (b, l, c).

    y_t = SiLU(sum_j taps[-1 - j] x_(t-j)), where x is zero before the first token.
    """
    if torch.compiler.is_compiling():
        padded = F.pad(x, (0, 0, len(taps) - 1, 0))
        return F.silu(sum(tap * padded[:, i : i + x.shape[1]] for i, tap in enumerate(taps.unbind(0))))  # type: ignore[arg-type]
    return _Convolution.apply(x, taps)


def unit_length(x: Tensor) -> Tensor:
    """Return x (..., d) divided by its length: the same as torch's ``normalize``."""
    if torch.compiler.is_compiling():
        return F.normalize(x, dim=-1)
    return _UnitLength.apply(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = scale.square_().mul_(1 / size).add_(EPSILON).rsqrt_()
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        return unit * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        unit, scale, weight = ctx.saved_tensors
        product = dy * unit
        along = (product @ weight)[..., None].mul_(-1 / len(weight))  # minus the mean of (dy weight) unit
        dx = (dy * weight).addcmul_(unit, along).mul_(scale)
        return dx, product.flatten(0, -2).sum(0)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, taps):
        y = x * taps[-1]
        for j in range(1, min(len(taps), x.shape[1])):
            y[:, j:].addcmul_(x[:, :-j], taps[-1 - j])
        ctx.save_for_backward(x, taps, y)
        return F.silu(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, taps, y = ctx.saved_tensors
        dy = torch.ops.aten.silu_backward(dy, y)
        dx = dy * taps[-1]
        dtaps = torch.zeros_like(taps)
        dtaps[-1] = (dy * x).sum((0, 1))
        for j in range(1, min(len(taps), x.shape[1])):
            later = dy[:, j:]
            dx[:, :-j].addcmul_(later, taps[-1 - j])
            dtaps[-1 - j] = (later * x[:, :-j]).sum((0, 1))
        return dx, dtaps


class _UnitLength(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=1e-12).reciprocal_()
        unit = x * scale
        ctx.save_for_backward(unit, scale)
        return unit

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        unit, scale = ctx.saved_tensors
        along = (dy * unit).sum(-1, keepdim=True)
        return torch.addcmul(dy, unit, along, value=-1).mul_(scale)
