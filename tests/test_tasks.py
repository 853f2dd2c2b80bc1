"""Every task asks what it says it asks: answers against brute force, read off the tokens alone."""

import itertools
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure

from sleepedu.pictures import draw_episode
from sleepedu.tasks import TASKS, UNSCORED, CellularAutomaton, Episode, GraphRetrieval
from sleepedu.tasks.cellular_automaton import next_row, space_time


def draw_from(task, batch=200, seed=0, depth=None) -> Episode:
    return task.sample(batch, torch.Generator().manual_seed(seed), depth)


def words_of(task, tokens) -> list[str]:
    words = task.words
    return [words[token] for token in tokens.flatten().tolist()]


# Every task


LONG_NAMES = GraphRetrieval(nodes=9, hops=3, queries=5, windows=4, shortest=3, name_tokens=2)


MIXED = CellularAutomaton(cells=9, steps=(1, 3, 4), ask="mixed", held_out=0.2)


@pytest.fixture(params=[*TASKS, LONG_NAMES, MIXED], ids=str)
def task(request):
    return TASKS[request.param]() if isinstance(request.param, str) else request.param


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


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("cuda", False)])
def test_an_episode_is_waited_for_on_its_way_back_from_a_gpu(device, waits, monkeypatch):
    episode, asked = draw_from(TASKS["graph"]()), []
    monkeypatch.setattr(torch.Tensor, "to", lambda self, _, non_blocking: asked.append(non_blocking) or self)
    episode.to(device)
    assert asked == [not waits] * 4


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
        assert isinstance(draw_episode(task, episode, 1, answers), Figure)
    assert plt.get_fignums() == []


def test_an_episode_of_another_task_is_not_drawn(task):
    episode = draw_from(task, 2)
    shorter = {name: getattr(episode, name)[:, :-1] for name in ("prompt", "targets", "depth")}
    message = "the {} task has {} windows of {} tokens and a prompt of {}, the episode "
    for other in ({"windows": episode.windows[:, :, :-1]}, shorter):
        told = message.format(task.name, task.windows, task.window, task.prompt_length)
        with pytest.raises(ValueError, match=told):
            draw_episode(task, replace(episode, **other))


@pytest.mark.parametrize(
    "batch, depth, message", [(0, None, "batch .* 0"), (-1, None, "batch .* -1"), (2, 0, "depth 0"), (2, 99, "99")]
)
def test_a_batch_or_depth_that_cannot_be_is_refused(task, batch, depth, message):
    with pytest.raises(ValueError, match=message):
        draw_from(task, batch, depth=depth)


@pytest.mark.parametrize("name", ["prompt", "targets", "depth", "windows"])
def test_tensors_that_make_no_episode_are_named(name):
    episode = draw_from(GraphRetrieval(), 2)
    with pytest.raises(ValueError, match=rf"{name} must be \(batch, .* got \(3, 4\)"):
        replace(episode, **{name: torch.zeros(3, 4, dtype=torch.long)})
    with pytest.raises(ValueError, match=f"{name} must be int64, got torch.int32"):
        replace(episode, **{name: getattr(episode, name).int()})


# Graph retrieval


DEPO = GraphRetrieval(nodes=75, hops=16, queries=10, windows=4, shortest=3, tested=(1, 2, 4, 8, 16), name_tokens=2)
GRAPHS = [
    GraphRetrieval(),
    GraphRetrieval(nodes=3, hops=2, queries=1),
    GraphRetrieval(nodes=30, hops=16, queries=10, windows=5),
    GraphRetrieval(nodes=12, hops=11, queries=4, windows=3, shortest=3),
    GraphRetrieval(nodes=9, hops=4, queries=4, windows=2, shortest=3),
    LONG_NAMES,
    GraphRetrieval(nodes=3, hops=2, queries=4, name_tokens=2),
    GraphRetrieval(nodes=27, hops=20, queries=3, windows=4, shortest=3, tested=(2,), name_tokens=2),
    GraphRetrieval(nodes=60, hops=8, queries=30, windows=3, name_tokens=2),
    DEPO,
]


def read_names(words: list[str]) -> list[str]:
    """Return the names that tokens without separators spell: a capital letter ends one; padding stands on the left."""
    words = list(words)
    while words[0] == "_":
        del words[0]
    names, begun = [], ""
    for word in words:
        begun += word
        if word[0].isupper():
            names.append(begun)
            begun = ""
    assert not begun and "_" not in "".join(names)
    return names


def read_edges(task, windows) -> dict[str, str]:
    """Return the node after every node, from the words of one example."""
    names = read_names(words_of(task, windows))
    assert len(names) % 2 == 0
    edges = dict(zip(names[::2], names[1::2], strict=True))
    assert len(edges) == len(names) // 2
    return edges


def read_questions(task, prompt, targets) -> list[tuple[int, str, str]]:
    """Return k, the node a question starts from and its right answer, for every question of one example."""
    words, targets, known = words_of(task, prompt), targets.tolist(), task.words
    size, questions = len(words) // task.queries, []
    for first in range(0, len(words), size):
        question, wanted = words[first : first + size], targets[first : first + size]
        if size == 2:
            k, start = question
            scored = wanted[1:]
        else:
            k, *start, mark, b1, b2 = question
            scored = wanted[3:5]
            assert mark == "?" and [b1, b2] == [known[token] for token in scored]
            start = "".join(start).removesuffix("_")
        assert wanted.count(UNSCORED) == len(wanted) - len(scored)
        questions.append((int(k), start, "".join(known[token] for token in scored).removesuffix("_")))
    return questions


@pytest.mark.parametrize("graph", GRAPHS, ids=str)
@pytest.mark.parametrize("depth", [None, 2])
def test_graph_answers_are_what_walking_the_edges_finds(graph, depth):
    episode = draw_from(graph, 500, depth=depth)
    successors, names = graph.successors(episode), graph.names
    lengths = set()
    for i in range(500):
        edges = read_edges(graph, episode.windows[i])
        node, visited = next(iter(edges)), set()
        while node not in visited:
            visited.add(node)
            node = edges[node]
        assert visited == set(edges), "the edges are not one cycle"
        lengths.add(len(edges))
        known = {a: names[b] for a, b in zip(names, successors[i].tolist(), strict=True) if b >= 0}
        assert known == edges
        depths = episode.depth[i][episode.asked[i]].tolist()[:: graph.answer_tokens]
        questions = read_questions(graph, episode.prompt[i], episode.targets[i])
        for (k, start, answer), announced in zip(questions, depths, strict=True):
            assert announced == k and (depth is None or k == depth)
            node = start
            for _ in range(k):
                node = edges[node]
            assert answer == node
            assert k >= len(edges) or node != start
    assert min(lengths) == (graph.shortest if graph.shortest and depth is None else graph.nodes)
    assert max(lengths) <= graph.nodes
    assert not episode.depth[~episode.asked].any()


def test_the_papers_form_of_depo():
    assert (DEPO.windows, DEPO.window, DEPO.prompt_length, DEPO.depths) == (4, 75, 60, (1, 2, 4, 8, 16))
    assert len(set(DEPO.words)) == len(DEPO.words) == 50 + 16 + 2  # tokens of names, hops, "?" and padding
    episode = draw_from(DEPO, 1000)
    assert set(episode.depth[episode.asked].tolist()) == set(range(1, 17)), "training asks for every k"
    with pytest.raises(ValueError, match=r"no depth 3: use one of \[1, 2, 4, 8, 16\]"):
        draw_from(DEPO, 5, depth=3)
    with pytest.raises(ValueError, match="no depth 17"):
        draw_from(DEPO, 5, depth=17)


def test_names_are_different_and_half_of_them_or_25_have_one_token():
    for graph in (DEPO, LONG_NAMES):
        episode, seen = draw_from(graph, 400), []
        for i in range(400):
            names = list(read_edges(graph, episode.windows[i]))
            assert len(set(names)) == len(names)
            assert sum(len(name) == 1 for name in names) == min(len(names) // 2, 25)
            assert {len(name) for name in names} == {1, 2}
            seen.append(frozenset(names))
        assert len(set(seen)) > 395, "every example draws its names anew"


def test_all_names_are_as_likely_in_all_places():
    graph = GraphRetrieval(nodes=10, hops=2, queries=3, name_tokens=2)
    episode = draw_from(graph, 20_000)
    starts, short_after_short, next_goes_on = [], [], []
    for row in episode.windows[:4000]:
        edges = read_edges(graph, row)
        starts += edges
        short_after_short += [len(after) == 1 for node, after in edges.items() if len(node) == 1]
        next_goes_on += [after == node for after, node in zip(list(edges.values())[:-1], list(edges)[1:], strict=True)]
    assert sum(short_after_short) / len(short_after_short) == pytest.approx(4 / 9, abs=0.015)
    assert sum(next_goes_on) / len(next_goes_on) == pytest.approx(1 / 9, abs=0.01)
    assert {len(name) for name in starts} == {1, 2} and len(set(starts)) == len(graph.names) == 650
    for tokens in (episode.prompt[:, 1::6], episode.targets[:, 3::6]):
        share = torch.bincount(tokens.flatten(), minlength=50) / tokens.numel()
        torch.testing.assert_close(share, torch.full((50,), 1 / 50), rtol=0, atol=0.003)
    second = episode.targets[:, 4::6].flatten()
    share = torch.bincount(second, minlength=len(graph.words)) / len(second)
    assert share[-1] == pytest.approx(0.5, abs=0.01) and share[:25].sum() == pytest.approx(0.5, abs=0.01)


def test_the_floor_of_a_graph_is_what_guessing_another_node_gets():
    for graph in (GraphRetrieval(nodes=8, hops=4), GraphRetrieval(nodes=5, hops=4, shortest=3)):
        episode = draw_from(graph, 4000, depth=2)
        asked = episode.asked
        guess = (episode.prompt[asked] + 1) % graph.nodes
        share = (guess == episode.targets[asked]).view(4000, -1).double().mean(1)
        error = share.std().item() / len(share) ** 0.5
        assert abs(share.mean().item() - graph.floor) < 4 * error
        assert not (episode.prompt[asked] == episode.targets[asked]).any()


def test_edges_and_names_straddle_windows():
    for graph, names_too in ((DEPO, True), (LONG_NAMES, True), (GraphRetrieval(nodes=9, hops=1, windows=2), False)):
        episode = draw_from(graph, 300, depth=1)
        edges_cut = names_cut = 0
        for row in episode.windows:
            flat = words_of(graph, row)
            names = read_names(flat)
            ends = list(itertools.accumulate((len(name) for name in names), initial=len(flat) - len("".join(names))))
            for cut in range(graph.window, len(flat), graph.window):
                edges_cut += cut > ends[0] and cut not in ends[::2]
                names_cut += cut > ends[0] and cut not in ends
        assert edges_cut >= 100 and (names_cut >= 50) == names_too


@pytest.mark.parametrize("graph", [DEPO, GraphRetrieval(nodes=6, hops=3, queries=10, shortest=3, name_tokens=2)])
def test_no_question_starts_where_another_did_whose_answer_is_in_the_prompt(graph):
    episode = draw_from(graph, 300)
    for i in range(300):
        starts = [start for _, start, _ in read_questions(graph, episode.prompt[i], episode.targets[i])]
        nodes = len(read_edges(graph, episode.windows[i]))
        assert len(set(starts)) == min(nodes, graph.queries)
        assert len(set(starts[:nodes])) == len(starts[:nodes])


def test_a_drawing_joins_the_tokens_of_a_name_and_shows_any_answer():
    graph = GraphRetrieval(nodes=8, hops=3, queries=8, name_tokens=2)
    episode = draw_from(graph, 3)
    for query, (k, start, answer) in enumerate(read_questions(graph, episode.prompt[2], episode.targets[2])):
        given = episode.targets[2].clamp(min=0)
        axes = draw_episode(graph, episode, 2, given, query=query).axes[0]
        walk = f"{k} hop{'s' * (k > 1)} after {start}: {answer}"
        assert axes.get_title("left") == f"{walk}   the model says {answer} (right)"
        shown = {text.get_text() for text in axes.texts} - {""}
        assert shown == set(read_edges(graph, episode.windows[2]))
        for b1, b2, said in (("_", "+1", "_+1"), ("a", "_", "a"), ("_", "_", "_")):
            given[6 * query + 3], given[6 * query + 4] = graph.words.index(b1), graph.words.index(b2)
            title = draw_episode(graph, episode, 2, given, query=query).axes[0].get_title("left")
            assert title == f"{walk}   the model says {said} (wrong)"


def test_edges_are_shuffled_and_starts_are_uniform():
    graph = GraphRetrieval(nodes=6, hops=3, queries=4)
    episode = draw_from(graph, 5000)
    edges = episode.windows.view(5000, 6, 2)
    assert (edges[:, :-1, 1] == edges[:, 1:, 0]).double().mean().item() == pytest.approx(1 / 5, abs=0.015)
    for tokens in (episode.prompt[:, 1::2], episode.targets[:, 1::2], edges[:, 0, 0]):
        share = torch.bincount(tokens.flatten()) / tokens.numel()
        torch.testing.assert_close(share, torch.full((6,), 1 / 6), rtol=0, atol=0.025)


@pytest.mark.parametrize("name_tokens", [1, 2])
def test_lengths_of_cycles_are_drawn_like_depo(name_tokens):
    graph = GraphRetrieval(nodes=10, hops=2, queries=1, shortest=4, name_tokens=name_tokens)
    lengths = (graph.successors(draw_from(graph, 20_000)) >= 0).sum(dim=1)
    weights = torch.tensor([0.0] * 4 + [1 / (n + 10**0.5) for n in range(4, 11)])
    torch.testing.assert_close(torch.bincount(lengths) / 20_000, weights / weights.sum(), rtol=0, atol=0.015)


@pytest.mark.parametrize(
    "settings",
    [
        {"nodes": 2},
        {"nodes": 651, "name_tokens": 2},
        {"hops": 0},
        {"hops": 12},
        {"queries": 0},
        {"windows": 0},
        {"windows": 5},
        {"windows": 9, "name_tokens": 2},
        {"shortest": 2},
        {"shortest": 13},
        {"shortest": -1},
        {"name_tokens": 0},
        {"name_tokens": 3},
        {"tested": (0, 1)},
        {"tested": (1, 9)},
        {"tested": (2, 2)},
        {"tested": [1, 2]},
        {"tested": 3},
        {"name_tokens": True},
    ],
    ids=str,
)
def test_wrong_graph_settings_are_named(settings):
    name, value = next(iter(settings.items()))
    value = re.escape(str(value))
    with pytest.raises(ValueError, match=rf"{name}.* {value}(?!\d)|\b{value} {name}"):
        GraphRetrieval(**settings)


@pytest.mark.parametrize("name_tokens, nodes", [(1, 700), (2, 650)])
def test_as_many_nodes_as_there_are_names(name_tokens, nodes):
    graph = GraphRetrieval(nodes=nodes, name_tokens=name_tokens)
    assert len(read_edges(graph, draw_from(graph, 1).windows[0])) == nodes


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


def test_a_mixed_prompt_asks_every_cell_after_a_t_of_its_own():
    for rule in (110, 30):
        task = replace(MIXED, rule=rule)
        episode = draw_from(task, 200)
        assert all(len(set(row)) > 1 for row in episode.depth.tolist()), "a t for every cell, not one for all"
        for i in range(200):
            bits = [int(word) for word in words_of(task, episode.windows[i])]
            for cell, asked in enumerate(words_of(task, episode.prompt[i])):
                t = int(asked.removeprefix("?"))
                assert episode.depth[i, cell] == t
                assert episode.targets[i, cell] == brute_force(bits, rule, t)[cell]
        alone = draw_from(task, 5, depth=3)
        assert torch.equal(alone.targets, draw_from(replace(task, ask="every"), 5, depth=3).targets)


def keys(episode) -> set[int]:
    return set((episode.windows.flatten(0, 1) << torch.arange(episode.windows.shape[-1])).sum(dim=-1).tolist())


@pytest.mark.parametrize("form", [{"ask": "mixed"}, {"ask": "every"}, {"ask": "first", "rows": 3}], ids=str)
def test_rows_held_out_are_never_drawn_for_training_and_alone_for_testing(form):
    task = CellularAutomaton(cells=8, steps=(1, 2), held_out=0.25, **form)
    trained = set().union(*(keys(draw_from(task, 1000, seed)) for seed in range(5)))
    held_out = set().union(*(keys(draw_from(task, 1000, seed, depth=2)) for seed in range(5)))
    assert not trained & held_out and len(trained | held_out) == 256
    assert 0.15 < len(held_out) / 256 < 0.35


def test_which_rows_are_held_out_is_the_same_in_every_process_and_for_every_task_of_that_share():
    rows = (torch.arange(1024)[:, None] >> torch.arange(10) & 1).byte()  # all there are
    tenth, half = (CellularAutomaton(cells=10, held_out=share).is_held_out(rows) for share in (0.1, 0.5))
    assert tenth.sum() == 112 and tenth[:40].nonzero().flatten().tolist() == [0, 2, 17, 32]
    assert (half | ~tenth).all() and half.sum() == pytest.approx(512, abs=48)
    long = torch.randint(2, (4000, 3, 20), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert CellularAutomaton(cells=20, held_out=0.1).is_held_out(long).double().mean() == pytest.approx(0.1, abs=0.01)


def test_an_automaton_that_holds_nothing_out_draws_the_rows_it_always_drew():
    rows = torch.randint(2, (6, 1, 12), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).long()
    for ask, depth in itertools.product(("every", "mixed"), (None, 2)):
        assert torch.equal(draw_from(CellularAutomaton(ask=ask), 6, depth=depth).windows, rows)


def test_a_share_that_leaves_no_row_on_either_side_is_refused_before_any_is_drawn():
    for cells, share, left in ((3, 0.01, "8 of 8"), (3, 0.99, "0 of 8")):
        with pytest.raises(ValueError, match=f"held_out {share} leaves {left} rows to train on"):
            CellularAutomaton(cells=cells, held_out=share)


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
        {"steps": [1, 2]},
        {"steps": 3},
        {"ask": "last"},
        {"rule": -1},
        {"rule": 256},
        {"rows": 2},
        {"held_out": 1.0},
        {"held_out": -0.1},
        {"held_out": 0.001},
        {"held_out": "0.1"},
        {"held_out": True},
    ],
    ids=str,
)
def test_wrong_automaton_settings_are_named(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ValueError) as error:
        CellularAutomaton(**settings)
    assert name in str(error.value) and str(value) in str(error.value)


def test_a_task_without_a_picture_says_what_there_is_instead():
    episode = draw_from(GraphRetrieval(), 1)
    shape = {"windows": 1, "window": episode.windows.shape[2], "prompt_length": episode.prompt.shape[1]}
    with pytest.raises(NotImplementedError, match=r"the parity task has no picture: use text\(\)"):
        draw_episode(SimpleNamespace(name="parity", **shape), episode)
