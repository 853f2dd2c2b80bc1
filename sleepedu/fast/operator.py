"""The gated delta rule as one operation of torch, with its gradient: in C++ on a CPU, in Triton on a GPU.

An operation that torch knows by name is one node in a compiled graph. Beside it the short convolution's own gradient.
"""

import torch
from torch import Tensor, library

from sleepedu.fast import cpp

MULTIPLES = {16: 16, 32: 8, 64: 4, 128: 4}  # the d_k there is code for, and what d_v has to be a multiple of on a CPU
ON_A_GPU = 16  # and what on a GPU, whose units multiply matrices of 16 rows at least


class GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_a, b, S):
        o, w, S_end = torch.ops.sleepedu.gated_delta(q, k, v, log_a, b, S)
        ctx.save_for_backward(q, k, v, log_a, b, S, w)
        return o, S_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS_end):
        return torch.ops.sleepedu.gated_delta_backward(*ctx.saved_tensors, do, dS_end)


@library.custom_op("sleepedu::gated_delta", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = results_of(q, k, v, log_a, b, S)
    _code(q.device).forward(q, k, v, log_a, b, S, *found)
    return found


@forward.register_fake
def results_of(q, k, v, log_a, b, S):
    return _room(v), _room(v), S.new_empty(S.shape)  # o; w, what the memory got wrong; S after the last token


@library.custom_op("sleepedu::gated_delta_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, b: Tensor, S: Tensor, w: Tensor, do: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = gradients_of(q, k, v, log_a, b, S, w, do, dS)
    _code(q.device).backward(q, k, v, log_a, b, S, w, do, dS, *found)
    return found


@backward.register_fake
def gradients_of(q, k, v, log_a, b, S, w, do, dS):
    return *map(_room, (q, k, v, log_a, b)), S.new_empty(S.shape)


def _code(device):
    if device.type == "cpu":
        return cpp
    from sleepedu.fast import gpu  # there is Triton where it is called

    return gpu


def _room(like: Tensor) -> Tensor:
    """Return an empty (b, h, l, ...) that lies in memory as (b, l, h, ...): so it is projected without a copy."""
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


class ShortConvolution(torch.autograd.Function):
    """y_t = sum_j taps[-1 - j] x_(t-j), where x is zero before the first token: (b, l, c), (taps, c) -> (b, l, c).

    Autograd would pad and add up a slice for each tap: half as long again on a CPU, 31 kernels on a GPU for these 17.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, taps):
        y = x * taps[-1]
        for j in range(1, min(len(taps), x.shape[1])):
            y[:, j:].addcmul_(x[:, :-j], taps[-1 - j])
        return y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy):
        (x, taps), length = ctx.saved_tensors, dy.shape[1]
        dx, dtaps = dy * taps[-1], [(x * dy).sum((0, 1))]
        for j in range(1, len(taps)):
            before, after = slice(max(length - j, 0)), dy[:, j:]
            dx[:, before].addcmul_(after, taps[-1 - j])
            dtaps.insert(0, (x[:, before] * after).sum((0, 1)))
        return dx, torch.stack(dtaps)
