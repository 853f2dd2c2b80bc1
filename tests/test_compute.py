"""The account of compute against what torch counts in a training step."""

from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel

from sleepedu.lab.benchmark import count_operations
from sleepedu.lab.compute import example_operations, training_operations
from sleepedu.lab.recipes import Experiment
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import run_episode
from sleepedu.tasks import GraphRetrieval
from sleepedu.tasks.random_streams import TRAINING, stream
from sleepedu.training import TrainConfig, score

RING = GraphRetrieval(nodes=8, hops=4, queries=8)
LAYOUTS = [
    {"layout": "ag", "passes": 4},
    {"layout": "ag", "passes": 1},
    {"layout": "agag", "passes": 3, "carry": "inject", "width": 32, "heads": 2},
    {"layout": "gaga", "passes": 2, "carry": "embed", "task": GraphRetrieval(nodes=72, windows=2)},
    {"layout": "ag", "passes": 3, "rule": "gated"},
    {"layout": "aga", "passes": 1, "key_size": 8, "value_size": 32},
    {"layout": "aaa", "passes": 1},
    {"layout": "ag", "passes": 3, "eviction": "sliding", "task": GraphRetrieval(nodes=72, windows=3)},
    {"layout": "AAA", "passes": 1},
]


@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_the_account_is_what_torch_counts_in_a_training_step(case):
    """Torch's FlopCounterMode watches a real step: whatever no gradient reaches is not counted there."""
    settings = dict(case)
    passes, task = settings.pop("passes"), settings.pop("task", RING)
    config = replace(Experiment("graph").model_config, vocabulary=len(task.words), **settings)
    model, episode = SleepLM(config), task.sample(2, stream(0, TRAINING, 0))
    with sdpa_kernel(SDPBackend.MATH):  # a fused kernel computes the scores again on the way back
        counted = count_operations(lambda: score(run_episode(model, episode, passes), episode)[0].backward())
    assert 2 * example_operations(config, task, passes) == pytest.approx(counted, rel=0.01)


def test_a_varied_n_costs_the_mean_of_its_range_and_a_run_its_steps():
    config, training = Experiment("graph").model_config, TrainConfig(passes=(1, 3), steps=10, batch=4)
    each = [training_operations(config, RING, replace(training, passes=n)) for n in (1, 2, 3)]
    assert training_operations(config, RING, training) == pytest.approx(sum(each) / 3)
    assert training_operations(config, RING, replace(training, steps=20, batch=8)) == pytest.approx(4 * sum(each) / 3)
