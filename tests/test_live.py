"""The exported models: up to date with their runs, small, rounded without harm. The browser's part is in test_pages."""

import base64
import json
import re
import shutil
from pathlib import Path

import live_model as live
import pytest
import torch
from results_page import FINDINGS, SIZES

from sleepedu.evaluation import accuracy_by_depth
from sleepedu.intervals import across_seeds
from sleepedu.lab.results import grouped
from sleepedu.lab.run_store import COMMITTED, Run, load_run, stored_runs
from sleepedu.model import ModelConfig, SleepLM

FOLDER = Path(__file__).resolve().parent.parent / "book" / "_extra" / "live"


def unpack(packed) -> torch.Tensor:
    """Return what ``pack_weights`` made this from, a matrix as it was rounded; a list has its rows."""
    if isinstance(packed, list):
        return torch.cat([unpack(part) for part in packed])
    if "numbers" in packed:
        return torch.frombuffer(bytearray(base64.b64decode(packed["numbers"])), dtype=torch.float32)
    base, value = len(live.DIGITS), {code: digit for digit, code in enumerate(live.DIGITS.tolist())}
    digits = torch.tensor([value[code] for code in packed["levels"].encode()])
    digits = digits.view(-1, packed["columns"], packed["characters"])
    places = base ** torch.arange(packed["characters"]).flip(0)
    levels = (digits * places).sum(dim=-1) - base ** packed["characters"] // 2
    return levels * torch.frombuffer(bytearray(base64.b64decode(packed["scales"])), dtype=torch.float32)[:, None]


def read_models(text: str) -> dict[int, SleepLM]:
    """Return the rounded model for every N in the text of a weights.js."""
    data = read_data(text)
    return {int(passes): read_model(stored, data["config"]) for passes, stored in data["models"].items()}


def read_data(text: str) -> dict:
    return json.loads(text[text.index("{") :].rstrip(";\n"))


def read_model(stored: dict, config: dict) -> SleepLM:
    model = SleepLM(ModelConfig(**config)).eval()
    model.load_state_dict({name: unpack(packed) for name, packed in stored["weights"].items()})
    return model


def read_light_sleeper() -> SleepLM:
    config = read_data((FOLDER / "weights.js").read_text())["config"]
    return read_model(read_data((FOLDER / "light_sleeper.js").read_text()), config)


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return [load_run(COMMITTED / name) for name in live.RUNS]


@pytest.fixture(scope="module")
def models():
    return read_models((FOLDER / "weights.js").read_text())


def test_the_committed_weights_are_those_of_the_runs(runs):
    again = "write them again: python book/live_model.py"
    assert (FOLDER / "weights.js").read_text() == live.script(runs), again
    assert [run.settings["train"]["passes"] for run in runs] == list(live.PASSES), "each N has a model of its own"
    sleeper = load_run(COMMITTED / live.LIGHT_SLEEPER)
    assert (FOLDER / "light_sleeper.js").read_text() == live.light_sleeper_script(sleeper, runs[0]), again


def test_scripts_and_weights_are_small():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir() if path.suffix in (".js", ".css")}
    assert len(sizes) == 6
    assert sizes.pop("light_sleeper.js") + sizes.pop("night.js") < 120_000, "chapter 11 alone has them"
    assert sum(sizes.values()) < 500_000


@pytest.mark.parametrize("passes", live.PASSES)
def test_rounding_leaves_the_stored_table_within_its_interval(passes, runs, models):
    run = runs[passes - 1]
    table = accuracy_by_depth(models[passes], run.make_task(), passes)  # on the examples of the stored table
    for depth, stored in run.table.items():
        one_answer = 1 / (stored.n * run.make_task().queries)  # by which 100% lies above an interval that ends there
        assert stored.low <= table[depth].accuracy <= stored.high + one_answer, f"N = {passes}, k = {depth}"


def test_rounding_leaves_what_the_light_sleeper_knows():
    run = load_run(COMMITTED / live.LIGHT_SLEEPER)
    as_trained, rounded = (
        accuracy_by_depth(model, run.make_task(), 3, 300) for model in (run.load_model(), read_light_sleeper())
    )
    for depth, accuracy in as_trained.items():
        assert abs(rounded[depth].accuracy - accuracy.accuracy) < 0.02, f"{depth} hops"


@pytest.mark.parametrize("characters, levels", [(1, 91), (2, 91**2)])
def test_a_matrix_is_rounded_to_half_a_level_of_its_row(characters, levels):
    torch.manual_seed(0)
    matrix = torch.randn(40, 64) * torch.logspace(-6, 3, 40)[:, None]
    matrix[7] = 0
    packed = live.pack_weights(matrix, characters)
    assert set(packed["levels"]) <= {chr(code) for code in range(35, 127)} - {"\\"}, "nothing in it needs escaping"
    error = (unpack(packed) - matrix).abs().amax(dim=1)
    assert (error <= matrix.abs().amax(dim=1) / (levels - 1) * 1.001).all()
    assert torch.equal(unpack(packed)[7], torch.zeros(64))


@pytest.mark.parametrize("characters, most", [(1, 45), (2, 4140)])
def test_every_level_comes_back(characters, most):
    levels = torch.arange(-most, most + 1, dtype=torch.float32)[None]
    assert torch.equal(unpack(live.pack_weights(levels, characters)), levels)


def test_a_vector_is_not_rounded():
    vector = torch.randn(64)
    assert torch.equal(unpack(live.pack_weights(vector)), vector)


def test_a_question_is_asked_as_the_task_asks_it(runs, models):
    task = runs[3].make_task()
    episode = task.sample(1, torch.Generator().manual_seed(3), depth=4)
    following = task.successors(episode)[0].tolist()
    ring = [0]
    while len(ring) < task.nodes:
        ring.append(following[ring[-1]])
    told = episode.windows[0, 0, ::2].tolist()
    start, right = episode.prompt[0, 1].item(), episode.targets[0, 1].item()
    logits, trace = live.ask(models[4], 4, ring, told, start, 4)
    assert logits.argmax() == right and len(trace.S[0]) == 5


def test_the_first_page_tells_the_runs_numbers(runs):
    text = " ".join((FOLDER.parent.parent / "intro.md").read_text().split())
    first, last = runs[0].table, runs[-1].table
    assert first[1].n == 2000 and "Over 2,000 fresh rings" in text
    assert f"gets {first[1].accuracy:.0%} of the questions of one hop right" in text
    assert f"(a hop is one arrow) and {first[3].accuracy:.0%} of those of three;" in text
    assert last[1].accuracy == last[3].accuracy == 1 and "the one with N = 4 gets all of both" in text


def test_the_first_page_tells_what_was_found():
    """Its words about the three tasks hold in the stored runs."""
    runs = grouped(stored_runs())
    gains = {}
    for task, _, depth, _, labels in FINDINGS:
        kinds = [runs[task, SIZES[task]][label] for label in labels]
        one, four, longer = (across_seeds([run.table for run in kind])[depth] for kind in kinds)
        gains[task] = four.accuracy - longer.accuracy
        assert four.low > one.high, "four passes help on every task"
        assert kinds[2][0].operations > 0.99 * kinds[1][0].operations, "longer training is paid as much at least"
    assert gains["graph"] > gains["math"] > 0 > gains["rule110"] and gains["math"] < 0.1
    deeper = across_seeds([run.table for run in runs["graph", "laptop"]["N=1, 4x layers, rate 0.005"]])
    assert deeper[3].accuracy > 0.99, "four times the layers do as well on the rings"


def test_the_script_writes_weights_and_picture(tmp_path, capsys):
    live.main(["--to", str(tmp_path / "live")])
    assert re.findall(r"([a-z_]+\.[a-z]+): [\d,]+ bytes", capsys.readouterr().out) == [
        "weights.js",
        "light_sleeper.js",
        "still.png",
    ]
    assert (tmp_path / "live" / "weights.js").read_bytes() == (FOLDER / "weights.js").read_bytes()
    assert (tmp_path / "live" / "still.png").read_bytes().startswith(b"\x89PNG")  # its bytes are matplotlib's version's


def test_runs_that_do_not_go_together_are_refused(runs, tiny_run):
    with pytest.raises(ValueError, match="not of one task and one model"):
        live.script([runs[0], tiny_run])
    with pytest.raises(ValueError, match="not of one task and one model"):
        live.light_sleeper_script(tiny_run, runs[0])


def test_missing_weights_are_one_line_and_nothing_is_written(tmp_path, capsys):
    for name in (*live.RUNS, live.LIGHT_SLEEPER):
        shutil.copytree(COMMITTED / name, tmp_path / "runs" / name)
    (tmp_path / "runs" / name / "weights.pt").unlink()
    with pytest.raises(SystemExit, match="2"):
        live.main(["--runs", str(tmp_path / "runs"), "--to", str(tmp_path / "live")])
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "weights.pt is missing" in error
    assert not (tmp_path / "live").exists()
    with pytest.raises(SystemExit, match="2"):
        live.main(["--runs", "/no/such/folder"])
    assert "there is no run '/no/such/folder/graph-laptop-sleep-N1-seed0'" in capsys.readouterr().err
