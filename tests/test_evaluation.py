"""Accuracy by depth against a direct count, and its intervals against published numbers."""

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch

from sleepedu import evaluation
from sleepedu.evaluation import accuracy_by_depth, accuracy_by_pass
from sleepedu.intervals import Accuracy, across_seeds, differing, paired, wilson_interval
from sleepedu.tasks import CellularAutomaton, GraphRetrieval

GRAPH = GraphRetrieval(nodes=4, hops=3, queries=2)
NAMED = GraphRetrieval(nodes=3, hops=2, queries=3, tested=(2,), name_tokens=2)
ROW = CellularAutomaton(cells=5, steps=(1, 2))


@pytest.mark.parametrize(
    "share, n, low, high",
    [
        (0.5, 10, 0.23659, 0.76341),
        (0.0, 10, 0.0, 0.27753),
        (1.0, 10, 0.72247, 1.0),
        (0.9, 2000, 0.88609, 0.91240),
        (81 / 263, 263, 0.25529, 0.36622),  # Newcombe 1998, table I
        (1 / 29, 29, 0.00611, 0.17175),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval(share, n, low, high):
    assert wilson_interval(share, n) == pytest.approx((low, high), abs=5e-5)


def measured(right, n):
    return Accuracy(right / n, *wilson_interval(right / n, n), n)


def test_an_accuracy_is_written_in_percent():
    assert Accuracy(0.294, 0.168, 0.421, 2000).percent == "29 (17, 42)"
    assert Accuracy(1.0, 0.998, 1.0, 2000).percent == "100 (100, 100)"
    assert Accuracy(0.001, -0.003, 0.005, 2000).percent == "0 (0, 0)"  # not -0: an interval across seeds may go below


@pytest.mark.parametrize(
    "one, other, apart",
    [  # the first four of Newcombe 1998 (Statistics in Medicine 17, 873-890), table II, method 10
        ((56, 70), (48, 80), True),  # 0.0524 to 0.3339
        ((9, 10), (3, 10), True),  # 0.1705 to 0.8090
        ((5, 56), (0, 29), False),  # -0.0381 to 0.1926
        ((10, 10), (0, 20), True),  # 0.6791 to 1
        ((1000, 2000), (1000, 2000), False),
        ((2000, 2000), (2000, 2000), False),
    ],
)
def test_what_differs_by_more_than_chance_explains(one, other, apart):
    found = [differing({3: measured(*a)}, {3: measured(*b)}, 1) for a, b in ((one, other), (other, one))]
    assert found == [[3] * apart] * 2


def test_many_pairs_of_equal_models_are_told_apart_once_in_twenty_times():
    times, pairs, n = 300, 40, 500
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = torch.distributions.Binomial(n, torch.full((2, times, pairs), 0.8)).sample().tolist()
    alarms = sum(
        bool(differing(*({i: measured(right, n) for i, right in enumerate(rights)} for rights in pair), pairs))
        for pair in zip(first, second, strict=True)
    )
    assert alarms <= 27  # 15 expected; more than 27 in one of a thousand draws
    assert differing({1: measured(400, n)}, {1: measured(340, n)}, pairs) == [1]


def cheat(monkeypatch, is_right):
    """Make the model right exactly where ``is_right(episode)`` says so; return the episodes that it is asked."""
    asked = []

    def answer(model, episode, passes):
        asked.append(episode)
        wrong = (episode.targets + 1) % model.config.vocabulary
        answers = torch.where(is_right(episode), episode.targets, wrong).clamp(min=0)
        return torch.nn.functional.one_hot(answers, model.config.vocabulary).float()

    monkeypatch.setattr(evaluation, "run_episode", answer)
    return asked


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_interval_holds_the_share_it_is_for(share):
    for n in (7, 50, 1000, 2000):
        low, high = wilson_interval(share, n)
        assert low <= share <= high


def test_every_depth_is_measured_by_itself(make_model, monkeypatch):
    cheat(monkeypatch, lambda episode: episode.depth <= 2)
    table = accuracy_by_depth(make_model(), GRAPH, passes=1, examples=50)
    assert {depth: a.accuracy for depth, a in table.items()} == {1: 1.0, 2: 1.0, 3: 0.0}
    assert (table[1].low, table[1].high) == wilson_interval(1.0, 50)
    assert table[1].n == 50


def test_each_question_counts_by_itself_on_a_graph(make_model, monkeypatch):
    cheat(monkeypatch, lambda episode: torch.arange(GRAPH.prompt_length) < 2)
    assert accuracy_by_depth(make_model(), GRAPH, 1, examples=30)[1].accuracy == 0.5


def test_an_answer_of_two_tokens_is_right_only_if_both_are(make_model, monkeypatch):
    model, place = make_model(vocabulary=len(NAMED.words)), torch.arange(NAMED.prompt_length)
    for right, share in (
        (place % 6 == 3, 0),
        (place % 6 == 4, 0),
        ((place % 6 == 3) | (place == 10), 1 / 3),
        (place != 4, 2 / 3),
        (place >= 0, 1),
    ):
        cheat(monkeypatch, lambda episode, right=right: right)
        table = accuracy_by_depth(model, NAMED, 1, examples=30)
        assert list(table) == [2] and table[2].accuracy == pytest.approx(share)
        assert (table[2].low, table[2].high) == wilson_interval(table[2].accuracy, 30)


def test_the_best_constant_answer_is_one_whole_answer(make_model, monkeypatch):
    class Four(GraphRetrieval):
        """Four answers of two tokens: two that are alike, and two that share a token with one another."""

        def sample(self, batch, generator, depth=None):
            episode = super().sample(batch, generator, depth)
            answers = torch.tensor([[5, 6], [7, 1], [8, 1], [5, 6]]).repeat(batch, 1)
            return replace(episode, targets=episode.targets.masked_scatter(episode.asked, answers))

    task = Four(nodes=4, hops=1, queries=4, name_tokens=2)
    cheat(monkeypatch, lambda episode: episode.depth > 0)
    (only,) = accuracy_by_depth(make_model(vocabulary=len(task.words)), task, 1, examples=20).values()
    assert only.majority == 0.5


def test_a_row_is_right_only_if_all_its_bits_are(make_model, monkeypatch):
    cheat(monkeypatch, lambda episode: torch.arange(ROW.cells) > 0)
    assert accuracy_by_depth(make_model(), ROW, 1, examples=30)[1].accuracy == 0.0
    cheat(monkeypatch, lambda episode: episode.windows[:, 0, :1].bool().expand_as(episode.targets))
    share = accuracy_by_depth(make_model(), ROW, 1, examples=400)[1].accuracy
    assert 0.4 < share < 0.6


@pytest.mark.parametrize("task", [GRAPH, ROW, NAMED], ids=["each", "all", "two tokens"])
def test_a_real_model_is_counted_example_by_example(task, make_model, monkeypatch):
    model, asked, given = make_model("agag", vocabulary=len(task.words)), [], []
    run_episode = evaluation.run_episode

    def spy(*arguments):
        asked.append(arguments[1])
        given.append(run_episode(*arguments))
        return given[-1]

    monkeypatch.setattr(evaluation, "run_episode", spy)
    table = accuracy_by_depth(model, task, passes=2, examples=25, batch=10)
    assert [len(episode) for episode in asked] == [10, 10, 5] * len(task.depths)
    for number, depth in enumerate(task.depths):
        shares, answers, targets = [], [], []
        for episode, logits in list(zip(asked, given, strict=True))[3 * number : 3 * number + 3]:
            for i in range(len(episode)):
                where = [p for p in range(task.prompt_length) if episode.targets[i, p] != -100]
                assert {int(episode.depth[i, p]) for p in where} == {depth}
                starts = where[:: task.answer_tokens]
                whole = [[p + late for late in range(task.answer_tokens)] for p in starts]
                assert list(itertools.chain(*whole)) == where
                targets.append([tuple(int(episode.targets[i, p]) for p in places) for places in whole])
                answers.append([tuple(int(logits[i, p].argmax()) for p in places) for places in whole])
                right = [x == y for x, y in zip(answers[-1], targets[-1], strict=True)]
                shares.append(all(right) if task.scoring == "all" else sum(right) / len(right))
        assert table[depth].accuracy == pytest.approx(sum(shares) / 25)
        everything = list(itertools.chain(*targets))
        most = max(sorted(set(everything)), key=everything.count)
        constant = [[x == most for x in row] for row in targets]
        wanted = sum(all(row) if task.scoring == "all" else sum(row) / len(row) for row in constant) / 25
        assert table[depth].majority == pytest.approx(wanted)


def test_majority_of_the_papers_automaton_is_the_papers_one_pass_result(make_model, monkeypatch):
    cheat(monkeypatch, lambda episode: episode.depth > 0)
    task = CellularAutomaton(rows=4, cells=24, steps=(32,), ask="first")
    assert accuracy_by_depth(make_model(), task, 1)[32].majority == pytest.approx(0.563**4, abs=0.02)


def test_examples_depend_on_the_seed_and_never_repeat(make_model, monkeypatch):
    asked = cheat(monkeypatch, lambda episode: episode.depth > 0)
    task = CellularAutomaton(cells=40, steps=(1, 2))
    for seed in (0, 1):
        accuracy_by_depth(make_model(), task, 1, examples=40, seed=seed, batch=20)
    rows = [tuple(row) for episode in asked for row in episode.windows[:, 0].tolist()]
    assert len(set(rows)) == len(rows) == 2 * 2 * 40
    again = cheat(monkeypatch, lambda episode: episode.depth > 0)
    accuracy_by_depth(make_model(), task, 1, examples=40, seed=0, batch=20)
    assert torch.equal(again[0].windows, asked[0].windows)


def test_wrong_settings_are_named(make_model):
    with pytest.raises(ValueError, match=r"examples must lie in 1\.\.5000000, got 0"):
        accuracy_by_depth(make_model(), GRAPH, 1, examples=0)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        accuracy_by_depth(make_model(), GRAPH, 0)
    with pytest.raises(ValueError, match="the task has 8 words, the model a vocabulary of 7"):
        accuracy_by_depth(make_model(vocabulary=7), GRAPH, 1)

    class Odd(GraphRetrieval):
        scoring = "some"

    with pytest.raises(ValueError, match="the graph task's scoring 'some' is unknown: use one of each, all"):
        accuracy_by_depth(make_model(), Odd(nodes=4, hops=3, queries=2), 1)


def table(*shares, majority=0.25):
    return {depth: Accuracy(share, 0.0, 1.0, 2000, majority) for depth, share in enumerate(shares, start=1)}


def test_across_seeds_is_the_mean_with_students_interval():
    together = across_seeds([table(0.4, 0.99), table(0.5, 1.0), table(0.6, 1.0)])
    assert together[1].accuracy == pytest.approx(0.5)
    reach = 4.302653 * 0.1 / math.sqrt(3)
    assert (together[1].low, together[1].high) == pytest.approx((0.5 - reach, 0.5 + reach))
    reach = 4.302653 * math.sqrt(1 / 90_000)  # the deviation of 0.99, 1 and 1, divided by the root of three
    assert together[2].high == pytest.approx(0.99667 + reach, abs=1e-4) and together[2].high > 1, "drawn as it is"
    assert together[1].n == 3 and together[1].majority == pytest.approx(0.25)


def test_across_two_seeds_uses_one_degree_of_freedom():
    reach = 12.706205 * 0.01 * math.sqrt(2) / math.sqrt(2)
    assert across_seeds([table(0.49), table(0.51)])[1].low == pytest.approx(0.5 - reach)


def seeds(*shares):
    return {seed: table(share) for seed, share in enumerate(shares)}


def test_pairs_of_seeds_tell_what_the_spread_between_seeds_would_hide():
    one, other = seeds(0.1, 0.3, 0.5, 0.7, 0.91), seeds(0.05, 0.25, 0.46, 0.65, 0.85)
    found = paired(one, other)[1]
    apart = [one[seed][1].accuracy - other[seed][1].accuracy for seed in range(5)]
    t = statistics.mean(apart) / (statistics.stdev(apart) / math.sqrt(5))
    assert t > 2.776445, "beyond Student's 97.5% for four degrees of freedom"
    assert found.n == 5 and found.p < 0.05 and found.word == "ahead"
    assert found.difference == pytest.approx(statistics.mean(apart))
    assert paired(other, one)[1].word == "behind"
    together = across_seeds([*one.values()])[1], across_seeds([*other.values()])[1]
    assert together[0].low < together[1].high, "their intervals overlap"


def test_words_say_when_they_rest_on_few_seeds_and_only_common_ones_count():
    assert paired(seeds(0.9, 0.91, 0.93), seeds(0.1, 0.12, 0.11, 0.9, 0.9))[1].word == "ahead (3 seeds)"
    assert paired(seeds(0.9, 0.1, 0.5), seeds(0.5, 0.5, 0.6))[1].word == "not told apart (3 seeds)"
    assert paired(seeds(1.0, 1.0, 1.0), seeds(1.0, 1.0, 1.0))[1] == (0, 1, 3)
    assert paired(seeds(0.9), seeds(0.1, 0.1))[1].word == "not tested (1 seed)"
    with pytest.raises(ValueError, match=r"no seed is in both: \[0\] and \[\]"):
        paired(seeds(0.9), {})


def test_a_single_run_keeps_its_own_interval_and_none_is_refused():
    single = table(0.3)
    assert across_seeds([single]) == single
    with pytest.raises(ValueError, match="no run"):
        across_seeds([])


@pytest.mark.parametrize("scoring", ["each", "all"])
def test_an_example_that_asks_nothing_does_not_count_and_a_task_without_questions_is_refused(scoring, make_model):
    class Sometimes(GraphRetrieval):
        every = 3

        def sample(self, batch, generator, depth=None):
            episode = super().sample(batch, generator, depth)
            silent = torch.arange(batch)[:, None] % self.every > 0
            return replace(episode, targets=episode.targets.masked_fill(silent, -100))

    Sometimes.scoring = scoring
    task = Sometimes(nodes=4, hops=1, queries=2)
    found = accuracy_by_depth(make_model(), task, passes=1, examples=30)[1]
    assert found.n == 10 and 0 <= found.accuracy <= 1 and 0 < found.majority < 1
    Sometimes.every = 1
    whole = accuracy_by_depth(make_model(), task, passes=1, examples=30)[1]
    assert whole.n == 30
    Sometimes.sample = lambda self, batch, generator, depth=None: replace(
        (episode := GraphRetrieval.sample(self, batch, generator, depth)), targets=episode.targets.fill_(-100)
    )
    with pytest.raises(ValueError, match="the graph task asks nothing at depth 1"):
        accuracy_by_depth(make_model(), task, passes=1, examples=30)


@pytest.mark.parametrize("windows", [1, 2])
@pytest.mark.parametrize(
    "layout, settings", [("ag", {}), ("agga", {"carry": "inject"}), ("ag", {"eviction": "sliding"})]
)
def test_one_sleep_gives_what_as_many_sleeps_would(layout, settings, windows, make_model):
    task = GraphRetrieval(nodes=4, hops=2, queries=3, windows=windows)
    model = make_model(layout, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # so that a pass changes answers
    tables = accuracy_by_pass(model, task, (3, 1, 2), examples=30, batch=20)
    assert list(tables) == [3, 1, 2] and tables[1] != tables[3]
    for n, table in tables.items():
        assert table == accuracy_by_depth(model, task, n, examples=30, batch=20)
    with pytest.raises(ValueError, match=r"passes \(N\)"):
        accuracy_by_pass(model, task, (1, 0))


def test_a_task_that_does_not_ask_at_the_depth_it_is_told_is_refused(make_model):
    class Deaf(GraphRetrieval):
        def sample(self, batch, generator, depth=None):
            return super().sample(batch, generator, 1)

    with pytest.raises(ValueError, match="the graph task was asked for depth 2, and its episode has others"):
        accuracy_by_depth(make_model(), Deaf(nodes=4, hops=2, queries=2), passes=1, examples=4)
