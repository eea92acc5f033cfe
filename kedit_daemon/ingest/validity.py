"""The beginning of facts: those that are valid take their places, others wait for `valid_from`.

Every function runs inside a transaction of the caller.
"""

from memory.db.store import Store
from memory.facts import FactState
from policies.routing import is_early


def apply_validity(store: Store, fact_id: str) -> None:
    """Let a fact that was just handed in wait for its `valid_from` or, if that has come, take the
    place of others that wait in its slot: no edit is spent on them."""
    fact = store.require_fact(fact_id)
    if is_early(fact.fact, store.db.format_now()):
        if fact.state is FactState.RECEIVED:
            reason = f"valid from {fact.fact.valid_from}"
            store.change_state(fact_id, FactState.SCHEDULED, reason=reason)
        return
    if fact.state is FactState.SCHEDULED:
        store.begin_fact(fact_id)
    for other in store.list_facts((FactState.RECEIVED,), slot=fact.fact.slot):
        if other.id != fact_id:
            reason = f"superseded by {fact_id}"
            store.change_state(other.id, FactState.SUPERSEDED, reason=reason)


def begin_due_facts(store: Store) -> int:
    """Let the facts begin whose `valid_from` has come, the earliest first. Return their number."""
    now = store.db.format_now()
    waiting = store.list_facts((FactState.SCHEDULED,))
    due = [fact for fact in waiting if not is_early(fact.fact, now)]
    for fact in sorted(due, key=lambda one: one.fact.valid_from or ""):
        apply_validity(store, fact.id)
    return len(due)
