"""The live facts of a home, found by the words of a prompt: no model is needed for it.

In the daemon's own server words decide too, wherever they can (memory/side/side_memory.py), and the
same reader reads them. What only the model's own states could tell is not found here: facts with a
prompt that does not name their subject, and facts that fire within a reply.
"""

import logging
import sqlite3
from dataclasses import dataclass

from memory.db.follower import Follower
from memory.errors import KeditError
from memory.facts import Fact
from memory.side.prompt_forms import list_forms
from memory.side.prompt_reader import PromptReader, PromptReading
from memory.side.question_reader import AskedQuestion, QuestionReader
from memory.side.shards import RoutingGates
from memory.side.word_matches import choose_asked, choose_best

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoutedFact:
    """A fact that a prompt asks for in a question, or comes to state; the score of its words, and
    the sha256 of its shard's file, if it is in the side memory."""

    fact: Fact
    score: float
    is_question: bool
    shard_sha: str | None = None


class RoutedFacts:
    """The facts of a home, as its database has them now; used by one thread at a time."""

    def __init__(self, follower: Follower, words: QuestionReader) -> None:
        self._follower, self._words = follower, words
        self._prompts = PromptReader(words)
        self._facts: dict[str, Fact] = {}
        self._followed_to: int | None = None  # the event up to which the facts are followed
        self.generation = 0
        """The active generation of the home."""
        self.problem: str | None = None
        """Why the facts are not those of the home as it is now."""

    def __len__(self) -> int:
        return len(self._facts)

    def close(self) -> None:
        """Close the database."""
        self._follower.close()

    def sync(self) -> None:
        """Follow the home: a fact that went live is found from now on, one that left is not. Cheap
        where little has changed. Where the database cannot be read, the facts stay as they were,
        and `problem` tells it."""
        try:
            if self._follower.has_changed():
                with self._follower.read_snapshot():
                    self._follow_events()
                    self.generation = self._follower.artifacts.active_generation()
        except sqlite3.Error as error:
            self._follower.forget_version()
            if self.problem is None:
                log.warning("The database cannot be read: %s", error)
            self.problem = f"the database cannot be read: {error}"
            return
        self.problem = None

    def _follow_events(self) -> None:
        """Read the facts again that new events are about: none changes without one."""
        followed, newest = self._followed_to, self._follower.newest_event()
        if followed is None:
            changed = self._follower.list_live_facts()
        else:
            changed = self._follower.list_changed_facts(followed)
        for fact_id in changed:
            try:
                fact = self._follower.find_live_fact(fact_id)
            except KeditError as error:  # of one fact, which is not routed
                log.warning("%s", error)
                fact = None
            self._set_fact(fact_id, fact)
        self._followed_to = newest

    def _set_fact(self, fact_id: str, fact: Fact | None) -> None:
        """Find a fact as it is now, or not any more."""
        if self._facts.get(fact_id) == fact:
            return
        self._words.remove_fact(fact_id)
        if fact is None:
            del self._facts[fact_id]
            self._prompts.subject_matcher.remove_fact(fact_id)
        else:
            self._facts[fact_id] = fact
            self._prompts.subject_matcher.add_names(fact_id, fact.names)
            self._words.add_fact(fact)

    def find_in_chat(self, question: str, history: str) -> list[RoutedFact]:
        """Find the facts that a conversation's last turn asks for, in the order in which it does.
        `history`: the text of what was said before it."""
        named = self._find_named(f"{history}\n{question}")
        if not named:
            return []
        asked = AskedQuestion(question.strip(), history, is_chat=True)
        return self._choose(self._prompts.read_question(asked, named))

    def find_in_text(self, text: str) -> list[RoutedFact]:
        """Find the fact that a text which is to be continued asks for or comes to state."""
        if not self._find_named(text):
            return []
        for form in (text, *list_forms(text)):
            named = self._find_named(form)
            if (asked := self._prompts.find_question(form)) is not None:
                found = self._choose(self._prompts.read_question(asked, named))
            else:
                found = self._choose(self._prompts.read_sentence(form, named))
            if found:
                return [max(found, key=lambda one: one.score)]
        return []

    def _find_named(self, text: str) -> set[str]:
        return self._prompts.subject_matcher.find_named_facts(text)

    def _choose(self, reading: PromptReading) -> list[RoutedFact]:
        least = RoutingGates.min_words_score
        chosen = choose_asked(reading.asked, least)
        if reading.stated is not None and (best := choose_best(reading.stated, least)):
            chosen = {best: reading.stated[best]}
        is_question = reading.stated is None
        return [
            RoutedFact(self._facts[n], score, is_question, self._find_shard(n))
            for n, score in chosen.items()
        ]

    def _find_shard(self, fact_id: str) -> str | None:
        try:
            return self._follower.find_shard_file(fact_id)
        except sqlite3.Error:  # the next sync tells it
            return None
