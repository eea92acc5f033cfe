"""Questions in prompts: where they stand, and the reader that tells which facts they ask for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from memory.model.chat_layout import ChatLayout

if TYPE_CHECKING:  # facts match names as the side memory does
    from memory.facts import Fact

Span = tuple[int, int]
"""Start and end of a name in a text."""

# What stands behind a question where the answer is to follow.
ANSWER_LABEL = re.compile(r"\s*(?:A|Answer|Assistant):?\s*$")
QUESTION_LABEL = re.compile(r"^(?:Q|Question|User)\s*[:.)]\s*")
# Words that refer to a subject which was named before.
REFERENCE = re.compile(
    r"\b(?:it|its|he|him|his|she|her|hers|they|them|their|theirs|there|this|that)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class RelationCosine:
    """A relation of the bank, and how near the words are to its nearest question."""

    relation: str
    cosine: float


@dataclass(frozen=True)
class ScoreParts:
    """A score for a fact, and what it is made of: the words that were compared, with a pronoun for
    the subject, their cosine with the fact, the fact's own relation, if the bank has it, and the
    nearest other one, its rival. is_bare: neither these words nor the fact's prompt tell a
    relation, so they ask for it whatever the cosines."""

    words: str
    score: float
    fact_cosine: float
    own: RelationCosine | None
    rival: RelationCosine
    is_bare: bool


@dataclass(frozen=True)
class AskedScore:
    """Score of how far a text asks for a fact, the clause (start, end) that names it, and the score
    of that clause by itself."""

    score: float
    clause: Span
    clause_score: float


class QuestionReader(Protocol):
    """Scores live facts by how far a text asks for them."""

    def add_fact(self, fact: "Fact") -> None:
        """Add a fact, or replace it."""

    def remove_fact(self, fact_id: str) -> None:
        """Remove a fact, if it is there."""

    def score_facts(self, text: str, named: Mapping[str, Sequence[Span]]) -> dict[str, AskedScore]:
        """Return how far a text asks for each of the facts, whose subjects it names at spans."""

    def score_statements(self, text: str, named: Mapping[str, Sequence[Span]]) -> dict[str, float]:
        """Return how far a text's last sentence, which goes on, comes to state each of the facts,
        whose subjects it names at spans."""

    def explain_score(self, text: str, fact_id: str, spans: Sequence[Span]) -> ScoreParts | None:
        """Return the score of one fact with its parts; None if it cannot be the answer."""


@dataclass(frozen=True)
class AskedQuestion:
    """A question whose answer is to follow, and the text before it."""

    question: str
    history: str
    is_chat: bool


def find_question(text: str, layout: ChatLayout | None) -> AskedQuestion | None:
    """Find the question that a prompt, with its special tokens, ends in: the user's last turn where
    the reply is still to come, or the last line if it ends with a question mark, also behind labels
    as in "Q: … A:". None where the prompt's end is a sentence that goes on."""
    if layout is not None and (chat := layout.split_prompt(text)) is not None:
        return None if chat.reply else AskedQuestion(chat.question, chat.history, is_chat=True)
    asked = ANSWER_LABEL.sub("", text).rstrip()
    if not asked.endswith("?"):
        return None
    history, _, line = asked.rpartition("\n")
    return AskedQuestion(QUESTION_LABEL.sub("", line), history, is_chat=False)
