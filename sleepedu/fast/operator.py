"""The gated delta rule as one operation of torch, with its gradient: in C++ on a CPU, in Triton on a GPU.

An operation that torch knows by name is one node in a compiled graph, whatever computes it.
"""

import torch
from torch import Tensor, library

from sleepedu.fast import cpp

MULTIPLES = {16: 16, 32: 8, 64: 4, 128: 4}  # the d_k there is code for, and what d_v has to be a multiple of on a CPU
ON_A_GPU = 16  # and what on a GPU, whose units multiply matrices of 16 rows at least


class GatedDelta(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, log_a, b, S):
        a = log_a.exp()
        o, w, S_end = torch.ops.sleepedu.gated_delta(q, k, v, a, b, S)
        ctx.save_for_backward(q, k, v, a, b, S, w)
        return o, S_end

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do, dS_end):
        return torch.ops.sleepedu.gated_delta_backward(*ctx.saved_tensors, do, dS_end)


@library.custom_op("sleepedu::gated_delta", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = results_of(q, k, v, a, b, S)
    _code(q.device).forward(q, k, v, a, b, S, *found)
    return found


@forward.register_fake
def results_of(q, k, v, a, b, S):
    return _room(v), _room(v), S.new_empty(S.shape)  # o; w, what the memory got wrong; S after the last token


@library.custom_op("sleepedu::gated_delta_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, S: Tensor, w: Tensor, do: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found = gradients_of(q, k, v, a, b, S, w, do, dS)
    _code(q.device).backward(q, k, v, a, b, S, w, do, dS, *found)
    return found


@backward.register_fake
def gradients_of(q, k, v, a, b, S, w, do, dS):
    return *map(_room, (q, k, v, a, b)), S.new_empty(S.shape)


def _code(device):
    if device.type == "cpu":
        return cpp
    from sleepedu.fast import gpu  # there is Triton where it is called

    return gpu


def _room(like: Tensor) -> Tensor:
    """Return an empty (batch, heads, length, ...), laid out in memory as projections are, (batch, length, heads, ...).

    So nobody has to turn it round before the next projection.
    """
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)
