"""Word problems as ordinary text, for any tokenizer: the question first, then windows of an exact length, no padding.

The paper's form of GSM-Infinite. A problem is ``MathReasoning``'s: dials that show digits. Sentences about other dials,
of the same forms, fill the windows to the last token.
"""

import random
import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from sleepedu import checks
from sleepedu.pretrained.loading import tokenizer_of
from sleepedu.tasks.base import UNSCORED, Episode, Task
from sleepedu.tasks.math_reasoning import COLOURS, PAIRED, PLACES, MathReasoning

NAMES = tuple(f"{colour} {place}" for colour in COLOURS[:PAIRED] for place in PLACES)
ANSWER = "\nAnswer: "
MOST = 4000  # tokens of a text, for which there are names enough
FILL = " now"  # a word that a sentence can do with or without
VERB = " shows"  # where it stands before
MORE = ("white lighthouse", "9", "more", ["brown lighthouse"])  # the longest sentence without a sum


@dataclass(frozen=True)
class TextReasoning(Task):
    """``MathReasoning`` as text: "The red mill dial shows 3 more than the grey canal dial."

    tokenizer: of which model, as for ``load``. windows, window: how many, of how many tokens; the paper's texts have
    2,000 to 3,300. ask: "one" question before the first sentence, as in the paper, or for "every" dial of the problem
    after the last. quantities, operations, sums, less, digits: as in ``MathReasoning``. Raises ValueError as that does,
    where a problem may be longer than the windows, these are longer than ``MOST``, or the tokenizer does not give every
    digit a token of its own.
    """

    tokenizer: str
    windows: int = 1
    window: int = 512
    quantities: int = 8
    operations: int = 4
    sums: bool = True
    less: bool = True
    digits: int = 10
    ask: str = "one"

    name = "text"
    scoring = "each"
    depth_name = "operations"

    def __post_init__(self):
        checks.whole("windows", self.windows, least=1)
        _ = self.problem  # which refuses what makes none
        checks.whole("window", self.window, least=1)
        for text in (FILL, VERB):
            if len(self._ids(text)) != 1:
                raise ValueError(f"the tokenizer of {self.tokenizer} splits {text!r}: it must be one token")
        starts = {tuple(self._ids(f"{ANSWER}{digit}")[:-1]) for digit in range(10)}
        if starts != {tuple(self._prompt)} or not self._prompt or len(set(self.digit_tokens)) < 10:
            raise ValueError(f"the tokenizer of {self.tokenizer} splits digits, or joins them: each must be a token")
        names = ["brown lighthouse", "orange lighthouse"]
        longest = sentence("white lighthouse", "", "", names) if self.sums else sentence(*MORE)
        needed = (self.quantities + 2 * (self.ask == "one")) * len(self._ids(longest))
        checks.whole("windows x window", self.windows * self.window, least=needed, most=MOST)

    @cached_property
    def problem(self) -> MathReasoning:
        """The problem without its text."""
        shape = (self.quantities, self.operations, self.ask)
        return MathReasoning(*shape, sums=self.sums, less=self.less, digits=self.digits)

    @cached_property
    def _prompt(self) -> list[int]:
        return self._ids(f"{ANSWER}0")[:-1]

    @cached_property
    def digit_tokens(self) -> list[int]:
        """The token of every digit, 0 to 9."""
        return [self._ids(f"{ANSWER}{digit}")[-1] for digit in range(10)]

    @cached_property
    def words(self) -> tuple[str, ...]:
        """Every token of the tokenizer, as it writes them."""
        found = tokenizer_of(self.tokenizer)
        return tuple(found.convert_ids_to_tokens(range(len(found))))

    @property
    def depths(self) -> tuple[int, ...]:
        return self.problem.depths

    @cached_property
    def prompt_length(self) -> int:
        longest = max(len(self._asks(name)) for name in NAMES)
        return len(self._prompt) if self.ask == "one" else self.quantities * longest

    @property
    def floor(self) -> float:
        return self.problem.floor or 0.0

    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        self._check_sample(batch, depth)
        drawn = self.problem.sample(batch, generator, depth)
        chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
        texts, prompts = zip(*(self._text(drawn, index, chance) for index in range(batch)), strict=True)
        prompt = torch.full((batch, self.prompt_length), self.digit_tokens[0])  # and behind all questions
        targets, depths = torch.full_like(prompt, UNSCORED), torch.zeros_like(prompt)
        digits = torch.tensor([*self.digit_tokens, UNSCORED])
        for index, asks in enumerate(prompts):
            ids = torch.tensor([token for ask in asks for token in ask])
            prompt[index, : len(ids)] = ids
            places = torch.tensor([len(ask) for ask in asks]).cumsum(0) - 1  # the last token of every question
            scored = drawn.prompt.shape[1] // len(asks)
            own = drawn.targets[index, scored - 1 :: scored]
            targets[index, places] = digits[own.where(own != UNSCORED, -1)]
            depths[index, places] = drawn.depth[index, scored - 1 :: scored]
        return Episode(torch.tensor(texts).view(batch, self.windows, self.window), prompt, targets, depths)

    def _text(self, drawn: Episode, index: int, chance: random.Random) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of one problem, its sentences among others, as many as fit; and those of every question."""
        room = self.windows * self.window
        names = chance.sample(NAMES, min(len(NAMES), self.quantities + room // 8))
        facts = self.problem.facts(drawn, index)
        called = {dial: names.pop() for dial in facts}
        dials = [self.problem.words[token] for token in drawn.prompt[index].tolist()]
        if self.ask == "one":
            (dial,) = self.problem.asked_dials(drawn, index)
            question, asks = self._ids(f"Question: what does the {called[dial]} dial show?"), [self._prompt]
        else:
            question, asks = [], [self._asks(called[dial]) for dial in dials if dial in called]
        own = [
            sentence(called[dial], n, form, [called[of] for of in sources])
            for dial, (n, form, sources) in facts.items()
        ]
        others = self._others(list(called.values()), names, chance)
        sentences = [self._ids(text) for text in (*own, *others)]
        room -= len(question) + sum(map(len, sentences[: len(own)]))
        for ids in sentences[len(own) :]:  # those that fit
            if len(ids) <= room:
                room -= len(ids)
            else:
                ids.clear()
        sentences = [ids for ids in sentences if ids]
        chance.shuffle(sentences)
        (verb,), (fill,) = self._ids(VERB), self._ids(FILL)
        filled = chance.sample(sentences, len(sentences))
        for number in range(room):  # what is left is less than a sentence
            ids = filled[number % len(filled)]
            ids.insert(ids.index(verb), fill)
        return [*question, *(token for ids in sentences for token in ids)], asks

    def _others(self, known: list[str], names: list[str], chance: random.Random) -> list[str]:
        """Return sentences about dials that nothing depends on, in the forms and about the shares of the problem's."""
        forms = ["", *(["more", "less"] if self.less else ["more"])]
        sentences = []
        for name in names:
            number, form, sources = str(chance.randrange(self.digits)), chance.choice(forms), chance.sample(known, 2)
            if form and self.sums and chance.random() < 0.3:
                number, form = "", "plus"
            count = {"": 0, "plus": 2}.get(form, 1)
            sentences.append(sentence(name, number, form, sources[:count]))
            known.append(name)
        return sentences

    def _asks(self, name: str) -> list[int]:
        return self._ids(f"{asked(name)} 0")[:-1]  # up to the digit: some tokenizers have a token for its space

    def _ids(self, text: str) -> list[int]:
        return [token for word in re.findall(" ?[^ ]+", text) for token in word_tokens(self.tokenizer, word)]

    def text(self, episode: Episode, index: int = 0) -> str:
        decode = tokenizer_of(self.tokenizer).decode
        parts, start = [decode(episode.windows[index].flatten().tolist())], 0
        for place in episode.asked[index].nonzero().flatten().tolist():
            question = decode(episode.prompt[index, start : place + 1].tolist())
            parts.append(question if question[0].isspace() else f" {question}")  # a tokenizer of words has no spaces
            parts.append(f"[{self.digit_tokens.index(int(episode.targets[index, place]))}]")
            start = place + 1
        return "".join(parts)


def asked(name: str) -> str:
    """Return what asks for a dial after the text: the beginning of a sentence that only its digit can go on."""
    return f" The {name} dial{VERB}"


def sentence(name: str, number: str, form: str, sources: list[str]) -> str:
    """Return what the text says of a dial: its number, "more", "less" or neither, and the dials it refers to."""
    if not sources:
        return f" The {name} dial shows {number}."
    if len(sources) == 2:
        return f" The {name} dial shows the {sources[0]} dial plus the {sources[1]} dial."
    return f" The {name} dial shows {number} {form} than the {sources[0]} dial."


@lru_cache(maxsize=2**14)
def word_tokens(source: str, word: str) -> tuple[int, ...]:
    """Return the tokens of a word with the space before it: no tokenizer of today joins two."""
    return tuple(tokenizer_of(source)(word, add_special_tokens=False).input_ids)
