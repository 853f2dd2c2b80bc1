"""Algorithm 1 against a second, plain implementation; what survives a sleep; streaming; the trace."""

import gc
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sleepedu.evaluation import accuracy_by_depth
from sleepedu.lab.run_store import load_run
from sleepedu.model import CARRIES, RULES, ModelConfig, SleepLM
from sleepedu.session import Session
from sleepedu.settling import sleep_until_settled
from sleepedu.sleep_loop import run_episode, sleep, wake
from sleepedu.tasks import Episode, GraphRetrieval
from sleepedu.trace import SleepTrace
from sleepedu.training import score

TASK = GraphRetrieval(nodes=4, hops=2, queries=3, windows=2)  # 11 words, two windows of 4 tokens, prompt of 6
EPISODE = TASK.sample(3, torch.Generator().manual_seed(0))


def assert_close(found, wanted, tolerance=1e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def blocks(model, h, S):
    """Blocks(h, S) of the paper; S is a dict from layer to matrix."""
    after = {}
    for i, block in enumerate(model.layers):
        h, after[i] = block(h, S.get(i))
    return h, after


def algorithm_1(model, episode, N):
    """The paper's Algorithm 1, word for word: the logits at the prompt and the loss."""
    S = {i: torch.zeros(3, 2, 8, 8) for i, letter in enumerate(model.config.layout) if letter == "g"}
    for window in range(episode.windows.shape[1]):
        embedded = F.embedding(episode.windows[:, window], model.embedding.weight)
        h = embedded
        for n in range(N):
            if n and model.config.carry == "embed":
                h = embedded
            if n and model.config.carry == "gate":
                h = embedded + model.gate * (h - embedded)
            if n and model.config.carry == "inject":
                normal = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
                h = torch.cat((embedded, normal), -1) @ model.inject.weight.T
            h, S = blocks(model, h, S)
    h, _ = blocks(model, F.embedding(episode.prompt, model.embedding.weight), S)
    logits = model.norm(h) @ model.head.weight.T
    return logits, F.cross_entropy(logits.flatten(0, 1), episode.targets.flatten(), ignore_index=-100)


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("N", [1, 2, 3])
def test_run_episode_is_algorithm_1(carry, N, make_model):
    model = make_model("agag", carry)
    names, parameters = zip(*model.named_parameters(), strict=True)
    logits = run_episode(model, EPISODE, N)
    loss, _ = score(logits, EPISODE)
    wanted, wanted_loss = algorithm_1(model, EPISODE, N)
    assert_close(logits, wanted)
    assert_close(loss, wanted_loss)
    found = torch.autograd.grad(loss, parameters, materialize_grads=True)
    for name, gradient, same in zip(
        names, found, torch.autograd.grad(wanted_loss, parameters, materialize_grads=True), strict=True
    ):
        assert_close(gradient, same, 1e-4)
        assert gradient.any() or (name in ("inject.weight", "gate") and N == 1), name


@pytest.mark.parametrize("carry", CARRIES)
def test_one_pass_of_any_carry_is_the_plain_hybrid(carry, make_model):
    plain, model = make_model("agag", "hidden"), make_model("agag", carry)
    model.load_state_dict(plain.state_dict(), strict=False)
    S = None
    for window in EPISODE.windows.unbind(1):
        _, S = plain(window, S)
    assert torch.equal(run_episode(model, EPISODE, 1), plain(EPISODE.prompt, S)[0])


def test_more_passes_give_another_answer(make_model):
    model = make_model("agag")
    answers = [run_episode(model, EPISODE, N) for N in (1, 2, 3)]
    assert not torch.allclose(answers[0], answers[1]) and not torch.allclose(answers[1], answers[2])


def test_carries_differ_from_the_second_pass_on(make_model):
    plain = make_model("agag", "hidden")
    answers = []
    for carry in CARRIES:
        model = make_model("agag", carry)
        model.load_state_dict(plain.state_dict(), strict=False)
        answers.append(run_episode(model, EPISODE, 2))
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(answers, 2))


@pytest.mark.parametrize("share, carry", [(0.0, "embed"), (1.0, "hidden")])
def test_a_gate_of_0_hands_on_the_embedding_and_one_of_1_hidden_states(share, carry, make_model):
    other, model = make_model("agag", carry), make_model("agag", "gate")
    model.load_state_dict(other.state_dict(), strict=False)
    model.gate.data.fill_(share)
    for passes in (1, 2, 4):
        assert_close(run_episode(model, EPISODE, passes), run_episode(other, EPISODE, passes))


def test_a_model_that_never_slept_answers_as_well_after_any_number_of_passes_through_a_gate_of_0():
    run = load_run("graph-laptop-sleep-N1-seed0")
    plain, task = run.load_model(), run.make_task()
    gated = SleepLM(replace(plain.config, carry="gate")).eval()
    gated.load_state_dict(plain.state_dict(), strict=False)
    right = {
        (model.config.carry, passes): accuracy_by_depth(model, task, passes, examples=300)[1].accuracy
        for model in (plain, gated)
        for passes in (1, 2, 4)
    }
    assert right["hidden", 1] == right["gate", 1] > 0.95
    assert min(right["gate", 2], right["gate", 4]) > 0.95 and right["hidden", 4] < 0.3


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_sleeps_in_a_session_and_under_a_trace(rule, make_model):
    model, trace = make_model("agag", rule=rule), SleepTrace()
    logits = run_episode(model, EPISODE, 3, trace)
    session = Session(model, TASK.window, passes=3, batch=3)
    session.read(EPISODE.windows.flatten(1))
    assert_close(session.S, trace.S[-1][-1])
    session = Session(model, 6, passes=3, batch=3)
    session.S = trace.S[-1][-1]
    assert_close(session.answer(EPISODE.prompt), logits)


def test_order_of_the_windows_matters_because_S_is_carried(make_model):
    model = make_model("agag")
    S = sleep(model, EPISODE.windows[:, 1], sleep(model, EPISODE.windows[:, 0], passes=2), passes=2)
    assert torch.equal(wake(model, EPISODE.prompt, S), run_episode(model, EPISODE, 2))
    fresh = sleep(model, EPISODE.windows[:, 1], passes=2)
    assert not torch.allclose(wake(model, EPISODE.prompt, fresh), run_episode(model, EPISODE, 2))


def test_after_a_sleep_nothing_but_S_is_left_of_the_window(make_model):
    model, later = make_model("agag"), EPISODE.prompt
    window = EPISODE.windows[:, 0]
    other = window.clone()
    other[:, -1] = (other[:, -1] + 1) % TASK.nodes
    sessions = []
    for tokens in (window, other, other):
        session = Session(model, window=7, passes=2, batch=3)
        session.read(tokens)
        session.sleep()
        sessions.append(session)
    read, held, free = sessions
    held.S = read.S
    logits = read.read(later)
    assert torch.equal(held.read(later), logits)
    assert not torch.allclose(free.read(later), logits)


def test_a_transformer_that_sleeps_remembers_nothing(make_model):
    model = make_model("aa")
    assert torch.equal(run_episode(model, EPISODE, 1), model(EPISODE.prompt)[0])


def test_places_are_those_of_the_window(make_model):
    model = make_model("agag", positions=6)
    session = Session(model, window=6, passes=2, batch=3)
    for piece in EPISODE.windows[:, 0].split([1, 3], dim=1):
        session.read(piece)
    session.sleep()
    session.read(EPISODE.prompt[:, :2])
    S = sleep(model, EPISODE.windows[:, 0], passes=2)
    assert_close(session.answer(EPISODE.prompt[:, 2:]), wake(model, EPISODE.prompt, S)[:, 2:])
    with pytest.raises(ValueError, match="a window of 7 tokens does not fit the model's 6 positions"):
        Session(model, window=7, passes=1)


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("sizes", [[1] * 8, [8], [3, 5], [4, 4], [7, 1], [2, 1, 5]], ids=str)
def test_session_in_pieces_is_run_episode(carry, sizes, make_model):
    model = make_model("agag", carry)
    session = Session(model, window=4, passes=3, batch=3)
    tokens = EPISODE.windows.flatten(1)
    logits = torch.cat([session.read(piece) for piece in tokens.split(sizes, dim=1)], dim=1)
    assert (session.sleeps, session.tokens_read, session.room) == (2, 8, 4)
    prompt = EPISODE.prompt[:, :4]
    S = model.empty_fast_weights(3)
    for i, window in enumerate(EPISODE.windows.unbind(1)):
        assert_close(logits[:, 4 * i : 4 * i + 4], model(window, S)[0])
        S = sleep(model, window, S, passes=3)
    for found, matrix in zip(session.S, S, strict=True):
        assert_close(found, matrix)
    assert_close(session.answer(prompt), wake(model, prompt, S))


def test_session_with_a_long_window_answers_like_run_episode(make_model):
    model = make_model("agag")
    session = Session(model, window=6, passes=2, batch=3)
    for window in EPISODE.windows.unbind(1):
        session.read(window)
        session.sleep()  # on a partial window
        assert session.room == 6
    assert session.sleeps == 2
    assert_close(session.answer(EPISODE.prompt), run_episode(model, EPISODE, 2))


def test_session_answers_from_the_window_it_has_not_slept_on(make_model):
    model, tokens = make_model("agag"), EPISODE.prompt
    session = Session(model, window=6, passes=2, batch=3)
    session.read(tokens[:, :4])
    assert_close(session.answer(tokens[:, 4:]), model(tokens)[0][:, 4:])
    assert session.sleeps == 0


def test_session_sleeps_before_a_prompt_that_does_not_fit_beside_the_window(make_model):
    model = make_model("agag")
    session = Session(model, window=6, passes=2, batch=3)
    session.read(EPISODE.windows[:, 0])
    answer = session.answer(EPISODE.prompt)
    assert session.sleeps == 1
    assert_close(answer, wake(model, EPISODE.prompt, sleep(model, EPISODE.windows[:, 0], passes=2)))


def test_an_answer_leaves_no_trace_in_the_session(make_model):
    model = make_model("agag")
    asked, left_alone = (Session(model, window=8, passes=2, batch=3) for _ in range(2))
    for session in (asked, left_alone):
        session.read(EPISODE.windows[:, 0])
    first, second = (asked.answer(EPISODE.prompt[:, :3]) for _ in range(2))
    assert torch.equal(first, second)
    assert (asked.tokens_read, asked.sleeps, asked.room) == (4, 0, 4)
    assert torch.equal(asked.read(EPISODE.prompt), left_alone.read(EPISODE.prompt))
    assert all(map(torch.equal, asked.S, left_alone.S))


def test_sleeping_on_nothing_does_nothing(make_model):
    session = Session(make_model("ag"), window=4, passes=2)
    session.sleep()
    assert session.sleeps == 0 and not session.S[0].any()


def test_session_refuses_what_does_not_fit_and_has_read_nothing_then(make_model):
    model = make_model("ag")
    session = Session(model, window=4, passes=2, batch=1)
    for tokens, message in (
        (torch.zeros(2, 3, dtype=torch.long), r"tokens must have shape \(1, length\), got \(2, 3\)"),
        (torch.tensor([[1, 2, 99]]), "token 99 is outside the vocabulary"),
    ):
        for method in (session.read, session.answer):
            with pytest.raises(ValueError, match=message):
                method(tokens)
    with pytest.raises(ValueError, match="a prompt must have 1 to 4 tokens, to fit the window, got 5"):
        session.answer(torch.zeros(1, 5, dtype=torch.long))
    assert session.tokens_read == 0 and session.room == 4
    for window, batch in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match=r"(window|batch) must be at least 1, got (0|-1)"):
            Session(model, window=window, passes=1, batch=batch)


def stream_of(batch, *lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (batch, length), generator=generator) for length in lengths]


def assert_same_state(found, wanted, tokens):
    """Sessions that count the same, hold the same S, and go on in the same way."""
    for name in ("tokens_read", "sleeps", "room"):
        assert getattr(found, name) == getattr(wanted, name), name
    for one, other in zip(found.S, wanted.S, strict=True):
        assert_close(one, other)
    assert_close(found.read(tokens), wanted.read(tokens))


@pytest.mark.parametrize("layout", ["ag", "aa"])
@pytest.mark.parametrize("N", [1, 3])
def test_reading_without_logits_is_reading_without_their_computation(layout, N, make_model, monkeypatch):
    model, (tokens,) = make_model(layout), stream_of(2, 10)
    silent, loud = (Session(model, window=4, passes=N, batch=2) for _ in range(2))
    loud.read(tokens)
    with monkeypatch.context() as patch:
        patch.delattr(type(model), "out")
        assert silent.read(tokens, logits=False) is None
    assert_same_state(silent, loud, tokens)


def test_reading_no_token_gives_no_logit(make_model):
    session = Session(make_model("ag", positions=4), window=4, passes=2)
    assert session.read(torch.zeros(1, 0, dtype=torch.long)).shape == (1, 0, 11)
    assert session.tokens_read == 0


@pytest.mark.parametrize("interrupted", range(6))
def test_an_interrupted_session_goes_on_where_it_stood(interrupted, make_model):
    model, (tokens,) = make_model("aga"), stream_of(1, 9)
    plain, session = (Session(model, window=4, passes=2) for _ in range(2))
    plain.read(tokens)
    calls = itertools.count()

    def interrupt(*call):
        if next(calls) == interrupted:
            raise KeyboardInterrupt

    # Between two layers: one has a longer cache by then.
    hook = model.layers[1].mixer_norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        for piece in tokens.split([2, 7], dim=1):  # passes over 2 and 2, asleep, 4, asleep, 1
            session.read(piece)
    hook.remove()
    session.read(tokens[:, session.tokens_read :])
    assert_same_state(session, plain, tokens)


def live_tensors():
    gc.collect()
    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


def held_by(session):
    return sum(len(value) for value in vars(session).values() if isinstance(value, list | tuple | dict))


@pytest.mark.parametrize("N", [1, 2])
def test_a_long_stream_leaves_no_more_behind_than_a_short_one(N, make_model):
    others = live_tensors()  # what other tests have left is held meanwhile, lest it go between two counts
    session = Session(make_model("ag"), window=8, passes=N)
    kept = []

    for i in range(60):
        if i in (11, 19, 59):  # 13 tokens a piece: every 8 pieces the window is as full as before
            kept.append((sum(x.numel() for x in live_tensors()), held_by(session)))
        session.read(torch.ones(1, 13, dtype=torch.long), logits=False)
    assert (session.tokens_read, session.sleeps) == (780, 97)
    assert kept[0] == kept[1] == kept[2]
    del others


@pytest.mark.parametrize("pieces", [[20], [8, 8, 4], [1] * 20], ids=str)
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_a_session_holds_no_larger_tensor_than_those_it_shows(pieces, eviction):
    session = Session(SleepLM(ModelConfig(12, layout="ag", width=16, heads=2, eviction=eviction)), window=32, passes=1)
    for length in [32, *pieces]:
        session.read(torch.ones(1, length, dtype=torch.long), logits=False)
    token, tail, S = 2 * 16, 3 * 3 * 16, 2 * 8 * 8
    left = 31 * token + tail if eviction == "sliding" else 0  # of the last window; once more in what this one sees
    assert session.held_bytes == 4 * (20 * token + tail + S + left + (left and 31 * token))


def test_a_cache_is_for_windows_that_slide(make_model):
    model = make_model("ag")
    with pytest.raises(ValueError, match="a cache outlives its window only where windows slide"):
        sleep(model, torch.ones(1, 5, dtype=torch.long), cache=model.empty_cache())


LONG = GraphRetrieval(nodes=6, hops=2, queries=3, windows=3).sample(3, torch.Generator().manual_seed(0))


def gradients(model, N, recompute, episode=LONG, **precision):
    """The logits, and the gradient of every parameter through a whole episode (None where there is none)."""
    with torch.autocast("cpu", torch.bfloat16, **({"enabled": False} | precision)):
        logits = run_episode(model, episode, N, recompute=recompute)
    model.zero_grad()
    score(logits.float() if precision else logits, episode)[0].backward()
    return logits, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("carry", CARRIES)
@pytest.mark.parametrize("layout", ["agag", "gaa"])
@pytest.mark.parametrize("N", [1, 3])
def test_recomputing_gives_the_same_gradient(carry, layout, N, make_model):
    model = make_model(layout, carry, vocabulary=13, positions=6).double()
    wanted_logits, wanted = gradients(model, N, recompute=False)
    logits, found = gradients(model, N, recompute=True)
    assert torch.equal(logits, wanted_logits)
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert_close(found[name], gradient, 1e-6)


def test_recomputing_gives_the_gradient_of_S_and_leaves_frozen_parameters_alone(make_model):
    model = make_model("agag", "inject").double()
    model.layers[0].requires_grad_(False)
    S = [0.1 * torch.randn_like(matrix).requires_grad_() for matrix in model.empty_fast_weights(3)]
    found = []
    for recompute in (False, True):
        after = sleep(model, EPISODE.windows[:, 0], tuple(S), 2, recompute=recompute)
        inputs = [*S, *model.layers[1].parameters(), model.inject.weight, model.embedding.weight]
        found.append(torch.autograd.grad(sum(matrix.square().sum() for matrix in after), inputs, allow_unused=True))
    for plain, recomputed in zip(*found, strict=True):
        assert_close(recomputed, plain, 1e-6)


def test_recomputing_keeps_to_the_precision_of_the_first_run(make_model):
    model = make_model("agag", vocabulary=13)
    wanted = gradients(model, 2, recompute=False, enabled=True)[1]
    mixed = []
    model.layers[0].register_forward_hook(lambda *call: mixed.append(torch.is_autocast_enabled("cpu")))
    found = gradients(model, 2, recompute=True, enabled=True)[1]
    assert mixed == [True] * (3 * 2 + 1 + 3 * 2)  # three windows, the prompt, and the windows again in the backward
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name


def kept_for_gradient(model, N, windows, recompute):
    """How many numbers a forward pass keeps for its gradient, parameters not counted."""
    own, kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

    def note(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # which also keeps the place from being used again
        return tensor

    episode = GraphRetrieval(nodes=6, hops=2, queries=3, windows=windows)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = run_episode(model, episode.sample(3, torch.Generator().manual_seed(0)), N, recompute=recompute)
    assert logits.requires_grad
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


@pytest.mark.parametrize("carry", CARRIES)
def test_recomputing_keeps_what_enters_a_pass_and_nothing_more(carry, make_model):
    model = make_model("agag", carry, vocabulary=13)
    length = {windows: GraphRetrieval(nodes=6, hops=2, queries=3, windows=windows).window for windows in (1, 2)}
    S = 2 * 3 * 2 * 8 * 8  # two layers of (b, heads, d_v, d_k)
    more = kept_for_gradient(model, 5, 1, True) - kept_for_gradient(model, 4, 1, True)
    assert (
        more <= S + {"inject": 6, "gate": 2}.get(carry, 1) * 3 * length[1] * 16
    )  # an S and an h (b, l, w), or what is mixed
    assert kept_for_gradient(model, 8, 3, True) < kept_for_gradient(model, 1, 3, False)
    assert kept_for_gradient(model, 5, 1, False) - kept_for_gradient(model, 4, 1, False) > 10 * more


@pytest.mark.parametrize("N", [0, -1, True, 1.5, "2", None], ids=repr)
def test_passes_must_be_a_whole_number_of_at_least_one(N, make_model):
    model = make_model("ag")
    for call in (
        lambda: run_episode(model, EPISODE, N),
        lambda: sleep(model, EPISODE.windows[:, 0], passes=N),
        lambda: Session(model, window=4, passes=N),
    ):
        with pytest.raises(ValueError, match=rf"passes \(N\) must be (at least 1|a whole number), got {N!r}"):
            call()


@pytest.mark.parametrize("carry", CARRIES)
def test_trace_changes_no_result_and_leaves_no_hook(carry, make_model):
    model, trace = make_model("agag", carry), SleepTrace()
    assert torch.equal(run_episode(model, EPISODE, 3, trace), run_episode(model, EPISODE, 3))
    assert not any(module._forward_hooks for module in model.modules())


def test_trace_of_a_recomputed_episode_records_every_pass_once(make_model):
    model, traces = make_model("agag", "inject"), [SleepTrace(), SleepTrace()]
    for trace, recompute in zip(traces, (False, True), strict=True):
        run_episode(model, EPISODE, 3, trace, recompute).sum().backward()
    plain, recomputed = traces
    for window in range(2):
        assert len(recomputed.h[window]) == 3 and len(recomputed.S[window]) == 4
        assert all(map(torch.equal, recomputed.h[window], plain.h[window]))
        for S, T in zip(recomputed.S[window], plain.S[window], strict=True):
            assert all(map(torch.equal, S, T))


def test_trace_leaves_no_hook_after_an_error(make_model):
    model = make_model("agag")
    with pytest.raises(ValueError, match="S must have shape"):
        sleep(model, EPISODE.windows[:, 0], model.empty_fast_weights(2), 2, SleepTrace())
    assert not any(module._forward_hooks for module in model.modules())


def test_trace_records_every_pass_of_every_window(make_model):
    model, trace = make_model("aga"), SleepTrace()
    run_episode(model, EPISODE, 3, trace)
    S = {1: torch.zeros(3, 2, 8, 8)}
    assert len(trace.S) == len(trace.h) == 2
    for window in range(2):
        h = model.embedding(EPISODE.windows[:, window])
        changes = []
        torch.testing.assert_close(trace.S[window][0][0], S[1])
        for n in range(3):
            before, layers = S[1], []
            for block in model.layers:
                h, after = block(h, S[1])
                S = S if after is None else {1: after}
                layers.append(h)
            assert_close(trace.S[window][n + 1][0], S[1])
            assert_close(trace.h[window][n], torch.stack(layers))
            lengths = S[1].flatten(1).norm(dim=1)
            changes.append(((S[1] - before).flatten(1).norm(dim=1) / lengths).mean())
        assert_close(trace.changes(window), torch.stack(changes)[:, None])
    assert trace.changes().shape == (3, 1) and torch.equal(trace.changes(), trace.changes(1))
    assert not any(x.requires_grad for x in (*trace.S[0][1], *trace.h[0]))


def test_a_model_without_fast_weights_leaves_none_to_measure(make_model):
    trace = SleepTrace()
    run_episode(make_model("aa"), EPISODE, 2, trace)
    for measure in (trace.stack, trace.changes):
        with pytest.raises(ValueError, match="there is no S in this trace: trace a model that has 'g' in its layout"):
            measure()


def test_a_transformer_that_keeps_its_cache_reads_windows_and_prompt_as_one_text(make_model):
    model = make_model("AA")
    draw = torch.Generator().manual_seed(0)
    windows, prompt = torch.randint(11, (2, 3, 5), generator=draw), torch.randint(11, (2, 4), generator=draw)
    episode = Episode(windows, prompt, targets=prompt, depth=torch.ones_like(prompt))
    logits = run_episode(model, episode, passes=1)
    whole, _ = model(torch.cat((windows.flatten(1), prompt), dim=1))
    torch.testing.assert_close(logits, whole[:, -4:])
    changed = Episode(windows.roll(1, 0), prompt, targets=prompt, depth=torch.ones_like(prompt))
    assert (run_episode(model, changed, passes=1) - logits).abs().max() > 1e-3, "it does not see the windows"


def test_a_transformer_that_keeps_its_cache_does_not_sleep(make_model):
    model, tokens = make_model("AA"), torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="cannot sleep: use run_episode"):
        sleep(model, tokens)
    with pytest.raises(ValueError, match="cannot sleep"):
        Session(model, window=8, passes=1)
    with pytest.raises(ValueError, match="passes must be 1, got 2"):
        run_episode(model, Episode(tokens[None], tokens, tokens, tokens), passes=2)


def test_a_prompt_has_to_ask_something(make_model):
    session = Session(make_model("ag"), window=4, passes=1)
    with pytest.raises(ValueError, match="a prompt must have 1 to 4 tokens, to fit the window, got 0"):
        session.answer(torch.zeros(1, 0, dtype=torch.long))


# Sleeping until S has settled


@pytest.mark.parametrize("carry", CARRIES)
def test_every_sequence_wakes_when_its_own_S_has_settled(carry, make_model):
    model, tokens = make_model("agag", carry), TASK.sample(40, torch.Generator().manual_seed(1)).windows[:, 0]
    before = sleep(model, tokens.flip(0))  # of an earlier window
    trace = SleepTrace()
    sleep(model, tokens, before, 6, trace)
    S = trace.stack().flatten(3)  # (passes + 1, layers, b, ...)
    changes = ((S[1:] - S[:-1]).norm(dim=-1) / S[1:].norm(dim=-1)).amax(dim=1)  # (passes, b)
    tolerance = changes[1:].median().item()
    settled = changes[1:] <= tolerance
    wanted = torch.where(settled.any(dim=0), 2 + settled.int().argmax(dim=0), 6)
    found, taken = sleep_until_settled(model, tokens, before, passes=6, tolerance=tolerance)
    assert torch.equal(taken, wanted) and len(taken.unique()) > 1
    for layer, matrix in enumerate(found):
        assert_close(matrix, torch.stack([trace.S[0][n][layer][i] for i, n in enumerate(wanted)]))


def test_a_sleep_that_never_settles_takes_all_its_passes_and_one_that_settles_at_once_takes_two(make_model):
    model, tokens = make_model("ag"), EPISODE.windows[:, 0]
    for passes, tolerance, wanted in ((5, 1e-9, 5), (5, 1e9, 2), (1, 1e9, 1)):
        (found,), taken = sleep_until_settled(model, tokens, passes=passes, tolerance=tolerance)
        assert taken.tolist() == [wanted] * 3
        assert_close(found, sleep(model, tokens, passes=wanted)[0])


def test_a_session_sleeps_until_settled_on_every_window(make_model):
    model = make_model("ag", "inject")
    first, second = EPISODE.windows.unbind(1)
    trace = SleepTrace()
    sleep(model, first, passes=4, trace=trace)
    tolerance = trace.changes()[1:].median().item()
    S, taken = sleep_until_settled(model, first, passes=4, tolerance=tolerance)
    session = Session(model, window=4, passes=4, batch=3, tolerance=tolerance)
    for piece in first.split((1, 3), dim=1):
        session.read(piece)
    assert torch.equal(session.passes_taken, taken)
    assert_close(session.S[0], S[0])
    S, taken = sleep_until_settled(model, second, S, passes=4, tolerance=tolerance)
    session.read(second)
    assert torch.equal(session.passes_taken, taken)
    assert_close(session.S[0], S[0])
    fixed = Session(model, window=4, passes=4, batch=3)
    assert fixed.passes_taken.tolist() == [0] * 3
    fixed.read(first)
    assert fixed.passes_taken.tolist() == [4] * 3


@pytest.mark.parametrize(
    "layout, settings, message",
    [
        ("ag", {"passes": 0}, r"passes \(N\) .* got 0"),
        ("ag", {"tolerance": 0.0}, "tolerance must be above 0, got 0.0"),
        ("ag", {"tolerance": float("nan")}, "tolerance must be a finite number, got nan"),
        ("aa", {}, "layout 'aa' has no fast weights that could settle"),
        ("AA", {}, "layout 'AA' keeps its cache and cannot sleep"),
    ],
)
def test_what_cannot_settle_is_refused(layout, settings, message, make_model):
    model = make_model(layout)
    with pytest.raises(ValueError, match=message):
        sleep_until_settled(model, EPISODE.windows[:, 0], **settings)
    with pytest.raises(ValueError, match=message):
        Session(model, window=4, batch=3, **{"passes": 2, "tolerance": 0.1} | settings)
