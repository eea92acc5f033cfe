"""The forms of a record, our own and those of the data sets, and the facts that they state."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)
from pydantic_core import PydanticCustomError

from memory.facts import Fact, Neighbour
from memory.timestamps import format_utc

INVALID_CHARS = re.compile("[\0\ud800-\udfff]")
STRICT_CONFIG = ConfigDict(strict=True, frozen=True, extra="forbid")
LENIENT_CONFIG = ConfigDict(strict=True, frozen=True, extra="ignore")


@dataclass(frozen=True)
class FileLimits:
    """The limits of a file: facts in all, characters in a target, characters in a record."""

    max_facts: int = 10_000
    max_target_chars: int = 400
    max_line_chars: int = 65_536


def quote_value(value: object) -> str:
    """Quote a foreign value in a message: short, on one line, and always valid UTF-8."""
    text = value if isinstance(value, str) else repr(value)
    text = text if len(text) <= 60 else text[:59] + "…"
    kept = "".join(c if c.isprintable() else c.encode("unicode-escape").decode() for c in text)
    return f'"{kept}"'


def _make_fault(problem: str, remedy: str) -> PydanticCustomError:
    # The text travels in the context because pydantic fills braces in the template.
    return PydanticCustomError("fault", "{problem}", {"problem": problem, "remedy": remedy})


def _check_characters(text: str) -> str:
    if found := INVALID_CHARS.search(text):
        what = "a NUL character" if found[0] == "\0" else "half a surrogate pair"
        raise _make_fault(f"a value holds {what}", "take that character out")
    return text


def _normalize_time(text: str) -> str:
    """Spell every time in one way, so that they sort as text; without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=time.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        remedy = "write the time in ISO-8601, such as 2026-01-31T12:00:00Z"
        raise _make_fault(f"{quote_value(text)} is not a time", remedy) from None
    return format_utc(time, "seconds")


def _extend_bare_date(text: str) -> str:
    """Let a date without a time mean the end of that day."""
    try:
        return f"{date.fromisoformat(text).isoformat()}T23:59:59Z"
    except ValueError:
        return text


Text = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1), AfterValidator(_check_characters)
]
Timestamp = Annotated[Text, AfterValidator(_normalize_time)]
Deadline = Annotated[Text, AfterValidator(_extend_bare_date), AfterValidator(_normalize_time)]


def _check_subject_named(prompt: str, subject: str) -> str:
    if "{}" not in prompt and subject not in prompt:
        remedy = 'write {} in the prompt in the place of the subject, as in "The capital of {} is"'
        raise _make_fault('"prompt" holds neither {} nor the subject', remedy)
    return prompt


def _collect_texts(value: object, depth: int = 3) -> list[str]:
    """Collect the texts of a field that holds a text, a list, nested lists, or nothing."""
    if isinstance(value, str):
        return [_check_characters(value.strip())] if value.strip() else []
    if isinstance(value, list) and depth:
        return [text for item in value for text in _collect_texts(item, depth - 1)]
    return []


def _first_text(value: object) -> str | None:
    return next(iter(_collect_texts(value)), None)


def _collect_neighbours(items: object, prompt: str, answer: str) -> list[Neighbour]:
    found = [i for i in items if isinstance(i, dict)] if isinstance(items, list) else []
    return [
        Neighbour(p, _first_text(i.get(answer)))
        for i in found
        for p in _collect_texts(i.get(prompt))
    ]


def _make_fact(
    asked: tuple[str, str], target: str, again: list[str], near: list[Neighbour]
) -> Fact:
    subject, prompt = asked
    return Fact(subject, prompt, target, paraphrases=tuple(again), neighbours=tuple(near))


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

    subject: Text
    prompt: Text
    target: Text
    paraphrases: list[Text] = []
    neighbours: list[NeighbourRecord] = []
    id: Text | None = None
    source: Text | None = None
    valid_from: Timestamp | None = None
    valid_until: Deadline | None = None
    tags: list[Text] = []
    aliases: list[Text] = []
    questions: list[Text] = []

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        _check_subject_named(self.prompt, self.subject)
        if self.valid_from and self.valid_until and self.valid_until <= self.valid_from:
            raise _make_fault('"valid_until" is not after "valid_from"', "correct the two times")
        return self

    def to_facts(self) -> list[Fact]:
        fact = Fact(
            subject=self.subject,
            prompt=self.prompt,
            target=self.target,
            paraphrases=tuple(self.paraphrases),
            neighbours=tuple(Neighbour(n.prompt, n.answer) for n in self.neighbours),
            external_id=self.id,
            source=self.source,
            valid_from=self.valid_from,
            valid_until=self.valid_until,
            tags=tuple(self.tags),
            aliases=tuple(self.aliases),
            questions=tuple(self.questions),
        )
        return [fact]


class Entity(BaseModel):
    """An answer in ROME's files: its name, and its Wikidata id, which is ignored."""

    model_config = LENIENT_CONFIG

    name: Text = Field(alias="str")


class RequestedRewrite(BaseModel):
    """A requested rewrite in ROME's and MQuAKE's files."""

    model_config = LENIENT_CONFIG

    subject: Text
    prompt: Text
    target_new: Entity
    target_true: Entity | None = None
    question: Any = None

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        _check_subject_named(self.prompt, self.subject)
        return self

    def to_fact(self, paraphrases: object, neighbours: object) -> Fact:
        """Return the rewrite as a fact, with the prompts of its record."""
        truth = self.target_true.name if self.target_true else None
        near = [Neighbour(prompt, truth) for prompt in _collect_texts(neighbours)]
        asked = (self.subject, self.prompt)
        return _make_fact(asked, self.target_new.name, _collect_texts(paraphrases), near)


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

    subject: Text
    prompt: Text
    target_new: Text
    target_true: Any = None
    ground_truth: Any = None
    rephrase_prompt: Any = None
    paraphrase_prompts: Any = None
    neighborhood_prompts: Any = None
    locality_prompt: Any = None
    locality_ground_truth: Any = None
    locality: Any = None

    def to_facts(self) -> list[Fact]:
        truth = _first_text(self.target_true) or _first_text(self.ground_truth)
        near = [Neighbour(prompt, truth) for prompt in _collect_texts(self.neighborhood_prompts)]
        answer = _first_text(self.locality_ground_truth)
        near += [Neighbour(prompt, answer) for prompt in _collect_texts(self.locality_prompt)]
        groups = self.locality.values() if isinstance(self.locality, dict) else ()
        near += [
            pair
            for group in groups
            for pair in _collect_neighbours(group, "prompt", "ground_truth")
        ]
        again = [*_collect_texts(self.rephrase_prompt), *_collect_texts(self.paraphrase_prompts)]
        return [_make_fact((self.subject, self.prompt), self.target_new, again, near)]


class ClozeRecord(FlatRecord):
    """A flat record whose prompt is a sentence to complete, so it has to name the subject."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        _check_subject_named(self.prompt, self.subject)
        return self


class QuestionRecord(Record):
    """QAEdit. The prompt is a whole question, which may name the subject in other words."""

    subject: Text
    prompt: Text
    target: Text
    rephrase: Any = None
    loc: Any = None
    loc_ans: Any = None
    locality: Any = None

    def to_facts(self) -> list[Fact]:
        near = [Neighbour(prompt, _first_text(self.loc_ans)) for prompt in _collect_texts(self.loc)]
        near += _collect_neighbours(self.locality, "loc", "loc_ans")
        again = _collect_texts(self.rephrase)
        return [_make_fact((self.subject, self.prompt), self.target, again, near)]


class ZsreRecord(QuestionRecord):
    """ZsRE in MEND's form: `alt` is the new answer."""

    prompt: Text = Field(alias="src")
    target: Text = Field(alias="alt")


class WikiBigEditRecord(QuestionRecord):
    """WikiBigEdit as it was published, before EasyEdit renamed its keys."""

    prompt: Text = Field(alias="update")
    target: Text = Field(alias="ans")
