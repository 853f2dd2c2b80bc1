"""The pictures: figures, drawn episodes, tables, the explorer with its sliders."""

from sleepedu.pictures.examples import draw_episode
from sleepedu.pictures.explorer import explore
from sleepedu.pictures.tables import show_table

__all__ = ["draw_episode", "explore", "show_table"]
