from collections.abc import Callable

from conftest import Bench, seat

from memory.facts import State

STEPS = {"steps": 300}
Make = Callable[..., Bench]


def test_facts_that_are_not_stated_any_more_are_learned_anew(bench: Make) -> None:
    at = bench(side=STEPS)
    one, two, three = seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Paris")
    at.receive(one, two, direct=True)
    at.settle()
    at.receive(three)
    at.settle()
    told = at.editor.auditor.retention.probe()
    assert told == {"figures": {"oldest": 1.0, "sample": 1.0}, "learned_anew": []}
    shard = at.served.side.shards[at.served.side.shard_of[three.id]]
    shard.delta.up.neg_()  # finite, and wrong
    with at.store.transaction():  # what the weights say is not what is asked for
        at.store.conn.execute("UPDATE facts SET target = 'Cairo' WHERE id = ?", (two.id,))
        at.store.conn.execute(
            "UPDATE facts SET record = replace(record, 'Lima', 'Cairo') WHERE id = ?", (two.id,)
        )
    told = at.editor.auditor.retention.probe()
    assert told["figures"] == {"oldest": 1 - 2 / 3, "sample": 1 - 2 / 3}
    assert sorted(told["learned_anew"]) == sorted([two.id, three.id])
    waiting = at.store.facts((State.RECEIVED,))
    assert {f.id for f in waiting} == {two.id, three.id}
    assert {f.reason for f in waiting} == {"an audit found that it is not stated any more"}
    at.settle()
    assert [at.says(f.question) for f in (one, two, three)] == ["Oslo", "Cairo", "Paris"]
    assert {str(f.state) for f in at.store.facts()} == {"live-weights", "live-side"}
    assert at.served.weights_facts() == [one.id]


def test_a_probe_without_facts_finds_nothing(bench: Make) -> None:
    told = bench().editor.auditor.retention.probe()
    assert told == {"figures": {"oldest": None, "sample": None}, "learned_anew": []}
