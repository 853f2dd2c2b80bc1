"""Math reasoning: answers against a solver that reads the English alone, and against what guessing can do."""

import re
from collections import Counter, defaultdict

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.figure import Figure
from test_tasks import draw_from, words_of

from sleepedu.pictures import draw_episode
from sleepedu.tasks import UNSCORED, MathReasoning
from sleepedu.tasks.math_reasoning import COLOURS, PLACES

PAPER = {"quantities": 300, "operations": 8, "ask": "one", "windows": 4, "sums": True, "name_words": 2}
FORMS = [
    {"ask": ask, "sums": sums, "name_words": words, "quantities": 12 if words == 2 else 8, "windows": words + sums}
    for ask in ("every", "one")
    for sums in (False, True)
    for words in (1, 2)
]
EDGES = [
    {"quantities": 2, "operations": 1},
    {"quantities": 3, "operations": 1, "sums": True},
    {"quantities": 6, "operations": 5, "ask": "one", "windows": 7},
    {"quantities": 26, "operations": 25},
    {"digits": 2, "less": False},
    {"digits": 5, "ask": "one", "sums": True, "name_words": 2},
]


def problem(task, episode, index) -> str:
    """Return one example as plain text: how far the dials go, then a line for every sentence."""
    words = " ".join(word for word in words_of(task, episode.windows[index]) if word != "_")
    sentences = words.split("? ")[-1].removesuffix(" .").split(" . ")
    rule = f"Each dial shows a digit from 0 to {task.digits - 1}"
    return "\n".join(f"{line}." for line in (rule, *sentences))


def read(text: str) -> dict[str, tuple[str, list[str]]]:
    """Return for every dial what its sentence does, and with what: {"red": ("more", ["3", "blue"]), ...}."""
    facts = {}
    for line in text.lower().splitlines():
        if match := re.fullmatch(r"(.+) shows (\d)\.", line):
            name, *rest, kind = *match.groups(), "given"
        elif match := re.fullmatch(r"(.+) shows (\d) (more|less) than (.+)\.", line):
            name, number, kind, source = match.groups()
            rest = [number, source]
        elif match := re.fullmatch(r"(.+) shows (.+) plus (.+)\.", line):
            name, *rest, kind = *match.groups(), "plus"
        else:
            continue
        assert name not in facts, f"{name} is described twice"
        facts[name] = (kind, rest)
    return facts


def solve(text: str) -> dict[str, int]:
    """Return the digit of every dial, found by going through the sentences until all are understood."""
    facts, digits = read(text), {}
    size = int(re.match(r"Each dial shows a digit from 0 to (\d)", text)[1]) + 1
    while len(digits) < len(facts):
        before = len(digits)
        for name, (kind, rest) in facts.items():
            if kind == "given":
                digits[name] = int(rest[0])
            elif kind == "plus" and rest[0] in digits and rest[1] in digits:
                digits[name] = (digits[rest[0]] + digits[rest[1]]) % size
            elif kind in ("more", "less") and rest[1] in digits:
                digits[name] = (digits[rest[1]] + int(rest[0]) * (1 if kind == "more" else -1)) % size
        assert len(digits) > before, "the sentences go in a circle"
    return digits


def behind(facts: dict[str, tuple[str, list[str]]], name: str) -> list[str]:
    """Return every dial that a digit takes, itself included, as often as it is used."""
    _, rest = facts[name]
    return [name, *(other for source in rest if source in facts for other in behind(facts, source))]


def questions(task, episode, index) -> list[tuple[str, int, int]]:
    """Return name, right digit and depth of every question, from the tokens."""
    if task.ask == "one":
        words = " ".join(word for word in words_of(task, episode.windows[index]) if word != "_")
        name = re.match(r"what does (.+?) show \?", words)[1]
        return [(name, int(episode.targets[index, 0]), int(episode.depth[index, 0]))]
    asked, prompt, width = [], words_of(task, episode.prompt[index]), 1 + task.name_words
    for last in range(width - 1, len(prompt), width):
        mark, *name = prompt[last + 1 - width : last + 1]
        assert mark == "?"
        if episode.targets[index, last] != UNSCORED:
            asked.append((" ".join(name), int(episode.targets[index, last]), int(episode.depth[index, last])))
    return asked


# What is asked, and what is right


@pytest.mark.parametrize("settings", FORMS + EDGES, ids=str)
def test_answers_agree_with_a_reader_of_the_english(settings):
    task = MathReasoning(**settings)
    count = 1250 if settings in FORMS else 100  # 10,000 problems over the eight forms
    depths = [None, *task.depths]
    for seed, depth in enumerate(depths):
        episode = draw_from(task, count // len(depths) + 1, seed, depth)
        for i in range(len(episode)):
            text = problem(task, episode, i)
            facts, digits, asked = read(text), solve(text), questions(task, episode, i)
            assert len(facts) == task.quantities and asked
            for name, digit, operations in asked:
                assert digits[name] == digit, text
                used = behind(facts, name)
                assert len(used) == len(set(used)), "a dial is used twice in one derivation"
                derived = [other for other in used if facts[other][0] != "given"]
                assert len(derived) == operations and depth in (None, operations)


def test_the_papers_form_is_long_and_asks_one_question_first():
    task = MathReasoning(**PAPER)
    assert 2000 <= task.windows * task.window <= 3300 and task.prompt_length == 1
    assert task.depths == tuple(range(1, 9))
    episode = draw_from(task, 30)
    for i in range(30):
        words = words_of(task, episode.windows[i])
        assert [word for word in words if word != "_"][:2] == ["what", "does"]
        text = problem(task, episode, i)
        ((name, digit, _),) = questions(task, episode, i)
        assert solve(text)[name] == digit
    assert words_of(task, episode.prompt) == ["="] * 30


def test_every_asks_all_dials_and_given_ones_are_a_bridge():
    task = MathReasoning()
    episode = draw_from(task, 300)
    depth = episode.depth[:, 1::2]
    assert task.given == 3 and (depth.sort(dim=1).values[:, :3] == 0).all()
    assert (episode.targets[:, 1::2] >= 0).all() and (episode.targets[:, 0::2] == UNSCORED).all()
    for i in range(300):
        assert sorted(words_of(task, episode.prompt[i, 1::2])) == sorted(COLOURS[:8])
        assert set(depth[i].tolist()) == set(range(int(depth[i].max()) + 1)), "a depth is left out"
    assert set(depth.max(dim=1).values.tolist()) == set(task.depths), "problems are not of every depth"
    only = draw_from(task, 300, depth=3)
    assert torch.equal(only.asked, only.depth == 3) and only.asked.any(dim=1).all()


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_depths_say_nothing_of_the_length(settings):
    task = MathReasoning(**settings)
    depth = draw_from(task, 4000).depth
    share = torch.bincount(depth[depth > 0], minlength=5)[1:] / (depth > 0).sum()
    if task.ask == "one":
        torch.testing.assert_close(share, torch.full((4,), 0.25), rtol=0, atol=0.03)
    else:
        assert (share.diff() < 0).all() and share.min() > 0.04, "shallow dials should abound, deep ones occur"
    blank = task.words.index("_")
    lengths = [
        (draw_from(task, 2000, d, d).windows != blank).sum(dim=(1, 2)).double().mean().item() for d in task.depths
    ]
    assert max(lengths) - min(lengths) < 0.3  # with sums, which are a word shorter and go deep, there is chance in it
    assert task.sums or len(set(lengths)) == 1


@pytest.mark.parametrize("settings", [*FORMS, PAPER], ids=str)
def test_text_is_shuffled_closed_up_and_padded_on_the_left_only(settings):
    task = MathReasoning(**settings)
    episode = draw_from(task, 40)
    for i in range(40):
        words = words_of(task, episode.windows[i])
        start = next(place for place, word in enumerate(words) if word != "_")
        assert "_" not in words[start:] and words[-1] == "."
        assert words.count(".") == task.quantities
        assert task.sums or start < task.windows  # without sums all texts of a form are equally long


def test_given_dials_stand_anywhere_in_the_text():
    task = MathReasoning()
    episode = draw_from(task, 2000)
    kinds = [[kind for kind, _ in read(problem(task, episode, i)).values()] for i in range(2000)]
    for place in range(8):
        assert sum(kind[place] == "given" for kind in kinds) / 2000 == pytest.approx(3 / 8, abs=0.04)


def test_names_are_drawn_afresh():
    short, long = MathReasoning(), MathReasoning(name_words=2)
    assert short.words[10:18] == COLOURS[:8] and "plus" not in short.words
    assert {next(iter(read(problem(short, draw_from(short), i)))) for i in range(200)} == set(COLOURS[:8])
    pairs = set()
    for i in range(200):
        names = list(read(problem(long, draw_from(long), i)))
        assert all(a in COLOURS[:20] and b in PLACES for a, b in (name.split() for name in names))
        pairs.update(names)
    assert len(pairs) > 380
    assert len(set(COLOURS)) == 26 and len(set(PLACES)) == 20


def test_sums_are_used_and_only_where_they_are_on():
    for ask in ("every", "one"):
        on, off = MathReasoning(ask=ask, sums=True), MathReasoning(ask=ask)
        kinds = Counter(kind for i in range(200) for kind, _ in read(problem(on, draw_from(on), i)).values())
        assert 0.08 < kinds["plus"] / kinds.total() < 0.3
        assert abs(kinds["more"] - kinds["less"]) < 4 * (kinds["more"] + kinds["less"]) ** 0.5
        assert all(kind != "plus" for i in range(50) for kind, _ in read(problem(off, draw_from(off), i)).values())


# What guessing can do


def best_constant(task, episode):
    answers = episode.targets[episode.depth > 0]
    return answers.mode().values


def most_frequent_number(task, episode):
    text = episode.windows.flatten(1)
    counts = torch.stack([(text == digit).sum(dim=1) for digit in range(task.digits)], dim=1)
    return counts.argmax(dim=1, keepdim=True)


def last_number(task, episode):
    text = episode.windows.flatten(1)
    place = torch.where(text < task.digits, torch.arange(text.shape[1]), -1).argmax(dim=1, keepdim=True)
    return text.gather(1, place)


def share_right(guess, episode) -> tuple[float, float]:
    """Return the share of right guesses for dials that are not given, and its standard error over problems."""
    asked = episode.depth > 0
    share = ((guess == episode.targets) & asked).sum(dim=1) / asked.sum(dim=1)
    return share.mean().item(), share.std().item() / len(share) ** 0.5


@pytest.mark.parametrize(
    "settings", [{}, {"ask": "one"}, {"sums": True}, {"ask": "one", "sums": True}, {"digits": 5}], ids=str
)
@pytest.mark.parametrize("guesser", [best_constant, most_frequent_number, last_number])
def test_guessers_are_right_one_time_in_all_digits(settings, guesser):
    """The most frequent number depends on all numbers and may stray: a point down, 0.3 up, in 300,000 problems."""
    task = MathReasoning(**settings)
    assert task.floor == 1 / task.digits
    stray = (0.012, 0.004) if guesser is most_frequent_number else (0, 0)
    for depth in (None, *task.depths):
        episode = draw_from(task, 10_000, 7 + (depth or 0), depth)
        share, error = share_right(guesser(task, episode), episode)
        assert 1 / task.digits - stray[0] - 4 * error < share < 1 / task.digits + stray[1] + 4 * error, f"depth {depth}"


def surface(text: str, name: str) -> dict[str, object]:
    """Return what can be seen of a question without working it out in full."""
    facts = read(text)
    names, (kind, rest) = list(facts), facts[name]
    numbers = [int(word) for _, words in facts.values() for word in words if word.isdigit()]
    own = rest[0] if kind != "plus" else None
    used = behind(facts, name)
    return {
        "form and number of its sentence": (kind, own),
        "number and place of its sentence": (own, names.index(name)),
        "sentence of the dial that it depends on": (facts[rest[-1]][0], facts[rest[-1]][1][0][:1]),
        "digit of the dial that it depends on": solve(text)[rest[-1]],
        "given digit at the end of its derivation, and its length": (facts[used[-1]][1], len(used)),
        "dials that depend on it": sum(name in words for _, words in facts.values()),
        "first and last number": (numbers[0], numbers[-1]),
        "sum of all numbers": sum(numbers) % 10,
        "largest number": max(numbers),
        "most frequent number, and how often": Counter(numbers).most_common(1)[0],
        "how often each form occurs": sorted(Counter(kind for kind, _ in facts.values()).items()),
    }


@pytest.mark.parametrize("sums", [False, True])
def test_no_table_of_surface_features_predicts_the_answer(sums):
    """For each feature, the digit most often right in one half of 10,000 problems is tried on the other half."""
    task = MathReasoning(ask="one", sums=sums)
    episode = draw_from(task, 10_000, 11)
    tables = [defaultdict(lambda: defaultdict(Counter)) for _ in range(2)]
    seen = []
    for i in range(len(episode)):
        ((name, digit, _),) = questions(task, episode, i)
        features = {what: str(value) for what, value in surface(problem(task, episode, i), name).items()}
        seen.append((features, digit))
        for what, value in features.items():
            tables[i % 2][what][value][digit] += 1
    for what in seen[0][0]:
        right = 0
        for i, (features, digit) in enumerate(seen):
            table = tables[1 - i % 2][what][features[what]]
            right += bool(table) and table.most_common(1)[0][0] == digit
        assert right / len(seen) == pytest.approx(0.1, abs=4 * 0.003), what


# Words, pictures and mistakes


def written(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("settings", [{}, {"sums": True}, PAPER], ids=str)
@pytest.mark.parametrize("depth", [None, 2])
def test_the_picture_shows_every_digit_and_marks_wrong_answers(settings, depth):
    task = MathReasoning(**settings)
    episode = draw_from(task, 3, depth=depth)
    asked = questions(task, episode, 1)
    facts, digits = read(problem(task, episode, 1)), solve(problem(task, episode, 1))
    shown = facts if task.ask == "every" else behind(facts, asked[0][0])
    figure = draw_episode(task, episode, 1)
    assert isinstance(figure, Figure) and plt.get_fignums() == []
    assert set(shown) <= set(written(figure)) and figure.axes[0].get_title(loc="left") == ""
    on_dials = Counter(text for text in written(figure) if text.isdigit())
    assert on_dials == Counter(str(digits[name]) for name in shown)
    right = episode.targets[1].clamp(min=0)
    assert draw_episode(task, episode, 1, right).axes[0].get_title(loc="left") == "the model: all right"
    wrong = right.clone()
    place = int(episode.asked[1].nonzero()[0])
    wrong[place] = (right[place] + 3) % 10
    figure = draw_episode(task, episode, 1, wrong)
    assert figure.axes[0].get_title(loc="left") == f"the model: 1 of {len(asked)} wrong (×)"
    assert f"×{int(wrong[place])}" in written(figure)


def test_dials_stand_in_the_columns_of_their_operations_with_arrows_between():
    task = MathReasoning(sums=True)
    episode = draw_from(task, 5)
    for index in range(5):
        facts = read(problem(task, episode, index))
        (axes,) = draw_episode(task, episode, index).axes
        places = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert all(places[name] == operations for name, _, operations in questions(task, episode, index))
        sources = sum(word in facts for _, rest in facts.values() for word in rest)
        assert sum(getattr(text, "arrow_patch", None) is not None for text in axes.texts) == sources


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quantities": 1}, r"quantities with name_words 1 must lie in 2\.\.26, got 1"),
        ({"quantities": 27}, r"quantities with name_words 1 must lie in 2\.\.26, got 27"),
        ({"quantities": 401, "name_words": 2}, r"quantities with name_words 2 must lie in 2\.\.400, got 401"),
        ({"quantities": 8.0}, "quantities .* must be a whole number, got 8.0"),
        ({"operations": 0}, r"operations on 8 quantities must lie in 1\.\.7, got 0"),
        ({"operations": 8}, r"operations on 8 quantities must lie in 1\.\.7, got 8"),
        ({"operations": 2.5}, "operations .* must be a whole number, got 2.5"),
        ({"less": "no"}, "less must be True or False, got 'no'"),
        ({"sums": 2}, "sums must be True or False, got 2"),
        ({"operations": 7, "sums": True}, r"operations on 8 quantities must lie in 1\.\.6, got 7"),
        ({"quantities": 2, "sums": True}, r"quantities with name_words 1 must lie in 3\.\.26, got 2"),
        ({"ask": "all"}, "ask 'all' is unknown: use one of every, one"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"name_words": 3}, r"name_words must lie in 1\.\.2, got 3"),
        ({"digits": 11}, r"digits must lie in 2\.\.10, got 11"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MathReasoning(**settings)
