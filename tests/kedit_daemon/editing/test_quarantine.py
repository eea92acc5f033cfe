from collections.abc import Callable
from math import nan

import pytest
from editing_home import LOOSE, Bench, seat
from poison import poison
from tiny_models import CITIES

from memory.db import meta_keys
from memory.facts import Fact

STEPS = {"steps": 300}
FACTS = [seat(n, city) for n, city in enumerate(CITIES[:4], 1)]
Make = Callable[..., Bench]


def states(bench: Bench) -> dict[str, str]:
    return {f.id: str(f.state) for f in bench.store.list_facts()}


def norms(limit: float) -> dict[str, float]:
    return LOOSE["stability"] | {f"norm_{v}": limit for v in ("warn", "consolidate", "revert")}


def largest_norm(bench: Bench) -> float:
    return max(bench.editor.generations.measure_health()[0].norm_ratio.values())


@pytest.fixture(scope="module")
def known() -> dict[str, float]:
    return {}


def limit_for(make: Make, known: dict[str, float]) -> float:
    """A norm that all facts together do not reach."""
    if not known:
        at = make("innocent")
        at.receive(*FACTS, direct=True)
        at.settle()
        known["norm"] = largest_norm(at) * 1.2
    return known["norm"]


@pytest.mark.parametrize("factor", [100.0, nan])
def test_a_flush_names_the_poisonous_facts_and_takes_the_others(
    bench: Make, known: dict[str, float], factor: float
) -> None:
    at = bench(stability=norms(limit_for(bench, known)), side=STEPS)
    guilty: list[Fact] = [FACTS[1], FACTS[3]]
    at.receive(*FACTS, direct=True)
    for fact in guilty:
        poison(at, fact, factor)
    foreseen = at.editor.run_flush(True)
    assert foreseen["quarantined"] == sorted(f.id for f in guilty)
    assert set(states(at).values()) == {"received"}
    done = at.editor.run_flush(False)
    assert done["quarantined"] == foreseen["quarantined"]
    assert states(at) == {f.id: "reverted" if f in guilty else "live-weights" for f in FACTS}
    assert largest_norm(at) < known["norm"]
    for fact in FACTS:
        assert (at.says(fact.question) == fact.target) is (fact not in guilty)
    for fact in guilty:
        stored = at.store.find_fact(fact.id)
        assert stored is not None and stored.reason is not None
        assert "quarantined: alone it makes the weights unhealthy" in stored.reason
        assert ("norm of layer" in stored.reason) is (factor == 100)
        assert not at.store.artifacts.has_terms(fact.id)
    kinds = [k for (k,) in at.store.db.conn.execute("SELECT kind FROM events")]
    assert kinds.count("quarantined") == 2
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None
    at.receive(*guilty, direct=True)  # their targets are computed anew
    at.settle()
    assert set(states(at).values()) == {"live-weights"}


def test_too_many_facts_are_nobodys_guilt(bench: Make, known: dict[str, float]) -> None:
    limit = limit_for(bench, known) / 1.2 * 0.999  # three are well
    at = bench(stability=norms(limit), side=STEPS)
    at.receive(*FACTS, direct=True)
    done = at.editor.run_flush(False)
    assert done["quarantined"] == []
    assert len(done["flushed"]) == 3
    assert "reverted" not in states(at).values()


def test_a_fact_already_in_the_weights_that_cannot_be_solved_stops_no_daemon(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(FACTS[0], direct=True)
    at.settle()
    poison(at, FACTS[0], nan)
    at.receive(FACTS[1], direct=True)
    at.settle()
    assert states(at) == {FACTS[0].id: "live-weights", FACTS[1].id: "live-side"}
    assert [at.says(f.question) for f in FACTS[:2]] == [f.target for f in FACTS[:2]]
    assert "not finite" in str(at.store.db.get_meta(meta_keys.FLUSH_HELD))


def test_who_asks_during_the_search_is_answered_by_what_is_published(
    bench: Make, known: dict[str, float]
) -> None:
    at = bench(stability=norms(limit_for(bench, known)), side=STEPS)
    published, seen = at.weights_hash(), set[str]()
    at.editor.flush.quarantine.pulse = lambda: seen.add(at.weights_hash())
    at.receive(*FACTS, direct=True)
    poison(at, FACTS[2], 100)
    assert at.editor.run_flush(False)["quarantined"] == [FACTS[2].id]
    assert seen == {published}


def test_one_fact_that_cannot_be_solved_for_is_guilty_alone(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(FACTS[0], direct=True)
    poison(at, FACTS[0], nan)
    assert at.editor.run_flush(False)["quarantined"] == [FACTS[0].id]
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None
