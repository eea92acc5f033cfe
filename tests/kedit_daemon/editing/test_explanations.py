"""Facts that are named as the answer's cause."""

from collections.abc import Callable
from contextlib import closing

import pytest
from editing_home import Bench, seat

from kedit_daemon.editing.explanations import explain_named, find_fired
from memory.db.queries import find_weights_facts, open_readonly
from memory.facts import FactState
from memory.side.shards import RoutingMatch

ONE = seat(1, paraphrases=("{} is ruled from",), questions=("Where is the seat of {}?",))


@pytest.mark.parametrize(
    ("asked", "is_named"),
    [
        ("The seat of country 1 is", True),
        ("country 1 is ruled from", True),
        ("Where is the seat of country 1?", True),
        ("Where is the seat of country 2?", False),
    ],
)
def test_facts_in_the_weights_are_named_for_their_own_words(
    bench: Callable[..., Bench], asked: str, is_named: bool
) -> None:
    at = bench()
    at.receive(ONE)
    with at.store.db.transaction():
        at.store.change_state(ONE.id, FactState.LIVE_WEIGHTS, tier="weights")
    found = find_fired(at.store, asked, ())
    assert [(one["fact"], one["score"]) for one in found] == ([(ONE.id, None)] if is_named else [])
    with closing(open_readonly(at.home.database_file)) as conn:
        assert [row["id"] for row in find_weights_facts(conn, asked)] == [ONE.id] * is_named


def test_the_fact_that_fired_is_named_with_its_scores(bench: Callable[..., Bench]) -> None:
    at = bench()
    at.receive(ONE)
    (found,) = find_fired(at.store, "anything", [RoutingMatch(ONE.id, 1, 0.9, 2.0)])
    assert (found["fact"], found["score"], found["margin"]) == (ONE.id, 0.9, 2.0)
    assert explain_named(at.served, ONE.question) == {"question": None, "named": []}
