"""What the tests share: one thread, no display, small models whose every parameter matters, one tiny stored run."""

import re
import signal

import matplotlib
import pytest
import soak
import torch

from sleepedu.lab import experiments, run_store
from sleepedu.model import ModelConfig, SleepLM
from sleepedu.tasks.math_reasoning import COLOURS, PLACES

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture
def make_model():
    """A factory of small models; their parameters are shaken, so that none is still at a neutral 0 or 1."""

    def make(layout: str = "ag", carry: str = "hidden", seed: int = 0, **settings) -> SleepLM:
        torch.manual_seed(seed)
        settings = {"vocabulary": 11, "width": 16, "heads": 2} | settings
        model = SleepLM(ModelConfig(layout=layout, carry=carry, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture(scope="session")
def tiny_experiment() -> experiments.Experiment:
    return experiments.Experiment("graph", "smoke", passes=2, steps=4)


@pytest.fixture(scope="session")
def tiny_run(tiny_experiment, tmp_path_factory) -> run_store.Run:
    """A run of four steps. Tests that damage it work on a copy."""
    return experiments.run(tiny_experiment, "cpu", tmp_path_factory.mktemp("runs"), examples=20)


@pytest.fixture(scope="session")
def make_tokenizer():
    """A factory of tokenizers of transformers with a token for every word; digits: those that it knows."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")

    def make(folder, digits: str = "0123456789") -> str:
        said = re.findall(r"\S+", "The dial shows now more less than the plus Question : what does show ? Answer .")
        words = ["[UNK]", *digits, *said, *COLOURS, *PLACES]
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def words(make_tokenizer, tmp_path_factory) -> str:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def pytest_terminal_summary(terminalreporter):
    for what, number in sorted(soak.COUNTS.items()):
        terminalreporter.write_line(f"{number:6,} {what}")
    for what, number in sorted(soak.LARGEST.items()) if soak.SOAK else ():
        terminalreporter.write_line(f"{number:.1e} {what}, at most")


@pytest.fixture
def handle_signal():
    """Set what handles a signal, for one test."""
    before = {}

    def handle(number, handler):
        before[number] = signal.signal(number, handler)

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)
