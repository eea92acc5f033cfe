from collections.abc import Callable
from math import nan

import numpy as np
import pytest
import torch
from editing_home import Bench, seat
from poison import poison

from kedit_daemon.editing import flush, repair
from kedit_daemon.editing.repair import find_damage
from memory.db import meta_keys
from memory.facts import Fact
from memory.files import tensors_path
from memory.side.index import KeyIndex, to_fact_number
from policies.edit_terms import Refusal

STEPS = {"steps": 300}
ONE, TWO, THREE, FOUR = (seat(n, c) for n, c in enumerate(("Oslo", "Lima", "Paris", "Cairo"), 1))
Make = Callable[..., Bench]


@pytest.fixture
def at(bench: Make) -> Bench:
    """One fact in the weights, and two beside them."""
    made = bench(side=STEPS)
    made.receive(ONE, direct=True)
    made.settle()
    made.receive(TWO, THREE)
    made.settle()
    assert damage(made) == []
    return made


def damage(at: Bench) -> list[str]:
    return find_damage(at.served, at.weights_hash(), 0).reasons


def kinds(at: Bench) -> list[str]:
    return [kind for (kind,) in at.store.db.conn.execute("SELECT kind FROM events ORDER BY seq")]


def whole(at: Bench) -> bool:
    said = [at.says(f.question) for f in (ONE, TWO, THREE)]
    return said == [f.target for f in (ONE, TWO, THREE)] and damage(at) == []


def weights(at: Bench) -> None:
    with torch.no_grad():
        at.loaded.model.weight(at.served.site.layers[0])[3, 5] = nan


def one_bit(at: Bench) -> None:
    with torch.no_grad():
        at.loaded.model.weight(at.served.site.layers[0])[3, 5] += 1e-4


def shard(at: Bench) -> None:
    at.served.side.shards[at.served.side.shard_ids[TWO.id]].delta.up[0, 0] = nan


def end_key(at: Bench) -> None:
    at.served.side.end_keys[TWO.id][0, 0] = nan


def index_key(at: Bench) -> None:
    index, ids = at.served.side.key_index, np.array([to_fact_number(TWO.id) << 15])
    index._store.remove(ids)
    index._store.add(ids, np.full((1, index.width), np.nan, dtype=np.float32))


def terms(at: Bench) -> None:
    poison(at, ONE, nan)


PLANTS = {
    weights: "the weights are not those that were published",
    one_bit: "the weights are not those that were published",
    shard: "shard {number} is not finite",
    end_key: f"end key of fact {TWO.id} is not finite",
    index_key: f"key of fact {TWO.id} is not finite",
    terms: f"the targets of fact {ONE.id} are damaged",
}


def test_an_audit_finds_what_is_damaged_in_memory_and_mends_it(at: Bench) -> None:
    before, number = at.weights_hash(), at.served.side.shard_ids[TWO.id]
    for count, (plant, text) in enumerate(PLANTS.items(), 1):
        said = text.replace("{number}", str(number))
        plant(at)
        foreseen = at.editor.audit(dry_run=True)
        assert foreseen["reasons"][0] == said
        assert kinds(at).count("mended") == count - 1
        done = at.editor.audit()
        assert (done["reasons"][0], done["acted"]) == (said, "nothing")
        assert done["verdict"] in ("keep", "warn")  # of replies beside the facts
        assert done["figures"]["weights_as_written"] and done["figures"]["retention"] == 1
        assert whole(at) and at.weights_hash() == before
        assert kinds(at).count("mended") == count
    assert said not in at.editor.audit()["reasons"]
    assert not at.editor.consolidate(False)["changed"]
    at.restart()
    assert whole(at)


def test_what_is_damaged_in_its_file_as_well_is_made_again(at: Bench) -> None:
    number = at.served.side.shard_ids[TWO.id]
    (row,) = (row for row in at.store.artifacts.list_shards() if row.id == number)
    path = tensors_path(at.home.side_folder, row.sha256)
    path.write_bytes(path.read_bytes()[:-1])
    active = at.store.artifacts.get_generation(at.store.artifacts.active_generation())
    assert active.sha256 is not None
    tensors_path(at.home.generations_folder, active.sha256).write_bytes(b"nothing")
    shard(at)
    weights(at)
    assert at.editor.audit()["verdict"] in ("keep", "warn")
    assert "generation_rebuilt" in kinds(at)
    assert [at.says(f.question) == f.target for f in (ONE, TWO, THREE)] == [True, False, True]
    at.settle()  # what was in the shard is learned again
    assert whole(at)


def test_weights_that_hold_no_fact_are_mended_too(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(TWO)
    at.settle()
    before = at.weights_hash()
    weights(at)
    done = at.editor.audit()
    assert (done["verdict"], done["learned_anew"]) == ("keep", [])
    assert done["reasons"] == ["the weights are not those that were published"]
    assert at.weights_hash() == before and at.says(TWO.question) == TWO.target


def test_a_side_memory_that_cannot_be_built_again_stays_what_it_was(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    shards = {row.id for row in at.store.artifacts.list_shards()}
    index_key(at)
    with monkeypatch.context() as broken, pytest.raises(OSError):
        broken.setattr(KeyIndex, "sync_keys", full)
        at.editor.audit()
    at.served.prune_side()
    assert (
        {row.id for row in at.store.artifacts.list_shards()} == shards == set(at.served.side.shards)
    )
    at.editor.audit()
    assert whole(at)


def test_a_fact_whose_targets_cannot_be_computed_again_goes_beside(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    terms(at)
    at.receive(FOUR, direct=True)
    at.settle()  # no flush can be done: it goes beside
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is not None
    with monkeypatch.context() as hard:
        hard.setattr(flush, "compute_terms", lambda _m, _s, _n, facts, done: done(refused(facts)))
        at.editor.audit()
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None
    at.settle()
    assert {str(f.state) for f in at.store.list_facts()} == {"live-side"}
    assert whole(at)


def refused(facts: list[Fact]) -> dict[str, Refusal]:
    return {fact.id: Refusal("too hard") for fact in facts}


def test_damaged_keys_in_the_database_stop_neither_a_flush_nor_a_start(at: Bench) -> None:
    with at.store.db.transaction():
        at.store.db.conn.execute("UPDATE side_keys SET sha256 = 'x' WHERE fact_id = ?", (TWO.id,))
    at.receive(FOUR, direct=True)
    at.settle()
    index_key(at)
    at.editor.audit()
    at.settle()  # the fact without keys is learned again
    at.restart()
    assert whole(at)


def test_all_damaged_targets_are_known_before_anything_is_solved(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    at.receive(FOUR, direct=True)
    at.settle()
    weights(at)
    active = at.store.artifacts.get_generation(at.store.artifacts.active_generation())
    assert active.sha256 is not None
    tensors_path(at.home.generations_folder, active.sha256).write_bytes(b"nothing")
    with at.store.db.transaction():
        at.store.db.conn.execute("UPDATE terms SET sha256 = 'x'")
    with monkeypatch.context() as hard:
        hard.setattr(repair, "TERMS_PER_TURN", 1)
        hard.setattr(flush, "compute_terms", lambda _m, _s, _n, facts, done: done(refused(facts)))
        assert at.editor.audit()["verdict"] == "keep"
    assert at.served.list_weights_facts() == []
    assert not at.store.artifacts.has_terms(ONE.id) and not at.store.artifacts.has_terms(FOUR.id)
    at.settle()
    assert {str(f.state) for f in at.store.list_facts()} == {"live-side"}
    assert whole(at) and at.says(FOUR.question) == FOUR.target
    at.editor.run_flush(False)  # their targets are computed anew
    assert set(at.served.list_weights_facts()) == {f.id for f in (ONE, TWO, THREE, FOUR)}
