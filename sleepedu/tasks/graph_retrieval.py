"""Graph retrieval: read a directed cycle as shuffled edges, then say which node stands k hops after another.

Every question can be about any node and any number of hops, so while it sleeps the model cannot know what will be
asked. After the multi-hop task of Allen-Zhu (Physics of Language Models 4.1), which the paper calls Depo.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sleepedu import checks
from sleepedu.tasks.base import UNSCORED, Episode, Task

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ENDERS = 25  # tokens that end a name, alone or after one of as many that begin it: ids 0..24, and 25..49
NAMES = ENDERS + ENDERS**2  # how many names of one or two tokens there are


@dataclass(frozen=True)
class GraphRetrieval(Task):
    """A cycle of ``nodes`` nodes as shuffled "from to" pairs over ``windows`` windows, then questions "k a" -> node.

    nodes: n. hops: the largest k asked; k is uniform in 1..hops, and the depth. queries: questions an example. windows:
    how many the edges are cut into, wherever the cuts fall. shortest: where no depth is given, as in training, lengths
    are drawn from shortest..nodes with p(n) ~ 1 / (n + sqrt(nodes)), as in Depo, and shorter cycles padded on the left;
    0 means full length always. tested: the k that ``depths`` tells; () means 1..hops. name_tokens: 1 for nodes that are
    tokens, 2 for Depo's names of one or two out of 50, drawn anew for every example: 25 of them end a name (the paper
    does not say how one tells), alone for half of the nodes, at most 25. A question then is "k a1 a2 ? b1 b2", with
    padding after a name of one; "?" asks for b1, and b1 for b2; no two of them then start from the same node
    while there are others. Raises ValueError for a cycle below 3 nodes or above the number of names, hops outside
    1..n-1, edges that do not fill the windows evenly, or other settings outside these.
    """

    nodes: int = 12
    hops: int = 8
    queries: int = 12
    windows: int = 1
    shortest: int = 0
    tested: tuple[int, ...] = ()
    name_tokens: int = 1

    name = "graph"
    scoring = "each"
    depth_name = "hops k"

    def __post_init__(self):
        checks.whole("name_tokens", self.name_tokens, least=1, most=2)
        checks.whole("nodes", self.nodes, least=3, most=checks.MOST if self.name_tokens == 1 else NAMES)
        checks.whole(f"hops on a cycle of {self.nodes} nodes", self.hops, least=1, most=self.nodes - 1)
        for name in ("queries", "windows"):
            checks.whole(name, getattr(self, name), least=1)
        checks.whole("shortest", self.shortest, least=0)
        checks.different("tested", self.tested)
        if self._tokens % self.windows:
            raise ValueError(f"{self._tokens} tokens of edges do not spread evenly over {self.windows} windows")
        if self.shortest and not 3 <= self.shortest <= self.nodes:
            raise ValueError(f"shortest must be 0 or lie in 3..{self.nodes}, got {self.shortest}")
        if max(self.tested, default=1) > self.hops:
            raise ValueError(f"tested must be numbers of hops in 1..{self.hops}, got {self.tested}")

    @property
    def words(self) -> tuple[str, ...]:
        """What names are made of first, then one word for every number of hops, "?" with two tokens, and padding."""
        hops = tuple(f"+{k}" for k in range(1, self.hops + 1))
        if self.name_tokens == 1:
            return (*self.names, *hops, "_")
        return (*LETTERS[:ENDERS], *LETTERS[:ENDERS].lower(), *hops, "?", "_")

    @property
    def names(self) -> tuple[str, ...]:
        """All names a node can have, of one token each, then (with name_tokens 2) by their first and second token."""
        if self.name_tokens == 1:
            return tuple(f"{LETTERS[node % 26]}{node // 26 or ''}" for node in range(self.nodes))
        enders = LETTERS[:ENDERS]
        return (*enders, *(beginner + ender for beginner in enders.lower() for ender in enders))

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(self.tested or range(1, self.hops + 1))

    @property
    def answer_tokens(self) -> int:
        return self.name_tokens

    @property
    def window(self) -> int:
        return self._tokens // self.windows

    @property
    def floor(self) -> float | None:
        """Any node but the one asked about, as no walk of fewer hops than nodes ends where it began."""
        return 1 / (self.nodes - 1) if self.name_tokens == 1 else None

    @property
    def prompt_length(self) -> int:
        return self.queries * (2 if self.name_tokens == 1 else 6)

    @property
    def _tokens(self) -> int:
        """The most tokens the edges can take."""
        return 2 * self.nodes * self.name_tokens

    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        self._check_sample(batch, depth)
        padding, row, place = len(self.words) - 1, torch.arange(batch)[:, None], torch.arange(self.nodes)
        length = self._lengths(batch, generator, depth)[:, None]
        cycle = self._draw_cycle(length, generator)
        shuffled = torch.rand(batch, self.nodes, generator=generator)
        order = shuffled.masked_fill(place >= length, -1.0).argsort(dim=1)  # edges by place; what is no edge first
        edges = torch.cat((cycle[row, order], cycle[row, (order + 1) % length]), dim=-1)
        edges[order >= length] = padding
        if self.name_tokens == 1:
            start = (torch.rand(batch, self.queries, generator=generator) * length).long()
        else:
            # The prompt holds the answers, so a node that was asked about before would be one to copy.
            starts = torch.rand(batch, self.nodes, generator=generator).masked_fill(place >= length, 1.0).argsort(dim=1)
            start = starts.gather(1, torch.arange(self.queries) % length)
        k = torch.randint(1, self.hops + 1, (batch, self.queries), generator=generator)
        if depth is not None:
            k = torch.full_like(k, depth)
        answer = cycle[row, (start + k) % length]
        asked = [(self.words.index("+1") + k - 1)[..., None], cycle[row, start]]
        if self.name_tokens == 2:
            asked += [torch.full((batch, self.queries, 1), padding - 1), answer]
        prompt = torch.cat(asked, dim=-1)
        targets, depths = torch.full_like(prompt, UNSCORED), torch.zeros_like(prompt)
        scored = slice(1, 2) if self.name_tokens == 1 else slice(3, 5)
        targets[..., scored], depths[..., scored] = answer, k[..., None]
        text = edges.flatten(1)
        text = text.gather(1, (text != padding).argsort(dim=1, stable=True))  # all padding to the left
        windows = text.view(batch, self.windows, self.window)
        return Episode(windows, prompt.flatten(1), targets.flatten(1), depths.flatten(1))

    def _lengths(self, batch: int, generator: torch.Generator, depth: int | None) -> Tensor:
        if depth is not None or not self.shortest:
            return torch.full((batch,), self.nodes)
        choices = torch.arange(self.shortest, self.nodes + 1)
        weights = 1 / (choices + self.nodes**0.5)
        return choices[torch.multinomial(weights, batch, replacement=True, generator=generator)]

    def _draw_cycle(self, length: Tensor, generator: torch.Generator) -> Tensor:
        """Return the name at every place of the ring, (b, nodes, name_tokens), for rings of ``length`` (b, 1)."""
        place, shuffled = torch.arange(self.nodes), torch.rand(len(length), self.nodes, generator=generator)
        if self.name_tokens == 1:
            return shuffled.argsort(dim=1)[..., None]
        most = self.nodes - min(self.nodes // 2, ENDERS)
        short = (length // 2).clamp(max=ENDERS)
        shorts = torch.rand(len(length), ENDERS, generator=generator).argsort(dim=1)
        longs = torch.rand(len(length), ENDERS**2, generator=generator).topk(most).indices + ENDERS
        longs = longs.gather(1, (place - short).clamp(0, most - 1))
        name = torch.where(place < short, shorts[:, place.clamp(max=ENDERS - 1)], longs)
        name = name.gather(1, shuffled.masked_fill(place >= length, 1.0).argsort(dim=1))
        alone = name < ENDERS
        first = torch.where(alone, name, ENDERS + name // ENDERS - 1)
        return torch.stack((first, torch.where(alone, len(self.words) - 1, name % ENDERS)), dim=-1)

    def successors(self, episode: Episode) -> Tensor:
        """Return the node after every node, (b, names), read off the windows; -1 for a node that is not there."""
        tokens = episode.windows.flatten(1)
        last = tokens < (self.nodes if self.name_tokens == 1 else ENDERS)
        if self.name_tokens == 2:
            before = tokens.roll(1, dims=1)  # the very last token comes first, but it begins no name
            begins = (before >= ENDERS) & (before < 2 * ENDERS)
            tokens = tokens + ENDERS * (before - ENDERS + 1).where(begins, 0)
        edges = tokens[last].view(-1, 2)
        row = last.nonzero()[::2, 0]
        following = torch.full((len(episode), len(self.names)), -1)
        following[row, edges[:, 0]] = edges[:, 1]
        return following
