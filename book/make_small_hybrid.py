"""Make the small pretrained hybrid that comes with the library, in half an hour:
`python book/make_small_hybrid.py`.

A model of Qwen3.5's kind in small, four blocks, pretrained without sleep: every
problem lies before it as a whole, text and questions in one window that nothing is
evicted from. What a sleep needs it has never done.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from torch import nn

from sleepedu import Episode, TrainConfig, train
from sleepedu.evaluation import accuracy_by_depth
from sleepedu.lab import run_store
from sleepedu.pretrained import PretrainedLM, TextReasoning, load
from sleepedu.pretrained.loading import SMALL_FOLDER
from sleepedu.progress import ProgressBar
from sleepedu.tasks.base import UNSCORED
from sleepedu.tasks.math_reasoning import COLOURS, PAIRED, PLACES

SAID = "The dial shows now more less than the plus ."
ASKED = "Question : what does show ? Answer"
KNOWN = [*"0123456789", *SAID.split(), *ASKED.split(), *COLOURS[:PAIRED], *PLACES]
WORDS = ["[UNK]", *KNOWN]
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    # A digit can see the name before it, as in "The red mill dial now shows 3".
    "linear_conv_kernel_dim": 8,
    "tie_word_embeddings": True,
}
PROBLEM = {
    "quantities": 6,
    "operations": 3,
    "digits": 5,
    "sums": False,
    "less": False,
}
TASK = {"window": 80, "ask": "every", **PROBLEM}
RATES = {"learning_rate": 0.01, "adam_learning_rate": 0.005, "warmup": 100}


@dataclass(frozen=True)
class InSight(TextReasoning):
    """``TextReasoning``, the text in the prompt: there is nothing to sleep on."""

    name = "text in sight"

    @property
    def prompt_length(self) -> int:
        return self.windows * self.window + super().prompt_length

    def sample(self, batch: int, generator: torch.Generator, depth=None) -> Episode:
        apart, asks = super().sample(batch, generator, depth), super().prompt_length
        text = apart.windows.flatten(1)
        parts = (
            (text, apart.prompt),
            (torch.full_like(text, UNSCORED), apart.targets),
            (torch.zeros_like(text), apart.depth),
        )
        joined = (torch.cat((of_text, own[:, :asks]), 1) for of_text, own in parts)
        return Episode(apart.windows[:, :0], *joined)


def before_training(folder: Path, seed: int) -> PretrainedLM:
    """Write a model with random weights and its tokenizer, and return the model."""
    numbers = {word: number for number, word in enumerate(WORDS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.Qwen3_5TextConfig(vocab_size=len(WORDS), **SHAPE)
    model = transformers.Qwen3_5ForCausalLM(config)
    for layer in model.model.layers:
        # To forget 2% a token at first; as transformers begins, it forgets all.
        if hasattr(layer, "linear_attn"):
            nn.init.zeros_(layer.linear_attn.A_log)
            nn.init.constant_(layer.linear_attn.dt_bias, -4.0)
    model.save_pretrained(folder)
    return load(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=SMALL_FOLDER)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2500)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = before_training(options.folder, options.seed)
    model.recompute = False  # it is small
    config = TrainConfig(1, options.steps, batch=64, seed=options.seed, **RATES)
    task = InSight(str(options.folder), **TASK)
    history = train(model, task, config, ProgressBar(), compile=True)
    table = accuracy_by_depth(model, task, 1, examples=1000, seed=options.seed)
    model.pretrained[0].to(torch.bfloat16).save_pretrained(options.folder)
    told = {
        "task": TASK,
        "train": asdict(config),
        "table": run_store.plain_table(table),
        "provenance": {
            **run_store.machine(torch.device("cpu")),
            "transformers": transformers.__version__,
            "seconds": history.seconds[-1],
        },
        "history": asdict(history),
    }
    (options.folder / "training.json").write_text(run_store.readable_json(told))
    print(json.dumps({depth: round(a.accuracy, 3) for depth, a in table.items()}))


if __name__ == "__main__":
    main()
