"""The pictures: figures, drawn episodes, the explorer with its sliders, the live model of the first page."""

from sleepedu.pictures.examples import draw_episode
from sleepedu.pictures.explorer import explore

__all__ = ["draw_episode", "explore"]
