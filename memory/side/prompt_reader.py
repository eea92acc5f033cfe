"""What a prompt's text tells by itself: which live facts it names, and how far it asks for them, or
comes to state them. No model is needed for it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from memory.model.chat_layout import ChatLayout
from memory.side.question_reader import (
    REFERENCE,
    AskedQuestion,
    AskedScore,
    QuestionReader,
    Span,
    find_question,
)
from memory.side.subject_matcher import SubjectMatcher


@dataclass(frozen=True)
class PromptReading:
    """A prompt's text, as far as it decides: the facts whose subject it names, how far the user's
    words ask for those of them that can be the answer, and whether it is in chat form. stated: how
    far a sentence comes to state them; None where words do not decide that."""

    named: frozenset[str] = frozenset()
    asked: Mapping[str, AskedScore] = field(default_factory=dict)
    is_chat: bool = False
    stated: Mapping[str, float] | None = None


class PromptReader:
    """Reads prompts by the names of the live facts, and by words where there is a reader of these.

    Whoever adds facts to it adds them to the reader of words too."""

    def __init__(self, words: QuestionReader | None, layout: ChatLayout | None = None) -> None:
        """layout: of the chat template that prompts may be in, with its special tokens."""
        self.words, self.layout = words, layout
        self.subject_matcher = SubjectMatcher()

    def find_question(self, text: str) -> AskedQuestion | None:
        """Find the question that a prompt, with its special tokens, ends in."""
        return find_question(text, self.layout)

    def read_question(self, asked: AskedQuestion, named: Iterable[str]) -> PromptReading:
        """Read a question, in a prompt that names facts."""
        named = frozenset(named)
        if self.words is None:
            return PromptReading(named)
        scores = self.words.score_facts(asked.question, self.find_meant(asked.question, named))
        return PromptReading(named, scores, asked.is_chat)

    def read_sentence(self, text: str, named: Iterable[str]) -> PromptReading:
        """Read a text that goes on, without special tokens, and names facts."""
        named = frozenset(named)
        if self.words is None:
            return PromptReading(named)
        stated = self.words.score_statements(text, self.find_meant(text, named))
        return PromptReading(named, stated=stated)

    def find_meant(self, question: str, named: Iterable[str]) -> dict[str, list[Span]]:
        """Find the facts that a question names, and where. If it names none, it may be about a
        subject that was `named` before, and now goes by a pronoun."""
        spans: dict[str, list[Span]] = {}
        for mention in self.subject_matcher.find_mentions(question):
            for fact_id in mention.fact_ids:
                spans.setdefault(fact_id, []).append((mention.start, mention.end))
        if not spans and REFERENCE.search(question):
            spans = {fact_id: [] for fact_id in named}
        return spans
