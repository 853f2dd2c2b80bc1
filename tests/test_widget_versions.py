"""Explorers under ipywidgets 7.7.1, which Colab has, and under the installed one: alone, and in a notebook's kernel."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import ipywidgets
import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

ROOT = Path(__file__).resolve().parent.parent
WIDGETS_7 = ROOT / ".venv" / "widgets7"
VIEW = "application/vnd.jupyter.widget-view+json"


def environment(version):
    """Return the variables of a process that finds the library here, and ipywidgets of this version."""
    first = []
    if version == "7.7.1":
        assert (WIDGETS_7 / "ipywidgets").is_dir(), (
            f"{WIDGETS_7} has no ipywidgets 7: `make .venv/ready` in {ROOT} puts it there, or: python -m pip install "
            "--no-deps --target .venv/widgets7 --requirement tests/environments/widgets7.txt"
        )
        first = [WIDGETS_7]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*first, ROOT])), "MPLBACKEND": "agg"}


def test_the_tests_of_explorers_pass_under_ipywidgets_7():
    tests = "import sys, ipywidgets, pytest; print(ipywidgets.__version__); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-p", "no:cacheprovider", str(ROOT / "tests" / "test_explorer.py")]
    command = [sys.executable, "-c", tests, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment("7.7.1"), cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("7.7.1\n") and " passed" in done.stdout and "skipped" not in done.stdout


class FrontEnd:
    """What a browser does for a notebook: runs cells, keeps the widgets' state, tells the kernel what a reader did."""

    def __init__(self, client):
        self.client, self.widgets, self.outputs = client, {}, []  # widgets: {comm's id: state}

    def run(self, source):
        """Run a cell and return its outputs."""
        self.outputs = []
        self._follow(self.client.execute(source))
        return self.outputs

    def act(self, widget, data):
        """Say that a reader changed or pressed a widget, and wait until the kernel has answered."""
        message = self.client.session.msg("comm_msg", {"comm_id": widget, "data": data})
        self.client.shell_channel.send(message)
        self._follow(message["header"]["msg_id"])

    def _follow(self, request):
        while True:
            message = self.client.get_iopub_msg(timeout=120)
            if message["parent_header"].get("msg_id") != request:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind in ("comm_open", "comm_msg") and "state" in content["data"]:
                paths = [path[0] for path in content["data"].get("buffer_paths", [])]
                buffers = dict(zip(paths, map(bytes, message["buffers"]), strict=True))
                self.widgets.setdefault(content["comm_id"], {}).update(content["data"]["state"] | buffers)
            assert kind != "error", "\n".join(content["traceback"])
            if kind in ("stream", "display_data", "execute_result"):
                self.outputs.append(content)
            if kind == "status" and content["execution_state"] == "idle":
                return

    def children(self, widget):
        return [child.removeprefix("IPY_MODEL_") for child in self.widgets[widget]["children"]]


def moved(**state):
    return {"method": "update", "state": state, "buffer_paths": []}


@pytest.fixture(params=["7.7.1", ipywidgets.__version__])
def front_end(request):
    manager, client = start_new_kernel(startup_timeout=120, env=environment(request.param), cwd=str(ROOT))
    try:
        yield request.param, FrontEnd(client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def test_a_notebook_shows_an_explorer_and_answers_its_reader(front_end):
    version, notebook = front_end
    cells = [cell.source for cell in nbformat.read(ROOT / "tests" / "explorer.ipynb", as_version=4).cells]
    assert notebook.run(cells[0])[-1]["text"] == f"{version}\n"
    (shown,) = notebook.run(cells[1])
    assert shown["data"]["text/html"].startswith('<div class="explorer"')
    box = shown["data"][VIEW]["model_id"]
    assert notebook.widgets[box]["_model_name"] == "VBoxModel"
    passes, hops, example, words, picture = notebook.children(box)
    number, button = notebook.children(example)

    def seen():
        return notebook.widgets[picture]["value"], notebook.widgets[words]["value"]

    states = [seen()]
    assert states[0][0].startswith(b"RIFF") and states[0][1].startswith("seed 11, N = 1: ")
    for widget, data, said in (
        (passes, moved(index=1), "seed 11, N = 2: "),
        (hops, moved(index=1), "seed 11, N = 2: "),
        (button, {"method": "custom", "content": {"event": "click"}}, "seed 12, N = 2: "),
        (number, moved(value=40), "seed 40, N = 2: "),
    ):
        notebook.act(widget, data)
        states.append(seen())
        assert states[-1][1].startswith(said)
    for before, after in pairwise(states):
        assert before[0] != after[0] and before[1] != after[1]
    notebook.act(number, moved(value=13))
    assert seen()[0] == states[-1][0] and "RuntimeError: no &lt;ring&gt;" in seen()[1]
    assert notebook.run(cells[2])[-1]["text"] == "5 pictures\n"
