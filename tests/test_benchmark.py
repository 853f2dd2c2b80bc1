"""The benchmark measures what it says, at tiny sizes; how long anything takes is nobody's business here."""

import contextlib
import json
import re
import time

import pytest
import torch

from sleepedu.__main__ import main
from sleepedu.lab import benchmark

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(benchmark, "RULE_SHAPES", {"cpu": ((2, 1, 5, 4),)})
    monkeypatch.setattr(benchmark, "WINDOWS", (4, 8))
    monkeypatch.setattr(benchmark, "READ_BEFORE", (100, 300))
    monkeypatch.setattr(benchmark, "PASSES", (1, 2))
    monkeypatch.setattr(benchmark, "can_compile", lambda device: False)
    recipes = {
        key: recipe for key, recipe in benchmark.RECIPES.items() if key[0] == "graph" and key[1] in ("smoke", "paper")
    }
    monkeypatch.setattr(benchmark, "RECIPES", recipes)


def test_functions_run_in_turn_and_the_first_round_does_not_count():
    calls = []
    found = benchmark.alternately(
        {"quick": lambda: calls.append("quick"), "slow": lambda: calls.append("slow") or time.sleep(0.02)},
        CPU,
        repeats=5,
    )
    assert calls == ["quick", "slow"] * 6
    assert found["quick"]["rounds"] == found["slow"]["rounds"] == 5
    assert found["quick"]["ms"] < 20 <= found["slow"]["low"] <= found["slow"]["ms"] <= found["slow"]["high"]


def test_no_round_is_begun_after_the_given_time():
    found = benchmark.alternately({"slow": lambda: time.sleep(0.01)}, CPU, repeats=1000, seconds=0.02)
    assert found["slow"]["rounds"] < 20


def test_all_parts_give_rows_with_times(tiny, capsys):
    assert main(["bench", "--device", "cpu", "--json"]) == 0
    shown = capsys.readouterr()
    figures = json.loads(shown.out)
    assert list(figures) == ["machine", "rule", "step", "sleep", "answer"] and figures["machine"]["device"] == "cpu"
    assert re.findall(r"^measuring: (\w+)$", shown.err, re.MULTILINE) == list(benchmark.PARTS)
    assert {(row["window"], row["passes"]) for row in figures["sleep"]} == {(4, 1), (4, 2), (8, 1), (8, 2)}
    assert [row["passes"] for row in figures["step"]] == [1, 4]
    for row in figures["step"]:
        assert 0 < row["share"] < 1 and row["tokens a second"] > 0
    assert figures["step"][1]["operations"] > 2 * figures["step"][0]["operations"]
    for part in ("sleep", "answer"):
        assert all(0 < row["low"] <= row["ms"] <= row["high"] for row in figures[part])


def test_a_step_is_timed_compiled_too_where_that_can_be(tiny, monkeypatch):
    compiled = []

    @contextlib.contextmanager
    def quickly(model):
        compiled.append(model)
        yield

    monkeypatch.setattr(benchmark, "can_compile", lambda device: True)
    monkeypatch.setattr(benchmark, "compiled_blocks", quickly)
    rows = list(benchmark.time_step(CPU))
    assert len(compiled) == len(rows) == 2 and all("compiled" in row and "plain" in row for row in rows)


def test_a_sleeper_holds_the_same_after_any_stream_and_a_cache_grows_with_it(tiny):
    rows = list(benchmark.time_answer(CPU))
    sleepers = {(row["passes"], row["held"]) for row in rows if row["model"] == "sleep"}
    caches = {row["read"]: row["held"] for row in rows if row["model"] == "transformer"}
    (one, fewer), (two, more) = sorted(sleepers)
    assert (one, two) == (1, 2) and fewer < more, "h and embedding of the window are for the next pass"
    assert caches[300] == 3 * caches[100]


def test_the_peer_gives_our_numbers_where_it_is_installed(tiny):
    pytest.importorskip("transformers")
    for row in benchmark.time_rule(CPU):
        assert row["largest difference"] < 1e-4
        assert row["ratio"] == pytest.approx(row["theirs"]["ms"] / row["ours"]["ms"], abs=0.01)


def test_the_command_prints_tables_or_refuses(tiny, capsys):
    assert main(["bench", "--only", "sleep", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-5].split()[:3] == ["window", "passes", "ms"] and shown[-3].split()[:2] == ["4", "2"]
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--only", "speed"])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "invalid choice: 'speed'" in error


@pytest.mark.parametrize("message", ["can't allocate memory", "something else"])
def test_only_a_cache_that_does_not_fit_ends_the_answers(tiny, message, monkeypatch):
    def fail(*shape, **options):
        raise RuntimeError(message)

    monkeypatch.setattr(benchmark, "alternately", lambda functions, *rest, **named: {key: {} for key in functions})
    answers = benchmark.time_answer(CPU)
    assert [next(answers)["model"] for _ in range(3)] == ["sleep"] * 3
    monkeypatch.setattr(torch, "randn", fail)
    if "memory" in message:
        assert list(answers) == []
    else:
        with pytest.raises(RuntimeError, match=message):
            list(answers)
