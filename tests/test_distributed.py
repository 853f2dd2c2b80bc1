"""Training on several devices: the curve of one, one writer, and an end for all ranks when one of them fails."""

import contextlib
import copy
import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from sleepedu import checkpoint, training
from sleepedu.checkpoint import Checkpoint
from sleepedu.lab import experiments, run_store
from sleepedu.tasks import GraphRetrieval
from sleepedu.tasks.base import UNSCORED
from sleepedu.training import TrainConfig, train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch has no Gloo here"
)
CONFIG = TrainConfig(passes=2, steps=4, batch=4, warmup=3)
SMOKE = ["train", "graph", "--size", "smoke", "--steps", "4", "--examples", "20", "--device", "cpu", "--no-compile"]


class Interrupted(Exception):
    pass


@dataclass(frozen=True)
class Questions(GraphRetrieval):
    """Graph retrieval that scores the first scored[i] questions of row i alone. Of two ranks one has the even rows."""

    nodes: int = 4
    hops: int = 2
    queries: int = 3
    scored: tuple[int, ...] = (3, 3, 3, 3)

    lasts = CONFIG.steps  # not a setting: an interrupted run is the same run

    def sample(self, batch, generator, depth=None):
        if generator.initial_seed() == self.lasts:  # which is the step, at seed 0
            raise Interrupted
        episode = super().sample(batch, generator, depth)
        scored = torch.tensor(self.scored).repeat(batch // len(self.scored))[:, None]
        late = torch.arange(self.prompt_length) >= 2 * scored
        return replace(episode, targets=episode.targets.masked_fill(late, UNSCORED))


@dataclass(frozen=True)
class Interrupting(Questions):
    lasts = 2


def train_all(runs, folder=None):
    """Train every (model, task, config); return histories, weights, gradients of step 1 and the steps watched."""
    done = []
    clock = itertools.count(0, 30)  # half a minute between any two looks, so that every entry is checkpointed
    for model, task, config in runs:
        model = copy.deepcopy(model)  # what is sent to two processes lies in memory that they share
        gradients, watched = [], []

        def clip(parameters, *arguments, clip=torch.nn.utils.clip_grad_norm_, gradients=gradients):
            parameters = list(parameters)
            gradients.append([None if p.grad is None else p.grad.clone() for p in parameters])
            return clip(parameters, *arguments)

        def watch(history, config, watched=watched):
            watched.append(history.step[-1])

        # No rank sees the other's folder, as if they were on two machines.
        own = folder and Checkpoint(folder / f"rank{os.environ.get('RANK', 0)}")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
            for module in (checkpoint, training):
                patch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
            history = None
            with contextlib.suppress(Interrupted):
                history = train(model, task, config, watch, own)
        done.append(
            SimpleNamespace(history=history, weights=model.state_dict(), gradients=gradients[0], watched=watched)
        )
    return done


def assert_same_weights(weights, others):
    for name, x in weights.items():
        assert torch.equal(x, others[name]), name


def as_rank(rank, function, arguments, folder):
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(function(*arguments), folder / f"returned{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture
def on_two_ranks(tmp_path):
    """Call a function of this module in two processes that train together; return what it returned in each."""

    def call(function, *arguments):
        torch.multiprocessing.spawn(as_rank, (function, arguments, tmp_path), nprocs=2)
        return [torch.load(tmp_path / f"returned{rank}.pt", weights_only=False) for rank in (0, 1)]

    return call


def test_two_ranks_have_the_gradients_and_the_curve_of_one(make_model, on_two_ranks):
    runs = [
        (make_model("agag"), Questions(), CONFIG),
        (make_model("g", "inject"), Questions(), CONFIG),
        (make_model("ag", "inject"), Questions(), replace(CONFIG, passes=1)),  # a single pass injects nothing
        (make_model("ag", "inject"), Questions(), replace(CONFIG, passes=(1, 3))),  # injects in some steps
        (make_model(), Questions(scored=(1, 3, 2, 3)), CONFIG),
        (make_model(), Questions(scored=(0, 3, 0, 1)), CONFIG),  # the first rank has nothing to learn from
        (make_model(), Questions(), replace(CONFIG, precision="float16")),
    ]
    ones = train_all(runs)
    firsts, seconds = on_two_ranks(train_all, runs)
    for one, first, second in zip(ones, firsts, seconds, strict=True):
        if one is not ones[-1]:  # the last computes in float16
            torch.testing.assert_close(first.gradients, one.gradients, rtol=1e-4, atol=1e-6)
        assert first.history.loss == pytest.approx(one.history.loss, abs=1e-3)
        assert first.history.accuracy == one.history.accuracy
        assert first.history.tokens_per_step == one.history.tokens_per_step
        assert second.history.loss == first.history.loss and second.history.accuracy == first.history.accuracy
        assert_same_weights(second.weights, first.weights)
        assert first.watched == one.watched == [1, 2, 3, 4] and second.watched == []
    assert ones[2].gradients[-1] is None
    assert torch.equal(firsts[2].weights["inject.weight"], runs[2][0].inject.weight), "not even decayed"


def interrupted_and_resumed(first, second, of_two, of_one):
    (stopped,) = train_all([(first, Interrupting(), CONFIG)], of_two)
    (resumed,) = train_all([(second, Questions(), CONFIG)], of_two)
    (whole,) = train_all([(first, Questions(), CONFIG)])
    (joined,) = train_all([(second, Questions(), CONFIG)], of_one)
    return stopped, resumed, whole, joined


def test_only_the_first_rank_writes_and_every_rank_resumes_from_it(make_model, on_two_ranks, tmp_path):
    model, of_two, of_one = make_model(), tmp_path / "of_two", tmp_path / "of_one"
    train_all([(model, Interrupting(), CONFIG)], of_one)
    returned = on_two_ranks(interrupted_and_resumed, model, make_model(seed=1), of_two, of_one)
    for stopped, resumed, whole, joined in returned:
        assert stopped.history is None
        assert resumed.history.step == joined.history.step == [1, 2, 3, 4]
        assert resumed.history.loss == whole.history.loss and resumed.history.accuracy == whole.history.accuracy
        assert_same_weights(resumed.weights, whole.weights)
        assert joined.history.loss == pytest.approx(whole.history.loss, abs=1e-3)
    assert [(resumed.watched, joined.watched) for _, resumed, _, joined in returned] == [([3, 4], [3, 4]), ([], [])]
    for folder in (of_two, of_one):
        assert [str(file.relative_to(folder)) for file in folder.rglob("*.*")] == [f"rank0/{Checkpoint.FILE}"]
        assert not (folder / "rank1").exists()


def test_a_batch_that_does_not_divide_among_the_ranks_is_refused(make_model, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "rank_and_ranks", lambda: (0, 3))
    with pytest.raises(ValueError, match="a batch of 4 does not divide into equal shares for 3 ranks"):
        train(make_model(), Questions(), CONFIG, checkpoint=Checkpoint(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_too_few_cuda_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    settings = {"TORCHELASTIC_RUN_ID": "a", "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    with (
        pytest.raises(ValueError, match="every rank needs a CUDA device: this machine has 1 for 2"),
        experiments.ranks_together(torch.device("cuda"), batch=4),
    ):
        pass


# As a program


def torchrun(ranks, *program):
    """Start a program on so many ranks with torchrun and wait for its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *program]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def assert_fails(done, message):
    """Assert that the program failed on every rank, and that one of them said why in one line."""
    said = [line for line in done.stdout.splitlines() if not line.startswith("[Gloo]")]  # so older versions greet peers
    assert done.returncode != 0 and said == []
    assert [line for line in done.stderr.splitlines() if line.startswith("sleepedu: ")] == [f"sleepedu: {message}"]
    assert "exitcode  : 2" in done.stderr
    assert done.stderr.count("Traceback") == 1, "torchrun's own, and none of a rank"


def test_torchrun_trains_and_stores_one_run(tmp_path):
    done = torchrun(2, "-m", "sleepedu", *SMOKE, "--passes", 2, "--runs", tmp_path / "two")
    assert done.returncode == 0 and done.stderr == ""
    assert "| 4/4 " in done.stdout and done.stdout.count("hops k") == 1
    (two,) = run_store.stored_runs(tmp_path / "two")
    one = experiments.run(two.experiment, "cpu", tmp_path / "one", examples=20)
    assert sorted(file.name for file in two.path.iterdir()) == ["run.json", "weights.pt"]
    assert (one.provenance["ranks"], two.provenance["ranks"]) == (1, 2)
    assert two.history.loss == pytest.approx(one.history.loss, abs=1e-3)
    assert two.settings == one.settings and two.provenance["tokens"] == one.provenance["tokens"]
    assert two.load_model().config == one.load_model().config


def test_wrong_input_is_told_once(tmp_path):
    done = torchrun(3, "-m", "sleepedu", *SMOKE, "--runs", tmp_path)
    assert_fails(done, "a batch of 64 does not divide into equal shares for 3 ranks")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_one_rank_ends_them_all(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "from sleepedu.tasks import batches\n"
        "from sleepedu.__main__ import main\n"
        "def stream(seed, purpose, number, stream=batches.stream):\n"
        "    if os.environ['RANK'] == '1' and number == 2:\n"
        "        raise OSError('the disk of rank 1 is gone')\n"
        "    return stream(seed, purpose, number)\n"
        "batches.stream = stream\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    done = torchrun(2, program, *SMOKE, "--quiet", "--runs", tmp_path)
    assert_fails(done, "the disk of rank 1 is gone")
