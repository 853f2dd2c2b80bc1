"""What ``on_a_gpu.py`` says of a GPU, on one that is pretended, which refuses and counts as a GPU does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
# What is pretended are torch's own hooks for CUDA, as they are in 2.13; a torch built for CUDA has taken their place.
USABLE = torch.version.cuda is None and tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
pytestmark = [
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX") or "g++"), reason="no C++ compiler here: install g++"),
    pytest.mark.skipif(not USABLE, reason="a GPU is pretended with torch for CPUs alone, from 2.13 on"),
]


def python(*arguments):
    """Run Python in a process of its own, to which torch is new."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_public_call_gives_on_a_gpu_the_numbers_of_the_cpu():
    shown = python("-m", "pytest", "-p", "pretended_gpu", "-p", "no:cacheprovider", HERE / "on_a_gpu.py")
    assert " passed" in shown and "skipped" not in shown


def test_a_step_launches_no_more_kernels_than_is_stored_and_never_waits():
    stored = json.loads((HERE.parent / "book/runs/benchmark/launches.json").read_text())
    for row, now in zip(stored, json.loads(python(HERE / "gpu_step.py")), strict=True):  # three faults are found, too
        for precision in ("float32", "bfloat16"):
            assert now[precision] <= 1.02 * row[precision], (now, row)  # another version of torch may count otherwise


def test_a_pretended_gpu_refuses_and_counts():
    python(
        "-c",
        """
from pretended_gpu import pretended_gpu
import torch

def refused(function, message):
    try:
        function()
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)

with pretended_gpu() as counts:
    x, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.is_cuda and (2 * x).device == torch.device("cuda", 0)
    refused(lambda: x + here, "to be on the same device, but add found cuda:0 (3,), cpu (3,)")
    refused(lambda: here[x.long()], "indices should be on the same device")
    refused(lambda: torch.rand(3, device="cuda", generator=torch.Generator()), "but found 'cpu'")
    counts.clear()
    y = (x + x).view(3, 1).mT + torch.tensor(1.0)  # one number may come along
    assert counts.launches == {"add": 2} and not counts.waits and not counts.copies
    assert y.tolist() == [[3.0] * 3] and y.sum().item() == 9
    z = here.to("cuda")[x > 0]
    assert sum(counts.waits.values()) == 3 and sum(counts.copies.values()) == 1
    w = x.clone().requires_grad_()
    (w.square() * z).sum().backward()
    assert w.grad.is_cuda and w.grad.cpu().tolist() == [2.0] * 3
""",
    )
