"""The hand-written gradients are those of the plain formulas, in double precision."""

import pytest
import torch
import torch.nn.functional as F

from sleepedu import operations


def plain_convolution(x, taps):
    padded = F.pad(x, (0, 0, len(taps) - 1, 0))
    return F.silu(sum(tap * padded[:, i : i + x.shape[1]] for i, tap in enumerate(taps)))


CASES = {
    "rms_norm": (
        operations.rms_norm,
        lambda x, w: F.rms_norm(x, w.shape, w, operations.EPSILON),
        [(3, 5, 8), (8,)],
    ),
    "unit_length": (operations.unit_length, lambda x: F.normalize(x, dim=-1), [(2, 3, 5, 4)]),
    "convolve": (operations.convolve, plain_convolution, [(3, 7, 6), (4, 6)]),
    "convolve, fewer tokens than taps": (operations.convolve, plain_convolution, [(3, 2, 6), (4, 6)]),
    "convolve, one tap": (operations.convolve, plain_convolution, [(3, 5, 6), (1, 6)]),
}


@pytest.mark.parametrize(("ours", "plain", "shapes"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("contiguous", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formula(ours, plain, shapes, contiguous):
    generator = torch.Generator().manual_seed(0)
    results = []
    for function in (ours, plain):
        generator.manual_seed(1)
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        if not contiguous:
            inputs[0] = inputs[0].mT.contiguous().mT
        inputs = [x.requires_grad_() for x in inputs]
        y = function(*inputs)
        gradient = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        results.append((y, *torch.autograd.grad(y, inputs, gradient)))
    for got, wanted in zip(*results, strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).abs().max() < 1e-12


def test_zeros_have_finite_norms_and_gradients():
    x = torch.zeros(2, 3, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    (operations.rms_norm(x, weight).sum() + operations.unit_length(x).sum()).backward()
    assert x.grad.isfinite().all()
