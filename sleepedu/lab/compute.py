"""What training costs: the floating-point operations of a step and of a run, one account for every comparison.

Counted are matrix products, forwards and backwards, a multiplication and an addition apart; attention with its whole
square, and the rule in chunks, as a GPU runs it. What no gradient reaches has no backward: whatever comes after the
last write to S in a window's last pass. Left out are elementwise operations, products repeated to save memory, and the
optimisers. (Muon's own products are the same for every N: counted, they would leave the controls at N = 1 fewer steps.)
"""

from collections.abc import Iterator

from sleepedu.model import ModelConfig
from sleepedu.tasks.base import Task
from sleepedu.training import TrainConfig


def training_operations(config: ModelConfig, task: Task, training: TrainConfig) -> int:
    """Return the operations of a whole training; where N is drawn anew for every batch, those that are expected."""
    passes = sum(training.range_of_passes) / 2  # the operations grow linearly with N, so the mean N has the mean
    return round(training.steps * training.batch * example_operations(config, task, passes))


def example_operations(config: ModelConfig, task: Task, passes: float) -> float:
    """Return the operations of learning from an example: sleep on its windows, answer its prompt, and all backwards."""
    head = 6 * task.prompt_length * config.width * config.vocabulary
    read = task.prompt_length + config.keeps_cache * task.windows * task.window  # in the pass that answers
    kept = (config.eviction == "sliding") * (task.window - 1)  # tokens in the cache, when all but the first begin
    answered = head + sum(forward + backward for forward, backward, _ in _blocks(config, read, kept))
    if config.keeps_cache:
        return answered
    blocks = _blocks(config, task.window, kept * (1 - 1 / task.windows))
    forward, backward, written = (sum(found) for found in zip(*blocks, strict=True))
    inject = 12 * task.window * config.width**2 if config.carry == "inject" else 0
    heard = written if config.carry == "embed" else backward  # of a pass that another one follows
    return answered + task.windows * (passes * forward + (passes - 1) * (heard + inject) + written)


def _blocks(config: ModelConfig, length: int, kept: float) -> Iterator[tuple[float, float, float]]:
    """Yield each block's operations over a window: forwards, backwards from h and S, backwards from S alone.

    kept: tokens that attention finds in its cache, on average.
    """
    width, (heads, d_v, d_k) = config.width, config.state_shape
    chunk = length / -(-length // 64)  # the length of a chunk: the window in as few parts as it takes
    mlp = 6 * length * max(1, int(config.mlp_ratio * width)) * width
    last = config.layout.rfind("g")  # after the last S nothing hears from S
    for place, letter in enumerate(config.layout):
        if letter == "g":
            project = 2 * length * width * heads * (2 * d_k + 2 * d_v + 2)  # to q, k, v, output gate, a and b
            corrects = "delta" in config.rule  # and solves a triangular system, which costs 3 times as much backwards
            rule: float = length * heads * (4 * d_k * d_v + 2 * chunk * (d_k + d_v))
            rule += corrects * length * heads * (2 * d_k * d_v + chunk * (2 * d_k + d_v))
            written: float = 2 * project + length * heads * 4 * d_k * d_v
            written += corrects * length * heads * (4 * d_k * d_v + chunk * (4 * d_k + 3 * d_v))
            forward = project + rule + 2 * length * width * heads * d_v + mlp
            backward = 2 * forward + corrects * length * heads * chunk * d_v
        else:
            forward = 8 * length * width**2 + 4 * length * (kept + length) * width + mlp
            backward, written = 2 * forward, 0
        yield forward, backward, backward if place < last else written
