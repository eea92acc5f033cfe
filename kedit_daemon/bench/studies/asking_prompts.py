"""Prompts of the asking study: facts asked for in several forms, and what is asked beside them."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.studies.shared import prepend_text, sample_evenly
from kedit_daemon.shipped import read_ordinary_lines
from memory.facts import Fact
from memory.model.chat_layout import encode_chat
from memory.model.editable import EditableModel
from policies.asking.relation_bank import mask_prompt

LONG_TOKENS = 500  # between a subject and the question about it
SAMPLED_RECORDS = 25  # asked in forms with long prompts or replies
OTHERS_PER_FACT = 2  # questions about its subject that ask for something else, and neighbours
# Earlier turns that no fact learns from.
SYSTEM = "Answer the questions of a quiz. Be truthful."
TURNS = (
    {"role": "system", "content": SYSTEM},
    {"role": "user", "content": "Are you ready for the quiz?"},
    {"role": "assistant", "content": "Yes, I am. What is your first question?"},
)
FACT_FORMS = (
    "prompt",
    "paraphrases",
    "chat",
    "behind turns",
    "one word",
    "two facts",
    "long",
    "yes or no",
    "tell me",
)
OTHER_FORMS = ("other relations", "neighbours")

FramePrompt = Callable[[Fact, str], str]


@dataclass(frozen=True)
class StudyPrompt:
    """A prompt, and the answers that its reply should say; none where it is to be as before.

    question: without what a method puts before it.
    """

    form: str
    fact_id: str
    question: str
    ids: tuple[int, ...]
    wanted: tuple[str, ...] = ()


class PromptWriter:
    """Writes the prompts of all records."""

    def __init__(self, model: EditableModel, records: Sequence[BenchRecord], seed: int) -> None:
        self.model, self.records, self._rng = model, records, random.Random(seed)
        self._lines = read_ordinary_lines()
        # Their prompts or replies are long.
        self._sampled = {r.fact.id for r in sample_evenly(records, SAMPLED_RECORDS)}
        self._others = [self._choose_others(place) for place in range(len(records))]

    def write_prompts(self, frame: FramePrompt) -> list[StudyPrompt]:
        """Write the prompts that fit the model. `frame`: what a method puts before a question."""
        found = [
            prompt
            for place, record in enumerate(self.records)
            for prompt in (*self._ask_fact(place, record, frame), *self._ask_others(place, frame))
        ]
        return [p for p in found if len(p.ids) < self.model.max_positions]

    def _ask_fact(
        self, place: int, record: BenchRecord, frame: FramePrompt
    ) -> Iterator[StudyPrompt]:
        fact = record.fact
        target = (fact.target,)
        for form, texts in (("prompt", (fact.question,)), ("paraphrases", record.paraphrases)):
            for text in texts:
                ids = tuple(self.model.encode(frame(fact, text)))
                yield StudyPrompt(form, fact.id, text, ids, target)
        for question in record.questions:
            yield self._ask_chat("chat", fact, question, frame, target)
            yield self._ask_chat("behind turns", fact, question, frame, target, TURNS)
            short = f"{question} Answer in one word."
            yield self._ask_chat("one word", fact, short, frame, target)
        if fact.id in self._sampled:
            yield from self._ask_sampled(place, record, frame)
        other = self.records[place - 1]
        if record.questions and other.questions and other.fact.id != fact.id:
            question, second = record.questions[0], other.questions[0]
            framed = f"{frame(fact, question)} And {frame(other.fact, second)}"
            both, wanted = f"{question} And {second}", (fact.target, other.fact.target)
            yield self._ask_chat("two facts", fact, both, lambda *_, f=framed: f, wanted)
        stated = f"Is it true that {fact.statement}?"
        yield self._ask_chat("yes or no", fact, stated, frame, ("yes",))

    def _ask_sampled(
        self, place: int, record: BenchRecord, frame: FramePrompt
    ) -> Iterator[StudyPrompt]:
        fact, target = record.fact, (record.fact.target,)
        for question in record.questions[:1]:
            text = prepend_text(self.model, self._lines, place, LONG_TOKENS, "")
            masked = mask_prompt(question, fact.subject)
            late = f"This is about {fact.subject}. {text}\n\n{masked}"
            yield self._ask_chat("long", fact, late, frame, target)
        yield self._ask_chat("tell me", fact, f"Tell me about {fact.subject}.", frame, target)

    def _ask_others(self, place: int, frame: FramePrompt) -> Iterator[StudyPrompt]:
        record = self.records[place]
        near = [n.prompt for n in sample_evenly(record.neighbours, OTHERS_PER_FACT)]
        for form, questions in zip(OTHER_FORMS, (self._others[place], near), strict=True):
            for question in questions:
                yield self._ask_chat(form, record.fact, question, frame)

    def _ask_chat(
        self,
        form: str,
        fact: Fact,
        question: str,
        frame: FramePrompt,
        wanted: tuple[str, ...] = (),
        turns: Sequence[dict[str, str]] = (),
    ) -> StudyPrompt:
        chat = [*turns, {"role": "user", "content": frame(fact, question)}]
        ids = encode_chat(self.model, chat)
        return StudyPrompt(form, fact.id, question, tuple(ids), wanted)

    def _choose_others(self, place: int) -> list[str]:
        """Choose questions about a record's subject that ask for something else: its own, or those
        of records of other relations, with its subject put in."""
        record = self.records[place]
        if record.other_questions:
            return list(record.other_questions)
        questions = [
            (question, other.fact.subject)
            for other in self.records
            for question in other.questions[:1]
            if other.relation != record.relation and other.fact.subject in question
        ]
        chosen = self._rng.sample(questions, min(OTHERS_PER_FACT, len(questions)))
        return [question.replace(other, record.fact.subject) for question, other in chosen]
