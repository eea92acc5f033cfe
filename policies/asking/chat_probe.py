"""Probes of a fact in a chat: the questions that are asked, and what became of them."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from memory.facts import Fact
from memory.side.subject_matcher import names_subject
from policies.asking.asked_rows import choose_questions, make_question
from policies.asking.relation_index import RelationIndex


class Relearning(StrEnum):
    """A state of the second learning of a fact whose shard fires and does not say it."""

    WAITS = "waits"
    DONE = "done"
    FAILED = "failed"  # the first shard is kept


@dataclass(frozen=True)
class FailedQuestion:
    """A question that a fact was not answered for, and the reply. fired: its shard took part, so
    that it was learned badly; else the words were not taken to ask for it."""

    question: str
    answer: str
    fired: bool


@dataclass(frozen=True)
class ChatProbe:
    """Result of asking a fact in a chat. shard: the sha256 of the one that was asked."""

    shard: str
    questions: int
    failed: tuple[FailedQuestion, ...] = ()
    relearning: Relearning | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values, with the count of answered questions."""
        values = asdict(self)
        return {**values, "answered": self.questions - len(self.failed)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ChatProbe":
        """Read what `as_dict` returned."""
        failed = tuple(FailedQuestion(**one) for one in values["failed"])
        state = values["relearning"]
        relearning = None if state is None else Relearning(state)
        return cls(values["shard"], values["questions"], failed, relearning)


def list_learnable(failed: Sequence[FailedQuestion], *, is_asked: bool) -> list[str]:
    """List the failed questions that another shard may be learned from: those for which the first
    one fired, or all if it has learned no question (`is_asked`), and so fires for none."""
    return [one.question for one in failed if one.fired or not is_asked]


def choose_probe_questions(fact: Fact, index: RelationIndex) -> list[str]:
    """Choose the questions of a probe: those that came with a fact, else one that it has learned,
    and one of its relation that it has not. Each names the subject: nothing stands before it that
    could.

    A fact may have learned questions that ask for something else, where the bank lacks its
    relation. Then it is asked in the words of its own prompt.
    """
    learned = choose_questions(fact, index)
    own = [] if fact.picture is not None else index.find_relation_questions(fact)
    known: Sequence[str] = learned
    if not fact.questions:
        known = [q for q in learned if q in own][:1] or [make_question(fact.question)]
    other = [q for q in own if q not in learned][:1]
    chosen = dict.fromkeys([*known, *other])
    return [question for question in chosen if names_subject((question,), fact.names)]
