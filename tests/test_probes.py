"""Probes find what was planted and nothing else, nothing of the test part leaks, and the trace holds the gates."""

import hashlib
import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from sleepedu import storage
from sleepedu.__main__ import main
from sleepedu.fast_weights import gated_delta
from sleepedu.lab import probes
from sleepedu.lab.probes import Settings
from sleepedu.lab.run_store import COMMITTED, readable_json
from sleepedu.sleep_loop import sleep
from sleepedu.tasks import CellularAutomaton, GraphRetrieval, MathReasoning
from sleepedu.trace import SleepTrace

GRAPH = GraphRetrieval(nodes=5, hops=3, queries=5)
SMALL = Settings(passes=2, episodes=300)


def random_parts(size: int, *shape: int, counts=(600, 100, 400)):
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(size, (count, *shape), generator=draw) for count in counts]


def test_a_planted_linear_code_is_read_without_a_mistake():
    labels = random_parts(5, 1, 3)
    code = torch.randn(15, 40, generator=torch.Generator().manual_seed(1))
    features = [torch.nn.functional.one_hot(part, 5).float().flatten(1) @ code for part in labels]
    assert torch.equal(probes.read_out(features, labels, 5), labels[2])


def test_labels_of_other_examples_are_read_no_better_than_by_chance():
    labels = random_parts(5, 1, 3)
    code = torch.randn(15, 40, generator=torch.Generator().manual_seed(1))
    features = [torch.nn.functional.one_hot(part, 5).float().flatten(1) @ code for part in labels]
    shuffled = [part.roll(1, dims=0) for part in labels]
    right = probes.read_out(features, shuffled, 5) == labels[2]
    assert abs(right.double().mean().item() - 1 / 5) < 4 * math.sqrt(0.16 / right.numel())


def test_a_product_of_two_bits_is_no_linear_code():
    bits = random_parts(2, 2)
    labels = [(part[:, :1] ^ part[:, 1:])[:, None] for part in bits]
    right = probes.read_out(bits, labels, 2) == labels[2]
    assert abs(right.double().mean().item() - 1 / 2) < 0.1


def test_what_never_varies_and_what_is_to_be_tested_change_nothing():
    labels = random_parts(3, 1, 2)
    noise = torch.Generator().manual_seed(2)
    features = [part[:, 0] + torch.randn(len(part), 2, generator=noise) for part in labels]
    answers = probes.read_out(features, labels, 3)
    still = [torch.cat((part, torch.full((len(part), 1), 7.3)), dim=1) for part in features]
    assert torch.equal(probes.read_out(still, labels, 3), answers)
    assert torch.equal(probes.read_out(features, [*labels[:2], torch.zeros_like(labels[2])], 3), answers)


def test_no_content_is_in_two_parts_and_none_is_tested_twice():
    episode = GRAPH.sample(500, torch.Generator().manual_seed(0))
    content = GRAPH.successors(episode)
    parts = probes.split(episode.windows[:, 0], content, torch.Generator().manual_seed(1))
    kinds = [[tuple(row) for row in content[part].tolist()] for part in parts]
    assert not set(kinds[0]) & set(kinds[1]) and not set(kinds[1]) & set(kinds[2]) and not set(kinds[0]) & set(kinds[2])
    assert len(set(kinds[1])) == len(kinds[1]) > 0 and len(set(kinds[2])) == len(kinds[2]) > len(kinds[1])
    windows = [tuple(row) for row in episode.windows[parts[0], 0].tolist()]
    assert len(set(windows)) == len(windows) > len(set(kinds[0])), "one ring in several orders is for fitting"


def test_the_states_of_a_graph_are_walks_and_those_of_an_automaton_its_rows():
    episode = GRAPH.sample(20, torch.Generator().manual_seed(0), depth=3)
    steps, labels = probes.hidden_states(GRAPH, episode)
    assert steps == (1, 2, 3) and labels.shape == (20, 3, 5)
    asked = labels[:, 2].gather(1, episode.prompt[:, 1::2])
    assert torch.equal(asked, episode.targets[:, 1::2])

    task = CellularAutomaton(cells=6, steps=(2, 4))
    episode = task.sample(20, torch.Generator().manual_seed(0), depth=4)
    steps, labels = probes.hidden_states(task, episode)
    assert steps == (0, 1, 2, 3, 4)
    assert torch.equal(labels[:, 0], episode.windows[:, 0]) and torch.equal(labels[:, 4], episode.targets)


def test_a_query_reads_S_as_given(make_model):
    model = make_model("ag", vocabulary=len(GRAPH.words))
    episode = GRAPH.sample(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        S = sleep(model, episode.windows[:, 0])
        prompt = episode.prompt[0]
        reads = probes.read_by_query(model, prompt, S, slice(1, None, 2))
        block = model.layers[1]
        h, _ = model.layers[0](model.embed(prompt[None]), None)
        q = block.mixer.rule_inputs(block.mixer_norm(h), S[0].dtype)[0][0, :, 3]  # (heads, d_k), of the second question
        torch.testing.assert_close(reads[2, 1], (S[0][2] @ q[..., None]).flatten())


@pytest.mark.parametrize(
    "task, rule", [(GRAPH, "gated_delta"), (GRAPH, "hebbian"), (CellularAutomaton(cells=7, steps=(1, 3)), "gated")]
)
def test_every_reader_is_scored_for_every_pass(task, rule, make_model):
    model = make_model("agg", vocabulary=len(task.words), positions=10, rule=rule)
    made = probes.probe_model(model, task, SMALL)
    steps, examples = made["steps"], made["examples"]
    assert examples["fit"] > examples["test"] > examples["choose"] > 0
    for shares in (made["each"], made["whole"]):
        assert list(shares) == list(probes.READERS)
        assert all(len(row) == len(steps) for rows in shares.values() for row in rows)
        assert {len(shares[reader]) for reader in ("S", "query", "awake", "untrained S", "shuffled")} == {2}
    assert made["each"]["facts"][0][0] == 1.0, "what was read is read off what was read"
    assert [share is None for share in made["each"]["awake"][0]] == [step not in task.depths for step in steps]
    assert json.dumps(made) == json.dumps(probes.probe_model(model, task, SMALL)), "the same settings, other numbers"


def test_probes_of_a_run_are_stored_found_and_loaded(tiny_run, tmp_path, monkeypatch):
    made = probes.probe_run(tiny_run, SMALL, tmp_path)
    path = tmp_path / "probes" / f"{tiny_run.name}.json"
    assert made == probes.load_probes(path) and made.provenance["torch"] == torch.__version__
    table = made.table("S", 2)
    assert list(table) == [1, 2, 3] and all(a.low <= a.accuracy <= a.high for a in table.values())
    assert {a.n for a in table.values()} == {made.examples["test"]}
    assert made.table("facts", 2) == made.table("facts", 1)
    with monkeypatch.context() as patched:
        patched.setattr(probes, "probe_model", None)
        assert probes.probe_run(tiny_run, SMALL, tmp_path) == made, "it was made again"
    assert probes.probe_run(tiny_run, replace(SMALL, passes=1), tmp_path).settings.passes == 1, "settings must count"
    copy = shutil.copytree(tiny_run.path, tmp_path / tiny_run.name)
    other = storage.pack({name: 0 * tensor for name, tensor in tiny_run.load_model().state_dict().items()})
    (copy / "weights.pt").write_bytes(other)
    retrained = replace(tiny_run, path=copy, weights_checksum=storage.checksum(other))
    assert probes.probe_run(retrained, SMALL, tmp_path) != made, "weights must count"


def test_an_unasked_step_survives_the_store_and_is_not_in_a_table(tiny_run, tmp_path, make_model):
    made = probes.probe_run(tiny_run, SMALL, tmp_path)
    unknown = replace(made, each={**made.each, "awake": [[None, 0.5, 1.0]]})
    assert list(unknown.table("awake")) == [2, 3]
    text = readable_json({"version": probes.VERSION, **asdict(unknown)})
    assert json.loads(text)["each"]["awake"] == [[None, 0.5, 1.0]]
    storage.write(tmp_path / "unknown.json", text.encode())
    assert probes.load_probes(tmp_path / "unknown.json") == unknown


def test_what_is_stored_of_probes_is_what_is_loaded():
    odd = {"provenance": {"processor": "NaN [two  spaces]"}}
    assert json.loads(readable_json(odd)) == odd
    for path in (COMMITTED / "probes").glob("*.json"):
        stored = {"version": probes.VERSION, **asdict(probes.load_probes(path))}
        assert readable_json(stored) == path.read_text()


def test_the_command_prints_tables_or_json(tiny_run, tmp_path, capsys):
    command = ["probe", str(tiny_run.path), "--passes", "2", "--episodes", "300", "--runs", str(tmp_path)]
    assert main(command) == 0
    assert "untrained S, pass 2" in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["settings"] == {"passes": 2, "episodes": 300, "seed": 0}
    assert main([command[0], *command[1:2] * 2, *command[2:], "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2
    for wrong, message in ((["--passes", "0"], "got 0"), (["--episodes", "9"], "got 9"), (["--seed", "-1"], "got -1")):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_committed_probes_are_of_the_committed_weights():
    stored = sorted((COMMITTED / "probes").glob("*.json"))
    assert stored
    for path in stored:
        found = probes.load_probes(path)
        weights = hashlib.sha256((COMMITTED / found.run / "weights.pt").read_bytes()).hexdigest()
        assert weights.startswith(found.weights) and found.run == path.stem and found.settings == Settings()


@pytest.mark.parametrize("content", ["", "{}", '{"version": 9}', '{"version": 1, "settings": {"naps": 3}}'])
def test_broken_probes_are_refused(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json cannot be used"):
        probes.load_probes(tmp_path / "run.json")
    with pytest.raises(FileNotFoundError):
        probes.load_probes(tmp_path / "none.json")


def test_wrong_values_are_named_with_those_allowed(tiny_run, tmp_path, make_model):
    with pytest.raises(ValueError, match=r"passes \(N\) must be at least 1, got 0"):
        Settings(passes=0)
    with pytest.raises(ValueError, match="episodes must be at least 100, got 99"):
        Settings(episodes=99)
    with pytest.raises(ValueError, match=r"seed must lie in 0\.\.4294967295, got -1"):
        Settings(seed=-1)
    made = probes.probe_run(tiny_run, SMALL, tmp_path)
    with pytest.raises(ValueError, match="reader 'mind' is unknown: use one of S, query, awake"):
        made.table("mind")
    with pytest.raises(ValueError, match=r"pass n must lie in 1\.\.2, got 3"):
        made.table("S", 3)
    with pytest.raises(ValueError, match="layout 'aa' has no fast weights to probe"):
        probes.probe_model(make_model("aa", vocabulary=len(GRAPH.words)), GRAPH, SMALL)
    tiny = GraphRetrieval(nodes=3, hops=1, queries=1)
    with pytest.raises(ValueError, match=r"100 episodes have \d+, \d+, \d+ different examples .* draw more episodes"):
        probes.probe_model(make_model(vocabulary=len(tiny.words)), tiny, Settings(episodes=100))
    for task in (MathReasoning(), CellularAutomaton(rows=2, ask="first"), GraphRetrieval(windows=2)):
        with pytest.raises(ValueError, match="has no probe: use a graph with name_tokens=1"):
            probes.hidden_states(task, task.sample(1, torch.Generator()))


def test_what_a_pass_does_to_each_head(make_model):
    trace = SleepTrace()
    with torch.no_grad():
        sleep(make_model("agag"), torch.randint(11, (3, 6)), passes=4, trace=trace)
    assert trace.changes(by_head=True).shape == (4, 2, 2)
    before, after = (S[1][:, 0].flatten(1) for S in trace.S[0][2:4])  # layer 2, head 1, passes 2 and 3
    change = ((after - before).norm(dim=1) / after.norm(dim=1)).mean()
    torch.testing.assert_close(trace.changes(by_head=True)[2, 1, 0], change)


def test_an_S_that_stays_0_has_changed_by_0(make_model):
    model, trace = make_model("g"), SleepTrace()
    with torch.no_grad():
        model.layers[0].mixer.project.weight.zero_()
        sleep(model, torch.randint(11, (3, 6)), passes=2, trace=trace)
    assert not trace.stack().any() and not trace.changes().any()


def test_the_trace_holds_the_hidden_states_that_made_S(make_model):
    model, trace = make_model("ag"), SleepTrace()
    with torch.no_grad():
        sleep(model, torch.randint(11, (3, 6)), passes=2, trace=trace)
        block = model.layers[1]
        for n in (1, 2):
            h = trace.h[0][n - 1][0]
            inputs = block.mixer.rule_inputs(block.mixer_norm(h), torch.float32)
            S = gated_delta(*inputs[:5], trace.S[0][n - 1][0])[1]
            torch.testing.assert_close(S, trace.S[0][n][0], rtol=1e-4, atol=1e-5)
