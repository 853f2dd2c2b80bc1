"""What sleep costs on this machine: the rule, a training step, a sleep, an answer. ``python -m sleepedu bench``.

Whatever is compared runs alternately in one process, many times over; figures are medians with their quartiles, so a
busy machine widens the spread before it bends a ratio. Nothing here is a test.
"""

import contextlib
import importlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sleepedu.fast import gated_delta_fast, without_compiled_rule
from sleepedu.fast.compiling import can_compile, compiled_blocks, keep_freed_memory
from sleepedu.fast.precision import tf32
from sleepedu.fast.recording import Recorded, recorded
from sleepedu.fast_weights import gated_delta_chunked
from sleepedu.lab.recipes import RECIPES, Experiment
from sleepedu.layers import WindowCache
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.session import Session
from sleepedu.sleep_loop import sleep
from sleepedu.tasks.random_streams import TRAINING, stream
from sleepedu.training import AnsweringEpisodes, begin_training, find_gradients, training_step

RULE_SHAPES = {  # batch, heads, length, size
    "cpu": ((64, 4, 24, 16), (64, 4, 24, 64), (32, 4, 75, 64), (4, 4, 2048, 64)),
    "cuda": ((512, 4, 24, 64), (128, 8, 75, 64), (512, 4, 128, 64), (4, 4, 2048, 64)),
}
ON_A_CPU = ("smoke", "laptop")  # the sizes whose steps are timed there
SQUARE = {"cpu": 1024, "cuda": 8192}  # the sides of matrices whose product is a machine's fastest
STEPS_ON_A_GPU = [("rule110", "paper")]
PASSES = (1, 2, 4, 8)
WINDOWS = (16, 64, 256)
READ_BEFORE = (1_000, 10_000, 100_000, 1_000_000)
WINDOW = 64  # of the streams here
MODEL = ModelConfig(vocabulary=64, layout="agag", width=64)


class Peer(NamedTuple):
    """Another library with the same rule: where it is, how it is called, and what power of d_k it divides o by."""

    package: str
    module: str
    name: str
    options: dict[str, Any]
    power: float


QWEN = "transformers.models.qwen3_next.modeling_qwen3_next"
FLA = {"scale": 1.0, "state_v_first": True}
PEERS = {
    "cpu": Peer("transformers", QWEN, "torch_chunk_gated_delta_rule", {}, 0.5),
    "cuda": Peer("flash-linear-attention", "fla.ops.gated_delta_rule", "chunk_gated_delta_rule", FLA, 0.0),
}
Row = dict[str, Any]


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
            times[name].append(1e3 * (time.perf_counter() - start))
        if turn >= 4 and time.perf_counter() > end:
            break
    found = {name: [round(x, 4) for x in statistics.quantiles(values[1:], n=4)] for name, values in times.items()}
    return {name: {"ms": ms, "low": low, "high": high, "rounds": turn} for name, (low, ms, high) in found.items()}


def count_operations(function: Callable[[], object]) -> int:
    """Return the floating-point operations of a call's matrix products, a multiplication and an addition apart.

    Triangular solves and attention count too, attention with its whole square; elementwise operations do not. The rule
    is run in chunks meanwhile, because those are products. (``compute`` counts trainings.)
    """
    aten, attention = torch.ops.aten, "_scaled_dot_product_flash_attention"
    solve = {aten.linalg_solve_triangular: lambda A, right, **options: math.prod(A) * right[-1]}
    counter = FlopCounterMode(display=False, custom_mapping=solve)
    for end in ("", "_backward"):  # it knows how to count attention, but leaves out what that is called on a CPU
        known = flop_registry[getattr(aten, attention + end)]
        counter.flop_registry[getattr(aten, f"{attention}_for_cpu{end}")] = known
    with without_compiled_rule(), counter:
        function()
    return counter.get_total_flops()


def time_rule(device: torch.device) -> Iterator[Row]:
    """Time the gated delta rule, forward and backward, against another library's, where one is installed."""
    peer = PEERS[device.type]
    rules: dict[str, Callable] = {"ours": gated_delta_fast, "chunked": gated_delta_chunked}
    with contextlib.suppress(ImportError):
        theirs = getattr(importlib.import_module(peer.module), peer.name)
        rules["theirs"] = partial(_theirs, partial(theirs, **peer.options))
    for batch, heads, length, size in RULE_SHAPES[device.type]:
        draw = torch.Generator().manual_seed(0)
        q, k, v, do = (torch.randn(batch, length, heads, size, generator=draw) for _ in range(4))
        log_a, b = (torch.rand(batch, length, heads, generator=draw) for _ in range(2))
        tokens = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, -0.1 * log_a, b, do)
        *inputs, do = (x.to(device).transpose(1, 2) for x in tokens)  # in memory as projections are, (b, l, h, ...)
        S, dS = torch.zeros(2, batch, heads, size, size, device=device)
        given = [x.requires_grad_() for x in (*inputs, S)]
        ways: dict[str, Callable] = {w: partial(_there_and_back, rule, given, (do, dS)) for w, rule in rules.items()}
        row: Row = {"batch": batch, "heads": heads, "length": length, "size": size}
        with tf32("auto", device):
            if "theirs" in ways:
                row["peer"] = f"{peer.package} {metadata.version(peer.package)}"
                row["largest difference"] = (ways["ours"]() - ways["theirs"]() * size**peer.power).abs().max().item()
            if device.type == "cuda":  # as in training: what the GPU does, not how long Python takes to say it
                ways = {way: recorded(function) for way, function in ways.items()}
            row |= alternately(ways, device)
        if "theirs" in ways:
            row["ratio"] = round(row["theirs"]["ms"] / row["ours"]["ms"], 2)
        yield row


def _theirs(peer: Callable, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    *tokens, S = inputs  # their S is transposed, and their queries are scaled
    o, S = peer(*(x.transpose(1, 2) for x in tokens), initial_state=S, output_final_state=True)
    return o.transpose(1, 2), S


def _there_and_back(rule: Callable, given: list[Tensor], gradients: tuple[Tensor, Tensor]) -> Tensor:
    o, S = rule(*given)
    torch.autograd.grad((o, S), given, gradients)
    return o


def time_step(device: torch.device) -> Iterator[Row]:
    """Time a whole training step, plain and compiled, and compare it with its matrix products alone.

    On a GPU the compiled one is recorded too. share: the time that this machine's matrix product, at its fastest (two
    square matrices of 1,024, on a GPU 8,192), would take for the operations of the step (Muon's too), divided by the
    step's.
    """
    keep_freed_memory()
    on_gpu = device.type == "cuda"
    side = SQUARE[device.type]
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    product = alternately({"product": lambda: square @ square}, device)["product"]["ms"]
    keys = STEPS_ON_A_GPU if on_gpu else [key for key in RECIPES if key[1] in ON_A_CPU]
    for task, size, passes in ((*key, passes) for key in keys for passes in (1, 4)):
        experiment = Experiment(task, size, passes=passes)
        config, questions, ways = experiment.train_config, experiment.make_task(), {}
        episode = questions.sample(config.batch, stream(0, TRAINING, 0)).to(device)
        with contextlib.ExitStack() as stack:
            for way in ("plain", "compiled") if can_compile(device) else ("plain",):
                model = SleepLM(experiment.model_config).to(device)
                state = begin_training(model, questions, config)
                gradients: Callable = partial(find_gradients, state, AnsweringEpisodes(model))
                if way == "compiled":
                    stack.enter_context(compiled_blocks(model))
                    gradients = Recorded(gradients, model.parameters()) if on_gpu else gradients
                ways[way] = partial(training_step, state, gradients, episode, passes, config.clip)
            stack.enter_context(tf32(state.precision, device))
            found = alternately(ways, device)
            operations = count_operations(ways["plain"])
        best = min(way["ms"] for way in found.values())
        yield {
            **{"task": task, "size": size, "passes": passes, "precision": state.precision, **found},
            "tokens a second": round(1e3 * config.batch * questions.tokens_per_example / best),
            "operations": operations,
            "share": round(operations / (2 * side**3) * product / best, 3),
        }


def time_sleep(device: torch.device) -> Iterator[Row]:
    """Time a sleep on one window, by N and by the window's length L."""
    model = SleepLM(MODEL).to(device).eval()
    for length in WINDOWS:
        tokens = torch.randint(MODEL.vocabulary, (1, length), device=device)
        ways = {n: torch.no_grad()(partial(sleep, model, tokens, passes=n)) for n in PASSES}
        for n, found in alternately(ways, device, repeats=60).items():
            yield {"window": length, "passes": n, **found}


def time_answer(device: torch.device) -> Iterator[Row]:
    """Time one answered token by N and by how much was read before, beside a transformer that keeps its whole cache.

    Every stream ends half-way into a window. held: bytes that are kept between two tokens, S and cache.
    """
    model, token = SleepLM(MODEL).to(device).eval(), torch.zeros(1, 1, dtype=torch.long, device=device)
    sessions = {(n, READ_BEFORE[0]): Session(model, WINDOW, n) for n in PASSES}
    sessions |= {(1, read): Session(model, WINDOW, 1) for read in READ_BEFORE[1:]}
    for (_, read), session in sessions.items():
        read += WINDOW // 2 - read % WINDOW
        session.read(torch.randint(MODEL.vocabulary, (1, read), device=device), logits=False)
    found = alternately({key: partial(s.answer, token) for key, s in sessions.items()}, device, 1000, seconds=60)
    for (n, read), session in sessions.items():
        yield {"model": "sleep", "passes": n, "read": read} | found[n, read] | {"held": session.held_bytes}

    # The cache is filled with random numbers: to read that much takes a time that grows with its square, and how long
    # an answer takes does not depend on what is in the cache.
    transformer = SleepLM(replace(MODEL, layout="a" * len(MODEL.layout))).to(device).eval()
    size = MODEL.width // MODEL.heads

    @torch.no_grad()
    def answer(cache: list[WindowCache]) -> Tensor:
        return transformer.out(transformer.blocks(transformer.embed(token), (), [replace(c) for c in cache])[0])

    for read in READ_BEFORE:
        try:
            kept = [torch.randn(2, 1, MODEL.heads, read, size, device=device) for _ in MODEL.layout]
            row = alternately({"": partial(answer, [WindowCache(*layer) for layer in kept])}, device, 100)[""]
        except RuntimeError as error:  # out of memory
            if "memory" in str(error):
                return
            raise
        yield {"model": "transformer", "passes": 1, "read": read} | row | {"held": sum(layer.nbytes for layer in kept)}


PARTS = {"rule": time_rule, "step": time_step, "sleep": time_sleep, "answer": time_answer}
