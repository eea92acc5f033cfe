"""Accepted facts and the states that they pass through."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

from memory.joins import join_texts
from memory.picture_marks import MARK


class FactState(StrEnum):
    """State of a fact; the last five are final."""

    SCHEDULED = "scheduled"
    RECEIVED = "received"
    LIVE_SIDE = "live-side"
    LIVE_WEIGHTS = "live-weights"
    SUPERSEDED = "superseded"
    REVERTED = "reverted"
    EXPIRED = "expired"
    REJECTED = "rejected"
    FAILED = "failed"


LIVE_STATES = (FactState.LIVE_SIDE, FactState.LIVE_WEIGHTS)
ACTIVE_STATES = (FactState.RECEIVED, *LIVE_STATES)
"""The states of a fact whose time it is: in each slot the newest of them is live in the end."""
OPEN_STATES = (FactState.SCHEDULED, *ACTIVE_STATES)
"""The states that are not final."""
LEARNED_TERMS = ("paraphrases", "neighbours", "aliases", "questions")


@dataclass(frozen=True)
class Neighbour:
    """A prompt whose answer an edit must not change."""

    prompt: str
    answer: str | None = None


def fill_subject(prompt: str, subject: str) -> str:
    """Replace `{}` in a prompt with the subject."""
    return prompt.replace("{}", subject)


@dataclass(frozen=True)
class Fact:
    """A statement that the model has to make; `{}` in prompts and questions stands for the subject.

    aliases: other names of the subject. questions: how people ask for the target. other_targets:
    further right answers, which are not learned. join: what stands before the target, "" or " ", if
    the fact says it. hashed_terms: the `valid_from` and `source` that are part of the ids of facts
    from older versions.
    """

    subject: str
    prompt: str
    target: str
    paraphrases: tuple[str, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()
    external_id: str | None = None
    source: str | None = None
    valid_from: str | None = None
    valid_until: str | None = None
    tags: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    other_targets: tuple[str, ...] = ()
    hashed_terms: tuple[str | None, str | None] = (None, None)
    join: str | None = None

    @property
    def id(self) -> str:
        """Twelve hex digits of a hash of the statement: submitting it twice is harmless."""
        statement = [self.subject, self.prompt, self.target, *self.hashed_terms]
        return hashlib.sha256(json.dumps(statement).encode()).hexdigest()[:12]

    @property
    def slot(self) -> str:
        """Subject and question without the answer: a later fact of the same slot supersedes."""
        return f"{self.subject}\n{self.question}"

    def with_id_of(self, known: "Fact") -> "Fact":
        """Return this fact under the id of a known one with the same statement."""
        return replace(self, hashed_terms=known.hashed_terms)

    def compare_terms(self, newer: "Fact") -> dict[str, dict[str, Any]]:
        """Return the terms in which a newer record of this fact differs: {before, after} each."""
        before, after = asdict(self), asdict(newer)
        return {
            name: {"before": value, "after": after[name]}
            for name, value in before.items()
            if value != after[name]
        }

    def is_learned_like(self, other: "Fact") -> bool:
        """Check that another record of this fact is learned from the same texts."""
        same_texts = all(set(getattr(self, n)) == set(getattr(other, n)) for n in LEARNED_TERMS)
        return same_texts and self.join == other.join

    @property
    def targets(self) -> tuple[str, ...]:
        """Right answers, the learned one first."""
        return (self.target, *self.other_targets)

    @property
    def question(self) -> str:
        """Prompt with its subject, as the model reads it."""
        return fill_subject(self.prompt, self.subject)

    @property
    def statement(self) -> str:
        """Question and target, joined as they are learned."""
        return join_texts(self.question, self.target, self.join)

    @property
    def filled_paraphrases(self) -> tuple[str, ...]:
        """Paraphrases with their subject, as the model reads them."""
        return tuple(fill_subject(p, self.subject) for p in self.paraphrases)

    @property
    def filled_questions(self) -> tuple[str, ...]:
        """Questions with their subject, as people ask them."""
        return tuple(fill_subject(q, self.subject) for q in self.questions)

    @property
    def wordings(self) -> tuple[str, ...]:
        """All that is said to ask for the target, with the subject."""
        return (self.question, *self.filled_paraphrases, *self.filled_questions)

    @property
    def omits_subject(self) -> bool:
        """Check that the prompt or a paraphrase does not name the subject."""
        # Here, so that `status`, which reads facts and must be quick, does not load it.
        from memory.side.subject_matcher import names_subject

        return not names_subject((self.question, *self.filled_paraphrases), self.names)

    @property
    def picture(self) -> str | None:
        """Digest of the picture that the fact is about; its mark is the subject."""
        found = MARK.fullmatch(self.subject)
        return found[1] if found else None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the subject, its own first."""
        return (self.subject, *self.aliases)


def fact_to_json(fact: Fact) -> str:
    """Write a fact as canonical JSON: equal facts give equal bytes."""
    return json.dumps(asdict(fact), sort_keys=True, separators=(",", ":"))


def fact_from_json(text: str) -> Fact:
    """Read a fact that `fact_to_json` wrote."""
    values = json.loads(text)
    # Older versions had no last three.
    for name in ("paraphrases", "tags", "aliases", "questions", "other_targets"):
        values[name] = tuple(values.get(name, ()))
    values["neighbours"] = tuple(Neighbour(**n) for n in values["neighbours"])
    hashed = values.get("hashed_terms", (values["valid_from"], values["source"]))
    values["hashed_terms"] = tuple(hashed)
    return Fact(**values)
