"""What sleep costs on this machine: the rule, a training step, a sleep, an answer. ``python -m sleepedu bench``.

Whatever is compared runs alternately in one process, many times over; figures are medians with their quartiles, so a
busy machine widens the spread before it bends a ratio. Nothing here is a test.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sleepedu.fast import cpp as kernel
from sleepedu.fast.cpp import gated_delta_fast
from sleepedu.fast_weights import gated_delta_chunked
from sleepedu.lab.experiments import Experiment
from sleepedu.lab.provenance import machine
from sleepedu.lab.recipes import RECIPES
from sleepedu.layers import WindowCache
from sleepedu.model import FastWeights, ModelConfig, SleepLM
from sleepedu.sleep_loop import Session, sleep
from sleepedu.training import (
    COMPILED,
    TRAINING,
    Answer,
    can_compile,
    compiled_blocks,
    keep_freed_memory,
    learn,
    make_optimizers,
    stream,
    tokens_per_example,
)

RULE_SHAPES = ((64, 4, 24, 16), (64, 4, 24, 64), (32, 4, 75, 64), (4, 4, 2048, 64))  # batch, heads, length, size
PASSES = (1, 2, 4, 8)
WINDOWS = (16, 64, 256)
READ_BEFORE = (1_000, 10_000, 100_000, 1_000_000)
WINDOW = 64  # of the streams here
MODEL = ModelConfig(vocabulary=64, layout="agag", width=64)

Row = dict[str, Any]


def bench(device: torch.device, parts: tuple[str, ...], watch: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of the given parts, a list of rows each, with the machine they were measured on.

    watch is told what is being measured. Raises ValueError for an unknown part.
    """
    for part in parts:
        if part not in PARTS:
            raise ValueError(f"part {part!r} is unknown: use one or more of {', '.join(PARTS)}")
    figures: dict[str, Any] = {"machine": machine(device)}
    for part in parts:
        watch(f"measuring: {part}")
        figures[part] = PARTS[part](device)
    return figures


def alternately(
    functions: Mapping[Any, Callable[[], object]], device: torch.device, repeats: int = 30, seconds: float = 20.0
) -> dict[Any, Row]:
    """Run the functions in turn and return, for each, the median and quartiles of its time in milliseconds.

    ``repeats`` rounds after one that does not count, but none is begun after ``seconds`` (and four).
    """
    times: dict[Any, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 4 and time.perf_counter() > end:
            break
    found = {}
    for name, values in times.items():
        low, median, high = (round(x, 4) for x in statistics.quantiles(values, n=4))
        found[name] = {"ms": median, "low": low, "high": high, "rounds": len(values)}
    return found


def count_operations(function: Callable[[], object]) -> int:
    """Return the floating-point operations of a call's matrix products, a multiplication and an addition apart.

    Triangular solves and attention count too, attention with its whole square; elementwise operations do not. The rule
    is run in chunks meanwhile, because those are products.
    """
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: _solve})
    counter.flop_registry |= {left_out: flop_registry[like] for left_out, like in _COUNTED_LIKE.items()}
    with kernel.without(), counter:
        function()
    return counter.get_total_flops()


def _solve(A, right, **options) -> int:
    return math.prod(A) * right[-1]


# What torch's counter leaves out, though it knows how to count it under another name.
_COUNTED_LIKE = {
    torch.ops.aten.baddbmm_: torch.ops.aten.baddbmm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: torch.ops.aten._scaled_dot_product_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        torch.ops.aten._scaled_dot_product_flash_attention_backward
    ),
}


def rule(device: torch.device) -> list[Row]:
    """Time the gated delta rule, forward and backward, against another library's, where one is installed."""
    name, peer = _peer(device)
    rows = []
    for batch, heads, length, size in RULE_SHAPES:
        draw = torch.Generator().manual_seed(0)
        q, k, v, do = (torch.randn(batch, length, heads, size, generator=draw).to(device) for _ in range(4))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        log_a = -0.1 * torch.rand(batch, length, heads, generator=draw).to(device)
        b = torch.rand(batch, length, heads, generator=draw).to(device)
        S, dS = torch.zeros(2, batch, heads, size, size, device=device)
        given = [tensor.requires_grad_() for tensor in (q, k, v, log_a, b, S)]

        def ours(rule=gated_delta_fast, given=given, do=do, dS=dS) -> Tensor:
            *tokens, S = given
            q, k, v, log_a, b = (x.transpose(1, 2) for x in tokens)
            o, S = rule(q, k, v, log_a, b, S)
            torch.autograd.grad((o, S), given, (do.transpose(1, 2), dS))
            return o.transpose(1, 2)

        def theirs(given=given, do=do, dS=dS, peer: Any = peer) -> Tensor:
            *tokens, S = given  # their S is transposed, and their queries are scaled
            o, S = peer(*tokens, initial_state=S, output_final_state=True)
            torch.autograd.grad((o, S), given, (do, dS))
            return o * given[0].shape[-1] ** 0.5

        row: Row = {"batch": batch, "heads": heads, "length": length, "size": size}
        ways = {"ours": ours, "chunked": partial(ours, gated_delta_chunked)}
        found = alternately(ways | ({name: theirs} if peer else {}), device)
        row |= {way: found[way] for way in ways}
        if peer:
            difference = (ours() - theirs()).abs().max().item()
            ratio = round(found[name]["ms"] / found["ours"]["ms"], 2)
            row |= {
                "peer": f"{name} {metadata.version(name)}",
                "theirs": found[name],
                "ratio": ratio,
                "largest difference": difference,
            }
        rows.append(row)
    return rows


def _peer(device: torch.device) -> tuple[str, Callable | None]:
    """Return the other library's rule for a device, or None where it is not installed."""
    with contextlib.suppress(ImportError):
        if device.type == "cuda":
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule

            return "flash-linear-attention", chunk_gated_delta_rule
        from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

        return "transformers", torch_chunk_gated_delta_rule
    return "", None


def step(device: torch.device) -> list[Row]:
    """Time a whole training step, plain and compiled, and compare it with its matrix products alone.

    share: the time that this machine's matrix product, at its fastest (two square matrices of 1,024), would take for
    the floating-point operations of the step, divided by the step's.
    """
    if device.type == "cpu":
        keep_freed_memory()
    square = torch.randn(1024, 1024, device=device)
    product = alternately({"product": lambda: square @ square}, device)["product"]["ms"]
    sizes = ("smoke", "laptop", "paper") if device.type == "cuda" else ("smoke", "laptop")
    rows = []
    for task, size in RECIPES:
        if size not in sizes:
            continue
        for passes in (1, 4):
            rows.append(_one_step(Experiment(task, size, passes=passes), product, device))
    return rows


def _one_step(experiment: Experiment, product_ms: float, device: torch.device) -> Row:
    task, config = experiment.make_task(), experiment.train_config
    torch.manual_seed(0)
    model = SleepLM(experiment.model_config).to(device)
    optimizers = make_optimizers(model, config)
    episode = task.sample(config.batch, stream(0, TRAINING, 0)).to(device)

    answer, scaler = Answer(model), torch.amp.GradScaler(enabled=False)

    def plain() -> None:
        learn(answer, episode, experiment.passes, optimizers, scaler, config)

    def step_with(methods: dict[str, Callable]) -> None:
        vars(model).update(methods)
        plain()

    ways = {"plain": partial(step_with, {name: getattr(model, name) for name in COMPILED})}
    with compiled_blocks(model) if can_compile(device) else contextlib.nullcontext():
        if can_compile(device):
            ways["compiled"] = partial(step_with, {name: getattr(model, name) for name in COMPILED})
        found = alternately(ways, device)
    best = min(row["ms"] for row in found.values())
    tokens = config.batch * tokens_per_example(task)
    operations = count_operations(plain)
    return {
        "task": experiment.task,
        "size": experiment.size,
        "passes": experiment.passes,
        **found,
        "tokens a second": round(1e3 * tokens / best),
        "operations": operations,
        "share": round(operations / (2 * 1024**3) * product_ms / best, 3),
    }


def asleep(device: torch.device) -> list[Row]:
    """Time a sleep on one window, by N and by the window's length L."""
    model = _model(device)
    rows = []
    for length in WINDOWS:
        tokens = torch.randint(MODEL.vocabulary, (1, length), device=device)
        ways = {n: partial(_asleep, model, tokens, n) for n in PASSES}
        for n, found in alternately(ways, device, repeats=60).items():
            rows.append({"window": length, "passes": n, **found})
    return rows


def _model(device: torch.device, layout: str = MODEL.layout) -> SleepLM:
    torch.manual_seed(0)
    return SleepLM(replace(MODEL, layout=layout)).to(device).eval()


@torch.no_grad()
def _asleep(model: SleepLM, tokens: Tensor, passes: int) -> None:
    sleep(model, tokens, passes=passes)


def answer(device: torch.device) -> list[Row]:
    """Time one answered token by N and by how much was read before, beside a transformer that keeps its whole cache.

    Every stream ends half-way into a window. held: bytes that are kept between two tokens, S and cache.
    """
    model = _model(device)
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    sessions = {(n, READ_BEFORE[0]): Session(model, WINDOW, n) for n in PASSES}
    sessions |= {(1, read): Session(model, WINDOW, 1) for read in READ_BEFORE[1:]}
    for (_, read), session in sessions.items():
        read += WINDOW // 2 - read % WINDOW
        session.read_stream(torch.randint(MODEL.vocabulary, (1, read), device=device).split(10_000, dim=1))
    found = alternately({key: partial(s.answer, token) for key, s in sessions.items()}, device, 1000, seconds=60)
    rows = []
    for (n, read), session in sessions.items():
        held = _bytes(session.S, session._cache)
        rows.append({"model": "sleep", "passes": n, "read": read, **found[n, read], "held": held})
    return rows + list(_keeping(token))


def _keeping(token: Tensor) -> Iterator[Row]:
    """Time a transformer of the same blocks that evicts nothing, until its cache no longer fits the memory.

    The cache is filled with random numbers: to read that much takes a time that grows with its square, and how long
    an answer takes does not depend on what is in the cache.
    """
    model = _model(token.device, "a" * len(MODEL.layout))
    size = MODEL.width // MODEL.heads
    for read in READ_BEFORE:
        try:
            cache = [
                WindowCache(*torch.randn(2, 1, MODEL.heads, read, size, device=token.device)) for _ in MODEL.layout
            ]
            found = alternately({"answer": partial(_answer, model, token, cache)}, token.device, 100)["answer"]
        except RuntimeError:  # out of memory
            return
        yield {"model": "transformer", "passes": 1, "read": read, **found, "held": _bytes((), cache)}


@torch.no_grad()
def _answer(model: SleepLM, token: Tensor, cache: list[WindowCache]) -> Tensor:
    h, _ = model.blocks(model.embed(token), (), [replace(layer) for layer in cache])
    return model.out(h)


def _bytes(S: FastWeights, cache: list[WindowCache]) -> int:
    kept = [*S, *(tensor for layer in cache for tensor in vars(layer).values() if tensor is not None)]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


PARTS: dict[str, Callable[[torch.device], list[Row]]] = {"rule": rule, "step": step, "sleep": asleep, "answer": answer}
