"""The layers are their equations; the model is causal, streams, and says what does not fit."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sleepedu import fast_weights, layers
from sleepedu.evaluation import accuracy_by_depth
from sleepedu.fast_weights import gated_delta
from sleepedu.lab.compute import example_operations
from sleepedu.lab.probes import Settings, probe_model
from sleepedu.layers import CausalAttention, FastWeightMixer, WindowCache, rotate
from sleepedu.model import RULES, ModelConfig, SleepLM
from sleepedu.session import Session
from sleepedu.settling import sleep_until_settled
from sleepedu.sleep_loop import run_episode, sleep
from sleepedu.tasks import GraphRetrieval
from sleepedu.trace import SleepTrace
from sleepedu.training import TrainConfig, score, train

TOKENS = torch.randint(11, (2, 13), generator=torch.Generator().manual_seed(0))


def assert_close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_attention_is_softmax_of_rotated_keys_and_queries():
    torch.manual_seed(0)
    layer, x = CausalAttention(width=8, heads=2), torch.randn(1, 5, 8)
    q, k, v = layer.project(x)[0].view(5, 3, 2, 4).permute(1, 2, 0, 3)  # (heads, length, size) each
    read = torch.zeros(5, 2, 4)
    for head in range(2):
        for t in range(5):
            scores = rotate(k[head], 0)[: t + 1] @ rotate(q[head], 0)[t] / math.sqrt(4)
            read[t, head] = scores.softmax(0) @ v[head, : t + 1]
    assert_close(layer(x)[0], layer.out(read.flatten(1)))


def test_rotation_keeps_lengths_and_depends_on_distance_alone():
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0))
    assert_close(rotate(q, 7).norm(), q.norm())
    assert_close(rotate(q, 0), q)
    assert_close(rotate(q, 9) @ rotate(k, 5).T, rotate(q, 4) @ rotate(k, 0).T)
    assert not torch.allclose(rotate(q, 9) @ rotate(k, 5).T, rotate(q, 9) @ rotate(k, 0).T)


def test_rotation_is_as_exact_as_what_it_turns():
    x = torch.ones(1, 4, dtype=torch.float64)
    turned = rotate(x, start=12_345)
    angle = 12_345 * 1e-2  # of the second pair of channels
    assert turned[0, 1].item() == pytest.approx(math.cos(angle) - math.sin(angle), abs=1e-12)


@pytest.mark.parametrize("rule", RULES)
def test_fast_weight_mixer_is_its_rule(rule, make_model):
    layer = make_model("g", rule=rule).layers[0].mixer
    x, S = torch.randn(1, 6, 16), torch.randn(1, 2, 8, 8)
    projected = layer.project(x[0])
    mixed, gate = projected[:, :48], projected[:, 48:]
    padded = torch.cat((torch.zeros(3, 48), mixed))
    mixed = F.silu(torch.stack([(layer.taps * padded[t : t + 4]).sum(0) for t in range(6)]))
    q, k, v = mixed.view(6, 3, 2, 8).permute(1, 2, 0, 3)[:, None]  # (1, heads, length, size) each
    q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
    forget, write = layer.gates(x).permute(0, 2, 1).split(2, dim=1)
    log_a = -layer.decay_rate.exp()[:, None] * F.softplus(forget)
    o, S_end = getattr(fast_weights, rule)(q, k, v, log_a, 2 * write.sigmoid(), S)
    o = layer.norm * o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    found, S_found = layer(x, S)
    assert_close(found[0], layer.out(o[0].transpose(0, 1).flatten(1) * F.silu(gate)))
    assert_close(S_found, S_end)


def test_a_fresh_mixer_writes_and_hardly_forgets():
    torch.manual_seed(0)
    layer = FastWeightMixer(16, 2, 8, 8, convolution=4, write_range=2.0)
    forget, write = layer.gates(torch.randn(1, 50, 16)).chunk(2, dim=-1)
    kept = (-layer.decay_rate.exp() * F.softplus(forget)).exp()
    assert 0.95 < kept.mean() < 0.99
    assert 0.9 < 2 * write.sigmoid().mean() < 1.1


def test_parameter_shapes():
    model = SleepLM(
        ModelConfig(vocabulary=11, layout="ag", width=16, heads=2, key_size=4, value_size=6, carry="inject")
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mlp = {"mlp.project.weight": (64, 16), "mlp.out.weight": (16, 32), "mixer_norm.weight": (16,)}
    mlp["mlp_norm.weight"] = (16,)
    attention = mlp | {"mixer.project.weight": (48, 16), "mixer.out.weight": (16, 16)}
    fast = mlp | {
        "mixer.project.weight": (2 * (4 + 4 + 6) + 12, 16),
        "mixer.taps": (4, 28),
        "mixer.gates.weight": (4, 16),
        "mixer.gates.bias": (4,),
        "mixer.decay_rate": (2,),
        "mixer.norm": (6,),
        "mixer.out.weight": (16, 12),
    }
    outside = {"embedding.weight": (11, 16), "norm.weight": (16,), "head.weight": (11, 16), "inject.weight": (16, 32)}
    wanted = {f"layers.{i}.{name}": shape for i, block in enumerate((attention, fast)) for name, shape in block.items()}
    assert shapes == outside | wanted
    assert model.config.state_shape == (2, 6, 4)
    logits, S = model(TOKENS)
    assert logits.shape == (2, 13, 11)
    assert [tuple(matrix.shape) for matrix in S] == [(2, 2, 6, 4)]


def test_injection_starts_as_the_embedding_plus_half_the_normalised_h():
    model = SleepLM(ModelConfig(vocabulary=11, width=16, heads=2, carry="inject"))
    h, embedding = torch.randn(2, 1, 3, 16)
    normal = h / h.square().mean(-1, keepdim=True).sqrt()
    assert_close(model.carry(h, embedding), embedding + normal / 2)


def test_the_gate_mixes_h_into_the_embedding_channel_by_channel(make_model):
    model, (h, embedding) = make_model(carry="gate"), torch.randn(2, 1, 3, 16)
    assert_close(model.carry(h, embedding), model.gate * h + (1 - model.gate) * embedding)
    fresh = SleepLM(model.config)
    assert fresh.gate.shape == (16,) and torch.equal(fresh.carry(h, embedding), embedding)


def test_places_are_added_to_tokens(make_model):
    model = make_model(positions=13)
    assert_close(model.embed(TOKENS), model.embedding(TOKENS) + model.places)
    assert_close(model.embed(TOKENS[:, 4:], start=4), model.embed(TOKENS)[:, 4:])
    with pytest.raises(ValueError, match="14 tokens in a window are too many: the model has 13 positions"):
        model.embed(TOKENS, start=1)


@pytest.mark.parametrize("layout", ["a", "g", "ag", "gaga", "aaaa", "agg"])
def test_layout_is_built_letter_by_letter(layout, make_model):
    model = make_model(layout)
    assert ["g" if block.has_fast_weights else "a" for block in model.layers] == list(layout)
    assert model.fast_layers == [i for i, letter in enumerate(layout) if letter == "g"]
    logits, S = model(TOKENS)
    assert len(S) == layout.count("g") and logits.isfinite().all()


@pytest.mark.parametrize("layout", ["a", "g", "agag"])
@pytest.mark.parametrize("t", [0, 5, 12])
def test_no_token_changes_what_came_before_it(layout, t, make_model):
    model, other = make_model(layout), TOKENS.clone()
    other[:, t] = (other[:, t] + 1) % 11
    before, after = model(TOKENS)[0], model(other)[0]
    assert torch.equal(before[:, :t], after[:, :t])
    assert (before[:, t:] != after[:, t:]).any(dim=(0, 2)).all()


def read_in_pieces(model, sizes):
    S, cache, logits = model.empty_fast_weights(2), model.empty_cache(), []
    for piece in TOKENS.split(sizes, dim=1):
        h, S = model.blocks(model.embed(piece), S, cache)
        logits.append(model.out(h))
    return torch.cat(logits, dim=1), S


@pytest.mark.parametrize(
    "layout, rule", [("aa", "gated_delta"), ("agag", "gated_delta"), *(("gg", rule) for rule in RULES)]
)
@pytest.mark.parametrize("sizes", [[1] * 13, [13], [2, 5, 1, 1, 4], [6, 7], [1, 12]], ids=str)
def test_reading_in_pieces_is_reading_at_once(layout, rule, sizes, make_model):
    model = make_model(layout, rule=rule)
    logits, S = read_in_pieces(model, sizes)
    wanted, S_wanted = model(TOKENS)
    assert_close(logits, wanted)
    for found, matrix in zip(S, S_wanted, strict=True):
        assert_close(found, matrix)


def test_one_token_with_no_convolution_reach_streams_too(make_model):
    model = make_model("ag", convolution=1)
    assert_close(read_in_pieces(model, [1] * 13)[0], model(TOKENS)[0])


def test_cache_of_a_window_starts_empty(make_model):
    assert make_model("ag").empty_cache() == [WindowCache(), WindowCache()]


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_gradient_for_every_sequence_is_the_gradient_of_each(make_model):
    model = make_model("ag")
    parameters = dict(model.named_parameters())

    def loss(given, tokens):
        return torch.func.functional_call(model, given, (tokens[None],))[0].square().mean()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, TOKENS)
    for i, tokens in enumerate(TOKENS):
        wanted = torch.autograd.grad(loss(parameters, tokens), list(parameters.values()))
        for gradient, same in zip(each.values(), wanted, strict=True):
            assert_close(gradient[i], same, 1e-4)


def test_a_model_can_be_exported(make_model):
    model = make_model("ag").eval()
    exported = torch.export.export(model, (TOKENS,))
    assert_close(exported.module()(TOKENS)[0], model(TOKENS)[0])


@pytest.mark.parametrize("layout", ["ag", "aa", "AA"])
def test_a_model_on_meta_knows_shapes_and_says_where_numbers_are_needed(layout, make_model):
    task = GraphRetrieval(nodes=5, hops=2, queries=4)
    model = make_model(layout).to("meta")
    episode = task.sample(3, torch.Generator().manual_seed(0)).to("meta")
    assert run_episode(model, episode, 1).shape == (3, 8, 11)
    if layout == "ag":
        session = Session(model, 10, 2, 3)
        session.read(episode.windows[:, 0])
        assert session.held_bytes == 4 * sum(S.numel() for S in session.S)  # the window is full: it has slept
        assert session.answer(episode.prompt).shape == (3, 8, 11) and session.S[0].shape == (3, 2, 8, 8)
        trace = SleepTrace()
        sleep(model, episode.windows[:, 0], passes=2, trace=trace)
        assert trace.changes().shape == (2, 1)
        for needs_numbers in (
            lambda: accuracy_by_depth(model, task, 1),
            lambda: train(model, task, TrainConfig()),
            lambda: sleep_until_settled(model, episode.windows[:, 0]),
            lambda: Session(model, 10, 2, tolerance=0.1),
            lambda: probe_model(model, task, Settings(passes=1)),
        ):
            with pytest.raises(ValueError, match="the model is on meta, which knows shapes and no numbers"):
                needs_numbers()


def test_the_smallest_mlp_is_one_wide():
    model = SleepLM(ModelConfig(vocabulary=4, width=98, heads=1, layout="g", mlp_ratio=1 / 98))  # 98 * (1 / 98) < 1
    assert model.layers[0].mlp.out.weight.shape == (98, 1)
    task = GraphRetrieval(nodes=4, hops=2, queries=3)
    one, two, all_of_it = (
        example_operations(replace(model.config, mlp_ratio=ratio), task, passes=1) for ratio in (1 / 98, 2.5 / 98, 1.0)
    )
    assert all_of_it - one == 97 * (two - one) > 0


def test_fast_weights_stay_float32_under_autocast(make_model, monkeypatch):
    def rule(name, *tensors):
        assert name == "gated_delta" and not torch.is_autocast_enabled("cpu")
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        return gated_delta(*tensors)

    monkeypatch.setattr(layers, "fast_rule", rule)
    model = make_model("ag")
    with torch.autocast("cpu", torch.bfloat16):
        logits, S = model(TOKENS)
    assert logits.dtype == torch.bfloat16
    assert S[0].dtype == torch.float32
    torch.testing.assert_close(S[0], model(TOKENS)[1][0], rtol=0.1, atol=0.1)


def test_double_precision_works_throughout(make_model):
    model = make_model("ag")
    logits, S = model.double()(TOKENS)
    assert logits.dtype == S[0].dtype == torch.float64
    assert_close(logits.float(), model.float()(TOKENS)[0])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_half_precision_works_throughout_and_keeps_S_whole(kind, make_model):
    model = make_model("ag")
    wanted = model(TOKENS)[0]
    logits, S = model.to(kind)(TOKENS)
    assert logits.dtype == kind and S[0].dtype == torch.float32
    torch.testing.assert_close(logits.float(), wanted, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("carry, passes", [("hidden", 1), ("hidden", 2), ("inject", 2), ("embed", 2), ("gate", 2)])
def test_gradient_reaches_every_parameter_that_the_rule_uses(carry, passes, rule, make_model):
    task = GraphRetrieval(nodes=4, hops=2, queries=4, windows=2)
    model = make_model("agag", carry, rule=rule)
    episode = task.sample(8, torch.Generator().manual_seed(0))
    score(run_episode(model, episode, passes), episode)[0].backward()
    unused = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    ignored = {"delta": ("decay_rate",), "hebbian": ("decay_rate", "gates.weight", "gates.bias")}.get(rule, ())
    assert unused == {f"layers.{layer}.mixer.{name}" for layer in model.fast_layers for name in ignored}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layout": "axg"}, "layout must be a word .* got 'axg'"),
        ({"layout": ""}, "layout must be a word .* got ''"),
        ({"layout": "Ag"}, "layout 'Ag' mixes 'A'"),
        ({"width": 30, "heads": 4}, "width 30 must divide into 4 heads"),
        ({"width": 12, "heads": 4}, "width 12 must divide into 4 heads of even size"),
        ({"carry": "nothing"}, "carry 'nothing' is unknown"),
        ({"rule": "oja"}, "rule 'oja' is unknown: use one of gated_delta, delta, gated, hebbian"),
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"heads": -1}, "heads must be at least 1, got -1"),
        ({"convolution": 0}, "convolution must be at least 1, got 0"),
        ({"key_size": -1}, "key_size .* -1"),
        ({"value_size": -2}, "value_size .* -2"),
        ({"positions": -1}, "positions .* -1"),
        ({"write_range": 2.5}, "write_range .* got 2.5"),
        ({"write_range": 0}, "write_range .* got 0"),
        ({"mlp_ratio": 0.001}, "mlp_ratio must .* got 0.001"),
    ],
)
def test_wrong_configuration_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"vocabulary": 11} | settings)


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.tensor([[0, -1]]), "token -1 is outside the vocabulary: ids are 0 to 10"),
        (torch.tensor([[11, 3]]), "token 11 is outside the vocabulary: ids are 0 to 10"),
        (torch.tensor([[1.0, 2.0]]), "tokens must be whole numbers"),
        (torch.tensor([1, 2]), r"tokens must be .* \(2,\)"),
        (torch.zeros(1, 2, dtype=torch.long, device="meta"), "the tokens are on meta, the model on cpu: move them"),
    ],
)
def test_wrong_tokens_are_named(tokens, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model()(tokens)


@pytest.mark.parametrize(
    "S, message",
    [
        ((), "S must be of 1 fast-weight layers, .* got 0"),
        ((torch.zeros(2, 2, 8, 8),) * 2, "S must be of 1 fast-weight layers, .* got 2"),
        ((torch.zeros(2, 2, 8, 4),), r"S must have shape \(2, 2, 8, 8\), .* got \(2, 2, 8, 4\)"),
        ((torch.zeros(1, 2, 8, 8),), r"S must have shape \(2, 2, 8, 8\), .* got \(1, 2, 8, 8\)"),
        ((torch.zeros(2, 2, 8, 8, device="meta"),), "S must .* on cpu, got .* meta"),
        ((torch.zeros(2, 2, 8, 8).double(),), "S must .* be torch.float32 .* got .* torch.float64"),
    ],
)
def test_wrong_fast_weights_are_named(S, message, make_model):
    with pytest.raises(ValueError, match=message):
        make_model("ag")(TOKENS, S)
