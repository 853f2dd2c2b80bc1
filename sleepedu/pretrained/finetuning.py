"""Fine-tune a pretrained model to sleep on text: every N on the same examples, stored, resumed where it stood."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from sleepedu import checks, storage
from sleepedu.checkpoint import Checkpoint
from sleepedu.evaluation import accuracy_by_depth, check_examples
from sleepedu.fast.precision import choose_precision
from sleepedu.lab import run_store
from sleepedu.lab.experiments import check_memory
from sleepedu.lab.recipes import setting
from sleepedu.pretrained.blocks import PretrainedLM
from sleepedu.pretrained.loading import add_lora, load, packed, restore, retrofit
from sleepedu.pretrained.text import TextReasoning
from sleepedu.training import History, TrainConfig, train

TRAINED = "trained.safetensors"  # in a run's folder: its weights


@dataclass(frozen=True)
class FineTuning:
    """One fine-tuning in words; the command line asks for the same fields. ValueError for what cannot be trained."""

    source: str = field(metadata={"help": "a name on the hub, a folder, a .gguf file, smollm2 or small-hybrid"})
    passes: int = setting(4, "N, sleep passes over every window")
    seed: int = setting(0, "of what is new in the model, and of all examples")
    steps: int = setting(500, "of training")
    batch: int = setting(8, "examples a step")
    windows: int = setting(1, "windows of a text")
    window: int = setting(512, "tokens of a window")
    quantities: int = setting(8, "dials that a problem is about")
    operations: int = setting(4, "most operations of an answer")
    digits: int = setting(10, "that a dial can show, 2 to 10")
    forms: str = setting("more,less,plus", "what sentences say of a dial: more, and less or plus where they are named")
    ask: str = setting("one", "question before the text, as in the paper, or for every dial after it")
    loop: str = setting(
        "", "FIRST:END, the blocks that are run N times; the middle half, of a retrofit all, when absent"
    )
    carry: str = setting("gate", "from pass to pass: gate or hidden")
    eviction: str = setting("hard", "what a sleep does to its window: hard or sliding")
    after: str = setting("", "retrofit: the blocks to put fast weights behind, as in 4,9,14, or 'six' of them")
    rank: int = setting(8, "of LoRA; 0 trains every weight")
    learning_rate: float = setting(0.002, "Muon's, for new matrices and, with rank 0, those of the blocks")
    adam_learning_rate: float = setting(0.0005, "AdamW's, for LoRA and the rest")

    def __post_init__(self):
        checks.whole("rank", self.rank, least=0)
        if not {"more"} <= set(self.forms.split(",")) <= {"more", "less", "plus"}:
            raise ValueError(f"forms must be more, with less or plus or both of them behind commas, got {self.forms!r}")
        _ = self.train_config, self._numbers("loop", ":"), self._numbers("after", ",")
        if self.loop and len(self._numbers("loop", ":")) != 2:
            raise ValueError(f"loop must be FIRST:END, as in 6:18, got {self.loop!r}")

    def _numbers(self, name: str, between: str) -> tuple[int, ...]:
        value = getattr(self, name)
        try:
            return tuple(int(part) for part in value.split(between)) if value not in ("", "six") else ()
        except ValueError:
            raise ValueError(f"{name} must be whole numbers with {between!r} between them, got {value!r}") from None

    @property
    def name(self) -> str:
        """The run's name, and that of its folder; other settings go into another, by a few digits that they give."""
        named = {"source", "passes", "carry", "steps", "seed"}
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        others = {name: value for name, value in values.items() if name not in named}
        if Path(self.source).name != self.source:
            others["source"] = self.source
        digits = run_store.json_checksum(others)[:6]
        words = (f"N{self.passes}", self.carry, f"{self.steps}steps", digits, f"seed{self.seed}")
        return "-".join([Path(self.source).name, *words])

    @property
    def train_config(self) -> TrainConfig:
        own: dict[str, Any] = {name: getattr(self, name) for name in ("passes", "steps", "batch", "seed")}
        own |= {name: getattr(self, name) for name in ("learning_rate", "adam_learning_rate")}
        return TrainConfig(**own, warmup=min(50, self.steps // 10))

    def make_task(self) -> TextReasoning:
        problem: dict[str, Any] = {name: getattr(self, name) for name in ("quantities", "operations", "digits", "ask")}
        problem |= {"sums": "plus" in self.forms, "less": "less" in self.forms}
        return TextReasoning(self.source, self.windows, self.window, **problem)

    def form(self) -> PretrainedLM:
        """Return the model on "meta", without its weights."""
        return self.make_model(fetch=False)

    def make_model(self, fetch: bool = True) -> PretrainedLM:
        """Return the model before its first step; its form alone, on meta, where its weights are not to be fetched."""
        loop: Any = self._numbers("loop", ":") or None
        torch.manual_seed(self.seed)
        if self.after:
            after = self._numbers("after", ",") or None
            model = retrofit(self.source, after, loop, self.carry, eviction=self.eviction, fetch=fetch)
        else:
            model = load(self.source, loop, self.carry, eviction=self.eviction, fetch=fetch)
        return add_lora(model, self.rank) if self.rank else model


class FineTuned(run_store.Run):
    """A finished fine-tuning; its experiment is a ``FineTuning``."""

    def make_task(self) -> TextReasoning:
        return self.experiment.make_task()

    def load_model(self, device: str = "cpu") -> PretrainedLM:
        """Return the model as it was trained; FileNotFoundError or ValueError for weights missing or not its own."""
        file = run_store.weights_of(self.path, self.weights_checksum, TRAINED)
        return restore(file).to(run_store.find_device(device)).eval()

    def row(self) -> dict[str, Any]:
        """Return the run as ``evaluate`` shows it for a program to read."""
        return {"run": self.name, **asdict(self.experiment), "depths": run_store.plain_table(self.table)}


def finetune(
    settings: FineTuning,
    device: str = "auto",
    directory: Path | str = run_store.OWN,
    watch: Callable[[History, TrainConfig], None] | None = None,
    examples: int = 400,
    recompute: bool = True,
) -> FineTuned:
    """Return the stored fine-tuning of these settings, or train, measure and store it now; interrupted, it goes on.

    watch: as in ``train``. examples: to measure on, for every number of operations. recompute: compute every block
    again for its gradient, which all but the smallest models need. Raises what ``load``, ``retrofit`` and ``train``
    raise; ValueError, before any weights are fetched, for a GPU that is too small, or no examples.
    """
    check_examples(examples, settings.batch)
    where = run_store.find_device(device)
    for path in (run_store.COMMITTED / run_store.FINE_TUNED / settings.name, Path(directory) / settings.name):
        if (path / "run.json").exists() and (found := load_finetuned(path)).experiment == settings:
            return found
    task = settings.make_task()
    if where.type == "cuda":
        check_memory(settings, settings.batch, recompute, torch.cuda.get_device_properties(where))
    with storage.sole_use(path):
        model, checkpoint = settings.make_model().to(where), Checkpoint(path)
        model.recompute = recompute
        history = train(model, task, settings.train_config, watch, checkpoint)
        table = accuracy_by_depth(model, task, settings.passes, examples, settings.seed, batch=settings.batch)
        made = {
            "precision": choose_precision(settings.train_config.precision, where),
            "recomputed": recompute,
            "trained": sum(weight.numel() for weight in model.state_dict().values()),
            "gate": model.gate.abs().mean().item() if settings.carry == "gate" else None,
        }
        run_store.save_run(path, settings, None, model, history, table, made, TRAINED, packed(model))
        checkpoint.remove()
    return load_finetuned(path)


def load_finetuned(run: Path | str) -> FineTuned:
    """Return a stored fine-tuning by its folder or name. Raises as ``load_run`` does."""
    path, stored = run_store.read_run(run)
    with storage.reading(path / "run.json"):
        return FineTuned(path, FineTuning(**stored["experiment"]), **run_store.measured(stored))


def load_any(run: Path | str) -> FineTuned | run_store.Run:
    """Return a stored run of either kind; raises as ``load_run`` does."""
    of_pretrained = "source" in run_store.read_run(run)[1]["experiment"]
    return load_finetuned(run) if of_pretrained else run_store.load_run(run)
