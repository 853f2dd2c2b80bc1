"""sleepedu: language models that sleep.

The names most uses need; everything else is in the modules, from the ground up: fast_weights, tasks, layers, model,
sleep, training, evaluation, experiments, figures, explore.
"""

from sleepedu.evaluation import accuracy_by_depth
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.sleep_loop import Session, SleepTrace, run_episode, sleep, sleep_until_settled, wake
from sleepedu.tasks import CellularAutomaton, Episode, GraphRetrieval, MathReasoning, Task
from sleepedu.training import TrainConfig, print_progress, train

__all__ = [
    "CellularAutomaton",
    "Episode",
    "GraphRetrieval",
    "MathReasoning",
    "ModelConfig",
    "Session",
    "SleepLM",
    "SleepTrace",
    "Task",
    "TrainConfig",
    "accuracy_by_depth",
    "print_progress",
    "run_episode",
    "sleep",
    "sleep_until_settled",
    "train",
    "wake",
]
