import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from editing_home import LOOSE, Bench, seat
from tiny_models import CITIES

from kedit_daemon.editing import flush
from kedit_daemon.editing.tensor_files import unpack_keys
from memory.db import meta_keys
from memory.facts import Fact
from memory.model.canary import Health
from policies.batch_selection import select_members
from policies.probe import Probe, compare_answers

STEPS = {"steps": 300}
Make = Callable[..., Bench]


def state(bench: Bench, fact_id: str) -> str:
    found = bench.store.find_fact(fact_id)
    assert found is not None
    return str(found.state)


def figures_of(bench: Bench) -> dict[str, float]:
    (_, figures), *_ = bench.store.artifacts.list_measurements()
    return figures["norm_ratio"]  # type: ignore[no-any-return]


def bounded(norm: float) -> dict[str, float]:
    limits = {"norm_warn": norm, "norm_consolidate": norm, "norm_revert": 1e6}
    return LOOSE["stability"] | limits


FACTS = [seat(n, city) for n, city in enumerate(CITIES[:6], 1)]


def norm_with(make: Make, name: str, facts: int) -> float:
    """The largest norm ratio with the first facts in the weights."""
    at = make(name)
    at.receive(*FACTS[:facts], direct=True)
    at.settle()
    assert len(at.served.list_weights_facts()) == facts
    return max(figures_of(at).values())


def test_a_batch_that_the_weights_do_not_bear_is_published_in_part(bench: Make) -> None:
    limit = norm_with(bench, "all", 6)
    at = bench(stability=bounded(limit), side=STEPS)
    at.receive(*FACTS, direct=True)
    done = at.editor.run_flush(False)
    taken = len(done["flushed"])
    assert taken == 5
    assert (done["verdict"], done["generation"], done["failed"]) == ("keep", 1, [])
    assert done["flushed"] == [f.id for f in FACTS[:taken]]
    left = [at.store.find_fact(f.id) for f in FACTS[taken:]]
    assert all(f is not None and (str(f.state), f.attempts) == ("received", 0) for f in left)
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None
    assert at.store.db.get_meta(meta_keys.WEIGHTS_TRIALS) is not None
    at.settle()  # the rest goes beside
    assert max(figures_of(at).values()) < limit
    assert {state(at, f.id) for f in FACTS} == {"live-weights", "live-side"}
    assert not [f for f in at.store.list_facts() if f.attempts]
    assert [at.says(f.question) for f in FACTS] == [f.target for f in FACTS]


def test_a_batch_is_cut_down_until_the_weights_bear_it(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"agreement_warn": 0.1, "agreement_consolidate": 0.1, "agreement_revert": 0.15}
    at = bench(stability=LOOSE["stability"] | limits)
    tried: list[int] = []
    solve, measure = at.editor.generations.solve, at.loaded.canary.measure_health
    monkeypatch.setattr(
        at.editor.generations, "solve", lambda ids: tried.append(len(ids)) or solve(ids)
    )
    # As the root of the count, which a straight line through the first point foresees too high.
    monkeypatch.setattr(
        at.loaded.canary,
        "measure_health",
        lambda: replace(measure(), agreement=1 - 0.099 * tried[-1] ** 0.5),
    )
    at.receive(*FACTS, direct=True)
    done = at.editor.run_flush(False)
    assert (done["verdict"], done["flushed"]) == ("keep", [FACTS[0].id])
    assert tried == [6, 1, 6, 2, 1]  # no single one is to blame: the second is tried alone
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None
    assert at.editor.generations.capacity_log.read_capacity() == 1


def test_what_does_not_hold_in_a_batch_that_is_cut_has_failed(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(stability=bounded(norm_with(bench, "five", 5)))

    def deaf(fact: Fact, before: list[str], after: list[str]) -> Probe:
        return replace(compare_answers(fact, before, after), right=fact.id != FACTS[5].id)

    monkeypatch.setattr(flush, "compare_answers", deaf)
    at.receive(*FACTS, direct=True)
    done = at.editor.run_flush(False)
    assert done["flushed"] == [f.id for f in FACTS[:4]]
    assert done["failed"] == [FACTS[5].id]
    stored = [at.store.find_fact(f.id) for f in FACTS[4:]]
    assert [f.attempts for f in stored if f] == [0, 1]


def full(make: Make, name: str = "home") -> Bench:
    """A home with one fact in the weights, which bear no other."""
    at = make(name, side=STEPS, routing={"flush_facts": 1})
    at.receive(FACTS[0], direct=True)
    at.settle()
    with at.store.db.transaction():
        at.editor.generations.capacity_log.record_oversized(2, unwell(at))
    assert at.editor.generations.capacity_log.read_capacity() == 1
    return at


def unwell(bench: Bench) -> Health:
    return replace(bench.loaded.canary.measure_health(), agreement=float("nan"))


def test_no_target_is_computed_for_what_finds_the_weights_full(bench: Make) -> None:
    at = full(bench)
    one, two = FACTS[1], FACTS[2]
    at.receive(one)
    at.settle()
    at.receive(two, direct=True)
    at.settle()
    assert (state(at, one.id), state(at, two.id)) == ("live-side", "live-side")
    assert not at.store.artifacts.has_terms(one.id) and not at.store.artifacts.has_terms(two.id)
    stored = at.store.find_fact(two.id)
    assert stored is not None and (stored.attempts, stored.direct) == (0, False)
    sent = at.store.db.conn.execute("SELECT fact_id, data FROM events WHERE kind = 'weights_full'")
    ((fact_id, data),) = sent.fetchall()
    assert fact_id == two.id
    assert json.loads(data) == {"capacity": 1, "figure": "agreement", "limit": 2e6}
    asked = at.editor.run_flush(False)
    assert (asked["flushed"], asked["failed"], asked["generation"]) == ([], [], 1)
    assert asked["reasons"] == ["weights full: their capacity is about 1 facts (agreement)"]
    assert not at.store.artifacts.has_terms(one.id)
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None


def test_what_replaces_a_fact_in_full_weights_needs_no_room(bench: Make) -> None:
    at = full(bench)
    new = seat(1, "Lima")
    at.receive(new, FACTS[1], direct=True)
    at.settle()
    assert (state(at, new.id), state(at, FACTS[0].id)) == ("live-weights", "superseded")
    assert state(at, FACTS[1].id) == "live-side"


def test_a_fact_that_leaves_makes_room_for_another(bench: Make) -> None:
    at = full(bench)
    at.receive(FACTS[1])
    at.settle()
    assert not at.editor.step()
    at.editor.revert([FACTS[0].id], None, False)
    at.settle()
    assert state(at, FACTS[1].id) == "live-weights"


def test_what_replaces_a_fact_in_weights_that_are_not_well_goes_beside(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(FACTS[0], direct=True)
    at.settle()
    tight = at.config.stability.model_copy(update=bounded(1.0))
    at.config = at.config.model_copy(update={"stability": tight})
    at.restart()
    new = seat(1, "Lima")
    at.receive(new, direct=True)
    at.settle()
    assert (state(at, new.id), at.served.list_weights_facts()) == ("live-side", [])
    assert at.says(new.question) == "Lima"


def test_a_dry_run_of_a_batch_that_is_too_large_shows_the_part_and_writes_nothing(
    bench: Make,
) -> None:
    at = bench(stability=bounded(norm_with(bench, "all", 6)))
    at.receive(*FACTS, direct=True)
    base = at.weights_hash()
    done = at.editor.run_flush(True)
    assert done["flushed"] == [f.id for f in FACTS[:5]]
    assert (at.weights_hash(), at.store.db.get_meta(meta_keys.WEIGHTS_TRIALS)) == (base, None)


def test_a_batch_is_of_the_oldest_fact_beside_and_its_like_within_the_memory(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(*FACTS[:3])
    at.settle()
    keys = {r.fact_id: unpack_keys(r.blob).subject for r in at.store.artifacts.read_side_keys()}
    wanted = select_members([], [f.id for f in FACTS[:3]], keys, 3)
    assert [f.id for f in at.editor.flush.select_batch(3, 1 << 30)] == wanted
    assert [f.id for f in at.editor.flush.select_batch(3, 1)] == wanted[:1]
    at.receive(FACTS[4], direct=True)
    assert [f.id for f in at.editor.flush.select_batch(2, 1 << 30)] == [FACTS[4].id, wanted[0]]


def test_a_fact_whose_target_is_too_long_stays_beside_the_weights(bench: Make) -> None:
    at = bench(side=STEPS)
    layer = at.loaded.layers[0]
    at.served.site = replace(at.served.site, anchors={layer: 1e-3})
    at.receive(FACTS[0])
    at.settle()
    at.receive(FACTS[1], direct=True)
    done = at.editor.run_flush(False)
    assert (done["kept"], done["failed"]) == ([FACTS[0].id], [FACTS[1].id])
    assert (state(at, FACTS[0].id), state(at, FACTS[1].id)) == ("live-side", "received")
    at.settle()
    assert state(at, FACTS[1].id) == "live-side"
