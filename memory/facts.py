"""Accepted facts and the states that they pass through."""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum


class FactState(StrEnum):
    """State of a fact; the last five are final."""

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
    further right answers, which are not learned.
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

    @property
    def id(self) -> str:
        """Twelve hex digits of a hash of the statement: submitting it twice is harmless."""
        statement = [self.subject, self.prompt, self.target, self.valid_from, self.source]
        return hashlib.sha256(json.dumps(statement).encode()).hexdigest()[:12]

    @property
    def slot(self) -> str:
        """Subject and question without the answer: a later fact of the same slot supersedes."""
        return f"{self.subject}\n{self.question}"

    @property
    def targets(self) -> tuple[str, ...]:
        """Right answers, the learned one first."""
        return (self.target, *self.other_targets)

    @property
    def question(self) -> str:
        """Prompt with its subject, as the model reads it."""
        return fill_subject(self.prompt, self.subject)

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
    return Fact(**values)
