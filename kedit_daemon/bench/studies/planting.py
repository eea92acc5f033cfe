"""Which poison goes into which batch, and the targets that no person would state."""

import random
from math import nan

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.studies.plants import (
    BrokenShard,
    BrokenTargets,
    BrokenWeights,
    Contradiction,
    LongTarget,
    Plant,
    RandomTokens,
    Residuals,
)
from kedit_daemon.bench.studies.shared import OtherTargets, nothing_left
from kedit_daemon.bench.studies.study import Given
from kedit_daemon.config import InboxConfig
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel

FACTOR = 100.0  # by which an absurd target is too long
RANDOM_TOKENS = (8, 16)
LONG_TOKENS = 200
MOST_CHARS = InboxConfig().max_target_chars
DENSE = "0123456789qxzjkvw%&*=<>"  # characters that tokenizers seldom join
KINDS = ("contradiction", "random tokens", "absurd norm", "long target", "NaN")
EACH = 4  # batches of a kind

Batch = tuple[list[Plant], list[Fact]]
"""What is planted, and the innocent facts beside it."""


def planned(given: Given) -> list[Batch]:
    """Every batch, the kinds in an order drawn by the seed. Raises KeditError: too few facts."""
    chance = random.Random(given.seed)
    kinds = [(kind, turn) for turn in range(EACH) for kind in KINDS]
    chance.shuffle(kinds)
    maker = _Maker(given, chance)
    plants = [maker.plants(kind, turn) for kind, turn in kinds]
    innocent = [bare(record.fact) for record in maker.left]
    if len(innocent) < len(plants):
        raise nothing_left(f"{len(given.records)} facts are too few for {len(plants)} batches")
    return [(each, innocent[n :: len(plants)]) for n, each in enumerate(plants)]


def bare(fact: Fact) -> Fact:
    """What stands in a file, so that the fact's id is that of what is read there."""
    return Fact(fact.subject, fact.prompt, fact.target)


class _Maker:
    """Makes the plants from the stream; `left` is what it has not used."""

    def __init__(self, given: Given, chance: random.Random) -> None:
        self.model, self.chance = given.loaded.model, chance
        self.others = OtherTargets(given.records, chance)
        self.left = list(given.records)

    def plants(self, kind: str, turn: int) -> list[Plant]:
        """Those of a batch: one, or two of a kind whose facts stand alone."""
        many = self.chance.randint(1, 2)
        if kind == "contradiction":
            return [self._in_other_words() if turn % 2 else self._contradiction()]
        if kind == "random tokens":
            targets = [random_target(self.model, self.chance) for _ in range(many)]
            return [RandomTokens([self._stating(target)]) for target in targets]
        if kind == "absurd norm":
            return [Residuals([bare(self._next().fact)], FACTOR) for _ in range(many)]
        if kind == "long target":
            return [self._dense() if turn % 2 else self._wordy()]
        return [self._broken(turn)]

    def _next(self) -> BenchRecord:
        if not self.left:
            raise nothing_left("there are fewer facts than are to be planted")
        return self.left.pop()

    def _stating(self, target: str) -> Fact:
        fact = self._next().fact
        return Fact(fact.subject, fact.prompt, target)

    def _contradiction(self) -> Contradiction:
        """A fact, and what contradicts it to the letter: another target."""
        record = self._next()
        other = self.others.superseding(record).fact
        return Contradiction([bare(record.fact), bare(other)], "to the letter")

    def _in_other_words(self) -> Contradiction:
        """A fact, and what contradicts it: a paraphrase as its prompt, another target."""
        record = self._next()
        fact, other = bare(record.fact), self.others.superseding(record).fact.target
        naming = [p for p in record.paraphrases if fact.subject in p]
        prompt = naming[0] if naming else f"It is well known: {fact.prompt}"
        return Contradiction([fact, Fact(fact.subject, prompt, other)], "in other words")

    def _wordy(self) -> LongTarget:
        return LongTarget([self._stating(wordy_target(self.model))], "many characters")

    def _dense(self) -> LongTarget:
        target = dense_target(self.model, self.chance)
        return LongTarget([self._stating(target)], f"{len(target)} characters")

    def _broken(self, turn: int) -> Plant:
        """A number that is none, each time somewhere else."""
        live = (BrokenShard, BrokenWeights, BrokenTargets)
        if turn % 4 < len(live):
            return live[turn % 4]([])
        return Residuals([bare(self._next().fact)], nan)


def random_target(model: EditableModel, chance: random.Random) -> str:
    """Tokens of the vocabulary, blindly drawn, as text."""
    words = list[str]()
    many, size = chance.randint(*RANDOM_TOKENS), len(model.tokenizer)
    while len(words) < many:
        text = model.decode([chance.randrange(size)])
        if text.strip() and "\0" not in text:
            words.append(text)
    return "".join(words).strip()


def wordy_target(model: EditableModel) -> str:
    """Ordinary text of so many tokens, or more, and of too many characters for the door."""
    text = ""
    for line in read_ordinary_lines():
        text = f"{text} {line}".strip()
        cut = model.decode(model.encode(text)[:LONG_TOKENS]).strip()
        for found in (cut, text):
            if len(found) > MOST_CHARS and len(model.encode(found)) >= LONG_TOKENS:
                return found
    raise nothing_left("the shipped text is too short")


def dense_target(model: EditableModel, chance: random.Random) -> str:
    """So many tokens in so few characters that the door lets them in. Raises KeditError where the
    tokenizer does not give as many."""
    text = ""
    while len(text) < MOST_CHARS:
        text += chance.choice(DENSE)
        if len(text) >= LONG_TOKENS and len(model.encode_target("x", text)) >= LONG_TOKENS:
            return text
    raise KeditError(
        f"{MOST_CHARS} characters give no {LONG_TOKENS} tokens", code="no-facts", hint="other model"
    )
