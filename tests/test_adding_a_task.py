"""The task in CONTRIBUTING.md is complete: it samples, is right, trains, is measured, and resumes."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from sleepedu import ModelConfig, SleepLM, TrainConfig, accuracy_by_depth, train
from sleepedu.tasks.batches import majority_loss

CONTRIBUTING = Path(__file__).resolve().parent.parent / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def parity():
    (example,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING.read_text(), flags=re.DOTALL)
    module = types.ModuleType("contributed")  # dataclasses looks its module up
    sys.modules["contributed"] = module
    exec(compile(example, "CONTRIBUTING.md", "exec"), module.__dict__)
    return module.Parity


def test_its_answers_are_what_counting_finds(parity):
    task = parity(bits=5)
    for depth in (None, *task.depths):
        episode = task.sample(50, torch.Generator().manual_seed(0), depth)
        assert episode.windows.shape[1:] == (task.windows, task.window)
        for i in range(50):
            read, asked = re.fullmatch(r"window 1: (.*)\nprompt:   (.*)", task.text(episode, i)).groups()
            k, answer = re.fullmatch(r"\?(\d) \[(\d)\]", asked).groups()
            assert int(answer) == read.split()[: int(k)].count("1") % 2
            assert depth in (None, int(k)) and int(episode.depth[i, 0]) == int(k)
    with pytest.raises(ValueError, match="the parity task has no depth 6"):
        task.sample(1, torch.Generator(), 6)
    with pytest.raises(ValueError, match="bits must be at least 1, got 0"):
        parity(bits=0)


def test_it_trains_and_is_measured(parity):
    task = parity(bits=2)
    torch.manual_seed(0)
    model = SleepLM(ModelConfig(len(task.words), "ag", 16, 2))
    history = train(model, task, TrainConfig(passes=2, steps=60, batch=32, warmup=5))
    assert history.loss[-1] < majority_loss(task) < history.loss[0]
    table = accuracy_by_depth(model, task, passes=2, examples=200)
    assert list(table) == [1, 2] and table[1].low > table[1].majority
