"""Sliding windows: what a sleep keeps of its window, what it evicts, and that nothing else gets past it."""

import pytest
import torch

from sleepedu import Episode, ModelConfig, Session, TrainConfig, run_episode, sleep, sleep_until_settled, train, wake
from sleepedu.lab import experiments
from sleepedu.lab.together import run_together
from sleepedu.layers import WindowCache
from sleepedu.tasks import GraphRetrieval

WINDOW = 5
TEXT = torch.randint(11, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(0))
PROMPT = torch.randint(11, (2, 4), generator=torch.Generator().manual_seed(1))
NOTHING = torch.full((2, 4), -100)
EPISODE = Episode(TEXT.view(2, 3, WINDOW), PROMPT, NOTHING, torch.zeros_like(NOTHING))


@pytest.fixture
def model(make_model):
    return make_model("agag", eviction="sliding").double()


def test_one_pass_is_the_ordinary_sliding_window_hybrid(model):
    """One forward over the whole text, in which every token sees itself and the L - 1 before it."""
    cache = model.empty_cache(WINDOW)
    h, _ = model.blocks(model.embed(torch.cat((TEXT, PROMPT), dim=1)), model.empty_fast_weights(2), cache)
    torch.testing.assert_close(run_episode(model, EPISODE, 1), model.out(h)[:, -4:])


def test_a_token_sees_itself_and_the_window_before_it():
    cache = WindowCache(keys=torch.zeros(1, 1, 2, 4), values=torch.zeros(1, 1, 2, 4), reach=3)
    assert cache.mask(3, "cpu").int().tolist() == [[1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1]]
    assert cache.mask(1, "cpu") is None
    assert WindowCache(reach=3).mask(3, "cpu") is None  # an ordinary first window: causal, without a mask
    assert WindowCache(reach=2).mask(3, "cpu").int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]


@pytest.mark.parametrize("changed", range(2 * WINDOW))
def test_what_a_sleep_evicts_gets_past_it_through_S_alone(changed, make_model):
    """With S held fixed, a changed token of two windows is felt if it is among the last L - 1, and not otherwise.

    In one attention block and one pass: with more of them a key tells of tokens that its own could see.
    """
    model, other = make_model("ag", eviction="sliding"), TEXT.clone()
    other[:, changed] = (other[:, changed] + 1) % 11

    def answer(text):
        S, cache = model.empty_fast_weights(2), model.empty_cache(WINDOW)
        for window in text[:, : 2 * WINDOW].split(WINDOW, dim=1):
            sleep(model, window, S, cache=cache)
        cache[1].tail = None  # what the convolution saw last, which belongs to S's side
        return wake(model, PROMPT, S, cache)

    with torch.no_grad():
        assert torch.equal(answer(TEXT), answer(other)) == (changed <= WINDOW)


@pytest.mark.parametrize("passes", [1, 3])
def test_a_session_streams_it(passes, model):
    whole = run_episode(model, EPISODE, passes)
    for sizes in ([15], [1] * 15, [4, 7, 4]):
        session = Session(model, WINDOW, passes, batch=2)
        for piece in TEXT.split(sizes, dim=1):
            session.read(piece)
        torch.testing.assert_close(session.answer(PROMPT), whole)
        assert session.sleeps == 3 and session.room == WINDOW


def test_gradients_are_the_same_computed_again(model):
    def gradients(**how):
        return torch.autograd.grad(run_episode(model, EPISODE, 3, **how).square().sum(), list(model.parameters()))

    for one, other in zip(gradients(), gradients(recompute=True), strict=True):
        torch.testing.assert_close(one, other)


def test_it_trains_compiled_as_it_does_plain(make_model):
    task = GraphRetrieval(nodes=6, hops=2, windows=2)
    config = TrainConfig(passes=2, steps=3, batch=4, warmup=0)
    settings = {"vocabulary": len(task.words), "width": 32, "eviction": "sliding"}  # narrower ones are not run in C++
    losses = [train(make_model("ag", **settings), task, config, compile=how).loss for how in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_goes_on_from_one_with_hard_eviction(tmp_path):
    """The paper's warm-up: hard eviction first, then windows that slide."""
    first = experiments.run(experiments.Experiment("graph", "smoke", steps=2), "cpu", tmp_path, examples=10)
    then = experiments.Experiment("graph", "smoke", steps=2, eviction="sliding", trained_from=first.name)
    assert then.name == "graph-smoke-sleep-N1-sliding-2steps-from-sleep-N1-2steps-seed0-seed0"
    run = experiments.run(then, "cpu", tmp_path, examples=10)
    assert run.load_model().config.eviction == "sliding" and run.settings["model"]["eviction"] == "sliding"
    assert "eviction" not in first.settings["model"]  # as in runs that were stored before there was a choice


def test_what_cannot_slide_is_refused(model, make_model, tmp_path):
    for settings in ({"positions": 4}, {"layout": "AA"}):
        with pytest.raises(ValueError, match="windows slide where positions are rotary and tokens are evicted"):
            ModelConfig(11, **settings, eviction="sliding")
    with pytest.raises(ValueError, match="eviction 'soft' is unknown: use one of hard, sliding"):
        ModelConfig(11, eviction="soft")
    with pytest.raises(ValueError, match="when S has settled needs hard eviction"):
        sleep_until_settled(model, TEXT)
    with pytest.raises(ValueError, match="when S has settled needs hard eviction"):
        Session(model, WINDOW, 2, tolerance=0.1)
    with pytest.raises(ValueError, match="sliding windows are for single runs"):
        run_together([experiments.Experiment("graph", "smoke", eviction="sliding")], "cpu", tmp_path)
