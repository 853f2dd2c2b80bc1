"""Stored runs and checkpoints that were truncated, flipped, exchanged or edited: the same numbers or a clear error."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from soak import COUNTS, size

from sleepedu import checkpoint, storage
from sleepedu.__main__ import main
from sleepedu.checkpoint import Checkpoint
from sleepedu.lab import experiments, run_store
from sleepedu.lab.run_store import load_run
from sleepedu.tasks import GraphRetrieval
from sleepedu.training import TrainConfig, train

SEEDS = range(size(60, 1000))
NUMBERS = (float("nan"), float("inf"), -1, -0.5, 0, 10**400, 1e308, 0.123456, True)
VALUES = (None, "", "0.5", [], {}, [[]], {"a": 1}, *NUMBERS)


def truncate(data: bytes, dice: random.Random) -> bytes:
    return data[: dice.randrange(len(data))]


def flip(data: bytes, dice: random.Random) -> bytes:
    flipped = bytearray(data)
    for _ in range(dice.choice((1, 1, 1, 2, 20))):
        flipped[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return bytes(flipped)


def cut_out(data: bytes, dice: random.Random) -> bytes:
    start, end = sorted(dice.randrange(len(data)) for _ in range(2))
    return data[:start] + data[end:]


def overwrite(data: bytes, dice: random.Random) -> bytes:
    start = dice.randrange(len(data))
    noise = dice.choice((dice.randbytes(50), bytes(50), data[:50]))
    return data[:start] + noise + data[start + 50 :]


def append(data: bytes, dice: random.Random) -> bytes:
    return data + dice.choice((dice.randbytes(30), data, b"\0", b"}", b" "))


def replace_all(data: bytes, dice: random.Random) -> bytes:
    return dice.choice((b"", b"\0" * 100, b"PK\x05\x06" + bytes(18), b"[" * 100_000, b'{"version": 1}', b"null", b"1"))


BYTES = (truncate, flip, flip, cut_out, overwrite, append, replace_all)


def edit_json(data: bytes, dice: random.Random) -> bytes:
    """Delete, rename, exchange or add one thing somewhere in a JSON file."""
    stored = json.loads(data)
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(stored)
    inside, key = dice.choice(places)
    way = dice.choice(("delete", "rename", "change", "change", "change", "add"))
    if way == "change":
        inside[key] = dice.choice(VALUES)
    elif way == "add" and isinstance(inside, dict):
        inside["new"] = dice.choice(VALUES)
    elif way == "rename" and isinstance(inside, dict):
        inside[f"{key}s"] = inside.pop(key)
    else:
        del inside[key]
    return json.dumps(stored).encode()


@pytest.fixture(scope="module")
def other_run(tiny_run, tmp_path_factory):
    """A run of the same shapes, whose files are not the tiny run's."""
    return experiments.run(replace(tiny_run.experiment, seed=1), "cpu", tmp_path_factory.mktemp("others"), examples=20)


def mutate(folder, other, dice) -> str:
    """Damage a stored run in one way, or two."""
    name = dice.choice(("run.json", "weights.pt"))
    file = folder / name
    way = dice.choice(("bytes", "bytes", "json", "json", "exchange", "delete"))
    if way == "json":
        (folder / "run.json").write_bytes(edit_json((folder / "run.json").read_bytes(), dice))
    elif way == "exchange":
        source = dice.choice((other / name, folder / "weights.pt", folder / "run.json"))
        file.write_bytes(source.read_bytes())
    elif way == "delete":
        file.unlink()
    else:
        way = dice.choice(BYTES)
        file.write_bytes(way(file.read_bytes(), dice))
    return f"{name} {way}"


def read(path) -> tuple:
    run = load_run(path)
    return replace(run, path=None), {name: t.tolist() for name, t in run.load_model().state_dict().items()}


def one_line(error: Exception) -> bool:
    return len(str(error)) < 1000 and len(str(error).splitlines()) == 1


def test_a_mutated_run_is_the_same_or_refused(tiny_run, other_run, tmp_path, capsys):
    whole, others = read(tiny_run.path), read(other_run.path)
    assert whole[1] != others[1]
    folder, refused = tmp_path / "run", 0
    for seed in SEEDS:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny_run.path, folder)
        dice = random.Random(seed)
        way = mutate(folder, other_run.path, dice)
        rest = [file for file in sorted(folder.iterdir()) if file.stat().st_size]
        if rest and dice.random() < 0.2:  # damaged twice
            second = dice.choice(rest)
            second.write_bytes(flip(second.read_bytes(), dice))
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        try:
            found = read(folder)
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert one_line(error), f"seed {seed}, {way}: {error}"
            if seed % 10 == 0:
                assert main(["evaluate", str(folder), "--examples", "1"]) == 2, f"seed {seed}, {way}"
                shown = capsys.readouterr()
                assert shown.out == "" and len(shown.err.splitlines()) == 1, f"seed {seed}, {way}: {shown.err}"
        else:
            assert found == whole, f"seed {seed}, {way}: other numbers were taken for the run's"
        assert before == {file.name: file.read_bytes() for file in folder.iterdir()}, f"seed {seed}, {way}: touched"
    assert refused > len(SEEDS) / 2
    COUNTS["mutated runs tried"] += len(SEEDS)


TASK = GraphRetrieval(nodes=4, hops=2, queries=3)
CONFIG = TrainConfig(passes=2, steps=3, batch=2, warmup=1)


def test_a_mutated_checkpoint_goes_on_the_same_or_is_refused(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    model = make_model()
    train(model, TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
    file = tmp_path / Checkpoint.FILE
    whole, end, seeds = file.read_bytes(), model.state_dict(), SEEDS[: len(SEEDS) // 2]
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 1000)
    for seed in seeds:
        dice = random.Random(seed)
        way = dice.choice(BYTES)
        mutated = way(whole, dice)
        file.write_bytes(mutated)
        resumed = make_model()
        try:
            train(resumed, TASK, CONFIG, checkpoint=Checkpoint(tmp_path))
        except ValueError as error:
            assert one_line(error) and str(file) in str(error), f"seed {seed}, {way.__name__}: {error}"
        else:
            same = all(torch.equal(t, end[name]) for name, t in resumed.state_dict().items())
            assert same, f"seed {seed}, {way.__name__}: another run went on"
        assert file.read_bytes() == mutated
    COUNTS["mutated checkpoints tried"] += len(seeds)


@pytest.fixture
def copy_of_run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run.path, tmp_path / tiny_run.name)


def test_every_number_of_a_run_is_under_its_checksum(copy_of_run, tiny_run):
    text = (copy_of_run / "run.json").read_text()
    numbers = (tiny_run.table[2].accuracy, tiny_run.history.loss[1], tiny_run.provenance["seconds"])
    for number in (*numbers, tiny_run.settings["train"]["adam_learning_rate"]):
        (copy_of_run / "run.json").write_text(text.replace(str(number), str(number + 0.001), 1))
        with pytest.raises(
            ValueError, match=r"run.json cannot be used .*changed: it does not have the checksum it states"
        ):
            load_run(copy_of_run)


def test_weights_of_another_seed_are_refused(copy_of_run, other_run):
    shutil.copy(other_run.path / "weights.pt", copy_of_run)
    with pytest.raises(ValueError, match=r"does not hold this run's weights, those with the checksum in run\.json"):
        load_run(copy_of_run).load_model()


def test_a_run_of_settings_that_this_library_does_not_know_is_refused(copy_of_run):
    """As a later version would write it: whole, with the right checksum."""
    stored = json.loads((copy_of_run / "run.json").read_text())
    del stored["checksum"]
    stored["settings"]["model"]["dreams"] = 3
    stored["checksum"] = run_store.json_checksum(stored)
    (copy_of_run / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"run.json cannot be used \(TypeError: .*dreams"):
        load_run(copy_of_run)


def test_a_full_disk_at_the_end_is_one_line_and_the_checkpoint_stays(tmp_path, capsys, monkeypatch):
    command = f"train graph --size smoke --steps 3 --examples 5 --quiet --runs {tmp_path}".split()
    monkeypatch.setattr(checkpoint, "SAVE_EVERY", 0)
    write = storage.write

    def full(path, content):
        if path.name == "weights.pt":
            raise OSError(f"{path} could not be written (No space left on device); what stood there stays")
        write(path, content)

    monkeypatch.setattr(storage, "write", full)
    assert main(command) == 2
    assert "weights.pt could not be written (No space left on device)" in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    assert [file.name for file in folder.iterdir()] == [Checkpoint.FILE]
    monkeypatch.setattr(storage, "write", write)
    assert main(command) == 0
