"""The compiled rule gives the numbers of the recurrence, and without a compiler everything works as well."""

import os
import subprocess
import sys

import pytest
import torch
from test_fast_weights import NAMES, assert_same, make_inputs, outputs_and_gradients
from torch import library

from sleepedu import fast
from sleepedu.fast import cpp, gated_delta_fast, operator
from sleepedu.fast.operator import MULTIPLES
from sleepedu.fast_weights import gated_delta, gated_delta_chunked

compiled = pytest.mark.usefixtures("compiler")


@pytest.fixture(scope="session")
def compiler():
    if not fast.cpp_is_available():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("no C++ compiler on this machine: install g++ or clang++, or set CXX to one")


@pytest.fixture
def calls(monkeypatch):
    """Return the names of the compiled functions that are called meanwhile."""
    names, call = [], cpp._call
    monkeypatch.setattr(cpp, "_call", lambda name, *tensors: names.append(name) or call(name, *tensors))
    return names


def recurrence(inputs):
    return outputs_and_gradients(gated_delta, [x.double() for x in inputs])


@compiled
@pytest.mark.parametrize("forgetting", ["none", "little", "mixed", "strong"])
@pytest.mark.parametrize("length", [1, 2, 24, 63, 64, 65, 200])
@pytest.mark.parametrize("d_k", MULTIPLES)
def test_compiled_is_the_recurrence(d_k, length, forgetting, calls):
    d_v = MULTIPLES[d_k] * 3
    inputs = make_inputs(2, 3, length, d_k, d_v, forgetting, torch.float32, seed=length)
    found = outputs_and_gradients(gated_delta_fast, inputs)
    assert calls == ["gated_delta_forward", "gated_delta_backward"]
    assert found["o"].dtype == found["S"].dtype == torch.float32
    assert_same(found, recurrence(inputs), 1e-5)


@compiled
def test_strong_forgetting_early_on_does_not_blur_weak_forgetting_later(calls):
    q, k, v, log_a, b, S = make_inputs(1, 1, 150, 16, 16, "little", torch.float32)
    log_a[:, :, (0, 70)] = -1e6
    inputs = (q, k, v, log_a, b, 1e3 * S)
    assert_same(outputs_and_gradients(gated_delta_fast, inputs), recurrence(inputs), 1e-5)
    assert calls


@compiled
def test_any_layout_in_memory_will_do(calls):
    inputs = make_inputs(2, 3, 9, 16, 32, dtype=torch.float32)
    wanted = outputs_and_gradients(gated_delta_fast, inputs)
    assert calls

    def turned(*tensors):
        return gated_delta_fast(*(x.movedim(-1, 0).contiguous().movedim(0, -1) for x in tensors))

    def of_one_token(*tensors):  # every token at the same place
        return gated_delta_fast(*(x[:, :, :1].expand_as(x) for x in tensors[:5]), tensors[5].mT.contiguous().mT)

    assert_same(outputs_and_gradients(turned, inputs), wanted, 0)
    again = tuple(x[:, :, :1].expand_as(x).contiguous() for x in inputs[:5])
    o, S = of_one_token(*inputs)
    wanted_o, wanted_S = gated_delta_fast(*again, inputs[5])
    torch.testing.assert_close((o, S), (wanted_o, wanted_S), rtol=0, atol=0)


@compiled
def test_the_number_of_threads_changes_nothing():
    inputs = make_inputs(3, 5, 30, 32, 8, dtype=torch.float32)
    wanted = outputs_and_gradients(gated_delta_fast, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert_same(outputs_and_gradients(gated_delta_fast, inputs), wanted, 0)
    finally:
        torch.set_num_threads(threads)


@compiled
def test_no_sequence_is_no_error():
    o, S = gated_delta_fast(*make_inputs(0, 2, 5, 16, 16, dtype=torch.float32))
    assert o.shape == (0, 2, 5, 16) and S.shape == (0, 2, 16, 16)


@compiled
def test_torch_takes_it_for_an_operator():
    inputs = make_inputs(2, 2, 5, 16, 16, dtype=torch.float32)
    library.opcheck(operator.forward, inputs)
    o, w, S_end = operator.forward(*inputs)
    library.opcheck(operator.backward, (*inputs, w, torch.ones_like(o), torch.ones_like(S_end)))


@compiled
def test_no_memory_for_the_gradient_is_told(monkeypatch):
    inputs = make_inputs(1, 1, 5, 16, 16, dtype=torch.float32)
    call = cpp._call
    monkeypatch.setattr(cpp, "_call", lambda name, *tensors: name.endswith("backward") or call(name, *tensors))
    with pytest.raises(MemoryError, match="for S after each of 5 tokens: take a shorter window"):
        outputs_and_gradients(gated_delta_fast, inputs)


@pytest.mark.parametrize(
    "d_k, d_v, dtype", [(8, 16, torch.float32), (16, 8, torch.float32), (64, 6, torch.float32), (16, 16, torch.float64)]
)
def test_what_there_is_no_code_for_goes_in_chunks(d_k, d_v, dtype, calls):
    inputs = make_inputs(1, 2, 7, d_k, d_v, dtype=dtype)
    assert_same(outputs_and_gradients(gated_delta_fast, inputs), outputs_and_gradients(gated_delta_chunked, inputs), 0)
    assert not calls


@pytest.mark.parametrize("way", ["grad", "vmap", "grad of each", "jvp", "grad of grad"])
def test_torch_func_works_on_the_rule(way, calls):
    func, inputs = torch.func, make_inputs(2, 2, 5, 16, 16, "little", torch.float32)

    def found(rule):
        def loss(*tensors):
            return sum(x.square().sum() for x in rule(*tensors))

        gradient, each = func.grad(loss, argnums=tuple(range(6))), [torch.stack((x, x.flip(0))) for x in inputs]
        return {
            "grad": lambda: gradient(*inputs),
            "vmap": lambda: func.vmap(rule)(*each),
            "grad of each": lambda: func.vmap(gradient)(*each),
            "jvp": lambda: func.jvp(rule, inputs, inputs)[1],
            "grad of grad": lambda: func.grad(lambda S: gradient(*inputs[:5], S)[5].square().sum())(inputs[5]),
        }[way]()

    torch.testing.assert_close(found(gated_delta_fast), found(gated_delta), rtol=1e-4, atol=1e-3)
    assert not calls


def test_one_can_do_without(calls):
    inputs = make_inputs(1, 2, 7, 16, 16, dtype=torch.float32)
    before = fast.cpp_is_available()
    with fast.without_compiled_rule():
        assert not fast.cpp_is_available()
        with fast.without_compiled_rule():
            pass
        found = gated_delta_fast(*inputs)
    assert fast.cpp_is_available() is before and not calls
    torch.testing.assert_close(found, gated_delta_chunked(*inputs), rtol=0, atol=0)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """Nothing is compiled yet; return the folder in which it will be kept."""
    monkeypatch.setattr(fast, "_cpp", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    cpp.compiled_code.cache_clear()
    yield tmp_path / "torch" / "hub"
    cpp.compiled_code.cache_clear()


def test_without_a_compiler_there_is_none(fresh, monkeypatch):
    monkeypatch.setattr(cpp.shutil, "which", lambda name: None)
    assert not fast.cpp_is_available()


@pytest.mark.parametrize(
    "script", ["exit 1", 'if [ "${@: -2:1}" = -o ]; then echo nothing > "${@: -1}"; fi', "sleep 0"]
)
def test_a_compiler_that_fails_is_as_good_as_none(fresh, monkeypatch, tmp_path, script):
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/bash\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert not fast.cpp_is_available()


@pytest.mark.parametrize("folder", ["/proc/nope", "a file"])
def test_without_a_place_to_write_there_is_none(fresh, monkeypatch, tmp_path, folder):
    (tmp_path / "file").touch()
    monkeypatch.setattr(cpp.tempfile, "tempdir", folder if folder.startswith("/") else str(tmp_path / "file"))
    assert not fast.cpp_is_available()
    assert gated_delta_fast(*make_inputs(1, 1, 3, 16, 16, dtype=torch.float32))[0].isfinite().all()


def test_importing_loads_no_compiler_and_needs_no_place_to_write():
    code = "import sys, sleepedu; assert not {'torch._dynamo', 'scipy', 'matplotlib', 'ipywidgets'} & set(sys.modules)"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": "/proc/nope"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@compiled
def test_it_is_compiled_once_for_all_processes_and_again_where_what_was_kept_is_broken(fresh, monkeypatch, tmp_path):
    calls, run = [], subprocess.run
    monkeypatch.setattr(cpp, "FLAGS", ("-O0", *cpp.FLAGS[1:]))  # is compiled in no time
    monkeypatch.setattr(
        cpp.subprocess, "run", lambda command, **how: calls.append("-o" in command) or run(command, **how)
    )

    def compilations():
        calls.clear()
        cpp.compiled_code.cache_clear()
        assert cpp.compiled_code() is not None
        return sum(calls)

    assert (compilations(), compilations()) == (1, 0)
    (kept,) = fresh.iterdir()
    broken = tmp_path / "other" / "hub" / kept.name
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "other"))
    assert compilations() == 1 and broken.stat().st_size == kept.stat().st_size
    monkeypatch.setattr(cpp, "FURTHER", ((),))
    assert compilations() == 1, "for other processors the code is another"


@compiled
def test_a_compiler_without_openmp_and_native_will_do(fresh, monkeypatch):
    monkeypatch.setattr(cpp, "FURTHER", (("-fno-such-flag",), ()))
    inputs = make_inputs(2, 2, 70, 64, 4, dtype=torch.float32)
    assert_same(outputs_and_gradients(gated_delta_fast, inputs), recurrence(inputs), 1e-5)


@pytest.mark.parametrize("wrong", NAMES)
def test_wrong_shape_is_named(wrong):
    inputs = dict(zip(NAMES, make_inputs(2, 3, 4, 16, 16, dtype=torch.float32), strict=True))
    inputs[wrong] = torch.zeros(2, 3, 7, 8) if wrong != "q" else torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=wrong):
        gated_delta_fast(**inputs)


@compiled
def test_processes_that_start_together_do_not_meet(tmp_path):
    code = "from sleepedu import fast; assert fast.cpp_is_available()"
    environment = os.environ | {"TORCH_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in started] == [0, 0]
