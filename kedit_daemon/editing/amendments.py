"""Amendments at work: live facts whose learned texts have changed are learned again."""

import logging

from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Generations
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.errors import KeditError, OutOfMemory, ends_daemon
from memory.facts import LIVE_STATES, FactState
from policies.routing import is_early

log = logging.getLogger(__name__)


class Amendments:
    """Carries out what an amendment changes beyond the record of a fact."""

    def __init__(self, store: Store, generations: Generations, flush: Flush) -> None:
        self.store, self.generations, self.flush = store, generations, flush

    def carry_out(self) -> bool:
        """Learn amended facts again, and take out those that are not valid yet. Return False if
        there are none. Raises OutOfMemory; then they are still to do.

        After another error they stay as they were learned, and the log says why.
        """
        ids = self.store.list_amended()
        facts = [f for n in ids if (f := self.store.find_fact(n))]
        if not ids:
            return False
        try:
            self._move_facts([f for f in facts if f.state in LIVE_STATES])
            self._renew_terms(facts)
        except OutOfMemory:
            raise
        except KeditError as error:
            if ends_daemon(error):
                raise
            log.warning("Cannot learn amended facts again: %s", error)
            with self.store.db.transaction():
                for fact in facts:
                    why = {"tier": fact.tier, "reason": str(error)}
                    self.store.db.write_event("edit_failed", fact.id, **why)
        with self.store.db.transaction():
            self.store.unmark_amended(ids)
        return True

    def _move_facts(self, live: list[StoredFact]) -> None:
        now = self.store.db.format_now()
        early = [f for f in live if is_early(f.fact, now)]
        changed = [f for f in live if not is_early(f.fact, now)]
        if early:
            self.generations.remove_facts(early, FactState.SCHEDULED, "not valid yet")
        if changed:
            self.generations.move_to_side(changed, "it was amended")

    def _renew_terms(self, facts: list[StoredFact]) -> None:
        """Compute stored terms again: they are for the texts from before. By now no generation that
        is served needs them."""
        artifacts = self.store.artifacts
        stale = [f.fact for f in facts if artifacts.has_terms(f.id)]
        refused = self.flush.ensure_terms(stale, again=True)
        with self.store.db.transaction():
            for fact_id in refused:
                artifacts.drop_terms(fact_id)
