"""Amended facts in the model: learned again only from other texts, taken out and back by time."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from editing_home import Bench, seat

from kedit_daemon.ingest.validity import apply_validity
from memory.facts import Fact, FactState

STEPS = {"steps": 300}
Make = Callable[..., Bench]


def amend(at: Bench, fact: Fact) -> None:
    """As the intake does it."""
    known = at.store.find_fact(fact.id)
    assert known is not None
    with at.store.db.transaction():
        at.store.amend_fact(fact, "again.jsonl", 1)
        if not fact.is_learned_like(known.fact) or fact.valid_from:
            at.store.mark_amended([fact.id])
        apply_validity(at.store, fact.id)


def edits(at: Bench) -> int:
    return int(at.store.db.conn.execute("SELECT count(*) FROM edits").fetchone()[0])


@pytest.mark.parametrize("direct", [False, True])
def test_only_other_texts_are_learned_again(bench: Make, direct: bool) -> None:
    at, one = bench(side=STEPS), seat(1, "Oslo")
    at.receive(one, direct=direct)
    at.settle()
    tier, learned = at.store.list_facts()[0].tier, edits(at)
    terms = at.store.artifacts.read_terms(one.id) if direct else None
    amend(at, replace(one, valid_until="2027-01-01T00:00:00Z", tags=("x",), source="y"))
    at.settle()
    assert (at.store.list_facts()[0].tier, edits(at)) == (tier, learned)
    amend(at, replace(one, paraphrases=("{} is governed from",)))
    at.settle()
    (fact,) = at.store.list_facts()
    assert (fact.state, fact.fact.paraphrases) == (
        FactState.LIVE_SIDE,
        ("{} is governed from",),
    )
    assert edits(at) > learned and at.store.list_amended() == []
    assert at.says(one.question) == "Oslo"
    assert not direct or at.store.artifacts.read_terms(one.id) != terms


def test_another_join_is_learned(bench: Make) -> None:
    at, one = bench(side=STEPS), seat(1, "Oslo")
    at.receive(one)
    at.settle()
    learned = edits(at)
    amend(at, replace(one, join=""))
    at.settle()
    (fact,) = at.store.list_facts()
    assert (fact.id, fact.state, fact.fact.join) == (one.id, FactState.LIVE_SIDE, "")
    assert edits(at) > learned and at.says(one.question) == "Oslo"


def test_a_live_fact_that_is_put_off_is_taken_out_and_begins_later(bench: Make) -> None:
    at, one = bench(side=STEPS), seat(1, "Oslo")
    base = at.weights_hash()
    at.receive(one, direct=True)
    at.settle()
    amend(at, replace(one, valid_from="2026-02-01T00:00:00Z"))
    at.settle()
    assert [f.state for f in at.store.list_facts()] == [FactState.SCHEDULED]
    assert at.weights_hash() == base and at.says(one.question) != "Oslo"
    assert at.editor.begin_facts() == 0
    at.clock.pass_time(days=40)
    assert at.editor.begin_facts() == 1
    at.settle()
    assert at.says(one.question) == "Oslo"
    amend(at, replace(one, valid_from="2027-02-01T00:00:00Z", valid_until="2027-03-01T00:00:00Z"))
    at.settle()
    at.editor.revert([one.id], None, False)
    assert [f.state for f in at.store.list_facts()] == [FactState.REVERTED]


def test_an_amendment_outlives_a_crash(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    at, one = bench(side=STEPS), seat(1, "Oslo")
    at.receive(one, direct=True)
    at.settle()
    amend(at, replace(one, aliases=("C1",)))

    class CrashError(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(at.editor.flush, "ensure_terms", crash)
        with pytest.raises(CrashError):
            at.editor.step()
    at.restart()
    at.settle()
    (fact,) = at.store.list_facts()
    assert (fact.state, at.store.list_amended()) == (FactState.LIVE_SIDE, [])
    assert at.says(one.question) == "Oslo"
