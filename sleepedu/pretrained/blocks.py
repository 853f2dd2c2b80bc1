"""A pretrained model as a ``SleepLM``: the blocks and weights of transformers, with our rule, S in and S out.

Their own cache is not used: it copies S in place, which ends a gradient at the second window. Symbols as in ``model``.
"""

import inspect
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sleepedu import checks
from sleepedu.fast import gated_delta_fast
from sleepedu.layers import EPSILON, FastWeightMixer, WindowCache
from sleepedu.model import EVICTIONS, FastWeights, SleepLM

CARRIES = ("gate", "hidden")  # of the library's, those that a pretrained model can begin with
LORA = "lora_"  # what peft calls its matrices


@dataclass(frozen=True)
class PretrainedConfig:
    """What ``restore`` needs to build a model again, and the library to know of it."""

    source: str  # a name on the hub, a folder or a .gguf file
    vocabulary: int
    layout: str  # "g" for every block with fast weights, "a" for every other
    state_shape: tuple[int, int, int]  # of S for one sequence and layer: (heads, d_v, d_k)
    loop: tuple[int, int]  # the first block that is looped, and the first after them
    carry: str = "gate"  # as in CARRIES
    after: tuple[int, ...] = ()  # the blocks that got fast weights of ours
    rank: int = 0  # of LoRA; 0: every weight is trained
    eviction: str = "hard"  # as in ``model.EVICTIONS``

    positions: ClassVar[int] = 0
    keeps_cache: ClassVar[bool] = False

    def __post_init__(self):
        (first, end), count = self.loop, len(self.layout)
        if not 0 <= first < end <= count:
            raise ValueError(f"loop {self.loop} lies outside the {count} blocks: use 0 <= first < end <= {count}")
        if "g" not in self.layout[first:end]:
            having = ", ".join(str(index) for index, letter in enumerate(self.layout) if letter == "g")
            raise ValueError(f"loop {self.loop} holds no block with fast weights: these are {having}")
        for name, value, allowed in (("carry", self.carry, CARRIES), ("eviction", self.eviction, EVICTIONS)):
            checks.one_of(name, value, allowed)


def gated_delta_layer(layer: Any, x: Tensor, S: Tensor, cache: WindowCache | None) -> tuple[Tensor, Tensor]:
    """Run Qwen3.5's gated delta layer on x (b, l, w) from S: what it adds to the stream, and the S after it."""
    mixed, reach = layer.in_proj_qkv(x).mT, layer.conv_kernel_size - 1  # (b, c, l)
    tail = mixed.new_zeros(*mixed.shape[:2], reach) if cache is None or cache.tail is None else cache.tail
    seen = torch.cat((tail, mixed), dim=-1)  # (b, c, reach + l)
    if cache is not None:
        cache.tail = seen[..., x.shape[1] :]
    mixed = F.silu(F.conv1d(seen, layer.conv1d.weight, layer.conv1d.bias, groups=layer.conv_dim)).mT
    *qk, v = mixed.split((layer.key_dim, layer.key_dim, layer.value_dim), dim=-1)
    q, k = (t.unflatten(-1, (layer.num_k_heads, -1)).transpose(1, 2).to(S.dtype) for t in qk)  # (b, heads, l, d)
    v = v.unflatten(-1, (layer.num_v_heads, -1)).transpose(1, 2).to(S.dtype)  # (b, heads, l, d_v)
    shared = layer.num_v_heads // layer.num_k_heads  # heads of S that have their keys in common
    q, k = ((t * (t.square().sum(-1, True) + EPSILON).rsqrt()).repeat_interleave(shared, dim=1) for t in (q, k))
    log_a = -layer.A_log.to(S.dtype).exp() * F.softplus(layer.in_proj_a(x).to(S.dtype) + layer.dt_bias)
    write = layer.in_proj_b(x).to(S.dtype).sigmoid()  # (b, l, heads)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        o, S = gated_delta_fast(q * layer.head_k_dim**-0.5, k, v, log_a.mT, write.mT, S)
    o, gate = o.transpose(1, 2), layer.in_proj_z(x).unflatten(-1, (layer.num_v_heads, -1))  # (b, l, heads, d_v)
    return layer.out_proj(layer.norm(o.to(x.dtype), gate).flatten(-2)), S


class AddedFastWeights(nn.Module):
    """Fast weights of ours behind a block that has none; their output is 0 at first, so nothing changes."""

    def __init__(self, width: int, state_shape: tuple[int, int, int]):
        super().__init__()
        heads, value_size, key_size = state_shape
        self.norm = nn.RMSNorm(width, EPSILON)
        self.mixer = FastWeightMixer(width, heads, key_size, value_size, convolution=4, write_range=2.0)
        nn.init.zeros_(self.mixer.out.weight)

    def forward(self, h: Tensor, S: Tensor, cache: WindowCache | None) -> tuple[Tensor, Tensor]:
        x, S = self.mixer(self.norm(h), S, cache)
        return h + x, S


class PretrainedBlock(nn.Module):
    """A block of transformers, called as one of ours is: h (b, l, w) and S, or None, to the same."""

    def __init__(self, block: nn.Module, added: AddedFastWeights | None = None):
        super().__init__()
        self.block, self.added = block, added
        taken = inspect.signature(type(block).forward).parameters
        self.cache_name = "cache" if "cache" in taken else "past_key_values"  # as it was called before 5.24

    def forward(self, h: Tensor, S: Any, cache: WindowCache | None, positions: dict[str, Any]) -> tuple[Tensor, Any]:
        if hasattr(self.block, "linear_attn"):
            x, S = gated_delta_layer(self.block.linear_attn, self.block.input_layernorm(h), S, cache)
            h = h + x
            return h + self.block.mlp(self.block.post_attention_layernorm(h)), S
        kept = {} if cache is None else {self.cache_name: cache}
        h = self.block(h, **positions, **kept)
        return (h, S) if self.added is None else self.added(h, S, cache)


class PretrainedLM(SleepLM):
    """A model of transformers that sleeps: what stands before the loop runs once, the loop N times, the rest once.

    It is called as a ``SleepLM`` is, and raises what that raises. Its ``state_dict`` is what is trained of it, alone.
    For the gradient every block keeps only what enters it, and is computed again (``recompute``).
    """

    config: Any  # a PretrainedConfig
    not_for_muon = (".gates.", "in_proj_a", "in_proj_b", LORA)

    def __init__(self, config: PretrainedConfig, pretrained: Any):
        nn.Module.__init__(self)
        self.config, self.recompute = config, True
        text, width = pretrained.model, pretrained.config.get_text_config().hidden_size
        self.embedding, self.norm, self.rotary = text.embed_tokens, text.norm, text.rotary_emb
        self.head = pretrained.lm_head
        added = {index: AddedFastWeights(width, config.state_shape) for index in config.after}
        self.layers = nn.ModuleList(PretrainedBlock(block, added.get(i)) for i, block in enumerate(text.layers))
        self.fast_layers = [index for index, letter in enumerate(config.layout) if letter == "g"]
        self.blocks_in_prelude, self.fast_in_coda = config.loop[0], config.layout[config.loop[1] :].count("g")
        if config.carry == "gate":
            self.gate = nn.Parameter(torch.zeros(width))
        self.pretrained = (pretrained,)  # no module of this one: for its save_pretrained

    def blocks(
        self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None, first: int = 0, end: int | None = None
    ) -> tuple[Tensor, FastWeights]:
        """Run one pass of all blocks, or of those from ``first`` to before ``end``; as ``SleepLM.blocks``."""
        self.check_fast_weights(S, h)
        of_layer, layers = dict(zip(self.fast_layers, S, strict=True)), range(len(self.layers))[first:end]
        kept = sorted((cache or [])[first:end], key=lambda layer: (layer.seen, layer.start))
        window = kept[-1] if kept else WindowCache()  # of a layer that has keys, if there is one
        place = window.start + window.seen + torch.arange(h.shape[1], device=h.device)[None]  # (1, l)
        mask = window.mask(h.shape[1], h.device)
        positions = {
            "position_embeddings": self.rotary(h, place),
            "position_ids": place,
            "attention_mask": None if mask is None else mask[None, None],
        }

        def run(index: int, h: Tensor, S: Any, kept: WindowCache | None) -> tuple[Tensor, Any, WindowCache | None]:
            own = kept and replace(kept)  # which the block changes; and it may run again, from what was there
            return *self.layers[index](h, S, own, positions), own

        for index in layers:
            given = (index, h, of_layer.get(index), None if cache is None else cache[index])
            again = self.recompute and torch.is_grad_enabled()
            h, of_layer[index], own = checkpoint(run, *given, use_reentrant=False) if again else run(*given)
            if cache is not None and own is not None:
                cache[index] = own
        return h, tuple(of_layer[index] for index in self.fast_layers)

    def prelude(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        return self.blocks(h, S, cache, end=self.config.loop[0])

    def loop(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        return self.blocks(h, S, cache, *self.config.loop)

    def coda(self, h: Tensor, S: FastWeights, cache: list[WindowCache] | None = None) -> tuple[Tensor, FastWeights]:
        return self.blocks(h, S, cache, first=self.config.loop[1])

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: weight.detach() for name, weight in self.named_parameters() if weight.requires_grad}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if differ := self.state_dict().keys() ^ state_dict.keys():
            raise ValueError(f"{len(differ)} of its weights are not this model's, or missing: {min(differ)} is one")
        return super().load_state_dict(state_dict, strict=False)
