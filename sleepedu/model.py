"""The hybrid language model: embed -> blocks -> out. It owns no loop; ``sleepedu.sleep_loop`` does.

Symbols: b batch, l tokens, w width, V vocabulary; h (b, l, w) hidden states; S (b, heads, d_v, d_k) for every layer.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sleepedu import checks
from sleepedu.fast import is_traced
from sleepedu.layers import EPSILON, Block, CausalAttention, FastWeightMixer, WindowCache

MIXERS = {
    "a": "attention to the window",
    "A": "attention to everything read, which keeps its cache",
    "g": "fast weights",
}
CARRIES = {
    "hidden": "the paper: h itself",
    "inject": "h normalised and mixed with the embedding again",
    "embed": "the embedding again, so nothing but S",
    "gate": "e + g (h - e): the embedding e, and a learned share g of h for every channel, at first 0",
}
EVICTIONS = ("hard", "sliding")  # after a sleep the cache is cleared, or keeps the last L - 1 tokens
RULES = ("gated_delta", "delta", "gated", "hebbian")  # of ``fast_weights``

FastWeights = tuple[Tensor, ...]  # the S of every fast-weight layer, from the first to the last


@dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a ``SleepLM``; raises ValueError for a value that makes no model.

    The paper leaves open what we chose: pre-norm RMSNorm; positions that count from 0 in every window; an empty
    convolution tail at every window; h carried as it is, without normalisation; float32.
    """

    vocabulary: int
    layout: str = "agag"  #: a letter a block, as in MIXERS; this is the paper's hybrid, "aaaa" a plain transformer
    width: int = 64
    heads: int = 4
    key_size: int = 0  #: of S, as is value_size; 0 means width / heads
    value_size: int = 0
    mlp_ratio: float = 2.0  #: the MLP's inner width / width
    convolution: int = 4  #: taps, the token itself and those before it
    write_range: float = 2.0  #: the largest write strength b
    carry: str = "hidden"  #: what one pass hands the next, as in CARRIES
    positions: int = 0  #: learned places of the window; with 0 rotary encoding alone, to which equal tokens look alike
    rule: str = field(default="gated_delta", metadata=checks.LATER)  #: how S is written, as in RULES
    eviction: str = field(default="hard", metadata=checks.LATER)  #: what a sleep leaves of its window, as in EVICTIONS

    def __post_init__(self):
        for name in ("vocabulary", "width", "heads", "convolution"):
            checks.whole(name, getattr(self, name), least=1)
        for name in ("key_size", "value_size", "positions"):
            checks.whole(name, getattr(self, name), least=0)
        for name, least, most in (("write_range", 0, 2), ("mlp_ratio", 1 / self.width, checks.MOST / self.width)):
            checks.finite(name, getattr(self, name))
            if not least <= getattr(self, name) <= most or not getattr(self, name):
                raise ValueError(f"{name} must lie in {least:.4g}..{most:.4g} and not be 0, got {getattr(self, name)}")
        if not isinstance(self.layout, str) or not self.layout or not set(self.layout) <= set(MIXERS):
            allowed = ", ".join(f"{letter!r} {what}" for letter, what in MIXERS.items())
            raise ValueError(f"layout must be a word of one or more of {allowed}, got {self.layout!r}")
        if self.keeps_cache and set(self.layout) != {"A"}:
            raise ValueError(f"layout {self.layout!r} mixes 'A', which evicts nothing, with layers that do")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"width {self.width} must divide into {self.heads} heads of even size")
        for name, allowed in (("carry", CARRIES), ("rule", RULES), ("eviction", EVICTIONS)):
            checks.one_of(name, getattr(self, name), allowed)
        if self.eviction == "sliding" and (self.positions or self.keeps_cache):
            raise ValueError("windows slide where positions are rotary and tokens are evicted: positions=0, no 'A'")

    @property
    def keeps_cache(self) -> bool:
        """Whether the model sees everything that it has read when it answers, and so has no use for sleep."""
        return "A" in self.layout

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """(heads, d_v, d_k), the shape of S for one sequence and layer."""
        per_head = self.width // self.heads
        return (self.heads, self.value_size or per_head, self.key_size or per_head)


class SleepLM(nn.Module):
    """A language model of attention and fast-weight blocks, called one pass over one window at a time.

    Methods raise ValueError for token ids outside the vocabulary or on another device, and for fast weights whose
    number, shape, device or dtype do not fit.
    """

    not_for_muon: tuple[str, ...] = (".gates.",)  # parts of the names of matrices that AdamW trains
    blocks_in_prelude = 0  # how many come before those that a sleep loops
    fast_in_coda = 0  # how many layers of fast weights come after them

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        heads, value_size, key_size = config.state_shape
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.positions:
            self.places = nn.Parameter(0.5 * torch.randn(config.positions, config.width))
        self.fast_layers = [index for index, letter in enumerate(config.layout) if letter == "g"]
        self.layers = nn.ModuleList()
        for letter in config.layout:
            if letter == "g":
                sizes = (heads, key_size, value_size, config.convolution)
                mixer: nn.Module = FastWeightMixer(config.width, *sizes, config.write_range, config.rule)
            else:
                mixer = CausalAttention(config.width, heads)
            self.layers.append(Block(mixer, config.width, config.mlp_ratio))
        self.norm = nn.RMSNorm(config.width, EPSILON)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.carry == "inject":
            self.inject = nn.Linear(2 * config.width, config.width, bias=False)
            eye = torch.eye(config.width)  # at first: the embedding plus half the normalised h
            self.inject.weight = nn.Parameter(torch.cat((eye, eye / 2), dim=1))
        if config.carry == "gate":
            self.gate = nn.Parameter(torch.zeros(config.width))

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of S, float32, or the model's where that is finer."""
        return torch.promote_types(self.head.weight.dtype, torch.float32)

    def empty_fast_weights(self, batch: int) -> FastWeights:
        """Return S = 0 for every fast-weight layer, each (batch, heads, d_v, d_k)."""
        device, shape = self.head.weight.device, (batch, *self.config.state_shape)
        return tuple(torch.zeros(shape, device=device, dtype=self.state_dtype) for _ in self.fast_layers)

    def empty_cache(self, window: int = 0) -> list[WindowCache]:
        """Return the cache of a window of which nothing has been read; of L tokens, where windows slide."""
        return [WindowCache(reach=window if self.config.eviction == "sliding" else 0) for _ in self.layers]

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Return the first hidden states h (b, l, w) of tokens (b, l), the first of them at place ``start``."""
        self.check_tokens(tokens)
        if tokens.device != (device := self.embedding.weight.device):
            raise ValueError(f"the tokens are on {tokens.device}, the model on {device}: move them to one device")
        h = self.embedding(tokens)  # (b, l, w)
        if not self.config.positions:
            return h
        end = start + tokens.shape[1]
        if end > self.config.positions:
            raise ValueError(f"{end} tokens in a window are too many: the model has {self.config.positions} positions")
        return h + self.places[start:end]

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ValueError unless tokens are int64 or int32 (b, l) inside the vocabulary (checked on the CPU)."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            found = f"{tokens.dtype} {tuple(tokens.shape)}"
            raise ValueError(f"tokens must be whole numbers (int64 or int32) of shape (batch, length), got {found}")
        if tokens.device.type == "cpu" and tokens.numel() and not is_traced():  # traced, there are no values
            last = self.config.vocabulary - 1
            for token in map(int, torch.aminmax(tokens)):
                if not 0 <= token <= last:
                    raise ValueError(f"token {token} is outside the vocabulary: ids are 0 to {last}")

    def blocks(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        """Run one pass of all blocks over the hidden states of a window: h, S <- Blocks(h, S).

        h: (b, l, w); S as from ``empty_fast_weights``. With a cache, h continues the window that is in it.
        """
        self.check_fast_weights(S, h)
        of_layer = dict(zip(self.fast_layers, S, strict=True))
        for index, block in enumerate(self.layers):
            h, of_layer[index] = block(h, of_layer.get(index), None if cache is None else cache[index])
        return h, tuple(of_layer[index] for index in self.fast_layers)  # (b, l, w), (b, heads, d_v, d_k) each

    def prelude(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        """Run what a sleep runs once before its passes: nothing, here."""
        return h, S

    def coda(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        """Run what a sleep runs once after its passes: nothing, here."""
        return h, S

    def loop(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        """Run what a sleep runs N times: all blocks, here."""
        return self.blocks(h, S, cache)

    def carry(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Return what the next sleep pass starts from, given this pass's h and the h (b, l, w) that the first got."""
        if self.config.carry == "hidden":
            return h
        if self.config.carry == "embed":
            return embedding
        if self.config.carry == "gate":
            return embedding + self.gate * (h - embedding)
        return self.inject(torch.cat((embedding, F.rms_norm(h, h.shape[-1:], eps=EPSILON)), dim=-1))

    def out(self, h: Tensor) -> Tensor:
        """Return the logits (b, l, V) of hidden states h (b, l, w)."""
        return self.head(self.norm(h))

    def forward(self, tokens: Tensor, S: FastWeights | None = None) -> tuple[Tensor, FastWeights]:
        """Run one ordinary pass, the plain hybrid: tokens (b, l) -> logits (b, l, V) and the S after them."""
        S = self.empty_fast_weights(len(tokens)) if S is None else S
        h, S = self.blocks(self.embed(tokens), S)
        return self.out(h), S

    def check_fast_weights(self, S: FastWeights, h: Tensor) -> None:
        """Raise ValueError unless S has one matrix stack per fast-weight layer that fits h (b, l, w)."""
        if len(S) != len(self.fast_layers):
            raise ValueError(f"S must be of {len(self.fast_layers)} fast-weight layers, as the model has, got {len(S)}")
        wanted = ((len(h), *self.config.state_shape), self.state_dtype, h.device)
        for matrix in S:
            if (found := (tuple(matrix.shape), matrix.dtype, matrix.device)) != wanted:
                raise ValueError("S must have shape {}, be {} and on {}, got {}, {}, {}".format(*wanted, *found))
