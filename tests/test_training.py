"""Training: the same data for every N, the same numbers twice, and a resumed run that is the uninterrupted one."""

import errno
import itertools
import os
import platform
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sleepedu import checkpoint, fast, training
from sleepedu.checkpoint import Checkpoint
from sleepedu.fast import compiling, cpp
from sleepedu.fast.compiling import can_compile
from sleepedu.fast.muon import Muon, orthogonal
from sleepedu.lab import experiments
from sleepedu.model import SleepLM
from sleepedu.progress import ProgressBar
from sleepedu.sleep_loop import run_episode
from sleepedu.tasks import CellularAutomaton, GraphRetrieval
from sleepedu.tasks.batches import majority_loss
from sleepedu.tasks.random_streams import TESTING, TRAINING, stream
from sleepedu.training import TrainConfig, make_optimizers, score, train

TASK = GraphRetrieval(nodes=4, hops=2, queries=3)
CONFIG = TrainConfig(passes=2, steps=12, batch=4, warmup=3)


class Interrupted(Exception):
    pass


def interrupt_at(step):
    def watch(history, config):
        if history.step[-1] == step:
            raise Interrupted

    return watch


def recording(seen):
    """A task like TASK that keeps every batch it draws for training in the list ``seen``."""

    @dataclass(frozen=True)
    class Recording(GraphRetrieval):
        def sample(self, batch, generator, depth=None):
            episode = super().sample(batch, generator, depth)
            if batch == CONFIG.batch:
                seen.append(episode)
            return episode

    return Recording(nodes=4, hops=2, queries=3)


@pytest.fixture
def saves_at_every_entry(monkeypatch):
    """Half a minute passes between any two looks at the clock, so that every history entry is checkpointed."""
    clock = itertools.count(0, 30)
    for module in (checkpoint, training):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))


def assert_same_weights(model, other):
    for (name, x), y in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(x, y), name


def test_every_N_and_model_sees_the_same_data_in_the_same_order(make_model):
    orders = []
    for passes, layout in ((1, "ag"), (2, "ag"), (3, "g"), ((1, 3), "ag")):
        seen = []
        train(make_model(layout), recording(seen), replace(CONFIG, passes=passes, steps=5))
        orders.append(torch.stack([torch.cat((e.windows[:, 0], e.prompt, e.targets), dim=1) for e in seen]))
    assert len(orders[0]) == 5
    assert all(torch.equal(orders[0], other) for other in orders)
    assert not torch.equal(orders[0][0], orders[0][1])


def test_N_is_drawn_anew_for_every_batch(make_model, monkeypatch):
    drawn = []

    def counting(model, episode, passes, **how):
        drawn.append(passes)
        return run_episode(model, episode, passes, **how)

    monkeypatch.setattr(training, "run_episode", counting)
    config = replace(CONFIG, passes=(2, 4), steps=60)
    for seed in (0, 0, 1):
        train(make_model("g"), TASK, replace(config, seed=seed))
    first, again, other = drawn[:60], drawn[60:120], drawn[120:]
    assert first == again != other
    assert all(10 < first.count(n) < 30 for n in (2, 3, 4)), "each as likely"


def test_N_drawn_from_a_single_value_is_that_N(make_model):
    fixed, drawn = make_model(), make_model()
    train(fixed, TASK, CONFIG)
    train(drawn, TASK, replace(CONFIG, passes=(2, 2)))
    assert_same_weights(drawn, fixed)


def test_another_seed_sees_other_data(make_model):
    seen = []
    for seed in (0, 1):
        train(make_model(), recording(seen), replace(CONFIG, steps=1, seed=seed))
    assert not torch.equal(seen[0].windows, seen[1].windows)


def test_streams_of_training_and_testing_never_meet():
    numbers = [0, 1, 2, 999, 1000, 9_997, 10_000, 45_589, 1_000_000, 1_010_000, 10**10]  # deep tasks have large ones
    keys = list(itertools.product([0, 1, 2, 3, 2146, 2147, 2**32 - 1], (TRAINING, TESTING), numbers))
    drawn = {tuple(torch.randint(2**40, (4,), generator=stream(*key)).tolist()) for key in keys}
    assert len(drawn) == len(keys)


def test_two_runs_of_one_seed_are_the_same_bit_for_bit(make_model):
    first, second = make_model("agag"), make_model("agag")
    histories = [train(model, TASK, CONFIG) for model in (first, second)]
    assert_same_weights(first, second)
    assert histories[0].loss == histories[1].loss and histories[0].accuracy == histories[1].accuracy
    assert not torch.equal(first.head.weight, make_model("agag").head.weight)


@pytest.mark.parametrize("carry, passes", [("hidden", 2), ("inject", 2), ("inject", (1, 3))])
def test_a_resumed_run_is_the_uninterrupted_one(carry, passes, make_model, tmp_path, saves_at_every_entry):
    whole, first, second = make_model("ag", carry), make_model("ag", carry), make_model("ag", carry, seed=1)
    config = replace(CONFIG, passes=passes)
    history = train(whole, TASK, config)
    with pytest.raises(Interrupted):
        train(first, TASK, config, interrupt_at(7), Checkpoint(tmp_path))
    seen = []
    resumed = train(second, recording(seen), config, checkpoint=Checkpoint(tmp_path))
    assert len(seen) == 6, "the steps after the last checkpoint, and no others"
    assert_same_weights(second, whole)
    assert resumed.step == history.step == list(range(1, 13))
    assert resumed.loss == history.loss and resumed.accuracy == history.accuracy
    assert resumed.tokens_per_step == history.tokens_per_step and resumed.majority_loss == history.majority_loss
    assert resumed.seconds == sorted(resumed.seconds)


def test_a_run_that_was_interrupted_twice_goes_on(make_model, tmp_path, saves_at_every_entry):
    whole, model = make_model(), make_model()
    train(whole, TASK, CONFIG)
    for step in (4, 9):
        with pytest.raises(Interrupted):
            train(model, TASK, CONFIG, interrupt_at(step), Checkpoint(tmp_path))
    train(model, TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
    assert_same_weights(model, whole)


def test_without_20_seconds_no_checkpoint_is_written(make_model, tmp_path):
    train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def interrupted(make_model, tmp_path, saves_at_every_entry):
    with pytest.raises(Interrupted):
        train(make_model(), TASK, CONFIG, interrupt_at(5), Checkpoint(tmp_path))
    return tmp_path / Checkpoint.FILE


def test_a_checkpoint_of_other_settings_is_refused(interrupted, make_model):
    for model, task, config in (
        (make_model(), TASK, replace(CONFIG, learning_rate=0.02)),
        (make_model(), TASK, replace(CONFIG, seed=1)),
        (make_model(carry="embed"), TASK, CONFIG),
        (make_model(), replace(TASK, queries=2), CONFIG),
    ):
        with pytest.raises(ValueError, match=f"{interrupted} cannot be used .* other settings"):
            train(model, task, config, checkpoint=Checkpoint(interrupted.parent))


@pytest.mark.parametrize("value", [torch.zeros(2), {1, 2}, Path("words.txt"), b"words"], ids=lambda v: type(v).__name__)
def test_a_task_whose_settings_cannot_be_stored_is_refused_by_name(value, make_model, tmp_path):
    @dataclass(frozen=True)
    class Odd(GraphRetrieval):
        extra: object = None

    odd = Odd(nodes=4, hops=2, queries=3, extra=value)
    with pytest.raises(ValueError, match=f"extra of the task is a {type(value).__name__}, which cannot be stored"):
        train(make_model(), odd, CONFIG, checkpoint=Checkpoint(tmp_path))
    assert train(make_model(), odd, replace(CONFIG, steps=1)).step == [1], "without a checkpoint nothing is stored"


def test_a_task_with_settings_that_are_no_fields_is_refused(make_model, tmp_path):
    class Flipped(GraphRetrieval):
        def __init__(self, flip):
            super().__init__(nodes=4, hops=2, queries=3)
            object.__setattr__(self, "flip", flip)

    with pytest.raises(ValueError, match=r"the settings of Flipped are not known: make it a @dataclass"):
        train(make_model(), Flipped(True), CONFIG, checkpoint=Checkpoint(tmp_path))


def test_what_torch_compile_returns_is_trained_as_the_model_in_it(make_model):
    plain, wrapped = make_model(), make_model()
    train(plain, TASK, replace(CONFIG, steps=2))
    train(torch.compile(wrapped), TASK, replace(CONFIG, steps=2))
    assert_same_weights(wrapped, plain)


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(keep, interrupted, make_model):
    whole = interrupted.read_bytes()
    interrupted.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else keep])
    with pytest.raises(ValueError, match=f"{interrupted} cannot be used"):
        train(make_model(), TASK, CONFIG, checkpoint=Checkpoint(interrupted.parent))


def test_a_checkpoint_is_replaced_as_a_whole(interrupted, make_model, monkeypatch):
    before, whole = interrupted.read_bytes(), make_model()
    history = train(whole, TASK, CONFIG)

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    model = make_model()
    message = f"{interrupted} could not be written .No space left on device.; what stood there stays; training goes on"
    with pytest.warns(UserWarning, match=message):
        resumed = train(model, TASK, CONFIG, checkpoint=Checkpoint(interrupted.parent))
    assert interrupted.read_bytes() == before and list(interrupted.parent.iterdir()) == [interrupted]
    assert_same_weights(model, whole)
    assert resumed.loss == history.loss, "nothing that was computed is lost"


def test_a_loss_that_is_no_number_stops_the_run(make_model):
    model = make_model()
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(
        FloatingPointError, match="the loss is nan and the norm of its gradient nan by step 1: lower learning_rate"
    ):
        train(model, TASK, CONFIG)


def test_a_vocabulary_that_is_too_small_is_refused(make_model):
    with pytest.raises(ValueError, match="the task has 7 words, the model a vocabulary of 6"):
        train(make_model(vocabulary=6), TASK, CONFIG)


def test_a_task_that_asks_nothing_or_is_scored_in_no_known_way_is_refused(make_model):
    class Silent(GraphRetrieval):
        def sample(self, batch, generator, depth=None):
            episode = super().sample(batch, generator, depth)
            return replace(episode, targets=torch.full_like(episode.targets, -100))

    class Odd(GraphRetrieval):
        scoring = "some"

    for kind, message in (
        (Silent, "the graph task asks nothing: all its targets are -100"),
        (Odd, "the graph task's scoring 'some' is unknown: use one of each, all"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_model(), kind(nodes=4, hops=2, queries=3), CONFIG)


def test_rate_warms_up_stays_and_decays_to_nothing():
    config = TrainConfig(steps=20, warmup=4, decay=0.25)
    rates = [config.rate(step) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:16] == [1.0] * 12
    assert rates[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])
    assert [TrainConfig(steps=5, warmup=0, decay=0).rate(step) for step in range(5)] == [1.0] * 5


def test_the_rate_reaches_both_optimizers(make_model, monkeypatch):
    rates = []
    for kind in (Muon, torch.optim.AdamW):
        step = kind.step

        def spy(self, *arguments, step=step, **named):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *arguments, **named)

        monkeypatch.setattr(kind, "step", spy)
    train(make_model(), TASK, TrainConfig(steps=4, batch=2, warmup=2, decay=0.5))
    shares = [0.5, 1.0, 1.0, 0.5]
    assert rates == pytest.approx([x for share in shares for x in (0.01 * share, 0.002 * share)])


@pytest.mark.parametrize("carry", ["hidden", "inject", "gate"])
def test_muon_gets_the_hidden_matrices_and_nothing_else(carry, make_model):
    model = make_model("ag", carry, positions=4)
    muon, adam = make_optimizers(model, CONFIG)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_muon, by_adam = (sorted(names[id(p)] for g in o.param_groups for p in g["params"]) for o in (muon, adam))
    blocks = [f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("mixer.project", "mixer.out")]
    blocks += [f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("mlp.project", "mlp.out")]
    assert by_muon == sorted(blocks + ["inject.weight"] * (carry == "inject"))
    assert sorted(by_muon + by_adam) == sorted(names.values())
    assert (muon.param_groups[0]["lr"], adam.param_groups[0]["lr"]) == (0.01, 0.002)


@pytest.mark.parametrize("shape", [(24, 8), (8, 24), (8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_muon_moves_as_torchs_own_does_up_to_bfloat16(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.ones(shape, dtype=dtype, requires_grad=True) for _ in range(2))
    optimizers = Muon([ours], lr=0.1, weight_decay=0.1), torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape, generator=generator).to(dtype)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - 1).norm()
    assert ours.dtype == dtype and moved > 0.5
    assert (ours - theirs).norm() < (0.05 if dtype == torch.bfloat16 else 0.02) * moved


def test_matrices_become_orthogonal_one_by_one_and_together():
    settings = Muon([torch.zeros(2, 2)]).defaults
    matrices = torch.randn(3, 6, 20, generator=torch.Generator().manual_seed(0))
    found = orthogonal(matrices, settings)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.6 and values.max() < 1.3
    for matrix, its in zip(matrices, found, strict=True):
        torch.testing.assert_close(orthogonal(matrix[None], settings)[0], its)
    torch.testing.assert_close(orthogonal(matrices.mT, settings), found.mT)
    assert orthogonal(torch.zeros(1, 2, 3), settings).count_nonzero() == 0


def test_score_counts_what_is_asked_and_nothing_else():
    episode = TASK.sample(5, torch.Generator().manual_seed(0))
    logits = torch.randn(5, TASK.prompt_length, 7, generator=torch.Generator().manual_seed(0))
    losses, right = [], []
    for i in range(5):
        for position in range(1, TASK.prompt_length, 2):
            target = int(episode.targets[i, position])
            losses.append(-logits[i, position].log_softmax(0)[target])
            right.append(float(logits[i, position].argmax() == target))
    loss, accuracy = score(logits, episode)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert accuracy.item() == pytest.approx(sum(right) / len(right))


def test_majority_loss_is_the_entropy_of_the_answers():
    assert majority_loss(TASK) == pytest.approx(1.3863, abs=0.002)  # ln 4
    paper = CellularAutomaton(rows=4, cells=24, steps=(32,), ask="first")
    assert majority_loss(paper) == pytest.approx(0.685, abs=0.003)  # of a coin that shows 1 in 56.3%
    assert paper.tokens_per_example == 100


def test_the_loss_of_a_constant_reads_about_a_million_tokens_at_most():
    drawn = []

    class Long(GraphRetrieval):
        def sample(self, batch, generator, depth=None):
            drawn.append(batch)
            return super().sample(batch, generator, depth)

    assert majority_loss(Long(nodes=2000, hops=2, queries=2000)) > 0
    assert drawn == [1 + 2**20 // (2 * 2000 + 2 * 2000)]


def test_history_says_where_the_run_stands(make_model, capsys):
    history = train(make_model(), TASK, CONFIG, watch=ProgressBar())
    assert history.step == list(range(1, 13))
    assert history.tokens_per_step == CONFIG.batch * (8 + 6)
    assert all(0 <= share <= 1 for share in history.accuracy)
    shown = capsys.readouterr().out
    assert shown.endswith("\n") and "12/12" in shown and "N=2:" in shown
    train(make_model(), TASK, replace(CONFIG, passes=(1, 2)), watch=ProgressBar())
    assert "N=1 to 2:" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains(precision, make_model):
    history = train(make_model(), TASK, replace(CONFIG, steps=2, precision=precision))
    assert len(history.loss) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_of_another_precision_trains(dtype, make_model):
    model = make_model().to(dtype)
    history = train(model, TASK, replace(CONFIG, steps=100, batch=16))
    assert history.loss[-1] < history.majority_loss < history.loss[0]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize("precision", ["auto", "bfloat16", "float16"])
def test_gradients_that_are_too_large_for_float16_are_skipped_by_both_optimizers(precision, make_model):
    model = make_model()
    with torch.no_grad():
        model.head.weight.mul_(100)
    easy = replace(TASK, hops=1)
    config = TrainConfig(steps=300, batch=16, warmup=5, adam_learning_rate=0.1, precision=precision)
    history = train(model, easy, config)
    assert sum(history.loss[-10:]) / 10 < history.majority_loss < history.loss[0] / 10
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"passes": 0},
        {"steps": 0},
        {"batch": -1},
        {"learning_rate": 0},
        {"learning_rate": float("nan")},
        {"adam_learning_rate": -0.1},
        {"clip": 0},
        {"warmup": -1},
        {"weight_decay": -0.5},
        {"decay": 1.5},
        {"precision": "int8"},
    ],
    ids=str,
)
def test_wrong_training_settings_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name}.*got.*{value}|{name} '{value}'"):
        TrainConfig(**settings)


@pytest.mark.parametrize("passes", [(3, 2), (0, 2), (1, 2.5), (1,), (1, 2, 3), (), [1, 8]], ids=str)
def test_a_wrong_range_of_passes_is_named(passes):
    with pytest.raises(ValueError, match=r"passes .*got (0|2\.5|\(.*\)|\[1, 8\])$"):
        TrainConfig(passes=passes)


def test_the_smoke_run_of_graph_retrieval_learns():
    experiment = experiments.Experiment("graph", "smoke")
    torch.manual_seed(0)
    history = train(
        SleepLM(experiment.model_config), experiment.make_task(), replace(experiment.train_config, steps=100)
    )
    assert history.loss[0] > history.majority_loss
    assert history.loss[-1] < history.majority_loss - 0.05


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="there is no C++ compiler here")
@pytest.mark.parametrize("rule", ["gated_delta", "hebbian"])  # in C++ and in chunks; the others are these with a gate
def test_compiled_training_gives_the_same_losses(rule, make_model):
    config = replace(CONFIG, steps=3)  # what was rounding grows from step to step
    plain, compiled = (make_model("g", rule=rule, width=32) for _ in range(2))  # the least that is run in C++
    compiled.load_state_dict(plain.state_dict())
    losses = train(plain, TASK, config).loss
    assert train(compiled, TASK, config, compile=True).loss == pytest.approx(losses, abs=1e-4)
    assert "blocks" not in vars(compiled), "after training the model runs its own blocks again"


@pytest.mark.parametrize("compiler", ["none", "false"])
def test_without_a_compiler_that_works_training_says_so_once_and_goes_on(compiler, make_model, monkeypatch, capfd):
    monkeypatch.setenv("CXX", "/usr/bin/false" if compiler == "false" else "")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(fast, "_cpp", None)
    cpp.compiled_code.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no compiler here that works") as told:
            history = train(make_model("g"), TASK, replace(CONFIG, steps=2), compile=True)
    finally:
        cpp.compiled_code.cache_clear()
    assert len(history.loss) == 2 and len(told) == 1 and capfd.readouterr() == ("", "")


def test_a_gpu_needs_a_compiler_that_works_as_well_as_triton(monkeypatch):
    found = {"triton": object()}
    monkeypatch.setattr(compiling.importlib.util, "find_spec", found.get)
    monkeypatch.setattr(compiling, "compiled_code", lambda: object())
    assert can_compile(torch.device("cuda")) == can_compile(torch.device("cpu"))
    monkeypatch.setattr(compiling, "compiled_code", lambda: None)
    assert not can_compile(torch.device("cuda"))
    found.clear()
    assert not can_compile(torch.device("cuda"))


def test_recomputed_training_gives_the_same_losses(make_model):
    config = replace(CONFIG, steps=3)
    plain, frugal = make_model("ag"), make_model("ag")
    frugal.load_state_dict(plain.state_dict())
    losses = train(plain, TASK, config).loss
    assert train(frugal, TASK, config, recompute=True).loss == pytest.approx(losses, abs=1e-4)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library is asked for this")
def test_memory_that_a_step_frees_is_there_for_the_next():
    # In a process of its own, as what is set lasts until the end of one. Without, most builds fetch all pages anew.
    script = """
import resource, torch
from sleepedu.fast.compiling import keep_freed_memory
keep_freed_memory()
for step in range(20):
    if step == 5:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**20) for _ in range(8)]  # 4 MiB, or 1,024 pages, each
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1024, "15 steps of 8,192 pages"
