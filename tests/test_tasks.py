"""Every task asks what it says it asks: answers against brute force, read off the tokens alone."""

import itertools
import random
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from sleepedu.tasks import TASKS, UNSCORED, CellularAutomaton, Episode, GraphRetrieval
from sleepedu.tasks.cellular_automaton import next_row, space_time


def draw_from(task, batch=200, seed=0, depth=None) -> Episode:
    return task.sample(batch, torch.Generator().manual_seed(seed), depth)


def words_of(task, tokens) -> list[str]:
    return [task.words[token] for token in tokens.flatten().tolist()]


# Every task


@pytest.fixture(params=TASKS, ids=str)
def task(request):
    return TASKS[request.param]()


def test_an_episode_has_the_shape_the_task_announces(task):
    episode = draw_from(task, 7)
    assert episode.windows.shape == (7, task.windows, task.window)
    assert episode.prompt.shape == episode.targets.shape == episode.depth.shape == (7, task.prompt_length)
    tensors = (episode.windows, episode.prompt, episode.targets, episode.depth)
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert not episode.depth[~episode.asked].any()  # a question may need no step: a number that is given
    for tokens in (episode.windows, episode.prompt, episode.targets[episode.asked]):
        assert tokens.min() >= 0 and tokens.max() < len(task.words)
    assert (episode.targets[~episode.asked] == UNSCORED).all()
    assert len(set(task.words)) == len(task.words)
    task.check(episode)


def test_mixed_episodes_hold_every_depth_and_others_only_theirs(task):
    mixed = draw_from(task, 500)
    assert sorted(set(mixed.depth[mixed.asked].tolist()) - {0}) == list(task.depths)
    for depth in task.depths:
        episode = draw_from(task, 5, depth=depth)
        assert set(episode.depth[episode.asked].tolist()) == {depth}


def test_same_seed_same_episode_other_seed_another(task):
    first, again, other = (draw_from(task, 20, seed) for seed in (3, 3, 4))
    for name in ("windows", "prompt", "targets", "depth"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.windows, other.windows)


def test_text_tells_windows_prompt_and_answers(task):
    episode = draw_from(task, 3)
    lines = task.text(episode, 2).splitlines()
    assert len(lines) == task.windows + 1
    for line, tokens in zip(lines, episode.windows[2], strict=False):
        assert line.split(": ")[1].split() == words_of(task, tokens)
    answers = [word[1:-1] for word in lines[-1].split() if word.startswith("[")]
    assert answers == words_of(task, episode.targets[2][episode.asked[2]])


def test_drawing_is_a_closed_figure_with_and_without_answers(task):
    episode = draw_from(task, 2)
    for answers in (None, episode.targets[1].clamp(min=0)):
        assert isinstance(task.draw(episode, 1, answers), Figure)
    assert plt.get_fignums() == []


def test_what_is_not_an_episode_of_the_task_is_refused(task):
    episode = draw_from(task, 2)
    with pytest.raises(ValueError, match=f"the {task.name} task reads {task.windows} windows of {task.window} tokens"):
        task.check(replace(episode, windows=episode.windows[:, :, :-1]))
    shorter = {name: getattr(episode, name)[:, :-1] for name in ("prompt", "targets", "depth")}
    with pytest.raises(ValueError, match=f"the {task.name} task asks with {task.prompt_length} tokens"):
        task.check(replace(episode, **shorter))


@pytest.mark.parametrize("batch, depth, message", [(0, None, "batch .* 0"), (-1, None, "batch .* -1"), (2, 99, "99")])
def test_a_batch_or_depth_that_cannot_be_is_refused(task, batch, depth, message):
    with pytest.raises(ValueError, match=message):
        draw_from(task, batch, depth=depth)


@pytest.mark.parametrize("name", ["prompt", "targets", "depth", "windows"])
def test_tensors_that_make_no_episode_are_named(name):
    tensors = dict.fromkeys(("prompt", "targets", "depth"), torch.zeros(2, 4, dtype=torch.long))
    tensors["windows"] = torch.zeros(2, 1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=f"{name} must be"):
        Episode(**tensors | {name: torch.zeros(3, 4, dtype=torch.long)})


# Graph retrieval


GRAPHS = [
    GraphRetrieval(),
    GraphRetrieval(nodes=3, hops=2, queries=1),
    GraphRetrieval(nodes=30, hops=16, queries=10, windows=5),
    GraphRetrieval(nodes=12, hops=11, queries=4, windows=3, shortest=3),
]


def read_edges(task, windows) -> dict[str, str]:
    """Return the node after every node, from the words of one example; padding must stand on the left."""
    words = words_of(task, windows)
    while words[0] == "_":
        del words[0]
    assert "_" not in words and len(words) % 2 == 0
    edges = dict(zip(words[::2], words[1::2], strict=True))
    assert len(edges) == len(words) // 2
    return edges


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("depth", [None, 2])
def test_graph_answers_are_what_walking_the_edges_finds(graph, depth):
    episode = draw_from(graph, 100, depth=depth)
    successors = graph.successors(episode)
    for i in range(100):
        edges = read_edges(graph, episode.windows[i])
        node, visited = next(iter(edges)), set()
        while node not in visited:
            visited.add(node)
            node = edges[node]
        assert visited == set(edges), "the edges are not one cycle"
        assert len(edges) == graph.nodes or (graph.shortest and depth is None and len(edges) >= graph.shortest)
        known = {a: -1 if b < 0 else graph.words[b] for a, b in zip(graph.words, successors[i].tolist(), strict=False)}
        assert known == {name: edges.get(name, -1) for name in graph.words[: graph.nodes]}
        prompt, targets = words_of(graph, episode.prompt[i]), episode.targets[i].tolist()
        for position in range(0, graph.prompt_length, 2):
            k, node = int(prompt[position]), prompt[position + 1]
            assert episode.depth[i, position + 1] == k and (depth is None or k == depth)
            start = node
            for _ in range(k):
                node = edges[node]
            assert targets[position] == UNSCORED and graph.words[targets[position + 1]] == node
            assert k >= len(edges) or node != start


def test_edges_are_shuffled_and_starts_are_uniform():
    graph = GraphRetrieval(nodes=6, hops=3, queries=4)
    episode = draw_from(graph, 5000)
    edges = episode.windows.view(5000, 6, 2)
    assert (edges[:, :-1, 1] == edges[:, 1:, 0]).double().mean().item() == pytest.approx(1 / 5, abs=0.015)
    for tokens in (episode.prompt[:, 1::2], episode.targets[:, 1::2], edges[:, 0, 0]):
        share = torch.bincount(tokens.flatten()) / tokens.numel()
        torch.testing.assert_close(share, torch.full((6,), 1 / 6), rtol=0, atol=0.025)


def test_lengths_of_cycles_are_drawn_like_depo():
    graph = GraphRetrieval(nodes=10, hops=2, queries=1, shortest=4)
    lengths = (graph.successors(draw_from(graph, 20_000)) >= 0).sum(dim=1)
    weights = torch.tensor([0.0] * 4 + [1 / (n + 10**0.5) for n in range(4, 11)])
    torch.testing.assert_close(torch.bincount(lengths) / 20_000, weights / weights.sum(), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    "settings",
    [
        {"nodes": 2},
        {"hops": 0},
        {"hops": 12},
        {"queries": 0},
        {"windows": 0},
        {"windows": 5},
        {"shortest": 2},
        {"shortest": 13},
        {"shortest": -1},
    ],
    ids=str,
)
def test_wrong_graph_settings_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError, match=rf"{name}.* {value}\b|\b{value} {name}"):
        GraphRetrieval(**settings)


# Cellular automata


def brute_force(row: list[int], rule: int, steps: int) -> list[int]:
    for _ in range(steps):
        n = len(row)
        row = [rule >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % n]) & 1 for i in range(n)]
    return row


def test_next_row_is_the_rule_on_a_ring():
    for rule in [0, 30, 110, 255, *random.Random(0).sample(range(256), 20)]:
        bits = torch.randint(2, (4, 11), generator=torch.Generator().manual_seed(rule), dtype=torch.uint8)
        assert next_row(bits, rule).tolist() == [brute_force(row, rule, 1) for row in bits.tolist()]


def test_rule_110_of_a_single_bit_grows_to_the_left_and_wraps():
    diagram = space_time(torch.tensor([1, 0, 0, 0, 0]), 110, 3)
    assert diagram.tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 1, 1, 0]]


@pytest.mark.parametrize("depth", [None, 3])
def test_every_bit_after_t_steps(depth):
    for rule in random.Random(1).sample(range(256), 8):
        task = CellularAutomaton(cells=9, steps=(1, 3, 4), rule=rule)
        episode = draw_from(task, 60, depth=depth)
        for i in range(60):
            t = int(episode.depth[i, 0])
            assert depth in (None, t)
            assert set(words_of(task, episode.prompt[i])) == {f"?{t}"}
            bits = [int(word) for word in words_of(task, episode.windows[i])]
            assert episode.targets[i].tolist() == brute_force(bits, rule, t)


def test_the_papers_form_asks_for_the_first_bit_of_every_row():
    task = CellularAutomaton(rows=4, cells=24, steps=(32,), ask="first")
    assert (task.windows, task.window, task.prompt_length, task.depths) == (4, 24, 4, (32,))
    assert task.windows * task.window + task.prompt_length == 100
    episode = draw_from(task, 30)
    for i, row in itertools.product(range(30), range(4)):
        assert episode.targets[i, row] == brute_force(episode.windows[i, row].tolist(), 110, 32)[0]


def test_one_is_the_answer_to_56_percent_of_the_papers_questions():
    targets = draw_from(CellularAutomaton(rows=4, cells=24, steps=(32,), ask="first"), 20_000).targets
    assert targets.double().mean().item() == pytest.approx(0.563, abs=0.008)


@pytest.mark.parametrize(
    "settings",
    [
        {"cells": 2},
        {"rows": 0},
        {"steps": ()},
        {"steps": (0, 1)},
        {"steps": (2, 2)},
        {"ask": "last"},
        {"rule": -1},
        {"rule": 256},
        {"rows": 2},
    ],
    ids=str,
)
def test_wrong_automaton_settings_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError) as error:
        CellularAutomaton(**settings)
    assert name in str(error.value) and str(value) in str(error.value)
