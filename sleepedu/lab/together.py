"""Many runs of one shape at once, on a GPU: their weights lie side by side, and one step trains them all.

A step of a small model is over before a GPU has really begun: on an H100 a ring with N = 4 alone takes 5.2 ms, six
automata as small take 5.0 ms together, and 24 of them 13.2. So every seed and rate of a comparison is trained in one
go. Each run is the one that ``train`` gives for its settings, up to rounding: the same first weights, batches, clipping
and optimizers.

Symbols: k models, b examples of each. As one batch they lie behind one another, model after model, (k b, l, ...).
"""

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sleepedu.evaluation import accuracy_by_depth, check_examples
from sleepedu.fast import fast_rule
from sleepedu.fast.compiling import compiled_blocks, pays
from sleepedu.fast.muon import orthogonal
from sleepedu.fast.precision import choose_precision, tf32
from sleepedu.fast.recording import recorded
from sleepedu.lab import run_store
from sleepedu.lab.experiments import finished, settings_and_weights
from sleepedu.lab.recipes import Experiment
from sleepedu.lab.run_store import Run, find_device, load_run, save_run
from sleepedu.layers import EPSILON, FastWeightMixer, WindowCache
from sleepedu.model import SleepLM
from sleepedu.sleep_loop import run_episode, wake
from sleepedu.tasks.base import UNSCORED, Episode
from sleepedu.tasks.batches import Batches, majority_loss
from sleepedu.training import History, TrainConfig, make_optimizers


def run_together(
    experiments: Sequence[Experiment],
    device: str = "auto",
    directory: Path | str = run_store.OWN,
    watch: Callable[[History, TrainConfig], None] | None = None,
    examples: int = 2000,
) -> list[Run]:
    """Train, evaluate and store runs that differ in seed, learning rate and the run they go on from, all at once.

    What ``directory`` holds already is not trained again. watch: is shown the history of the first one. There is no
    checkpoint: what is interrupted begins anew. Large products are float32, in TF32 where a GPU has it. Raises
    ValueError for experiments that differ otherwise or are for single runs; FloatingPointError, when the others are
    stored, for runs whose loss was no number; and what ``run`` raises for a device, examples and a run to go on from.
    """
    check_examples(examples)
    where, first = find_device(device), experiments[0]
    for e in experiments:
        may = {name: getattr(e, name) for name in ("seed", "learning_rate", "trained_from")}
        if replace(first, **may) != e:
            raise ValueError(f"{e.name} cannot be trained together with {first.name}: seed, rate and start may differ")
        if e.train_config.precision.endswith("16"):
            raise ValueError(f"precision {e.precision!r} is for single runs: together they train in float32")
        if e.eviction == "sliding":
            raise ValueError("sliding windows are for single runs: trained together, models keep no cache")
        if e.model == "varied" and e.model_config.carry in ("inject", "gate"):  # a batch of one pass does not move it
            raise ValueError(f"carry {e.model_config.carry!r} with a varied N is for single runs")
    best = choose_precision(first.train_config.precision, where)
    precision = "tf32" if best in ("tf32", "bfloat16") else "float32"  # what has bfloat16 has TF32
    folders = {experiment.name: Path(directory, experiment.name) for experiment in experiments}
    begun = {experiment.name: settings_and_weights(experiment, directory) for experiment in experiments}
    new = [e for e in experiments if finished(folders[e.name], begun[e.name][0]) is None]
    if new:
        task, configs, models = first.make_task(), [e.train_config for e in new], []
        for experiment in new:
            torch.manual_seed(experiment.seed)
            models.append(SleepLM(experiment.model_config))
            models[-1].load_state_dict(begun[experiment.name][1], strict=False)
        streams = sorted({config.seed for config in configs})
        batches = [batches_of(Batches(task, replace(configs[0], seed=seed))) for seed in streams]
        data = {name: torch.stack([batch[name] for batch in batches]).to(where) for name in batches[0]}
        own = [streams.index(config.seed) for config in configs]
        compile = pays(configs[0].steps, where)
        with tf32(precision, where):
            histories = train_together([m.to(where) for m in models], configs, data, own, compile, watch)
        tokens, constant = configs[0].batch * task.tokens_per_example, majority_loss(task)
        lost = [e.name for e, history in zip(new, histories, strict=True) if not all(map(math.isfinite, history.loss))]
        for experiment, model, history in zip(new, models, histories, strict=True):
            if experiment.name in lost:
                continue
            history.tokens_per_step, history.majority_loss = tokens, constant
            table = accuracy_by_depth(model.eval(), task, experiment.passes, examples, seed=experiment.seed)
            made = {"precision": precision, "compiled": compile, "recomputed": False, "ranks": 1, "together": len(new)}
            save_run(folders[experiment.name], experiment, begun[experiment.name][0], model, history, table, made)
        if lost:
            raise FloatingPointError(f"the loss of {', '.join(lost)} is no number: lower learning_rate or clip")
    return [load_run(folder) for folder in folders.values()]


def batches_of(batches: Batches) -> dict[str, Tensor]:
    """Return all batches of a run: windows, prompt, targets (steps, b, ...) in int16, and passes, N, (steps,)."""
    workers = os.cpu_count() or 1
    loader = DataLoader(batches, None, sampler=range(batches.config.steps), num_workers=workers if workers > 2 else 0)
    found: dict[str, list[Tensor]] = {name: [] for name in ("windows", "prompt", "targets", "passes")}
    for episode, passes in loader:
        for name, tensors in found.items():
            tensors.append(torch.tensor(passes) if name == "passes" else getattr(episode, name).short())
    return {name: torch.stack(tensors) for name, tensors in found.items()}


def train_together(
    models: Sequence[SleepLM],
    configs: Sequence[TrainConfig],
    data: dict[str, Tensor],
    stream_of: Sequence[int],
    compile: bool = False,
    watch: Callable[[History, TrainConfig], None] | None = None,
) -> list[History]:
    """Train models of one shape, each as ``train`` would, and return the histories; seconds are those of all together.

    configs: alike but in seed and rates. data: what ``batches_of`` gave, stacked over streams, where the models are;
    stream_of: which of the streams is a model's own.
    """
    config, k, device = configs[0], len(models), data["prompt"].device
    stacked = stack(models)
    optimizers = Optimizers(stacked, models[0], configs)
    step, own = torch.zeros(1, dtype=torch.long, device=device), torch.tensor(stream_of, device=device)
    seen = torch.zeros(config.steps, k, 2, device=device)  # loss and share right
    fewest, most = config.range_of_passes

    def one_step() -> None:  # nothing in it is a number of the host's: it can be recorded, with the batch it takes
        batch = {name: tensor.index_select(1, step)[:, 0][own].long() for name, tensor in data.items()}  # (k, b, ...)
        passes = batch.pop("passes").repeat_interleave(config.batch)  # (k b,)
        batch = {name: tensor.flatten(0, 1) for name, tensor in batch.items()}
        episode = Episode(**batch, depth=torch.zeros_like(batch["prompt"]))
        logits = run_episode(stacked, episode, most) if fewest == most else answer(stacked, episode, most, passes)
        loss, right = score_each(logits, episode.targets, k)
        gradients = torch.autograd.grad(loss.sum(), optimizers.parameters, materialize_grads=True)
        optimizers.step(gradients, step)
        seen.index_copy_(0, step, torch.stack((loss.detach(), right), dim=-1)[None])
        step.add_(1)

    histories, every = [History() for _ in models], max(1, config.steps // 200)
    with compiled_blocks(stacked) if compile else nullcontext():
        take = rehearsed(one_step, [*optimizers.state, step]) if device.type == "cuda" else one_step
        started, begin = time.perf_counter(), 0
        for done in range(1, config.steps + 1):
            take()
            if not done % every or done == config.steps:
                for history, (loss, right) in zip(histories, seen[begin:done].mean(0).tolist(), strict=True):
                    history.add(done, loss, right, time.perf_counter() - started)
                begin = done
                if watch is not None:
                    watch(histories[0], config)
    for index, model in enumerate(models):
        model.load_state_dict({name: tensor[index] for name, tensor in stacked.state_dict().items()})
    return histories


def rehearsed(function: Callable[[], None], changed: Sequence[Tensor]) -> Callable[[], None]:
    """Record a function that changes these tensors, and put back what its rehearsals have changed."""
    before = [tensor.detach().clone() for tensor in changed]
    replay = recorded(function)
    with torch.no_grad():
        for tensor, value in zip(changed, before, strict=True):
            tensor.copy_(value)
    return replay


def answer(model: SleepLM, episode: Episode, most: int, passes: Tensor) -> Tensor:
    """``run_episode`` where every example has its own N, ``passes`` (k b,), ``most`` at most."""
    S = model.empty_fast_weights(len(episode))
    for tokens in episode.windows.unbind(1):
        h = embedding = model.embed(tokens)
        for n in range(most):
            h, after = model.blocks(model.carry(h, embedding) if n else h, S)
            asleep = (n < passes)[:, None, None, None]
            S = tuple(torch.where(asleep, new, old) for new, old in zip(after, S, strict=True))
    return wake(model, episode.prompt, S)


def score_each(logits: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the loss (nats a scored token) and the share right of every model, (k,) each."""
    count = (targets != UNSCORED).view(k, -1).sum(1).clamp(min=1)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED, reduction="none")
    right = (logits.detach().argmax(-1) == targets).view(k, -1).sum(1)
    return loss.view(k, -1).sum(1) / count, right / count


class Optimizers:
    """Muon and AdamW as ``make_optimizers`` has them for one of the models, for all k with rates of their own."""

    def __init__(self, stacked: SleepLM, single: SleepLM, configs: Sequence[TrainConfig]):
        muon, adam = make_optimizers(single, configs[0])
        self.clip, self.muon, self.adam = configs[0].clip, muon.defaults, adam.defaults
        hidden, all_k = {id(matrix) for matrix in muon.param_groups[0]["params"]}, dict(stacked.named_parameters())
        self.hidden = [all_k[name] for name, parameter in single.named_parameters() if id(parameter) in hidden]
        self.rest = [all_k[name] for name, parameter in single.named_parameters() if id(parameter) not in hidden]
        self.parameters = [*self.hidden, *self.rest]
        # AdamW moves every number by itself, so it has all of them in one place, (k, numbers).
        self.flat = torch.cat([parameter.detach().flatten(1) for parameter in self.rest], dim=1)
        for parameter, part in zip(self.rest, self.flat.split([p[0].numel() for p in self.rest], dim=1), strict=True):
            parameter.data = part.unflatten(1, parameter.shape[1:])
        self.momentum = [torch.zeros_like(parameter) for parameter in self.hidden]
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.state = [*self.hidden, self.flat, *self.momentum, self.mean, self.square]
        device, steps = self.flat.device, range(configs[0].steps)
        self.muon_rate = torch.tensor([config.learning_rate for config in configs], device=device)[:, None, None]
        self.adam_rate = torch.tensor([config.adam_learning_rate for config in configs], device=device)[:, None]
        # For every step the share of the rate, and what the two running means lack of their beginning.
        b1, b2 = self.adam["betas"]
        table = [(configs[0].rate(i), 1 - b1 ** (i + 1), math.sqrt(1 - b2 ** (i + 1))) for i in steps]
        self.of_step = torch.tensor(table, device=device)

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], step: Tensor) -> None:
        """Clip the gradients of each model by its own norm, and move."""
        share, mean_known, square_known = self.of_step.index_select(0, step)[0].unbind()
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()  # (k,)
        scale = (self.clip / (norm + 1e-6)).clamp(max=1.0)[:, None]
        for parameter, g, momentum in zip(self.hidden, gradients, self.momentum, strict=False):
            g = g * scale[:, None]
            momentum.lerp_(g, 1 - self.muon["momentum"])
            rate, taller = self.muon_rate * share, math.sqrt(max(1, parameter.shape[1] / parameter.shape[2]))
            update = orthogonal(g.lerp(momentum, self.muon["momentum"]), self.muon) * (rate * taller)
            parameter.mul_(1 - rate * self.muon["weight_decay"]).sub_(update)
        g = torch.cat([g.flatten(1) for g in gradients[len(self.hidden) :]], dim=1) * scale
        rate, (b1, b2) = self.adam_rate * share, self.adam["betas"]
        self.mean.lerp_(g, 1 - b1)
        self.square.mul_(b2).addcmul_(g, g, value=1 - b2)
        self.flat.mul_(1 - rate * self.adam["weight_decay"])
        self.flat.sub_(rate / mean_known * self.mean / (self.square.sqrt() / square_known + self.adam["eps"]))


def stack(models: Sequence[SleepLM]) -> SleepLM:
    """Return models of one shape as one, whose parameters are (k, ...); it takes batches of (k b) examples."""
    stacked, weights = copy.deepcopy(models[0]), [dict(model.named_parameters()) for model in models]
    kinds: dict[type, type[nn.Module]] = {nn.Linear: StackedLinear, nn.RMSNorm: StackedNorm, SleepLM: StackedLM}
    kinds |= {nn.Embedding: StackedEmbedding, FastWeightMixer: StackedMixer}
    for path, module in stacked.named_modules():
        for name, _ in list(module.named_parameters(recurse=False)):
            own = [w[f"{path}.{name}".lstrip(".")].detach() for w in weights]
            module.register_parameter(name, nn.Parameter(torch.stack(own)))
        module.__class__ = kinds.get(type(module), type(module))
    return stacked


def each(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply x (k b, ..., c) by the weights of the model that each example belongs to, (k, c)."""
    return (x.reshape(len(weight), -1, x.shape[-1]) * weight[:, None]).view(x.shape)


class StackedLinear(nn.Linear):
    """K linear layers: weight (k, out, in), bias (k, out) or None; (k b, l, in) -> (k b, l, out)."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(self.weight), -1, x.shape[-1]) @ self.weight.mT  # (k, b l, out)
        y = y if self.bias is None else y + self.bias[:, None]
        return y.view(*x.shape[:-1], y.shape[-1])


class StackedNorm(nn.RMSNorm):
    """K RMSNorms: weight (k, w)."""

    def forward(self, x: Tensor) -> Tensor:
        return each(F.rms_norm(x, x.shape[-1:], eps=EPSILON), self.weight)


class StackedEmbedding(nn.Embedding):
    """K embeddings of a small vocabulary, weight (k, V, w), as a product: its gradient is one, too."""

    def forward(self, tokens: Tensor) -> Tensor:
        words = torch.arange(self.weight.shape[1], device=tokens.device)
        one_hot = (tokens[..., None] == words).to(self.weight.dtype)  # (k b, l, V)
        h = one_hot.view(len(self.weight), -1, one_hot.shape[-1]) @ self.weight  # (k, b l, w)
        return h.view(*tokens.shape, -1)


class StackedMixer(FastWeightMixer):
    """K fast-weight mixers: taps (k, convolution, c), decay_rate (k, heads), norm (k, value_size)."""

    _scale = staticmethod(each)

    def forward(self, x: Tensor, S: Tensor, cache: WindowCache | None = None) -> tuple[Tensor, Tensor]:
        q, k, v, log_a, b, gate = self.rule_inputs(x, S.dtype)
        o, S = fast_rule(self.rule, q, k, v, log_a, b, S)  # (k b, h, l, d)
        o = each(F.rms_norm(rearrange(o, "b h l d -> b l h d"), o.shape[-1:], eps=EPSILON), self.norm)
        return self.out(o.flatten(2) * F.silu(gate)), S

    def convolve(self, x: Tensor, cache: WindowCache | None = None) -> Tensor:
        length, reach = x.shape[1], self.taps.shape[1] - 1
        seen = F.pad(x, (0, 0, reach, 0))  # (k b, reach + l, c)
        *taps, own = self.taps.unbind(1)
        return F.silu(sum((each(seen[:, j : j + length], tap) for j, tap in enumerate(taps)), start=each(x, own)))


class StackedLM(SleepLM):
    """K models as one; what a ``SleepLM`` has for one, in layers that know the model an example belongs to."""

    def embed(self, tokens: Tensor, start: int = 0) -> Tensor:
        h = self.embedding(tokens)
        if not self.config.positions:
            return h
        places = self.places[:, start : start + tokens.shape[1]]  # (k, l, w)
        return (h.unflatten(0, (len(places), -1)) + places[:, None]).flatten(0, 1)

    def carry(self, h: Tensor, embedding: Tensor) -> Tensor:
        if self.config.carry == "gate":
            return embedding + each(h - embedding, self.gate)
        return super().carry(h, embedding)
