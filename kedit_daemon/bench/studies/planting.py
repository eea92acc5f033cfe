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
    PlantedPoison,
    RandomTokens,
    ScaledResiduals,
)
from kedit_daemon.bench.studies.shared import OtherTargets, make_no_facts_error
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.config import InboxConfig
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel

NORM_FACTOR = 100.0  # by which an absurd target is too long
RANDOM_TOKENS = (8, 16)
LONG_TOKENS = 200
MAX_CHARS = InboxConfig().max_target_chars
RARE_CHARACTERS = "0123456789qxzjkvw%&*=<>"  # characters that tokenizers seldom join
KINDS = ("contradiction", "random tokens", "absurd norm", "long target", "NaN")
BATCHES_PER_KIND = 4  # batches of a kind

PoisonBatch = tuple[list[PlantedPoison], list[Fact]]
"""What is planted, and the innocent facts beside it."""


def plan_batches(given: StudyInput) -> list[PoisonBatch]:
    """Every batch, the kinds in an order drawn by the seed. Raises KeditError: too few facts."""
    chance = random.Random(given.seed)
    kinds = [(kind, turn) for turn in range(BATCHES_PER_KIND) for kind in KINDS]
    chance.shuffle(kinds)
    maker = _PoisonMaker(given, chance)
    plants = [maker.make_poisons(kind, turn) for kind, turn in kinds]
    innocent = [strip_fact(record.fact) for record in maker.unused_records]
    if len(innocent) < len(plants):
        raise make_no_facts_error(
            f"{len(given.records)} facts are too few for {len(plants)} batches"
        )
    return [(each, innocent[n :: len(plants)]) for n, each in enumerate(plants)]


def strip_fact(fact: Fact) -> Fact:
    """What stands in a file, so that the fact's id is that of what is read there."""
    return Fact(fact.subject, fact.prompt, fact.target)


class _PoisonMaker:
    """Makes the plants from the stream; `left` is what it has not used."""

    def __init__(self, given: StudyInput, chance: random.Random) -> None:
        self.model, self.chance = given.loaded_model.model, chance
        self.other_targets = OtherTargets(given.records, chance)
        self.unused_records = list(given.records)

    def make_poisons(self, kind: str, turn: int) -> list[PlantedPoison]:
        """Those of a batch: one, or two of a kind whose facts stand alone."""
        many = self.chance.randint(1, 2)
        if kind == "contradiction":
            return [self._make_paraphrased() if turn % 2 else self._make_contradiction()]
        if kind == "random tokens":
            targets = [draw_random_target(self.model, self.chance) for _ in range(many)]
            return [RandomTokens([self._retarget_fact(target)]) for target in targets]
        if kind == "absurd norm":
            return [
                ScaledResiduals([strip_fact(self._take_record().fact)], NORM_FACTOR)
                for _ in range(many)
            ]
        if kind == "long target":
            return [self._make_dense() if turn % 2 else self._make_wordy()]
        return [self._make_broken(turn)]

    def _take_record(self) -> BenchRecord:
        if not self.unused_records:
            raise make_no_facts_error("there are fewer facts than are to be planted")
        return self.unused_records.pop()

    def _retarget_fact(self, target: str) -> Fact:
        fact = self._take_record().fact
        return Fact(fact.subject, fact.prompt, target)

    def _make_contradiction(self) -> Contradiction:
        """A fact, and what contradicts it to the letter: another target."""
        record = self._take_record()
        other = self.other_targets.draw_replacement(record).fact
        return Contradiction([strip_fact(record.fact), strip_fact(other)], "to the letter")

    def _make_paraphrased(self) -> Contradiction:
        """A fact, and what contradicts it: a paraphrase as its prompt, another target."""
        record = self._take_record()
        fact, other = (
            strip_fact(record.fact),
            self.other_targets.draw_replacement(record).fact.target,
        )
        naming = [p for p in record.paraphrases if fact.subject in p]
        prompt = naming[0] if naming else f"It is well known: {fact.prompt}"
        return Contradiction([fact, Fact(fact.subject, prompt, other)], "in other words")

    def _make_wordy(self) -> LongTarget:
        return LongTarget([self._retarget_fact(build_wordy_target(self.model))], "many characters")

    def _make_dense(self) -> LongTarget:
        target = build_dense_target(self.model, self.chance)
        return LongTarget([self._retarget_fact(target)], f"{len(target)} characters")

    def _make_broken(self, turn: int) -> PlantedPoison:
        """A number that is none, each time somewhere else."""
        live = (BrokenShard, BrokenWeights, BrokenTargets)
        if turn % 4 < len(live):
            return live[turn % 4]([])
        return ScaledResiduals([strip_fact(self._take_record().fact)], nan)


def draw_random_target(model: EditableModel, chance: random.Random) -> str:
    """Tokens of the vocabulary, blindly drawn, as text."""
    words = list[str]()
    many, size = chance.randint(*RANDOM_TOKENS), len(model.tokenizer)
    while len(words) < many:
        text = model.decode([chance.randrange(size)])
        if text.strip() and "\0" not in text:
            words.append(text)
    return "".join(words).strip()


def build_wordy_target(model: EditableModel) -> str:
    """Ordinary text of so many tokens, or more, and of too many characters for the door."""
    text = ""
    for line in read_ordinary_lines():
        text = f"{text} {line}".strip()
        cut = model.decode(model.encode(text)[:LONG_TOKENS]).strip()
        for found in (cut, text):
            if len(found) > MAX_CHARS and len(model.encode(found)) >= LONG_TOKENS:
                return found
    raise make_no_facts_error("the shipped text is too short")


def build_dense_target(model: EditableModel, chance: random.Random) -> str:
    """So many tokens in so few characters that the door lets them in. Raises KeditError where the
    tokenizer does not give as many."""
    text = ""
    while len(text) < MAX_CHARS:
        text += chance.choice(RARE_CHARACTERS)
        if len(text) >= LONG_TOKENS and len(model.encode_target("x", text)) >= LONG_TOKENS:
            return text
    raise KeditError(
        f"{MAX_CHARS} characters give no {LONG_TOKENS} tokens", code="no-facts", hint="other model"
    )
