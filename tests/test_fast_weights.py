"""The learned local rule: every recurrence is its equation, and the chunked form is the recurrence."""

import pytest
import torch

from sleepedu.fast import fast_rule, gated_delta_fast
from sleepedu.fast_weights import delta, gated, gated_delta, gated_delta_chunked, hebbian

NAMES = ("q", "k", "v", "log_a", "b", "S")
EYE = torch.eye(3, dtype=torch.float64)
EQUATIONS = {
    hebbian: lambda S, k, v, a, b: S + v.outer(k),
    gated: lambda S, k, v, a, b: a * S + b * v.outer(k),
    delta: lambda S, k, v, a, b: S @ (EYE - b * k.outer(k)) + b * v.outer(k),
    gated_delta: lambda S, k, v, a, b: a * S @ (EYE - b * k.outer(k)) + b * v.outer(k),
}
FORGETTING = {  # log a for uniform random numbers in 0..1
    "none": torch.zeros_like,
    "little": lambda u: -1e-4 * u,
    "strong": lambda u: -20 - 10 * u,
    "mixed": lambda u: torch.where(u < 0.3, 0.0, torch.where(u < 0.8, -0.1 * u, -40 * u)),
}


def make_inputs(batch, heads, length, d_k, d_v, forgetting="mixed", dtype=torch.float64, seed=0, S=True):
    """Return q, k, v, log_a, b, S with q and k of unit length and b in 0..2."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(batch, heads, *shape, generator=generator, dtype=torch.float64)

    def uniform():
        return torch.rand(batch, heads, length, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(normal(length, d_k), dim=-1) for _ in range(2))
    tensors = (q, k, normal(length, d_v), FORGETTING[forgetting](uniform()), 2 * uniform(), S * normal(d_v, d_k))
    return tuple(tensor.to(dtype) for tensor in tensors)


def outputs_and_gradients(rule, inputs, **settings):
    """Return o, the last S, and the gradient of a random weighting of both for each of the six inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    o, S = rule(*inputs, **settings)
    generator = torch.Generator().manual_seed(1)
    loss = sum((x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum() for x in (o, S))
    gradients = torch.autograd.grad(loss, inputs, materialize_grads=True)  # a gate that is ignored has 0
    return {"o": o, "S": S} | {f"gradient of {name}": g for name, g in zip(NAMES, gradients, strict=True)}


def assert_same(found, wanted, tolerance):
    for name, x in wanted.items():
        difference = (found[name] - x).abs().max().item() / max(1.0, x.abs().max().item())
        assert difference <= tolerance, f"{name} differs by {difference:.1e} of its scale"


@pytest.mark.parametrize("rule", EQUATIONS, ids=lambda rule: rule.__name__)
def test_recurrence_is_its_equation(rule):
    q, k, v, log_a, b, S = inputs = make_inputs(2, 2, 7, d_k=3, d_v=5)
    o, S_end = rule(*inputs)
    for i in range(2):
        for j in range(2):
            matrix = S[i, j]
            for t in range(7):
                matrix = EQUATIONS[rule](matrix, k[i, j, t], v[i, j, t], log_a[i, j, t].exp(), b[i, j, t])
                torch.testing.assert_close(o[i, j, t], matrix @ q[i, j, t], rtol=0, atol=1e-12)
            torch.testing.assert_close(S_end[i, j], matrix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(
    "batch, heads, length, d_k, d_v, chunk, forgetting",
    [
        (1, 1, 1, 1, 1, 64, "mixed"),
        (2, 3, 5, 4, 6, 1, "mixed"),
        (2, 1, 17, 8, 3, 4, "none"),
        (1, 2, 50, 5, 5, 64, "mixed"),
        (3, 2, 65, 4, 8, 64, "little"),
        (2, 2, 100, 8, 8, 7, "strong"),
        (1, 2, 131, 16, 8, 500, "mixed"),
        (1, 1, 300, 8, 8, 64, "mixed"),
        (1, 2, 299, 16, 16, 37, "little"),
        (1, 1, 300, 6, 7, 300, "none"),
    ],
)
def test_chunked_is_the_recurrence(batch, heads, length, d_k, d_v, chunk, forgetting, dtype, tolerance):
    inputs = make_inputs(batch, heads, length, d_k, d_v, forgetting, dtype, seed=length)
    found = outputs_and_gradients(gated_delta_chunked, inputs, chunk=chunk)
    assert found["o"].dtype == found["S"].dtype == dtype
    assert_same(found, outputs_and_gradients(gated_delta, inputs), tolerance)


def test_chunked_is_the_recurrence_for_random_shapes():
    generator = torch.Generator().manual_seed(2)
    for seed in range(25):
        batch, heads, d_k, d_v = torch.randint(1, 6, (4,), generator=generator).tolist()
        length, chunk = torch.randint(1, 40, (2,), generator=generator).tolist()
        inputs = make_inputs(batch, heads, length, d_k, d_v, seed=seed, S=bool(seed % 3))
        found = outputs_and_gradients(gated_delta_chunked, inputs, chunk=chunk)
        assert_same(found, outputs_and_gradients(gated_delta, inputs), 1e-10)


@pytest.mark.parametrize("rule", EQUATIONS, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize(
    "length, size, dtype", [(1, 5, torch.float64), (131, 5, torch.float64), (70, 16, torch.float32)]
)
def test_the_fast_form_of_every_rule_is_the_recurrence(length, size, dtype, rule):
    inputs = make_inputs(2, 3, length, size, size, dtype=dtype, seed=length)
    found = outputs_and_gradients(lambda *tensors: fast_rule(rule.__name__, *tensors), inputs)
    wanted = outputs_and_gradients(rule, [tensor.double() for tensor in inputs])
    assert_same(found, wanted, 1e-10 if dtype == torch.float64 else 1e-5)


def test_decay_of_e_to_minus_20_a_token_stays_finite_and_exact():
    q, k, v, log_a, b, S = make_inputs(1, 2, 300, 8, 8, dtype=torch.float32)
    inputs = (q, k, v, torch.full_like(log_a, -20.0), b, 1e3 * S)
    found = outputs_and_gradients(gated_delta_chunked, inputs)
    assert all(x.isfinite().all() for x in found.values())
    assert_same(found, outputs_and_gradients(gated_delta, inputs), 1e-5)


def test_strong_forgetting_early_on_does_not_blur_weak_forgetting_later():
    q, k, v, log_a, b, S = make_inputs(1, 1, 60, 4, 4, "little", torch.float32)
    log_a[:, :, 0] = -1e6
    found = outputs_and_gradients(gated_delta_chunked, (q, k, v, log_a, b, S))
    assert_same(found, outputs_and_gradients(gated_delta, (q, k, v, log_a, b, S)), 1e-5)


def test_gradient_is_that_of_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in make_inputs(1, 2, 5, 2, 3, "little")]
    assert torch.autograd.gradcheck(lambda *tensors: gated_delta_chunked(*tensors, chunk=3), inputs)


def test_unit_write_strength_without_forgetting_stores_the_value_exactly():
    q, k, v, log_a, b, S = make_inputs(1, 1, 9, 4, 4, "none")
    _, S = gated_delta_chunked(q, k, v, log_a, torch.ones_like(b), S, chunk=2)
    torch.testing.assert_close(S[0, 0] @ k[0, 0, -1], v[0, 0, -1])


@pytest.mark.parametrize("rule", [*EQUATIONS, gated_delta_chunked], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("wrong", NAMES)
def test_wrong_shape_is_named(rule, wrong):
    inputs = dict(zip(NAMES, make_inputs(2, 3, 4, 5, 6), strict=True))
    inputs[wrong] = torch.zeros(2, 3, 7, 8) if wrong != "q" else torch.zeros(2, 3, 4)
    shape = "(2, 3, 4)" if wrong == "q" else "(2, 3, 7, 8)"
    with pytest.raises(ValueError) as error:
        rule(**inputs)
    assert wrong in str(error.value) and shape in str(error.value)


@pytest.mark.parametrize("wrong", NAMES[1:])
def test_other_device_is_named(wrong):
    inputs = dict(zip(NAMES, make_inputs(1, 1, 2, 3, 3), strict=True))
    inputs[wrong] = inputs[wrong].to("meta")
    with pytest.raises(ValueError, match=rf"^{wrong} must be .* on cpu to fit q and v, got .* on meta"):
        gated_delta_chunked(**inputs)


@pytest.mark.parametrize("rule", [*EQUATIONS, gated_delta_chunked], ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("wrong", NAMES[1:])
def test_other_dtype_is_named(rule, wrong):
    inputs = dict(zip(NAMES, make_inputs(1, 1, 2, 3, 3), strict=True))
    inputs[wrong] = inputs[wrong].half()
    with pytest.raises(ValueError, match=rf"^{wrong} must be .*torch.float64, .* got .* torch.float16"):
        rule(**inputs)


@pytest.mark.parametrize("heads, length", [(1, 0), (0, 3)])
def test_no_token_and_no_head_are_refused(heads, length):
    with pytest.raises(ValueError, match="with a head and a token at least"):
        gated_delta_chunked(*make_inputs(1, heads, length, 2, 2))


@pytest.mark.parametrize("chunk", [0, -3])
def test_chunk_below_one_is_refused(chunk):
    with pytest.raises(ValueError, match=f"chunk must be at least 1, got {chunk}"):
        gated_delta_chunked(*make_inputs(1, 1, 2, 2, 2), chunk=chunk)


def test_halving_a_sequence_changes_nothing():
    inputs = make_inputs(1, 2, 12, 3, 3)
    o, S = gated_delta_chunked(*inputs)
    first, middle = gated_delta_chunked(*(x[:, :, :5] for x in inputs[:5]), inputs[5])
    second, end = gated_delta_chunked(*(x[:, :, 5:] for x in inputs[:5]), middle)
    torch.testing.assert_close(torch.cat((first, second), dim=2), o)
    torch.testing.assert_close(end, S)


FAST = pytest.mark.parametrize("rule", [gated_delta_chunked, gated_delta_fast], ids=lambda rule: rule.__name__)


@FAST
@pytest.mark.parametrize("huge", [torch.finfo(torch.float32).min, -torch.inf, -1e30, -200.0])
def test_a_gate_that_forgets_everything_hides_none_of_those_after_it(rule, huge):
    ones, k = torch.ones(1, 1, 3, 16), torch.zeros(1, 1, 3, 16)
    k[0, 0, 0, 0] = 1.0
    log_a = torch.tensor([[[huge, -1.0, 0.0]]], requires_grad=True)
    o, _ = rule(ones, k, ones, log_a, ones[..., 0], torch.zeros(1, 1, 16, 16))
    torch.testing.assert_close(o[0, 0, :, 0], torch.tensor([1.0, 0.36787945, 0.36787945]))
    o[..., 0].sum().backward()
    torch.testing.assert_close(log_a.grad[0, 0], torch.tensor([0.0, 0.7357589, 0.36787945]))


@FAST
@pytest.mark.parametrize("where", ["everywhere", "once in 20 tokens", "every ninth"])
@pytest.mark.parametrize("forgetting", [-20.0, -90.0, -1e4])
def test_the_gradient_of_a_gate_is_as_small_as_the_gate(rule, forgetting, where):
    length = 2 if where == "everywhere" else 130
    q, k, v, log_a, b, S = make_inputs(1, 2, length, 16, 16, "little", torch.float32)
    place = {"everywhere": slice(None), "once in 20 tokens": slice(7, None, 20), "every ninth": slice(3, None, 9)}[
        where
    ]
    log_a[:, :, place] = forgetting
    inputs = (q, k, v, log_a, b, S)
    found = outputs_and_gradients(rule, inputs)
    for name, wanted in outputs_and_gradients(gated_delta, [x.double() for x in inputs]).items():
        for gradient, exact in zip(found[name].flatten(2).unbind(2), wanted.flatten(2).unbind(2), strict=True):
            scale = exact.abs().max().item()  # of one token, not of the largest
            torch.testing.assert_close(gradient.double(), exact, rtol=0, atol=2e-4 * scale + 1e-30)


def test_a_rule_that_has_no_fast_form_is_not_another_in_silence():
    with pytest.raises(ValueError, match="there is no fast form of a rule 'oja'"):
        fast_rule("oja", *[torch.zeros(1, 1, 1, 8)] * 3, *[torch.zeros(1, 1, 1)] * 2, torch.zeros(1, 1, 8, 8))
