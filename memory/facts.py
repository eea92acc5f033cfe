"""What a fact is, once it has been accepted, and the states it passes through."""

import hashlib
import json
from dataclasses import asdict, dataclass
from enum import StrEnum

from memory.side.subject_matcher import contains_subject, normalize_text


class FactState(StrEnum):
    """Where a fact stands; the last five are ends."""

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
    """A prompt whose answer an edit must leave as it is."""

    prompt: str
    answer: str | None = None


def fill_subject(prompt: str, subject: str) -> str:
    """The prompt with the subject in the place of {}; as it stands where there is no {}."""
    return prompt.replace("{}", subject)


@dataclass(frozen=True)
class Fact:
    """One statement that the model shall make; `{}` in prompts stands for the subject."""

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

    @property
    def id(self) -> str:
        """Twelve hex digits from what the fact says: handing it in twice is harmless."""
        said = [self.subject, self.prompt, self.target, self.valid_from, self.source]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]

    @property
    def slot(self) -> str:
        """What is asked, whatever the answer: a later fact in the same slot supersedes."""
        return f"{self.subject}\n{self.question}"

    @property
    def question(self) -> str:
        """The prompt as the model reads it."""
        return fill_subject(self.prompt, self.subject)

    @property
    def filled_paraphrases(self) -> tuple[str, ...]:
        """The given paraphrases as the model reads them."""
        return tuple(fill_subject(p, self.subject) for p in self.paraphrases)

    @property
    def omits_subject(self) -> bool:
        """Whether the prompt, or a paraphrase, does without the subject's name."""
        subject = normalize_text(self.subject)
        return not all(
            contains_subject(normalize_text(text), subject)
            for text in (self.question, *self.filled_paraphrases)
        )


def fact_to_json(fact: Fact) -> str:
    """The whole fact as canonical JSON: the same fact gives the same bytes."""
    return json.dumps(asdict(fact), sort_keys=True, separators=(",", ":"))


def fact_from_json(text: str) -> Fact:
    """The fact that `to_json` wrote."""
    said = json.loads(text)
    for name in ("paraphrases", "tags"):
        said[name] = tuple(said[name])
    said["neighbours"] = tuple(Neighbour(**n) for n in said["neighbours"])
    return Fact(**said)
