"""How far a long training is, in one line."""

import sys

from tqdm import tqdm

from sleepedu.training import History, TrainConfig


class ProgressBar:
    """A line that says how far training is: hand one to ``train`` as its ``watch``.

    In a terminal it is rewritten in place; where that is not possible, in a log or a page, a line stands for every
    tenth of the run.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, history: History, config: TrainConfig) -> None:
        step = history.step[-1]
        if self._bar is None:
            fewest, most = config.range_of_passes
            self._bar = tqdm(
                desc=f"N={fewest}" if fewest == most else f"N={fewest} to {most}",
                total=config.steps,
                initial=history.step[-2] if len(history.step) > 1 else 0,  # of a run that was resumed
                file=sys.stdout,
                miniters=0 if sys.stdout.isatty() else config.steps // 10,
                mininterval=0.1 if sys.stdout.isatty() else 0,
            )
        loss = f"loss {history.loss[-1]:.3f} (best constant {history.majority_loss:.3f})"
        self._bar.set_postfix_str(f"{loss}, right {history.accuracy[-1]:.0%}", refresh=False)
        self._bar.update(step - self._bar.n)
        if step == config.steps:
            self._bar.close()
            self._bar = None
