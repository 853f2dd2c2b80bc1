"""Weights that are not here are fetched, once, from where the version's runs are published, and only the right ones."""

import http.server
import shutil
import threading
from functools import partial

import pooch
import pytest

from sleepedu.lab import run_store

NAME = "graph-laptop-sleep-N1-seed0"
WEIGHTS = f"book/runs/{NAME}/weights.pt"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An installed package's runs: everything but weights."""
    here = tmp_path / "store"
    (here / NAME).mkdir(parents=True)
    shutil.copy(run_store.COMMITTED / NAME / "run.json", here / NAME)
    monkeypatch.setattr(run_store, "COMMITTED", here)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    monkeypatch.delenv("SLEEPEDU_RUNS", raising=False)
    return here


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that is served as the repository's address, and the requests that came."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, _format, *told):
            asked.append(told[0].split()[1] if isinstance(told[0], str) else "")

    folder = tmp_path / "repository"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(run_store, "metadata", lambda name: {"Project-URL": f"Repository, {address}"})
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield folder, asked
    server.shutdown()


def publish(folder, tag, content):
    file = folder / "raw" / tag / WEIGHTS
    file.parent.mkdir(parents=True)
    file.write_bytes(content)


def test_weights_are_fetched_once_and_are_the_run_s(store, repository):
    folder, asked = repository
    wanted = (run_store.PACKAGE.parent / WEIGHTS).read_bytes()
    publish(folder, f"v{run_store.__version__}", b"of another run of this name")
    publish(folder, "HEAD", wanted)
    run = run_store.load_run(store / NAME)
    assert sum(p.numel() for p in run.load_model().parameters()) == run.provenance["parameters"]
    tags = [path.split("/")[2] for path in asked if path]
    assert tags == [f"v{run_store.__version__}", "HEAD"], "first as this version has them"
    asked.clear()
    run.load_model()
    assert asked == [], "from the cache"


def test_no_network_is_told_with_what_to_do(store, repository):
    with pytest.raises(FileNotFoundError, match=f"the weights of {NAME} are neither here nor at http.*SLEEPEDU_RUNS"):
        run_store.load_run(store / NAME).load_model()


def test_a_folder_serves_as_well(store, monkeypatch, tmp_path):
    monkeypatch.setenv("SLEEPEDU_RUNS", str(run_store.PACKAGE.parent / "book" / "runs"))
    assert run_store.load_run(store / NAME).load_model()
    monkeypatch.setenv("SLEEPEDU_RUNS", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="is missing: the run cannot be used without its weights"):
        run_store.load_run(store / NAME).load_model()


def test_only_stored_runs_are_fetched(tmp_path, repository):
    shutil.copytree(run_store.COMMITTED / NAME, tmp_path / "own" / NAME, ignore=shutil.ignore_patterns("weights.pt"))
    with pytest.raises(FileNotFoundError, match="is missing"):
        run_store.load_run(tmp_path / "own" / NAME).load_model()
    assert repository[1] == []
