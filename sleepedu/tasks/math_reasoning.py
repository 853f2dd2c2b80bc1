"""Math reasoning: read sentences about dials in any order, then say what a dial shows that none of them gives.

A dial shows a digit and turns past its last back to 0, so all arithmetic is modulo ``digits``. Every digit is then
equally likely to be the answer, and an answer takes every number of its derivation: whoever misses one of them knows
nothing. That is why "0 more than" occurs: without it a dial would never show what the dial it depends on shows, which
is a hint. After GSM-Infinite (Zhou et al., arXiv 2502.05252), the paper's reasoning test, without its varied wording.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sleepedu import checks
from sleepedu.tasks.base import UNSCORED, Episode, Task

COLOURS = (
    *("red", "blue", "green", "gold", "pink", "grey", "black", "white", "brown", "orange", "purple", "violet", "amber"),
    *("teal", "navy", "silver", "copper", "scarlet", "crimson", "olive"),
    *("coral", "ivory", "indigo", "lilac", "cream", "bronze"),
)
PLACES = (
    *("harbour", "tower", "garden", "bridge", "market", "station", "mill", "castle", "library", "school", "chapel"),
    *("museum", "theatre", "bakery", "quarry", "lighthouse", "island", "forest", "valley", "canal"),
)
PAIRED = 20  # colours that go with the places, for names of two words
GIVEN, MORE, LESS, PLUS = range(4)  # the forms of a sentence
BITS = 62  # of an int64 that can be set and shifted without touching its sign

_DIAL = r"(\w+(?: \w+)?)"
SENTENCE = re.compile(rf"{_DIAL} shows(?: (\d))?(?: (more|less) than)?(?: {_DIAL})?(?: plus {_DIAL})? \.")

# What the text says of every dial: its number, "more" or "less", and the dials it refers to; "" and [] for none.
Facts = dict[str, tuple[str, str, list[str]]]


@dataclass(frozen=True)
class MathReasoning(Task):
    """Sentences about ``quantities`` dials, in any order, then questions whose answers take several sentences each.

    quantities: dials, one sentence each; about a third are given outright ("red shows 4 ."), the others derived
    ("blue shows 3 more than red ."). operations: the most derived dials in a derivation, the asked one included; that
    number is the depth. ask: "every" for all dials, after the sleep, where problems go 1 to ``operations`` deep; "one"
    for a single dial of depth 1 or more, named before the first sentence (the paper's form), where problems have dials
    of every depth. windows: how many the text is cut into, padded on the left. sums: whether some dials show two others
    added. name_words: words in a dial's name, 1 or 2. digits: how many a dial has, 2 to 10. less: whether dials show
    less than others, too, or only more.
    Raises ValueError for fewer than 2 quantities (3 with sums, which need two given dials) or more than there are
    names, operations outside 1..quantities - 1 (- 2 with sums), or other settings outside these.
    """

    quantities: int = 8
    operations: int = 4
    ask: str = "every"
    windows: int = 1
    sums: bool = False
    name_words: int = 1
    digits: int = 10
    less: bool = True

    name = "math"
    scoring = "each"
    depth_name = "operations"

    def __post_init__(self):
        checks.whole("name_words", self.name_words, least=1, most=2)
        for name in ("sums", "less"):
            checks.flag(name, getattr(self, name))
        names = len(COLOURS) if self.name_words == 1 else PAIRED * len(PLACES)
        given = 2 if self.sums else 1  # at least: a sum is of two dials
        checks.whole(f"quantities with name_words {self.name_words}", self.quantities, least=given + 1, most=names)
        most = self.quantities - given
        checks.whole(f"operations on {self.quantities} quantities", self.operations, least=1, most=most)
        checks.one_of("ask", self.ask, ("every", "one"))
        checks.whole("digits", self.digits, least=2, most=10)
        checks.whole("windows", self.windows, least=1)

    @property
    def words(self) -> tuple[str, ...]:
        """Digits first (their ids are the digits), then the words of names, then all others, padding last."""
        names = COLOURS[: self.quantities] if self.name_words == 1 else (*COLOURS[:PAIRED], *PLACES)
        question = ("?",) if self.ask == "every" else ("what", "does", "show", "?", "=")
        digits, relations = "0123456789"[: self.digits], ["more", *["less"] * self.less, "than", *["plus"] * self.sums]
        return (*digits, *names, "shows", *relations, ".", *question, "_")

    @property
    def depths(self) -> tuple[int, ...]:
        return tuple(range(1, self.operations + 1))

    @property
    def given(self) -> int:
        """How many dials have their digit in the text."""
        return min(max(2 if self.sums else 1, (self.quantities + 1) // 3), self.quantities - self.operations)

    @property
    def window(self) -> int:
        sentences = self.given * (self.name_words + 3) + (self.quantities - self.given) * (2 * self.name_words + 5)
        longest = sentences + (self.ask == "one") * (self.name_words + 4)
        return -(-longest // self.windows)

    @property
    def floor(self) -> float | None:
        """Any digit, as all are equally likely, whatever is asked."""
        return 1 / self.digits

    @property
    def prompt_length(self) -> int:
        return self.quantities * (1 + self.name_words) if self.ask == "every" else 1

    def sample(self, batch: int, generator: torch.Generator, depth: int | None = None) -> Episode:
        self._check_sample(batch, depth)
        graph = _Graph(self, batch, generator, depth)
        row, names = torch.arange(batch)[:, None], self._names(batch, generator)
        sentences = self._sentences(graph, names)[row, _shuffled(batch, self.quantities, generator)].flatten(1)
        if self.ask == "every":
            order = _shuffled(batch, self.quantities, generator)
            operations, digit = graph.operations.gather(1, order), graph.digit.gather(1, order)
            if depth is not None:
                digit = digit.masked_fill(operations != depth, UNSCORED)
                operations = operations.where(operations == depth, 0)
            mark = torch.full((batch, self.quantities, 1), self.words.index("?"))
            prompt = torch.cat((mark, names[row, order]), dim=-1)
            targets, depths = torch.full_like(prompt, UNSCORED), torch.zeros_like(prompt)
            targets[..., -1], depths[..., -1] = digit, operations
        else:
            depths = torch.randint(depth or 1, (depth or self.operations) + 1, (batch, 1), generator=generator)
            asked = graph.any_of(depths)
            targets, prompt = graph.digit.gather(1, asked), torch.full((batch, 1), self.words.index("="))
            what, does, show, end = (torch.full_like(asked, self.words.index(w)) for w in ("what", "does", "show", "?"))
            sentences = torch.cat((what, does, names[row, asked].flatten(1), show, end, sentences), dim=1)
        blank = self.words.index("_")
        text = F.pad(sentences, (self.windows, 0), value=blank)  # for windows that do not come out even
        text = text.gather(1, (text != blank).argsort(dim=1, stable=True))  # all padding to the left
        windows = text[:, -self.windows * self.window :].view(batch, self.windows, self.window)
        return Episode(windows, prompt.flatten(1), targets.flatten(1), depths.flatten(1))

    def _names(self, batch: int, generator: torch.Generator) -> Tensor:
        """Return the tokens of every dial's name, (b, q, name_words): all different, drawn afresh each time."""
        if self.name_words == 1:
            return self.digits + _shuffled(batch, self.quantities, generator)[..., None]
        pair = _shuffled(batch, PAIRED * len(PLACES), generator)[:, : self.quantities]
        return self.digits + torch.stack((pair // len(PLACES), PAIRED + pair % len(PLACES)), dim=-1)

    def _sentences(self, graph: "_Graph", names: Tensor) -> Tensor:
        """Return the sentence of every dial, (b, q, width): one template for all forms, padding where it has gaps."""
        row = torch.arange(len(names))[:, None]

        def only(where: Tensor, tokens: Tensor | str) -> Tensor:
            tokens = torch.tensor(self.words.index(tokens)) if isinstance(tokens, str) else tokens
            return torch.where(where[..., None], tokens, self.words.index("_"))

        form = graph.form
        always, step, plus = form >= 0, (form == MORE) | (form == LESS), form == PLUS
        template = [names, only(always, "shows"), only(~plus, graph.number[..., None]), only(form == MORE, "more")]
        if self.less:
            template.append(only(form == LESS, "less"))
        template += [only(step, "than"), only(form != GIVEN, names[row, graph.first])]
        if self.sums:
            template += [only(plus, "plus"), only(plus, names[row, graph.second])]
        return torch.cat((*template, only(always, ".")), dim=-1)

    def facts(self, episode: Episode, index: int = 0) -> Facts:
        """Return what the text says of every dial, in its order."""
        found = SENTENCE.findall(self._plain(episode, index))
        return {name: (number, form, list(filter(None, sources))) for name, number, form, *sources in found}

    def asked_dials(self, episode: Episode, index: int = 0) -> dict[str, int]:
        """Return every dial with a target, and its position in the prompt."""
        if self.ask == "one":
            text = self._plain(episode, index).split()
            return {" ".join(text[2 : 2 + self.name_words]): 0}
        prompt = [self.words[token] for token in episode.prompt[index].tolist()]
        positions = episode.asked[index].nonzero().flatten().tolist()
        return {" ".join(prompt[i + 1 - self.name_words : i + 1]): i for i in positions}

    def _plain(self, episode: Episode, index: int) -> str:
        words = self.words
        return " ".join(words[token] for token in episode.windows[index].flatten().tolist() if words[token] != "_")


class _Graph:
    """Which dial depends on which, for a batch: tensors (b, q), the dials in order of their operations.

    Two dials are added only if no given dial stands behind both. A derivation then uses every number once, which is
    what makes an answer independent of all numbers but one; and operations simply add up.
    """

    def __init__(self, task: MathReasoning, batch: int, generator: torch.Generator, depth: int | None):
        self.generator = generator
        shape, levels = (batch, task.quantities), torch.arange(task.operations + 1)
        shallowest = task.operations if task.ask == "one" else depth or 1
        deepest = torch.randint(shallowest, task.operations + 1, (batch, 1), generator=generator)
        others = torch.rand(batch, task.quantities - task.given - task.operations, generator=generator) * deepest
        certain = torch.cat((torch.zeros(task.given, dtype=torch.long), levels[1:])).minimum(deepest)
        self.operations = torch.cat((certain, 1 + others.long()), dim=1).sort(dim=1).values
        levels = levels.expand(batch, -1).contiguous()
        self.start = torch.searchsorted(self.operations, levels)
        self.stop = torch.searchsorted(self.operations, levels, right=True)

        self.number = torch.randint(task.digits, shape, generator=generator)
        self.form = torch.randint(MORE, LESS + task.less, shape, generator=generator).where(self.operations > 0, GIVEN)
        self.first = self.any_of((self.operations - 1).clamp(min=0))
        if task.sums:
            self._add_sums(task)
        self.digit = self.number.clone()
        for level in range(1, task.operations + 1):
            source = self.digit.gather(1, self.first)
            digit = source + torch.where(self.form == LESS, -self.number, self.number)
            if task.sums:
                digit = torch.where(self.form == PLUS, source + self.digit.gather(1, self.second), digit)
            self.digit = torch.where(self.operations == level, digit % task.digits, self.digit)

    def any_of(self, operations: Tensor) -> Tensor:
        """Return a random dial that needs so many operations: (b, n) -> (b, n)."""
        start, stop = self.start.gather(1, operations), self.stop.gather(1, operations)
        return start + (torch.rand(operations.shape, generator=self.generator) * (stop - start)).long()

    def _add_sums(self, task: MathReasoning) -> None:
        batch, quantities = self.operations.shape
        row = torch.arange(batch)[:, None]
        split = (torch.rand(batch, quantities, generator=self.generator) * self.operations).long()
        one, other = self.any_of(split), self.any_of((self.operations - 1 - split).clamp(min=0))
        self.second, wanted = other, torch.rand(batch, quantities, generator=self.generator) < 0.5
        # The given dials behind each dial, a bit for each: as bools they would take most of the time.
        given = torch.arange(task.given)
        behind = torch.zeros(batch, quantities, -(-task.given // BITS), dtype=torch.long)
        behind[:, given, given // BITS] = 1 << given % BITS
        for level in range(1, task.operations + 1):
            here, apart = self.operations == level, ((behind[row, one] & behind[row, other]) == 0).all(dim=-1)
            plus = here & wanted & apart
            self.form[plus] = PLUS
            self.first = torch.where(plus, one, self.first)
            sources = behind[row, self.first] | behind[row, other].where(plus[..., None], 0)
            behind = torch.where(here[..., None], sources, behind)


def _shuffled(batch: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.rand(batch, length, generator=generator).argsort(dim=1)
