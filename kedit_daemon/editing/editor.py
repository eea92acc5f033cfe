"""The editor: the next piece of work for facts that wait, and what people and jobs request."""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.editing.amendments import Amendments
from kedit_daemon.editing.audit import Auditor, make_thresholds
from kedit_daemon.editing.chat_prober import ChatProber
from kedit_daemon.editing.explanations import explain_named, find_fired
from kedit_daemon.editing.fact_lifecycle import Lifecycle
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.memory_backoff import EditRunner, MemoryBackoff
from kedit_daemon.editing.side_learner import OUTSIDE_LINES, SideLearner
from kedit_daemon.ingest.validity import begin_due_facts
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.errors import HINT_VISION, KeditError
from memory.facts import OPEN_STATES, FactState
from memory.model.chat_layout import write_chat
from policies.cooldown import Cooldown
from policies.routing import find_flush_reason, is_for_batch


class Editor:
    """Everything that changes the model's answers. One thread uses it."""

    def __init__(
        self,
        live_model: LiveModel,
        config: Config,
        pulse: Callable[[], None],
        outside_lines: int = OUTSIDE_LINES,
    ) -> None:
        """`pulse` is called between the steps of long work. `outside_lines`: of ordinary text,
        that the side memory is kept quiet on."""
        self.live_model, self.store, self.config = live_model, live_model.store, config
        self.lifecycle = Lifecycle(self.store, config.inbox.max_attempts)
        parts = live_model, self.store, self.lifecycle
        self.generations = Generations(*parts, make_thresholds(config, live_model.site))
        self.flush = Flush(*parts, self.generations, pulse)
        self.side_learner = SideLearner(
            *parts,
            self.generations,
            config.side.batch_facts,
            config.side.steps,
            pulse,
            outside_lines,
        )
        self.chat_prober = ChatProber(live_model, self.store, self.side_learner)
        self.memory_backoff = MemoryBackoff(self._read_clock)
        self.runner = EditRunner(*parts, self.flush, self.side_learner, self.memory_backoff)
        self.amendments = Amendments(self.store, self.generations, self.flush)
        cooldown = Cooldown(config.stability.cool_down_seconds, config.stability.acts_a_day)
        self.auditor = Auditor(live_model, self.store, self.generations, self.flush, cooldown)

    # The loop -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one piece of work. Return False if there is none."""
        if self.memory_backoff.is_active():
            return False
        if self.runner.carry_out_amendments(self.amendments):
            return True
        newest = self._keep_newest(self.store.list_facts((FactState.RECEIVED,)))
        waiting = self.memory_backoff.order_by_shortage(newest)
        tiers = [self._step_side, self._step_batch]
        if self.memory_backoff.blocked_tier == "side":  # it must not stop the other tier
            tiers.reverse()
        idle_work = [self._step_unasked, self.chat_prober.step]
        return any(work(waiting) for work in tiers) or any(work() for work in idle_work)

    def _step_side(self, waiting: list[StoredFact]) -> bool:
        for_side = [f for f in waiting if not is_for_batch(f)]
        if for_side:
            self.runner.learn_waiting(for_side)
        return bool(for_side)

    def _step_batch(self, waiting: list[StoredFact]) -> bool:
        for_batch = [f for f in waiting if is_for_batch(f)]
        if unfitting := self._find_over_capacity(for_batch):
            capacity = self.generations.capacity_log.estimate_capacity()
            with self.store.db.transaction():
                self.lifecycle.redirect_over_capacity(unfitting, capacity)
            return True
        if reason := self._find_flush_reason(for_batch):
            self.runner.flush_waiting(self._select_batch(), reason)
            return True
        return False

    def _step_unasked(self) -> bool:
        """Let facts of the weights be asked for in chats."""
        unasked = self.side_learner.take_unasked()
        if unasked:
            self.runner.learn_waiting(unasked)
        return bool(unasked)

    def _find_over_capacity(self, for_batch: list[StoredFact]) -> list[StoredFact]:
        """Find the facts that no batch would take: the weights are full, and they replace none."""
        if not for_batch or self._compute_headroom() >= 1:
            return []
        return [f for f in for_batch if not self.lifecycle.is_replacement(f)]

    def _compute_headroom(self) -> float:
        return self.flush.compute_headroom(self.generations.capacity_log.read_capacity())

    def _keep_newest(self, waiting: list[StoredFact]) -> list[StoredFact]:
        """Keep one fact a slot: one that was sent back to wait may have been superseded since."""
        newest = {f.fact.slot: f for f in waiting}
        outdated = [f for f in waiting if newest[f.fact.slot] is not f]
        if outdated:
            with self.store.db.transaction():
                for fact in outdated:
                    reason = f"superseded by {newest[fact.fact.slot].id}"
                    self.store.change_state(fact.id, FactState.SUPERSEDED, reason=reason)
        return list(newest.values())

    def _find_flush_reason(self, waiting: list[StoredFact]) -> str | None:
        if self.store.db.get_meta(meta_keys.FLUSH_HELD) is not None and not waiting:
            return None
        beside = self.store.list_facts((FactState.LIVE_SIDE,))
        live = [fact for fact in beside if fact.fact.picture is None]
        if not waiting and (not live or self._compute_headroom() < 1):
            return None
        now, rules = self._read_clock(), self.config.routing
        ages = [(now - datetime.fromisoformat(f.changed_at)).total_seconds() for f in live]
        return find_flush_reason(
            waiting, len(live), max(ages, default=0.0), rules.flush_facts, rules.flush_age_seconds
        )

    def _read_clock(self) -> datetime:
        return datetime.fromisoformat(self.store.db.format_now())

    def _select_batch(self) -> list[StoredFact]:
        limits = self.config.flush
        return self.flush.select_batch(limits.batch_facts, limits.memory_mb << 20)

    # Requests and jobs --------------------------------------------------------------------------

    def run_flush(self, dry_run: bool) -> dict[str, Any]:
        """Flush now, without another reason. Facts that stay live in the side memory are kept, and
        have not failed."""
        reports, failed = self.runner.flush_in_parts(self._select_batch(), "asked for", dry_run)
        if not reports:
            raise failed[0][1]
        lists = ("flushed", "failed", "quarantined")
        ids = {key: [n for report in reports for n in report.get(key, [])] for key in lists}
        beside = {fact.id for fact in self.store.list_facts((FactState.LIVE_SIDE,))}
        ids["kept"] = [n for n in ids["failed"] if n in beside]
        ids["failed"] = [n for n in ids["failed"] if n not in beside]
        ids["failed"] += [fact.id for part, _ in failed for fact in part]
        last = reports[-1]
        reasons = [f"{len(part)} facts could not be flushed: {error}" for part, error in failed]
        merged = last | {key: found for key, found in ids.items() if key in last or found}
        return merged | {"reasons": [*last["reasons"], *reasons]}

    def audit(self, dry_run: bool = False) -> dict[str, Any]:
        """Measure the model, judge it, record the audit, and act on the verdict."""
        return self.auditor.audit(dry_run)

    def consolidate(self, dry_run: bool) -> dict[str, Any]:
        """Solve the weights again from W0."""
        return self.generations.consolidate(dry_run)

    def revert(self, names: list[str], generation: int | None, dry_run: bool) -> dict[str, Any]:
        """Take facts out by id, or go back to a generation. An external id means all its facts."""
        if generation is not None:
            return self.generations.restore_generation(generation, dry_run)
        facts = {f.id: f for name in names for f in self._require_open(name)}
        return self.generations.remove_facts(
            [*facts.values()], FactState.REVERTED, "reverted by hand", dry_run
        )

    def dismiss(self, names: list[str], dry_run: bool) -> dict[str, Any]:
        """Settle failed and quarantined facts for which nothing is to be done."""
        known = {f.id: f for name in names for f in self._require_failed(name)}
        if not dry_run:
            with self.store.db.transaction():
                for fact in known.values():
                    self.lifecycle.dismiss(fact)
        return {"dismissed": [*known], "dry_run": dry_run}

    def _require_failed(self, name: str) -> list[StoredFact]:
        facts = [f for f in self.store.find_ended_facts(name) if self.lifecycle.has_failed(f)]
        if not facts:
            raise KeditError(
                f"no fact {name} has failed: there is nothing to dismiss",
                code="unknown-fact",
                hint="kedit-daemon status; revert takes out a fact that is live",
            )
        return facts

    def _require_open(self, name: str) -> list[StoredFact]:
        """Return the facts of an id or external id that have not ended."""
        facts = self.store.find_facts(name)
        if not facts or facts[0].state not in OPEN_STATES:
            state = f"{facts[0].state} already" if facts else "unknown"
            raise KeditError(
                f"fact {name} is {state}", code="unknown-fact", hint="kedit-daemon facts"
            )
        return facts

    def expire_facts(self) -> int:
        """End the facts whose `valid_until` has passed. Return their number."""
        now = self.store.db.format_now()
        expired = [
            f
            for f in self.store.list_facts(OPEN_STATES)
            if f.fact.valid_until and f.fact.valid_until <= now
        ]
        if expired:
            self.generations.remove_facts(expired, FactState.EXPIRED, "valid_until has passed")
        return len(expired)

    def begin_facts(self) -> int:
        """Begin the facts whose `valid_from` has come. Return their number."""
        with self.store.db.transaction():
            return begin_due_facts(self.store)

    def answer_chat(
        self, chat: Sequence[Mapping[str, str]], max_tokens: int, base: bool, explain: bool
    ) -> dict[str, Any]:
        """Reply to a conversation, of roles and contents, whose last turn is the user's, through
        the model's chat template. Raises KeditError: it has none, or refuses the conversation."""
        prompt = write_chat(self.live_model.model.tokenizer, chat)
        asked = chat[-1]["content"]
        return self._answer(prompt, asked, max_tokens, base, explain, is_chat=True)

    def show_picture(self, data: bytes) -> None:
        """Show the model a picture, whose mark a question has. Raises BadPicture, or KeditError if
        it takes none."""
        pictures = self.live_model.model.pictures
        if pictures is None:
            raise KeditError("the model takes no pictures", code="unsupported", hint=HINT_VISION)
        pictures.add(data)

    def answer_prompt(
        self, prompt: str, max_tokens: int, base: bool, explain: bool
    ) -> dict[str, Any]:
        """Continue a prompt."""
        return self._answer(prompt, prompt, max_tokens, base, explain, is_chat=False)

    def _answer(
        self, prompt: str, asked: str, max_tokens: int, base: bool, explain: bool, *, is_chat: bool
    ) -> dict[str, Any]:
        """Answer by the edited model; if requested, by the base too, and with the fact that fired.
        `asked`: a person's own words in the prompt."""
        began = time.monotonic()
        answer = self.live_model.answer_prompts([prompt], max_tokens, whole=is_chat)[0]
        self.auditor.traffic.count_question(answer.fired_match)
        result: dict[str, Any] = {
            "answer": answer.text,
            "generation": self.store.artifacts.active_generation(),
            "seconds": time.monotonic() - began,
            "fired": find_fired(self.store, asked, answer.matches) if explain else [],
        }
        if explain:
            result |= explain_named(self.live_model, prompt)
        if base:
            bases = self.live_model.answer_base([prompt], max_tokens, whole=is_chat)
            result["base_answer"] = bases[0]
        return result
