"""What a GPU does: the rule's kernels (under Triton's interpreter), precision, and the door's choice. Needs no GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sleepedu.fast.precision import PRECISIONS, choose_precision, tf32
from sleepedu.lab.recipes import Experiment
from sleepedu.tasks.batches import prefetched
from sleepedu.training import TrainConfig, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
def test_the_kernels_give_the_numbers_of_the_rule():
    program = [sys.executable, str(Path(__file__).with_name("gpu_kernels.py"))]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case, errors in json.loads(done.stdout).items():
        assert max(errors.values()) < 1e-5, (case, errors)  # a NaN would not be smaller


@pytest.mark.parametrize(
    "precision, has_both, chosen",
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float16"),
        ("tf32", True, "tf32"),
        ("float32", False, "float32"),
        ("float16", True, "float16"),
    ],
)
def test_a_gpu_computes_in_what_it_has(precision, has_both, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_both)
    assert choose_precision(precision, CUDA) == chosen


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_what_a_gpu_only_emulates_is_refused(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match=f"precision '{precision}' is not to be had on Tesla T4: use float16"):
        choose_precision(precision, CUDA)


def test_a_cpu_has_no_tf32(make_model):
    task = Experiment("graph", "smoke").make_task()
    with pytest.raises(ValueError, match="precision 'tf32' is a GPU's: on a cpu use float32 or bfloat16"):
        train(make_model(vocabulary=len(task.words)), task, TrainConfig(steps=1, precision="tf32"))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'half' is unknown: use one of " + ", ".join(PRECISIONS)):
        TrainConfig(precision="half")


@pytest.mark.parametrize("precision, allowed", [("float32", False), ("tf32", True), ("bfloat16", True)])
def test_torch_may_use_tf32_only_meanwhile_and_only_where_it_was_chosen(precision, allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), tf32(precision, CUDA):
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_batches_are_the_same_wherever_a_run_begins():
    task, config = Experiment("graph", "smoke").make_task(), TrainConfig(steps=6, batch=3, passes=(1, 4))
    whole = list(prefetched(task, config, 0, CPU))
    for step, (episode, passes) in enumerate(prefetched(task, config, 4, CPU), 4):
        assert torch.equal(episode.windows, whole[step][0].windows) and passes == whole[step][1]
    assert len(whole) == 6 and step == 5
