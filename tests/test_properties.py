"""Whatever comes in, the result has the shape, the range and the kind it should have, or is a documented error."""

import functools
import inspect
import itertools
import math
import time
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from soak import COUNTS, LARGEST, SOAK, size
from test_fast_weights import NAMES

from sleepedu.__main__ import main
from sleepedu.evaluation import accuracy_by_depth
from sleepedu.fast import gated_delta_fast
from sleepedu.fast_weights import delta, gated, gated_delta, gated_delta_chunked, hebbian
from sleepedu.intervals import Accuracy, across_seeds, wilson_interval
from sleepedu.lab import experiments, recipes, run_store
from sleepedu.lab.recipes import Experiment
from sleepedu.model import CARRIES, RULES, ModelConfig, SleepLM
from sleepedu.pictures.explorer import explore
from sleepedu.session import Session
from sleepedu.sleep_loop import run_episode, sleep, wake
from sleepedu.tasks import CellularAutomaton, Episode, GraphRetrieval
from sleepedu.tasks.math_reasoning import MathReasoning
from sleepedu.tasks.random_streams import stream
from sleepedu.training import TrainConfig, score, train

common = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.function_scoped_fixture],
}
settings.register_profile("ci", max_examples=12, derandomize=True, **common)
settings.register_profile("soak", max_examples=1000, **common)
settings.load_profile("soak" if SOAK else "ci")


def holds(**strategies):
    """Like hypothesis.given, counting the examples."""

    def wrap(test):
        @given(**strategies)
        @functools.wraps(test)
        def counted(*arguments, **named):
            COUNTS["property examples run"] += 1
            return test(*arguments, **named)

        return counted

    return wrap


def holds_for_long(**strategies):
    """Like ``holds``, but again and again with other examples for ten minutes in `make soak`."""

    def wrap(test):
        @functools.wraps(test)
        def repeated(*arguments, **named):
            end = time.monotonic() + size(0, 600)
            holds(**strategies)(test)(*arguments, **named)
            while time.monotonic() < end:
                holds(**strategies)(test)(*arguments, **named)

        del repeated.__wrapped__  # whose arguments would be taken for fixtures
        parameters = inspect.signature(test).parameters.values()
        repeated.__signature__ = inspect.Signature([p for p in parameters if p.name not in strategies])
        return repeated

    return wrap


small = st.integers(-1, 9)
odd = st.one_of(
    small,
    st.sampled_from([None, True, 1.5, 4.0, -(10**30), 10**30, math.nan, math.inf, -math.inf, "3", "", b"x", (), [1]]),
)
tuples = st.one_of(
    odd, st.lists(st.one_of(st.integers(0, 5), st.sampled_from([1.0, True, "a"])), max_size=4).map(tuple)
)


def some(**choices):
    """A dictionary with any of these settings."""
    return st.fixed_dictionaries({}, optional=choices)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Tasks


graphs = some(nodes=odd, hops=odd, queries=odd, windows=odd, shortest=odd, tested=tuples, name_tokens=odd)
automata = some(
    cells=odd,
    rows=odd,
    steps=tuples,
    ask=st.sampled_from(["first", "every", "mixed", "all", 1]),
    rule=odd,
    held_out=st.one_of(odd, st.sampled_from([0.01, 0.1, 0.5, 0.99])),
)
mathematics = some(
    quantities=odd,
    operations=odd,
    ask=st.sampled_from(["every", "one", "two", 1]),
    windows=odd,
    sums=st.one_of(odd, st.booleans()),
    name_words=odd,
    digits=odd,
    less=st.one_of(odd, st.booleans()),
)
made_tasks = st.one_of(
    st.tuples(st.just(GraphRetrieval), graphs),
    st.tuples(st.just(CellularAutomaton), automata),
    st.tuples(st.just(MathReasoning), mathematics),
)
good_tasks = st.one_of(
    st.builds(
        lambda nodes, hops, queries, name_tokens: GraphRetrieval(
            nodes, min(hops, nodes - 1), queries, name_tokens=name_tokens
        ),
        st.integers(3, 8), st.integers(1, 7), st.integers(1, 4), st.integers(1, 2),
    ),
    st.builds(lambda cells, steps: CellularAutomaton(cells, 1, (steps,)), st.integers(3, 9), st.integers(1, 5)),
    st.builds(
        lambda quantities, operations, sums: MathReasoning(quantities, min(operations, quantities - 2), sums=sums),
        st.integers(3, 8), st.integers(1, 6), st.booleans(),
    ),
)  # fmt: skip


def check_episode(task, episode, batch, depth):
    assert_fits(task, episode)
    assert episode.windows.shape == (batch, task.windows, task.window)
    assert episode.prompt.shape == episode.targets.shape == episode.depth.shape == (batch, task.prompt_length)
    for tensor in (episode.windows, episode.prompt, episode.targets, episode.depth):
        assert tensor.dtype == torch.int64
    words = len(task.words)
    for tokens in (episode.windows, episode.prompt, episode.targets[episode.asked]):
        assert tokens.min() >= 0 and tokens.max() < words
    assert int(episode.asked.sum()) % task.answer_tokens == 0 and episode.asked.any()
    asked = episode.depth[episode.asked]
    assert (asked == depth).all() if depth is not None else asked.min() >= 0
    assert task.text(episode, batch - 1)


def assert_fits(task, episode):
    assert episode.windows.shape[1:] == (task.windows, task.window)
    assert episode.prompt.shape[1] == task.prompt_length


@holds(made=made_tasks, batch=odd, depth=st.one_of(st.none(), small), seed=st.integers(0, 2**32))
def test_a_task_samples_what_it_says_or_refuses(made, batch, depth, seed):
    kind, chosen = made
    try:
        task = kind(**chosen)
    except ValueError as error:
        assert str(error)
        return
    try:
        episode = task.sample(batch, generator(seed), depth)
    except ValueError as error:
        assert "batch" in str(error) or "depth" in str(error)
        return
    check_episode(task, episode, batch, depth)


@holds(task=good_tasks, batch=st.integers(1, 6), seed=st.integers(0, 2**32), data=st.data())
def test_every_depth_can_be_asked(task, batch, seed, data):
    depth = data.draw(st.sampled_from([None, *task.depths]))
    episode = task.sample(batch, generator(seed), depth)
    check_episode(task, episode, batch, depth)
    again = task.sample(batch, generator(seed), depth)
    assert all(torch.equal(getattr(episode, f.name), getattr(again, f.name)) for f in fields(episode))


# Settings


numbers = st.one_of(odd, st.floats())


@holds(
    chosen=some(
        passes=odd, steps=odd, batch=odd, seed=odd, learning_rate=numbers, adam_learning_rate=numbers, warmup=odd,
        decay=numbers, weight_decay=numbers, clip=numbers,
        precision=st.sampled_from(["auto", "bfloat16", "int8", None]),
    )
)  # fmt: skip
def test_training_settings_are_usable_or_refused(chosen):
    try:
        config = TrainConfig(**chosen)
    except ValueError as error:
        assert any(name in str(error) for name in chosen), f"{error} names no setting of {chosen}"
        return
    for step in {0, config.steps // 2, config.steps - 1}:
        assert 0 < config.rate(step) <= 1
    for name in ("learning_rate", "adam_learning_rate", "clip", "weight_decay", "decay"):
        assert math.isfinite(getattr(config, name))
    stream(config.seed, 0, config.steps - 1)


def mostly(good):
    """Draw what is good three times of four."""
    return st.one_of(good, good, good, odd)


configs = some(
    layout=mostly(st.sampled_from(["a", "g", "ag", "gga", "AA"])),
    width=mostly(st.sampled_from([8, 16, 32])),
    heads=mostly(st.sampled_from([1, 2, 4])),
    key_size=mostly(st.integers(0, 9)),
    value_size=mostly(st.integers(0, 9)),
    mlp_ratio=mostly(st.floats(0.5, 4)),
    convolution=mostly(st.integers(1, 5)),
    write_range=mostly(st.floats(0.1, 2)),
    carry=st.sampled_from([*CARRIES, "nothing", None]),
    positions=mostly(st.integers(0, 9)),
    rule=st.sampled_from([*RULES, "oja", None]),
)


@holds(chosen=configs, vocabulary=mostly(st.integers(1, 9)))
def test_model_settings_make_a_model_or_are_refused(chosen, vocabulary):
    try:
        config = ModelConfig(vocabulary, **chosen)
    except ValueError as error:
        assert any(name in str(error) for name in ("vocabulary", *chosen)), f"{error} names no setting of {chosen}"
        return
    COUNTS["models that can be made"] += 1
    sizes = (config.vocabulary, config.width * config.mlp_ratio, config.convolution, config.positions)
    assume(max(*sizes, *config.state_shape) < 1000)
    model = SleepLM(config)
    length = min(config.positions or 3, 3)
    tokens = torch.randint(config.vocabulary, (2, length), generator=generator())
    logits, S = model(tokens)
    assert logits.shape == (2, length, config.vocabulary) and logits.isfinite().all()
    assert all(matrix.shape == (2, *config.state_shape) for matrix in S)


@holds(
    recipe=st.sampled_from([*recipes.RECIPES, ("chess", "laptop"), ("graph", "huge"), (None, None)]),
    model=st.sampled_from([*recipes.MODELS, "x"]), passes=mostly(st.integers(1, 8)), seed=mostly(st.integers(0, 99)),
    steps=mostly(st.integers(0, 99)), learning_rate=mostly(st.floats(1e-4, 1)), carry=st.sampled_from([*CARRIES, ""]),
)  # fmt: skip
def test_an_experiment_has_a_name_and_settings_or_is_refused(recipe, **chosen):
    try:
        experiment = Experiment(*recipe, **chosen)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
        return
    COUNTS["experiments that can be run"] += 1
    assert "/" not in experiment.name and f"seed{chosen['seed']}" in experiment.name
    assert experiment.settings["train"]["seed"] == chosen["seed"]


# The model at work


def model_of(layout, carry, seed=0):
    torch.manual_seed(seed)
    return SleepLM(ModelConfig(7, layout, 8, 2, carry=carry))


layouts, carries = st.sampled_from(["a", "g", "ag", "ga"]), st.sampled_from([*CARRIES])


@holds(
    layout=layouts, carry=carries, batch=st.integers(0, 3), length=st.integers(0, 5), passes=odd,
    kind=st.sampled_from([torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32]), token=st.integers(-1, 7),
)  # fmt: skip
def test_sleep_and_wake_keep_their_shapes_or_refuse(layout, carry, batch, length, passes, kind, token):
    model, tokens = model_of(layout, carry), torch.full((batch, length), token).to(kind)
    try:
        S = sleep(model, tokens, passes=passes)
        logits = wake(model, tokens, S)
    except ValueError as error:
        assert str(error)
        return
    assert (kind in (torch.int64, torch.int32) and 0 <= token < 7) or 0 in (batch, length)
    assert logits.shape == (batch, length, 7) and logits.dtype == torch.float32 and logits.isfinite().all()
    assert len(S) == layout.count("g")
    for matrix in S:
        assert matrix.shape == (batch, *model.config.state_shape) and matrix.dtype == torch.float32
        assert matrix.isfinite().all()


@holds(task=good_tasks, layout=layouts, carry=carries, passes=st.integers(1, 3), batch=st.integers(1, 3))
def test_an_episode_gives_logits_for_its_prompt(task, layout, carry, passes, batch):
    torch.manual_seed(0)
    model = SleepLM(ModelConfig(len(task.words), layout, 8, 2, carry=carry))
    episode = task.sample(batch, generator())
    logits = run_episode(model, episode, passes)
    assert logits.shape == (*episode.prompt.shape, len(task.words))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


@holds(
    layout=layouts, carry=carries, window=odd, passes=odd, batch=odd,
    pieces=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=4),
)  # fmt: skip
def test_a_session_reads_pieces_of_any_size_or_refuses(layout, carry, window, passes, batch, pieces):
    model = model_of(layout, carry)
    try:
        session = Session(model, window, passes, batch)
    except ValueError as error:
        assert any(name in str(error) for name in ("window", "batch", "passes"))
        return
    assume(batch < 100)
    read = 0
    for rows, length in pieces:
        tokens = torch.randint(7, (rows, length), generator=generator(length))
        if rows != batch:
            with pytest.raises(ValueError, match="tokens must have shape"):
                session.read(tokens)
            continue
        logits, read = session.read(tokens), read + length
        assert logits.shape == (batch, length, 7) and logits.isfinite().all()
        assert session.tokens_read == read and session.sleeps == read // window
        assert session.room == window - read % window
        try:
            assert session.answer(tokens).shape == (batch, length, 7)
        except ValueError as error:
            assert "to fit the window" in str(error) and not 1 <= length <= window
        if session.sleeps > read // window:
            return  # it slept to make room for the prompt


sizes = st.integers(1, 4)


@holds(
    shape=st.tuples(st.integers(0, 4), sizes, st.integers(0, 40), sizes, sizes), chunk=st.sampled_from([1, 5, 64]),
    wrong=st.sampled_from(["", "", "k", "v", "log_a", "b", "S"]), forget=st.floats(-100, 0), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_rules_keep_their_shapes_and_the_chunked_form_agrees(shape, chunk, wrong, forget, seed):
    batch, heads, length, d_k, d_v = shape
    random = functools.partial(torch.randn, generator=generator(seed))
    tensors = {
        "q": random(batch, heads, length, d_k),
        "k": torch.nn.functional.normalize(random(batch, heads, length, d_k), dim=-1),
        "v": random(batch, heads, length, d_v),
        "log_a": forget * torch.rand(batch, heads, length, generator=generator(seed)),
        "b": 2 * torch.rand(batch, heads, length, generator=generator(seed + 1)),
        "S": random(batch, heads, d_v, d_k),
    }
    if wrong or length == 0:
        if wrong:
            tensors[wrong] = tensors[wrong][..., None]
        with pytest.raises(ValueError):
            gated_delta_chunked(*tensors.values(), chunk=chunk)
        return
    for rule in (hebbian, gated, delta, gated_delta):
        o, S = rule(*tensors.values())
        assert o.shape == tensors["v"].shape and S.shape == tensors["S"].shape
    o, S = gated_delta(*tensors.values())
    fast_o, fast_S = gated_delta_chunked(*tensors.values(), chunk=chunk)
    torch.testing.assert_close(fast_o, o, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(fast_S, S, rtol=1e-3, atol=1e-4)


# Gates of any size


LEAST = torch.finfo(torch.float32).min
gates = st.one_of(
    st.sampled_from([0.0, -1e-45, -1e-7, -0.01, -1.0, -20.0, -87.0, -88.8, -103.0, -104.0, -1e4, LEAST, -math.inf]),
    st.floats(max_value=0.0, width=32, allow_nan=False),
)


def largest_so_far(a, sizes, first):
    """Return for every token the largest of its size and those before it, each times the gates since: (b, h, t)."""
    largest = [first]
    for t in range(sizes.shape[-1]):
        largest.append(torch.maximum(sizes[..., t], a[..., t] * largest[-1]))
    return torch.stack(largest[1:], dim=-1)


def exact(inputs, delta, do, dS_end):
    """Return outputs and gradients of the recurrence in float64, and the size of the numbers that each is a sum of."""
    q, k, v, log_a, b, S_before = inputs = [x.double().requires_grad_() for x in inputs]
    a, S, outputs, kept, states = log_a.exp(), S_before, [], [], []
    for t in range(q.shape[2]):
        kept.append(a[:, :, t, None, None] * S)
        w = v[:, :, t] - (kept[-1] @ k[:, :, t, :, None])[..., 0] * delta
        S = kept[-1] + (b[:, :, t, None] * w)[..., None] * k[:, :, t, None]
        S.retain_grad()
        states.append(S)
        outputs.append((S @ q[:, :, t, :, None])[..., 0])
    o = torch.stack(outputs, dim=2)
    ((o * do).sum() + (S * dS_end).sum()).backward()
    with torch.no_grad():
        Q, K, V, DO = (x.double().norm(dim=-1) for x in (q, k, v, do))  # all of them (b, h, t)
        kept = torch.stack(kept, dim=2).norm(dim=(-2, -1))
        W, back = V + kept * K * delta, 1 + b * K.square() * delta
        # What a write has taken out of S was in it before, and is still in the sums of a chunk: only a gate forgets.
        S_size = largest_so_far(a, kept + b * W * K, S_before.norm(dim=(-2, -1)))
        dS = torch.stack([state.grad for state in states], dim=2).norm(dim=(-2, -1)) + DO * Q
        dS_end = dS_end.double().norm(dim=(-2, -1))
        later = torch.cat((a[..., 1:], torch.ones_like(a[..., :1])), dim=-1)
        dS = largest_so_far(later.flip(-1), (dS * back).flip(-1), dS_end).flip(-1)
        before = a * torch.cat((S_before.norm(dim=(-2, -1))[..., None], S_size[..., :-1]), dim=-1)
        W = V + before * K * delta
        sizes = (
            *(S_size * Q, S_size[..., -1], S_size * DO, b * dS * (W + before * K * delta), b * dS * K),
            *(before * dS, W * dS * K, a[..., 0] * dS[..., 0]),
        )
    found = (o, S, *(x.grad for x in inputs))
    return {name: (x.detach(), size) for name, x, size in zip(("o", "the last S", *NAMES), found, sizes, strict=True)}


@pytest.mark.parametrize("rule", [gated, gated_delta, gated_delta_chunked, gated_delta_fast], ids=lambda r: r.__name__)
@holds_for_long(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 300), st.sampled_from([3, 16, 32])),
    some_gates=st.lists(gates, min_size=1, max_size=4), strengths=st.sampled_from([(0, 2), (1, 1), (0, 1e-3), (2, 2)]),
    scale=st.sampled_from([0.0, 1.0, 1e3]), same_keys=st.booleans(), chunk=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_rule_is_exact_for_gates_of_any_size(rule, shape, some_gates, strengths, scale, same_keys, chunk, seed):
    batch, heads, length, d = shape
    draw = generator(seed)
    q, k, v, do = torch.randn(4, batch, heads, length, d, generator=draw)
    k = torch.nn.functional.normalize(k[:, :, :1].expand_as(k) if same_keys else k, dim=-1)
    S, dS_end = torch.randn(2, batch, heads, d, d, generator=draw)
    least, most = strengths
    b = least + (most - least) * torch.rand(batch, heads, length, generator=draw)
    log_a = torch.tensor(some_gates)[torch.randint(len(some_gates), b.shape, generator=draw)]
    inputs = [x.clone().requires_grad_() for x in (q, k, v, log_a, b, scale * S)]
    o, S_end = rule(*inputs, **{"chunk": chunk} if rule is gated_delta_chunked else {})
    gradients = torch.autograd.grad((o, S_end), inputs, (do, dS_end))
    wanted = exact([x.detach() for x in inputs], rule is not gated, do, dS_end)
    # A strength of 2 turns S over along a key. Along the same key again and again it keeps every rounding so far.
    limit = 1e-4 if same_keys and strengths == (2, 2) else 2e-5
    for found, (name, (right, parts)) in zip((o, S_end, *gradients), wanted.items(), strict=True):
        assert found.isfinite().all(), name
        error = (found.double() - right).abs().reshape(*parts.shape, -1).amax(dim=-1)
        worst = (error / (parts + 1e-30)).max().item()
        what = f"{rule.__name__}: error of {name} by its size"
        LARGEST[what] = max(worst, LARGEST[what])
        assert worst < limit, f"{name} is off by {worst:.1e} of its own size"


@holds_for_long(
    rate=st.floats(-60, 60, width=32), bias=st.floats(-(2.0**120), 2.0**120, width=32), length=st.integers(1, 300),
    layout=st.sampled_from(["g", "ag"]), passes=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_a_model_with_gates_of_any_size_gives_numbers_and_gradients(rate, bias, length, layout, passes, seed):
    model = model_of(layout, "inject", seed)
    mixer = model.layers[-1].mixer
    with torch.no_grad():
        mixer.decay_rate.fill_(rate)
        mixer.gates.bias[:2] = bias
    tokens = torch.randint(7, (2, length), generator=generator(seed))
    logits = wake(model, tokens[:, -5:], sleep(model, tokens, passes=passes))
    logits.square().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@holds_for_long(
    batch=st.integers(1, 4), length=st.integers(1, 300), asked=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    scale=st.sampled_from([0.0, 1.0, 1e4, 1e30]), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_a_score_is_a_number_whatever_is_asked(batch, length, asked, scale, seed):
    draw = generator(seed)
    tokens = torch.randint(7, (batch, length), generator=draw)
    targets = tokens.where(torch.rand(batch, length, generator=draw) < asked, -100)
    episode = Episode(tokens[:, None], tokens, targets, torch.zeros_like(tokens))
    logits = (scale * torch.randn(batch, length, 7, generator=draw)).requires_grad_()
    loss, right = score(logits, episode)
    loss.backward()
    assert right >= 0 and loss.isfinite() and logits.grad.isfinite().all()
    same = logits.detach().double().requires_grad_()
    wanted = score(same, episode)[0]
    wanted.backward()
    assert abs(loss.item() - wanted.item()) <= 1e-5 * wanted.item() + 1e-6  # a small one is the log of almost 1
    assert (logits.grad - same.grad).abs().max() <= 1e-5 * same.grad.abs().max() + 1e-6
    assert bool(episode.asked.any()) or (loss.item(), right.item(), logits.grad.abs().sum().item()) == (0, 0, 0)


@holds_for_long(
    silent=st.sets(st.integers(0, 3)), batch=st.integers(1, 3), passes=st.integers(1, 2), seed=st.integers(0, 99)
)
def test_training_and_measuring_go_on_where_a_batch_asks_nothing(silent, batch, passes, seed):
    drawn = itertools.count()

    @dataclass(frozen=True)
    class Silent(GraphRetrieval):
        def sample(self, size, generator, depth=None):
            episode = super().sample(size, generator, depth)
            nothing = size == batch and next(drawn) in silent
            return replace(episode, targets=episode.targets.masked_fill(torch.tensor(nothing), -100))

    task, model = Silent(nodes=4, hops=2, queries=2), SleepLM(ModelConfig(7, "ag", 8, 2))
    history = train(model, task, TrainConfig(passes=passes, steps=4, batch=batch, seed=seed))
    assert all(math.isfinite(loss) for loss in history.loss)
    assert [history.loss[step] == 0 for step in range(4)] == [step in silent for step in range(4)]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


# Numbers and pictures


@holds(task=good_tasks, passes=odd, examples=small, seed=odd, batch=small)
def test_accuracies_lie_in_their_intervals_or_are_refused(task, passes, examples, seed, batch):
    assume(not isinstance(passes, int) or passes < 4)
    torch.manual_seed(0)
    model = SleepLM(ModelConfig(len(task.words), "g", 8, 2))
    try:
        table = accuracy_by_depth(model, task, passes, examples, seed, batch)
    except ValueError as error:
        assert any(name in str(error) for name in ("passes", "examples", "seed", "batch"))
        return
    assert list(table) == list(task.depths)
    for accuracy in table.values():
        assert 0 <= accuracy.low <= accuracy.accuracy <= accuracy.high <= 1
        assert accuracy.n == examples and 0 <= accuracy.majority <= 1


@holds(right=st.integers(0, 10**6), n=st.integers(1, 10**6))
def test_an_interval_holds_its_share(right, n):
    share = min(right, n) / n
    low, high = wilson_interval(share, n)
    assert 0 <= low <= share <= high <= 1 and low < high


@holds(shares=st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_a_mean_over_seeds_lies_in_its_interval(shares):
    tables = [{1: Accuracy(share, *wilson_interval(share, 10), 10, 0.5)} for share in shares]
    mean = across_seeds(tables)[1]
    assert mean.low <= mean.accuracy + 1e-12 and mean.accuracy - 1e-12 <= mean.high


def draw(n, depth):
    return Figure(figsize=(0.4, 0.4), dpi=30)


values = st.lists(st.one_of(st.integers(-3, 99), st.text(max_size=3)), max_size=2, unique=True)


@holds(passes=values, depths=values, words=st.text(max_size=20))
def test_an_explorer_shows_every_pair_or_is_refused(passes, depths, words):
    try:
        page = explore(draw, passes, depths, lambda n, depth: words).page()
    except ValueError:
        assert not passes or not depths
        return
    assert page.count('<input type="range"') == 2 and page.count("<script") == 2 == page.count("</script>")


# The command line


arguments = st.lists(
    st.sampled_from(
        [
            *("train", "evaluate", "results", "reproduce", "graph", "rule110", "math", "no-such-run", "smoke"),
            *("--passes", "--size", "--model", "--seed", "--steps", "--examples", "--device", "--threads", "--json"),
            *("--learning-rate", "--runs", "--", "kept", "cpu", "1", "0", "-1", "1e9", "nan", "9" * 20, "", "\0"),
            "x" * 300,
        ]
    ),
    max_size=7,
)


@holds(words=arguments)
def test_the_command_line_ends_with_a_code_and_at_most_one_line_of_complaint(words, capsys, monkeypatch, tmp_path):
    def no_training(*arguments, **named):
        raise ValueError("this would train")

    monkeypatch.setattr(experiments, "train", no_training)
    monkeypatch.setattr(run_store, "COMMITTED", tmp_path)  # to measure all the stored runs would take minutes
    monkeypatch.chdir(tmp_path)
    try:
        code = main(words)
    except SystemExit as stopped:
        code = stopped.code
    shown = capsys.readouterr()
    assert code in (0, 2)
    assert (len(shown.err.splitlines()) == 1) == (code == 2), shown.err
    torch.set_num_threads(1)
