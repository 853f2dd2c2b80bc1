"""The small pretrained hybrid that comes with the library: what it says of itself is so, and it sleeps."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'sleepedu[pretrained]'")

from make_small_hybrid import PROBLEM, TASK, InSight

from sleepedu import run_episode
from sleepedu.evaluation import accuracy_by_depth
from sleepedu.intervals import Accuracy, differing
from sleepedu.pretrained import TextReasoning, load
from sleepedu.pretrained.loading import SMALL_FOLDER


@pytest.fixture(scope="module")
def model():
    return load("small-hybrid")


def test_it_knows_what_is_stored_of_it(model):
    stored = json.loads((SMALL_FOLDER / "training.json").read_text())
    assert stored["task"] == TASK
    table = accuracy_by_depth(model, InSight("small-hybrid", **TASK), passes=1, examples=200, seed=7)
    before = {int(depth): Accuracy(**found) for depth, found in stored["table"].items()}
    assert not differing(table, before, comparisons=len(table))


def test_it_is_small_and_sleeps(model):
    assert sum(file.stat().st_size for file in SMALL_FOLDER.iterdir()) < 3e6
    task = TextReasoning("small-hybrid", **TASK)
    episode = task.sample(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = run_episode(model, episode, passes=4)
    assert logits.shape == (2, 30, model.config.vocabulary) and logits.isfinite().all()


def test_its_text_in_sight_is_the_text_with_the_questions_behind_it():
    apart, beside = TextReasoning("small-hybrid", **TASK), InSight("small-hybrid", **TASK)
    there, here = (task.sample(3, torch.Generator().manual_seed(0)) for task in (apart, beside))
    assert torch.equal(here.prompt, torch.cat((there.windows[:, 0], there.prompt), dim=1))
    assert torch.equal(here.targets[:, 80:], there.targets) and not here.depth[:, :80].any()
    assert here.windows.numel() == 0 and set(PROBLEM) < set(TASK)
