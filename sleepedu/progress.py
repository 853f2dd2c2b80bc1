"""How far a long training is, in one line."""

import sys

from tqdm import tqdm

from sleepedu.training import History, TrainConfig


class ProgressBar:
    """A line that says how far training is: hand one to ``train`` as its ``watch``.

    It is rewritten in place; in a log or a page, where that cannot be, it stands there at every tenth of the run.
    """

    bar: tqdm | None = None

    def __call__(self, history: History, config: TrainConfig) -> None:
        if self.bar is None:
            name = "N=" + " to ".join(str(n) for n in sorted(set(config.range_of_passes)))
            done = history.step[-2] if len(history.step) > 1 else 0  # of a run that was resumed
            pace = {} if sys.stdout.isatty() else {"miniters": config.steps // 10, "mininterval": 0}
            self.bar = tqdm(desc=name, total=config.steps, initial=done, file=sys.stdout, **pace)
        loss = f"loss {history.loss[-1]:.3f} (best constant {history.majority_loss:.3f})"
        self.bar.set_postfix_str(f"{loss}, right {history.accuracy[-1]:.0%}", refresh=False)
        self.bar.update(history.step[-1] - self.bar.n)
        if history.step[-1] == config.steps:
            self.bar.close()
            self.bar = None
