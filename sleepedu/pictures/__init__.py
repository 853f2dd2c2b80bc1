"""The pictures: figures, drawn episodes, the explorer with its sliders, the live model of the first page."""
