"""The tasks, by the names they have on the command line."""

from sleepedu.tasks.base import UNSCORED, Episode, Task
from sleepedu.tasks.cellular_automaton import CellularAutomaton
from sleepedu.tasks.graph_retrieval import GraphRetrieval
from sleepedu.tasks.math_reasoning import MathReasoning

TASKS: dict[str, type[Task]] = {"graph": GraphRetrieval, "rule110": CellularAutomaton, "math": MathReasoning}

__all__ = ["TASKS", "UNSCORED", "CellularAutomaton", "Episode", "GraphRetrieval", "MathReasoning", "Task"]
