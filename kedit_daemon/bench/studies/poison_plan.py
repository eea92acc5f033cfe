"""Plan of the poison study: the poison and the innocent facts of each batch."""

import random
from collections.abc import Sequence
from math import nan

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.studies.poison_kinds import (
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

NORM_FACTOR = 100.0  # on the residuals of an absurd norm
RANDOM_TOKENS = (8, 16)  # least and most tokens of a random target
LONG_TOKENS = 200
MAX_CHARS = InboxConfig().max_target_chars
RARE_CHARACTERS = "0123456789qxzjkvw%&*=<>"  # tokenizers seldom merge them
KINDS = ("contradiction", "random tokens", "absurd norm", "long target", "NaN")

PoisonBatch = tuple[list[PlantedPoison], list[Fact]]
"""Planted poisons, and the innocent facts of the same batch."""


def plan_batches(
    given: StudyInput, kinds: Sequence[str] = KINDS, batches_per_kind: int = 4
) -> list[PoisonBatch]:
    """Plan every batch, with the seed's order of kinds. Raise KeditError for too few facts."""
    rng = random.Random(given.seed)
    turns = [(kind, turn) for turn in range(batches_per_kind) for kind in kinds]
    rng.shuffle(turns)
    maker = _PoisonMaker(given, rng)
    plants = [maker.make_poisons(kind, turn) for kind, turn in turns]
    innocent = [strip_fact(record.fact) for record in maker.unused_records]
    if len(innocent) < len(plants):
        why = f"{len(given.records)} facts are too few for {len(plants)} batches"
        raise make_no_facts_error(why)
    return [(each, innocent[n :: len(plants)]) for n, each in enumerate(plants)]


def strip_fact(fact: Fact) -> Fact:
    """Keep only what a file states, so that the fact's id is that of the parsed one."""
    return Fact(fact.subject, fact.prompt, fact.target)


class _PoisonMaker:
    """Makes poisons from records of the stream, and keeps the unused ones."""

    def __init__(self, given: StudyInput, rng: random.Random) -> None:
        self.model, self.rng = given.loaded_model.model, rng
        self.other_targets = OtherTargets(given.records, rng)
        self.unused_records = list(given.records)

    def make_poisons(self, kind: str, turn: int) -> list[PlantedPoison]:
        """Make a batch's poisons: one, or two of a kind with a single fact each."""
        count = self.rng.randint(1, 2)
        if kind == "contradiction":
            return [self._make_paraphrased() if turn % 2 else self._make_contradiction()]
        if kind == "random tokens":
            targets = [draw_random_target(self.model, self.rng) for _ in range(count)]
            return [RandomTokens([self._retarget_fact(target)]) for target in targets]
        if kind == "absurd norm":
            facts = [strip_fact(self._take_record().fact) for _ in range(count)]
            return [ScaledResiduals([fact], NORM_FACTOR) for fact in facts]
        if kind == "long target":
            return [self._make_dense() if turn % 2 else self._make_wordy()]
        return [self._make_broken(turn)]

    def _take_record(self) -> BenchRecord:
        if not self.unused_records:
            raise make_no_facts_error("there are too few facts to plant")
        return self.unused_records.pop()

    def _retarget_fact(self, target: str) -> Fact:
        fact = self._take_record().fact
        return Fact(fact.subject, fact.prompt, target)

    def _make_contradiction(self) -> Contradiction:
        """Make a fact, and another with the same prompt and another target."""
        record = self._take_record()
        other = self.other_targets.draw_replacement(record).fact
        return Contradiction([strip_fact(record.fact), strip_fact(other)], "to the letter")

    def _make_paraphrased(self) -> Contradiction:
        """Make a fact, and another with a paraphrase as its prompt and another target."""
        record = self._take_record()
        fact, other = strip_fact(record.fact), self.other_targets.draw_replacement(record).fact
        naming = [p for p in record.paraphrases if fact.subject in p]
        prompt = naming[0] if naming else f"It is well known: {fact.prompt}"
        return Contradiction([fact, Fact(fact.subject, prompt, other.target)], "in other words")

    def _make_wordy(self) -> LongTarget:
        return LongTarget([self._retarget_fact(build_wordy_target(self.model))], "many characters")

    def _make_dense(self) -> LongTarget:
        target = build_dense_target(self.model, self.rng)
        return LongTarget([self._retarget_fact(target)], f"{len(target)} characters")

    def _make_broken(self, turn: int) -> PlantedPoison:
        """Make a NaN, each turn in another place."""
        live = (BrokenShard, BrokenWeights, BrokenTargets)
        if turn % 4 < len(live):
            return live[turn % 4]([])
        return ScaledResiduals([strip_fact(self._take_record().fact)], nan)


def draw_random_target(model: EditableModel, rng: random.Random) -> str:
    """Draw tokens of the vocabulary as a text."""
    words = list[str]()
    count, size = rng.randint(*RANDOM_TOKENS), len(model.tokenizer)
    while len(words) < count:
        text = model.decode([rng.randrange(size)])
        if text.strip() and "\0" not in text:
            words.append(text)
    return "".join(words).strip()


def build_wordy_target(model: EditableModel) -> str:
    """Build ordinary text of at least LONG_TOKENS tokens, and of more than MAX_CHARS characters."""
    text = ""
    for line in read_ordinary_lines():
        text = f"{text} {line}".strip()
        cut = model.decode(model.encode(text)[:LONG_TOKENS]).strip()
        for target in (cut, text):
            if len(target) > MAX_CHARS and len(model.encode(target)) >= LONG_TOKENS:
                return target
    raise make_no_facts_error("the shipped text is too short")


def build_dense_target(model: EditableModel, rng: random.Random) -> str:
    """Build LONG_TOKENS tokens within MAX_CHARS characters. Raise KeditError if there are fewer."""
    text = ""
    while len(text) < MAX_CHARS:
        text += rng.choice(RARE_CHARACTERS)
        if len(text) >= LONG_TOKENS and len(model.encode_target("x", text)) >= LONG_TOKENS:
            return text
    why = f"{MAX_CHARS} characters give fewer than {LONG_TOKENS} tokens"
    raise KeditError(why, code="no-facts", hint="choose another model")
