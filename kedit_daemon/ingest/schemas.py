"""The forms of a record, our own and those of the data sets, and the facts that they state."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kedit_daemon.config import InboxConfig
from kedit_daemon.ingest.field_types import (
    Answers,
    Deadline,
    Join,
    Line,
    Text,
    Timestamp,
    collect_texts,
    find_first_text,
    make_fault,
)
from memory.blanks import settle_blanks
from memory.facts import Fact, Neighbour

STRICT_CONFIG = ConfigDict(strict=True, frozen=True, extra="forbid")
LENIENT_CONFIG = ConfigDict(strict=True, frozen=True, extra="ignore")


MAX_FILE_BYTES = 10_485_760


@dataclass(frozen=True)
class FileLimits:
    """The limits of a file: facts, characters in a target and in a record, bytes when unpacked."""

    max_facts: int = 10_000
    max_target_chars: int = 400
    max_line_chars: int = 65_536
    max_bytes: int = MAX_FILE_BYTES

    @classmethod
    def from_settings(cls, settings: InboxConfig) -> Self:
        """Return the limits that the settings of an inbox state."""
        return cls(settings.max_facts, settings.max_target_chars, max_bytes=settings.max_bytes)


def _check_subject_named(prompt: str, subject: str) -> str:
    if "{}" not in prompt and subject not in prompt:
        remedy = 'write {} in the prompt in the place of the subject, as in "The capital of {} is"'
        raise make_fault('"prompt" holds neither {} nor the subject', remedy)
    return prompt


def _collect_neighbours(items: object, prompt: str, answer: str) -> list[Neighbour]:
    found = [i for i in items if isinstance(i, dict)] if isinstance(items, list) else []
    return [
        Neighbour(p, find_first_text(i.get(answer)))
        for i in found
        for p in collect_texts(i.get(prompt))
    ]


def _make_fact(
    asked: tuple[str, str], answers: tuple[str, ...], again: list[str], near: list[Neighbour]
) -> Fact:
    target, *others = answers
    return Fact(
        *asked,
        target,
        paraphrases=tuple(map(settle_blanks, again)),
        neighbours=tuple(near),
        other_targets=tuple(others),
    )


class Record(BaseModel, ABC):
    """A data set's record, by default: keys that we have no use for are ignored."""

    model_config = LENIENT_CONFIG

    @abstractmethod
    def to_facts(self) -> list[Fact]:
        """Return the facts that the record states."""


class NeighbourRecord(BaseModel):
    """A prompt whose answer shall stay as it is."""

    model_config = STRICT_CONFIG

    prompt: Text
    answer: Text | None = None


class NativeRecord(Record):
    """Our own form."""

    model_config = STRICT_CONFIG

    subject: Line
    prompt: Line
    target: Answers
    paraphrases: list[Line] = []
    neighbours: list[NeighbourRecord] = []
    id: Text | None = None
    source: Text | None = None
    valid_from: Timestamp | None = None
    valid_until: Deadline | None = None
    tags: list[Text] = []
    aliases: list[Line] = []
    questions: list[Line] = []
    join: Join | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, record: dict[str, object]) -> dict[str, object]:
        """Drop optional fields that hold null; an unknown or required one is told."""
        optional = {n for n, field in cls.model_fields.items() if not field.is_required()}
        return {k: v for k, v in record.items() if v is not None or k not in optional}

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        _check_subject_named(self.prompt, self.subject)
        if self.valid_from and self.valid_until and self.valid_until <= self.valid_from:
            raise make_fault(
                '"valid_until" is not after "valid_from"', 'give "valid_until" a later time'
            )
        return self

    def to_facts(self) -> list[Fact]:
        fact = Fact(
            subject=self.subject,
            prompt=self.prompt,
            target=self.target[0],
            paraphrases=tuple(self.paraphrases),
            neighbours=tuple(Neighbour(n.prompt, n.answer) for n in self.neighbours),
            external_id=self.id,
            source=self.source,
            valid_from=self.valid_from,
            valid_until=self.valid_until,
            tags=tuple(self.tags),
            aliases=tuple(self.aliases),
            questions=tuple(self.questions),
            other_targets=self.target[1:],
            join=self.join,
        )
        return [fact]


class RequestedRewrite(BaseModel):
    """A requested rewrite in ROME's and MQuAKE's files."""

    model_config = LENIENT_CONFIG

    subject: Line
    prompt: Line
    target_new: Answers
    target_true: Any = None
    question: Any = None

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        _check_subject_named(self.prompt, self.subject)
        return self

    def to_fact(self, paraphrases: object, neighbours: object) -> Fact:
        """Return the rewrite as a fact, with the prompts of its record."""
        truth = find_first_text(self.target_true)
        near = [Neighbour(prompt, truth) for prompt in collect_texts(neighbours)]
        asked = (self.subject, self.prompt)
        return _make_fact(asked, self.target_new, collect_texts(paraphrases), near)


class RomeRecord(Record):
    """CounterFact as ROME publishes it; its neighbours share the answer that is replaced."""

    requested_rewrite: RequestedRewrite
    paraphrase_prompts: Any = None
    neighborhood_prompts: Any = None

    def to_facts(self) -> list[Fact]:
        rewrite = self.requested_rewrite
        return [rewrite.to_fact(self.paraphrase_prompts, self.neighborhood_prompts)]


class MquakeRecord(Record):
    """MQuAKE: the rewrites that one multi-hop question depends on."""

    requested_rewrite: list[RequestedRewrite] = Field(min_length=1)

    def to_facts(self) -> list[Fact]:
        return [rewrite.to_fact(rewrite.question, None) for rewrite in self.requested_rewrite]


class FlatRecord(Record):
    """The flat forms: EasyEdit's, KnowEdit's, and CounterFact with all its prompts."""

    subject: Line
    prompt: Line
    target_new: Answers
    target_true: Any = None
    ground_truth: Any = None
    rephrase_prompt: Any = None
    paraphrase_prompts: Any = None
    neighborhood_prompts: Any = None
    locality_prompt: Any = None
    locality_ground_truth: Any = None
    locality: Any = None

    def to_facts(self) -> list[Fact]:
        truth = find_first_text(self.target_true) or find_first_text(self.ground_truth)
        near = [Neighbour(prompt, truth) for prompt in collect_texts(self.neighborhood_prompts)]
        answer = find_first_text(self.locality_ground_truth)
        near += [Neighbour(prompt, answer) for prompt in collect_texts(self.locality_prompt)]
        groups = self.locality.values() if isinstance(self.locality, dict) else ()
        near += [
            pair
            for group in groups
            for pair in _collect_neighbours(group, "prompt", "ground_truth")
        ]
        again = [*collect_texts(self.rephrase_prompt), *collect_texts(self.paraphrase_prompts)]
        return [_make_fact((self.subject, self.prompt), self.target_new, again, near)]


class ClozeRecord(FlatRecord):
    """A flat record whose prompt is a sentence to complete, so it has to name the subject."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        _check_subject_named(self.prompt, self.subject)
        return self


class QuestionRecord(Record):
    """QAEdit. The prompt is a whole question, which may name the subject in other words."""

    subject: Line
    prompt: Line
    target: Answers
    rephrase: Any = None
    loc: Any = None
    loc_ans: Any = None
    locality: Any = None

    def to_facts(self) -> list[Fact]:
        near = [
            Neighbour(prompt, find_first_text(self.loc_ans)) for prompt in collect_texts(self.loc)
        ]
        near += _collect_neighbours(self.locality, "loc", "loc_ans")
        again = collect_texts(self.rephrase)
        return [_make_fact((self.subject, self.prompt), self.target, again, near)]


class ZsreRecord(QuestionRecord):
    """ZsRE in MEND's form: `alt` is the new answer."""

    prompt: Line = Field(alias="src")
    target: Answers = Field(alias="alt")


class WikiBigEditRecord(QuestionRecord):
    """WikiBigEdit as it was published, before EasyEdit renamed its keys."""

    prompt: Line = Field(alias="update")
    target: Answers = Field(alias="ans")
