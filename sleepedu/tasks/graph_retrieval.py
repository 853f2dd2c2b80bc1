"""Graph retrieval: read a directed cycle as shuffled edges, then say which node stands k hops after another.

Every question can be about any node and any number of hops, so while it sleeps the model cannot know what will be
asked. After the multi-hop task of Allen-Zhu (Physics of Language Models 4.1), which the paper calls Depo.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sleepedu.tasks.base import UNSCORED, Episode, Task


@dataclass(frozen=True)
class GraphRetrieval(Task):
    """A cycle of ``nodes`` nodes as shuffled "from to" pairs over ``windows`` windows, then questions "k a" -> node.

    nodes: n, one token each. hops: the largest k asked; k is uniform in 1..hops. queries: questions an example.
    windows: how many windows the edges are spread over. shortest: in training the cycle's length is drawn from
    shortest..nodes with p(n) ~ 1 / (n + sqrt(nodes)), as in Depo, and shorter cycles are padded on the left; with a
    depth given, as in every test, all cycles have full length. 0 means full length always. Depth is k.
    Raises ValueError for a cycle below 3 nodes, hops outside 1..n-1, or edges that do not fill the windows evenly.
    """

    nodes: int = 12
    hops: int = 8
    queries: int = 12
    windows: int = 1
    shortest: int = 0

    name = "graph"
    scoring = "each"
    depth_name = "hops k"

    def __post_init__(self):
        if self.nodes < 3:
            raise ValueError(f"nodes must be at least 3, got {self.nodes}")
        if not 1 <= self.hops < self.nodes:
            raise ValueError(f"hops must lie in 1..{self.nodes - 1} on a cycle of {self.nodes} nodes, got {self.hops}")
        if self.queries < 1:
            raise ValueError(f"queries must be at least 1, got {self.queries}")
        if self.windows < 1 or self.nodes % self.windows:
            raise ValueError(f"{self.nodes} edges do not spread evenly over {self.windows} windows")
        if self.shortest and not 3 <= self.shortest <= self.nodes:
            raise ValueError(f"shortest must be 0 or lie in 3..{self.nodes}, got {self.shortest}")

    @property
    def words(self) -> tuple[str, ...]:
        """Node names first (their ids are 0..n-1), then one word for every number of hops, then padding."""
        names = tuple(_node_name(node) for node in range(self.nodes))
        return (*names, *(f"+{k}" for k in self.depths), "_")

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(range(1, self.hops + 1))

    @property
    def window(self) -> int:
        return 2 * self.nodes // self.windows

    @property
    def prompt_length(self) -> int:
        return 2 * self.queries

    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        self._check_sample(batch, depth)
        place = torch.arange(self.nodes)
        length = self._lengths(batch, generator, depth)[:, None]
        cycle = torch.rand(batch, self.nodes, generator=generator).argsort(dim=1)  # node at every place of the ring
        shuffled = torch.rand(batch, self.nodes, generator=generator)
        order = shuffled.masked_fill(place >= length, -1.0).argsort(dim=1)  # edges by place; what is no edge first
        edges = torch.stack((cycle.gather(1, order), cycle.gather(1, (order + 1) % length)), dim=-1)
        edges[order >= length] = len(self.words) - 1
        start = (torch.rand(batch, self.queries, generator=generator) * length).long()
        k = torch.randint(1, self.hops + 1, (batch, self.queries), generator=generator)
        if depth is not None:
            k = torch.full_like(k, depth)
        prompt = torch.stack((self.nodes + k - 1, cycle.gather(1, start)), dim=-1)
        answer = cycle.gather(1, (start + k) % length)
        return Episode(
            windows=edges.view(batch, self.windows, self.window),
            prompt=prompt.flatten(1),
            targets=torch.stack((torch.full_like(answer, UNSCORED), answer), dim=-1).flatten(1),
            depth=torch.stack((torch.zeros_like(k), k), dim=-1).flatten(1),
        )

    def _lengths(self, batch: int, generator: torch.Generator, depth: int | None) -> Tensor:
        if depth is not None or not self.shortest:
            return torch.full((batch,), self.nodes)
        choices = torch.arange(self.shortest, self.nodes + 1)
        weights = 1 / (choices + self.nodes**0.5)
        return choices[torch.multinomial(weights, batch, replacement=True, generator=generator)]

    def successors(self, episode: Episode) -> Tensor:
        """Return the node after every node, (b, nodes), read off the windows; -1 for a node that is not there."""
        edges = episode.windows.flatten(1).unflatten(1, (self.nodes, 2))
        following = torch.full((len(episode), len(self.words)), -1)
        return following.scatter_(1, edges[..., 0], edges[..., 1])[:, : self.nodes]

    def draw(self, episode: Episode, index: int = 0, answers: Tensor | None = None, query: int = 0):
        """Draw the ring of example ``index`` with the walk of one query, and the answer given where there is one."""
        from sleepedu import figures

        self.check(episode)
        following = self.successors(episode)[index].tolist()
        position = 2 * query + 1
        walk = [int(episode.prompt[index, position])]
        for _ in range(int(episode.depth[index, position])):
            walk.append(following[walk[-1]])
        answer = None if answers is None else int(answers[position])
        return figures.ring(following, self.words[: self.nodes], walk, answer)


def _node_name(node: int) -> str:
    letter = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[node % 26]
    return letter if node < 26 else f"{letter}{node // 26}"
