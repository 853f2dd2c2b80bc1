"""sleepedu: language models that sleep.

The names most uses need. The method is in fast_weights, layers, model, sleep_loop and training; beside it stand
session, trace and evaluation, and the tasks; ``fast`` is what is only fast, ``lab`` has the experiments and the store
of their runs, ``pictures`` the figures and sliders.
"""

from sleepedu._version import __version__
from sleepedu.checkpoint import Checkpoint
from sleepedu.evaluation import accuracy_by_depth, accuracy_by_pass
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.progress import ProgressBar
from sleepedu.session import Session
from sleepedu.settling import sleep_until_settled
from sleepedu.sleep_loop import run_episode, sleep, wake
from sleepedu.tasks import CellularAutomaton, Episode, GraphRetrieval, MathReasoning, Task
from sleepedu.trace import SleepTrace
from sleepedu.training import TrainConfig, train

__all__ = [
    "CellularAutomaton",
    "Checkpoint",
    "Episode",
    "GraphRetrieval",
    "MathReasoning",
    "ModelConfig",
    "ProgressBar",
    "Session",
    "SleepLM",
    "SleepTrace",
    "Task",
    "TrainConfig",
    "__version__",
    "accuracy_by_depth",
    "accuracy_by_pass",
    "run_episode",
    "sleep",
    "sleep_until_settled",
    "train",
    "wake",
]
