"""Where it runs: paths that are not plain, folders that cannot be written, no network, lines that end as on Windows."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest

from sleepedu.__main__ import main
from sleepedu.lab import run_store

TRAIN = ["train", "graph", "--size", "smoke", "--steps", "4", "--examples", "20", "--quiet"]


def python(*arguments, **settings):
    command = [sys.executable, *map(str, arguments)]
    there = os.pathsep.join([str(run_store.PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": there, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, **settings)


def sleepedu(*arguments, **settings):
    return python("-m", "sleepedu", *arguments, **settings)


def test_a_path_may_have_spaces_and_any_letters(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "Ein Büchlein vom Schlaf – 眠り"
    folder.mkdir()
    runs = folder / "mes réseaux"
    made = sleepedu(*TRAIN, "--runs", runs, cwd=folder)
    assert made.returncode == 0, made.stderr
    (run,) = runs.iterdir()
    monkeypatch.chdir(folder)
    for command in (["evaluate", run, "--examples", "20"], ["results", "--runs", runs]):
        assert main(list(map(str, command))) == 0
        assert run.name in capsys.readouterr().out


def may_not_write_everywhere():
    """Give up what lets Linux's root write where nobody may (CAP_DAC_OVERRIDE)."""
    assert ctypes.CDLL(None).prctl(24, 1, 0, 0, 0) == 0  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="how root is kept from writing is Linux's own")
def test_a_store_that_cannot_be_written_is_read_and_refused_in_one_line(tiny_run, tmp_path):
    settings = {"preexec_fn": may_not_write_everywhere} if os.geteuid() == 0 else {}
    store = tmp_path / "store"
    shutil.copytree(tiny_run.path, store / tiny_run.name)
    for path in [store, *store.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        shown = sleepedu("results", "--runs", store, cwd=store, **settings)
        assert tiny_run.name in shown.stdout, shown.stderr
        refused = sleepedu(*TRAIN, "--runs", store / "new", cwd=store, **settings)
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
        assert "Permission denied" in refused.stderr and "Traceback" not in refused.stderr
    finally:
        for path in [store, *store.rglob("*")]:
            path.chmod(0o755)


def test_a_run_may_come_from_a_system_that_ends_lines_in_its_own_way(tiny_run, tmp_path):
    copy = shutil.copytree(tiny_run.path, tmp_path / tiny_run.name)
    text = (copy / "run.json").read_bytes()
    (copy / "run.json").write_bytes(text.replace(b"\n", b"\r\n"))
    assert b"\r\n" in (copy / "run.json").read_bytes()
    found = run_store.load_run(copy)
    assert found.table == tiny_run.table and found.load_model() is not None


def test_nothing_asks_the_network(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "import socket, sys\n"
        "def refuse(*_, **__):\n"
        "    raise AssertionError('something asked the network')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from sleepedu.__main__ import main\n"
        f"assert main({[*TRAIN, '--runs', str(tmp_path / 'runs')]!r}) == 0\n"
        "assert main(['results']) == 0\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_goes_into_a_file_is_utf_8_whatever_the_console_is(encoding, tiny_run, tmp_path):
    shutil.copytree(tiny_run.path, tmp_path / "store" / "Schlaf – 眠り")
    page = tmp_path / "results.txt"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(run_store.PACKAGE.parent)}
    with open(page, "wb") as file:
        command = [sys.executable, "-m", "sleepedu", "results", "--runs", tmp_path / "store"]
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Schlaf – 眠り" in page.read_text(encoding="utf-8")
