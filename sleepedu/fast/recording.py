"""A training step's forward and backward pass as one CUDA graph: recorded once for each N, then played.

A GPU finishes the small matrices of a short window sooner than Python can name the next operation. A graph names them
all at once. What it holds has fixed places in memory: the batch is copied there, the gradients are found there.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sleepedu.tasks.base import Episode

WARM_UPS = 3  # calls before the recording, in which compilers and libraries make what they need


class Recorded:
    """``function(episode, passes) -> tensors``, which leaves new gradients in ``parameters``, for a GPU.

    The results lie where those of the last call lay. All episodes must have the shapes of the first one.
    """

    def __init__(self, function: Callable[[Episode, int], tuple[Tensor, ...]], parameters: Iterable[nn.Parameter]):
        self.function, self.parameters = function, list(parameters)
        self.recordings: dict[int, tuple] = {}

    def __call__(self, episode: Episode, passes: int) -> tuple[Tensor, ...]:
        if passes not in self.recordings:
            self.recordings[passes] = self._record(episode, passes)
        replay, inputs, results, gradients = self.recordings[passes]
        for name, tensor in vars(inputs).items():
            tensor.copy_(getattr(episode, name))
        replay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        return results

    def _record(self, episode: Episode, passes: int) -> tuple:
        inputs = Episode(**{name: tensor.clone() for name, tensor in vars(episode).items()})
        results: list[Tensor] = []

        def function() -> None:
            results[:] = self.function(inputs, passes)

        replay = recorded(function)
        return replay, inputs, tuple(results), [parameter.grad for parameter in self.parameters]


def recorded(function: Callable[[], object]) -> Callable[[], None]:
    """Record what a function gives a GPU to do, and return what does it again, with the same places in memory."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on as they like: one of them brings the next batches into pinned memory.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()
    return graph.replay
