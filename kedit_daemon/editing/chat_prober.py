"""Live facts asked in a chat, when nothing else is to do. A fact whose shard fires and does not say
it is learned again, once; one that does not fire would not gain by that, and is only told.

What was found is kept with the fact's probe, beside the sha256 of the shard that was asked: a shard
of other content is asked again, and no other is after a restart.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.memory_backoff import describe_failure, guard_memory
from kedit_daemon.editing.relations import load_relation_index
from kedit_daemon.editing.side_learner import SideLearner
from kedit_daemon.editing.tensor_files import save_shard
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.errors import KeditError, ends_daemon
from memory.facts import Fact, FactState
from memory.model.chat_layout import render_chat
from memory.side.shards import Shard
from policies.asking.chat_probe import (
    ChatProbe,
    FailedQuestion,
    Relearning,
    choose_probe_questions,
    list_learnable,
)
from policies.edit_terms import Refusal
from policies.probe import compare_answers, count_answer_tokens, says_answers

FACTS_PER_STEP = 2  # that are asked together, some seconds on a slow CPU, while others wait
SPARE_TOKENS = 8  # before the target: a reply may be a sentence
log = logging.getLogger(__name__)


class ChatProber:
    """Asks live facts in a chat, and learns again what is not answered."""

    def __init__(self, live_model: LiveModel, store: Store, side_learner: SideLearner) -> None:
        self.live_model, self.model, self.store = live_model, live_model.model, store
        self.side_learner = side_learner
        # Facts that could not be asked: they are not tried again in this process.
        self._skipped: set[str] = set()

    def step(self) -> bool:
        """Ask the next facts, or learn one again. Return False if there is nothing to do."""
        if self.live_model.side.reader is None:
            return False
        artifacts = self.store.artifacts
        unprobed = [
            pair for pair in artifacts.list_unprobed_shards() if pair[0] not in self._skipped
        ]
        if unprobed:
            batch = [self.store.require_fact(n) for n, _ in unprobed[:FACTS_PER_STEP]]
            if error := self._try(lambda: self._probe(batch, dict(unprobed))):
                log.warning("Cannot ask facts in a chat: %s", error, exc_info=error)
                self._skipped.update(fact.id for fact in batch)
            return True
        waiting = artifacts.list_shards_to_relearn()
        if waiting:
            fact = self.store.require_fact(waiting[0][0])
            if error := self._try(lambda: self._relearn(fact)):
                log.warning("Cannot learn fact %s again: %s", fact.id, error, exc_info=error)
                self._keep_first(fact, describe_failure(error))
        return bool(waiting)

    def _try(self, work: Callable[[], None]) -> Exception | None:
        """Do some work. Return the error, if there was one: the facts are live as they are."""
        try:
            with guard_memory(self.live_model):
                work()
        except (KeditError, ArithmeticError, RuntimeError, ValueError) as error:
            if ends_daemon(error):
                raise
            return error
        return None

    # Asking -------------------------------------------------------------------------------------

    def _probe(self, batch: Sequence[StoredFact], shards: dict[str, str]) -> None:
        found = self._ask([(fact.fact, shards[fact.id]) for fact in batch])
        with self.store.db.transaction():
            for fact, probe in zip(batch, found, strict=True):
                self._record(fact, fact.probe or {}, probe)

    def _ask(self, facts: Sequence[tuple[Fact, str]]) -> list[ChatProbe]:
        """Ask facts, each with the sha256 of its shard, as far as their questions fit the model."""
        most = count_answer_tokens(self.model, [fact for fact, _ in facts]) + SPARE_TOKENS
        index, limit = load_relation_index(), self.model.max_positions
        asked = list[tuple[int, str, str]]()  # place, question, prompt
        for n, (fact, _) in enumerate(facts):
            for question in choose_probe_questions(fact, index):
                chat = [{"role": "user", "content": question}]
                prompt = render_chat(self.model.tokenizer, chat)
                if len(self.model.encode(prompt)) + most <= limit:
                    asked.append((n, question, prompt))
        prompts = [prompt for _, _, prompt in asked]
        answers = self.live_model.answer_prompts(prompts, most, whole=True)
        failed: list[list[FailedQuestion]] = [[] for _ in facts]
        for (n, question, _), answer in zip(asked, answers, strict=True):
            fact = facts[n][0]
            if not any(says_answers(answer.text, [target]) for target in fact.targets):
                fired = any(match.fact_id == fact.id for match in answer.matches)
                failed[n].append(FailedQuestion(question, answer.text, fired))
        counts = [sum(place == n for place, _, _ in asked) for n in range(len(facts))]
        return [
            ChatProbe(
                sha,
                count,
                tuple(wrong),
                Relearning.WAITS if self._list_learnable(fact, wrong) else None,
            )
            for (fact, sha), count, wrong in zip(facts, counts, failed, strict=True)
        ]

    def _list_learnable(self, fact: Fact, failed: Sequence[FailedQuestion]) -> list[str]:
        return list_learnable(failed, is_asked=self.live_model.side.is_asked(fact.id))

    def _record(
        self, fact: StoredFact, probe: dict[str, Any], chat: ChatProbe, reason: str | None = None
    ) -> None:
        """Record the result of a probe, and what is not as it should be in the log. Runs inside a
        transaction of the caller."""
        values = chat.as_dict()
        self.store.put_probe(fact.id, {**probe, "chat": values})
        if chat.failed or chat.relearning:
            del values["shard"]
            self.store.db.write_event("chat_probed", fact.id, reason=reason, **values)

    # Learning again -----------------------------------------------------------------------------

    def _relearn(self, fact: StoredFact) -> None:
        """Learn a fact again. Another shard takes the place of the first if the fact's own prompt
        is still right, and it is answered for more of the questions."""
        began, chat = time.monotonic(), self._read_probe(fact)
        questions = self._list_learnable(fact.fact, chat.failed)
        shard = self.side_learner.train_again(fact.fact, questions)
        if not self._still_waits(fact):
            return
        if isinstance(shard, Refusal):
            self._keep_first(fact, shard.reason)
        elif why := self._try_shard(fact, shard, chat, began):
            self._keep_first(fact, why)
        self.live_model.prune_side()

    def _read_probe(self, fact: StoredFact) -> ChatProbe:
        return ChatProbe.from_dict((fact.probe or {})["chat"])

    def _still_waits(self, fact: StoredFact) -> bool:
        waiting = self.store.artifacts.list_shards_to_relearn()
        return (fact.id, self._read_probe(fact).shard) in waiting

    def _keep_first(self, fact: StoredFact, reason: str) -> None:
        """Record that a fact stays as it was learned first, if it has not ended since."""
        if not self._still_waits(fact):
            return
        chat = replace(self._read_probe(fact), relearning=Relearning.FAILED)
        with self.store.db.transaction():
            self._record(fact, fact.probe or {}, chat, reason)

    def _try_shard(
        self, fact: StoredFact, shard: Shard, before: ChatProbe, began: float
    ) -> str | None:
        """Probe another shard, and let it take the place of the first. Return the reason if it does
        not."""
        side, folder = self.live_model.side, self.live_model.home.side_folder
        unedited = self.live_model.probe_unedited([fact.fact])[fact.id]
        first, number, taken = side.shard_ids[fact.id], max(side.shards) + 1, False
        side.shards[number], side.shard_ids[fact.id] = shard, number
        try:
            edited = self.live_model.probe_edited([fact.fact])[fact.id]
            probe = compare_answers(fact.fact, unedited, edited)
            if not probe.right:
                return f"the side memory answered {probe.answer!r}"
            (chat,) = self._ask([(fact.fact, before.shard)])
            if len(chat.failed) >= len(before.failed):
                return "it was answered for no more questions"
            sha = save_shard(folder, shard)
            chat = replace(chat, shard=sha, relearning=Relearning.DONE)
            # In the weights it keeps the probe of these.
            is_beside = fact.state is FactState.LIVE_SIDE
            measured = probe.as_dict() if is_beside else fact.probe or {}
            seconds = time.monotonic() - began
            with self.store.db.transaction():
                self.store.artifacts.add_shard(number, sha, 1, shard.threshold)
                self.store.artifacts.move_side_keys(fact.id, number)
                self._record(fact, measured, chat)
                self.store.add_edit(fact.id, "side", None, seconds, "relearned", probe.as_dict())
            taken = True
        finally:
            if not taken:
                side.shard_ids[fact.id] = first
                del side.shards[number]
        return None
