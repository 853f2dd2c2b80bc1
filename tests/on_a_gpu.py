"""Public calls, all but those for pretrained models, give on "cuda" the CPU's numbers; the GPU may be a pretended one.

``python -m pytest tests/on_a_gpu.py`` where there is a GPU; ``test_cuda_pretended.py`` runs it elsewhere.
"""

import io
import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sleepedu import checkpoint, training
from sleepedu.checkpoint import Checkpoint
from sleepedu.evaluation import accuracy_by_depth
from sleepedu.fast_weights import delta, gated, gated_delta, gated_delta_chunked, hebbian
from sleepedu.lab import benchmark, experiments
from sleepedu.lab.probes import Settings, probe_model
from sleepedu.model import CARRIES
from sleepedu.pictures import draw_episode
from sleepedu.session import Session
from sleepedu.settling import sleep_until_settled
from sleepedu.sleep_loop import run_episode, sleep, wake
from sleepedu.tasks import CellularAutomaton, GraphRetrieval, MathReasoning
from sleepedu.trace import SleepTrace
from sleepedu.training import TrainConfig, score, train

TASK = GraphRetrieval(nodes=4, hops=2, queries=3, windows=2)
EPISODE = TASK.sample(3, torch.Generator().manual_seed(0))
EASY = GraphRetrieval(nodes=3, hops=1, queries=3)  # learned within 20 steps
CONFIG = TrainConfig(passes=1, steps=20, batch=16, warmup=2, adam_learning_rate=0.05, precision="float32")


@pytest.fixture(autouse=True)
def gpu():
    """What is counted on the pretended GPU; None on a real one."""
    if "pretended_gpu" in sys.modules:
        with sys.modules["pretended_gpu"].pretended_gpu() as counts:
            yield counts
    elif torch.cuda.is_available():
        yield None
    else:
        pytest.skip("there is no GPU: test_cuda_pretended.py pretends one")


def assert_close(found, wanted, tolerance=1e-4):
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), wanted, rtol=tolerance, atol=tolerance)


def on_both(make, *arguments, **settings):
    return make(*arguments, **settings), make(*arguments, **settings).to("cuda")


@pytest.mark.parametrize(
    "layout, carry",
    [*(("agag", carry) for carry in CARRIES), *((layout, "hidden") for layout in ("a", "g", "gga", "AA"))],
)
def test_an_episode_and_its_gradients(layout, carry, make_model):
    passes = 1 if layout == "AA" else 3
    positions = 0 if layout == "AA" else 6
    found = []
    for model in on_both(make_model, layout, carry, positions=positions):
        episode = EPISODE.to(model.head.weight.device)
        logits = run_episode(model, episode, passes, recompute=layout == "agag")
        score(logits, episode)[0].backward()
        found.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (wanted, gradients), (logits, same) = found
    assert_close(logits, wanted)
    assert gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert_close(same[name], gradient)


@pytest.mark.parametrize("rule", [hebbian, gated, delta, gated_delta, gated_delta_chunked], ids=lambda r: r.__name__)
def test_a_rule_and_its_gradients(rule):
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 70, 8, generator=draw)
    log_a, b = torch.rand(2, 2, 2, 70, generator=draw)
    inputs = (q, torch.nn.functional.normalize(k, dim=-1), v, -log_a, b, torch.randn(2, 2, 8, 8, generator=draw))
    found = []
    for device in ("cpu", "cuda"):
        given = [x.to(device).requires_grad_() for x in inputs]
        o, S = rule(*given)
        wanted = torch.autograd.grad(o.sum() + S.sum(), given, materialize_grads=True)
        found.append((o, S, *wanted))
    for there, here in zip(found[1], found[0], strict=True):
        assert_close(there, here, 2e-4)


def test_a_sleep_its_trace_and_a_waking(make_model):
    found = []
    for model in on_both(make_model, "aggag", "inject"):
        episode, trace = EPISODE.to(model.head.weight.device), SleepTrace()
        S = sleep(model, episode.windows[:, 0], passes=3, trace=trace)
        measures = (trace.stack(), trace.changes(by_head=True))
        found.append([*S, wake(model, episode.prompt, S), *measures, *trace.h[0]])
    for there, here in zip(found[1], found[0], strict=True):
        assert_close(there, here)


def test_a_sleep_that_ends_by_itself(make_model):
    here, there = on_both(make_model, "agag", "inject")
    trace = SleepTrace()
    sleep(here, EPISODE.windows[:, 0], passes=5, trace=trace)
    tolerance = trace.changes()[1:].median().item()
    S, taken = sleep_until_settled(here, EPISODE.windows[:, 0], passes=5, tolerance=tolerance)
    S_there, taken_there = sleep_until_settled(there, EPISODE.windows[:, 0].to("cuda"), passes=5, tolerance=tolerance)
    assert_close(taken_there, taken)
    for matrix, same in zip(S, S_there, strict=True):
        assert_close(same, matrix)


@pytest.mark.parametrize("tolerance", [None, 0.3])
def test_a_session(tolerance, make_model):
    found = []
    for model in on_both(make_model, "agag", "inject"):
        device = model.head.weight.device
        session = Session(model, window=6, passes=3, batch=3, tolerance=tolerance)
        logits = [session.read(piece.to(device)) for piece in EPISODE.windows.flatten(1).split([1, 3, 4], dim=1)]
        logits.append(session.answer(EPISODE.prompt.to(device)))
        for piece in EPISODE.prompt.to(device).split(1, dim=1):
            session.read(piece, logits=False)
        session.sleep()
        found.append([*logits, session.passes_taken, *session.S])
        assert session.held_bytes > 0
    for there, here in zip(found[1], found[0], strict=True):
        assert_close(there, here)


@pytest.mark.parametrize(
    "task",
    [TASK, GraphRetrieval(5, 2, 2, name_tokens=2), CellularAutomaton(6, steps=(1, 2)), MathReasoning(4, 2)],
    ids=str,
)
def test_accuracy_by_depth(task, make_model):
    here, there = on_both(make_model, "ag", vocabulary=len(task.words))
    assert accuracy_by_depth(there, task, 2, examples=30, batch=20) == accuracy_by_depth(here, task, 2, 30, batch=20)


@pytest.mark.parametrize("task", [GraphRetrieval(5, 3, 5), CellularAutomaton(7, steps=(1, 3))], ids=str)
def test_probes(task, make_model):
    here, there = on_both(make_model, "agg", vocabulary=len(task.words))
    settings = Settings(passes=2 if isinstance(task, GraphRetrieval) else 1, episodes=200)
    wanted, found = probe_model(here, task, settings), probe_model(there, task, settings)
    assert found["steps"] == wanted["steps"] and found["examples"] == wanted["examples"]
    for reader, rows in wanted["each"].items():
        for row, same in zip(rows, found["each"][reader], strict=True):
            assert same == pytest.approx(row, abs=0.05), reader  # an answer or two may be a tie


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_in_every_precision(precision, make_model):
    config = replace(CONFIG, precision=precision)
    here, there = on_both(make_model)
    wanted, found = train(here, EASY, config), train(there, EASY, config)
    assert found.loss[0] == pytest.approx(wanted.loss[0], rel=1e-4 if precision == "float32" else 2e-2)
    assert found.loss[-1] < found.majority_loss < found.loss[0]
    assert all(p.device.type == "cuda" and p.isfinite().all() for p in there.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_training_a_model_of_another_precision(dtype, make_model):
    model = make_model().to("cuda", dtype)
    history = train(model, EASY, CONFIG)
    assert history.loss[-1] < history.majority_loss < history.loss[0]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_gradients_that_are_too_large_for_float16(make_model):
    model = make_model().to("cuda")
    with torch.no_grad():
        model.head.weight.mul_(100)
    history = train(model, EASY, replace(CONFIG, steps=40, precision="float16"))
    assert history.loss[-1] < history.majority_loss < history.loss[0] / 10


@pytest.mark.parametrize("precision, passes", [("float32", 2), ("float16", (1, 3))])
def test_a_resumed_run_is_the_uninterrupted_one(precision, passes, make_model, tmp_path, monkeypatch):
    clock = itertools.count(0, 30)  # between two looks at it a checkpoint is due
    for module in (checkpoint, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))

    def interrupt(history, config):
        if history.step[-1] == 5:
            raise InterruptedError

    config = replace(CONFIG, steps=7, batch=4, precision=precision, passes=passes)
    whole, first, second = (make_model("ag", "inject", seed=seed).to("cuda") for seed in (0, 0, 1))
    history = train(whole, EASY, config)
    with pytest.raises(InterruptedError):
        train(first, EASY, config, interrupt, Checkpoint(tmp_path))
    resumed = train(second, EASY, config, checkpoint=Checkpoint(tmp_path))
    assert resumed.step == list(range(1, 8)) and resumed.loss == pytest.approx(history.loss, rel=1e-3)
    for parameter, same in zip(whole.parameters(), second.parameters(), strict=True):
        assert_close(same, parameter.cpu(), 1e-3)


def test_an_example_is_drawn_wherever_it_is():
    for task in (TASK, CellularAutomaton(6, steps=(1, 2)), MathReasoning(4, 2)):
        here = task.sample(1, torch.Generator().manual_seed(0))
        episode = here.to("cuda")
        assert task.text(episode) == task.text(here)
        drawn = []
        for each in (here, episode):
            figure = draw_episode(task, each, answers=each.targets[0].clamp(min=0))
            figure.savefig(pixels := io.BytesIO(), format="rgba")
            drawn.append(pixels.getvalue())
        assert drawn[0] == drawn[1]


def test_a_stored_run(tiny_experiment, tmp_path):
    run = experiments.run(tiny_experiment, "cuda", tmp_path, examples=20)
    assert run.provenance["device"] == "cuda" and run.provenance["kernel"] and run.provenance["processor"]
    model = run.load_model("cuda")
    assert model.head.weight.device.type == "cuda"
    task = run.make_task()
    again = accuracy_by_depth(model, task, run.experiment.passes, 20, run.experiment.seed)
    assert again == run.table
    assert experiments.reproduce(run)[1]


def test_what_does_not_fit_is_refused_before_the_first_step(tiny_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1e6))
    with pytest.raises(ValueError, match=r"graph-smoke-.* takes .* GB of memory, there is room for 0\.0"):
        experiments.run(tiny_experiment, "cuda", tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_benchmark(monkeypatch):
    def once(functions, device, *rest, **named):
        for function in functions.values():
            function()
        return {name: {"ms": 1.0, "low": 1.0, "high": 1.0, "rounds": 1} for name in functions}

    for name, small in (
        *(("alternately", once), ("RULE_SHAPES", {"cuda": ((1, 2, 5, 16),)}), ("PASSES", (1, 2)), ("WINDOWS", (8,))),
        *(
            ("READ_BEFORE", (100,)),
            ("SQUARE", {"cuda": 64}),
            ("RECIPES", [("graph", "smoke")]),
            ("can_compile", lambda device: False),
        ),
    ):
        monkeypatch.setattr(benchmark, name, small)
    if "pretended_gpu" in sys.modules:  # it cannot record what it is given to do
        monkeypatch.setattr(benchmark, "recorded", lambda function: function)
        monkeypatch.setattr(benchmark, "STEPS_ON_A_GPU", [("graph", "smoke")])
    for measure in benchmark.PARTS.values():
        assert list(measure(torch.device("cuda")))
