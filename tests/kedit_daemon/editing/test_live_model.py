from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editing_home import Bench, seat
from side_tools import fact_numbers

from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.editing.tensor_files import pack_keys, unpack_keys
from memory.db import meta_keys
from memory.errors import KeditError
from memory.facts import FactState
from memory.files import save_tensors
from memory.side.index import to_fact_id

ONE, TWO, THREE = seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")
Make = Callable[..., Bench]


@pytest.fixture
def at(bench: Make) -> Bench:
    """One fact in the weights, two beside them."""
    made = bench(side={"steps": 300})
    made.receive(ONE, direct=True)
    made.settle()
    made.receive(TWO, THREE)
    made.settle()
    assert sorted(str(f.state) for f in made.store.list_facts()) == ["live-side"] * 2 + [
        "live-weights"
    ]
    return made


def answers(bench: Bench) -> list[tuple[str, str | None]]:
    asked = [*(f.question for f in (ONE, TWO, THREE)), "The seat of country 30 is"]
    said = bench.served.answer_prompts(asked, 12)
    return [(a.text, a.fired_match and a.fired_match.fact_id) for a in said]


def events(bench: Bench, kind: str) -> int:
    kinds = [name for (name,) in bench.store.db.conn.execute("SELECT kind FROM events")]
    return kinds.count(kind)


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_restart_gives_the_same_answers_from_the_same_weights(at: Bench) -> None:
    before, weights = answers(at), at.weights_hash()
    assert before[:3] == [("Oslo", None), ("Lima", TWO.id), ("Cairo", THREE.id)]
    at.restart()
    assert (answers(at), at.weights_hash()) == (before, weights)
    assert not at.editor.step()


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_a_lost_generation_is_solved_again_from_the_store(at: Bench, damage: str) -> None:
    before, weights, path = answers(at), at.weights_hash(), only(at.home.generations_folder)
    data = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    if damage == "flipped":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    at.restart()
    assert (at.weights_hash(), answers(at)) == (weights, before)
    assert events(at, "generation_rebuilt") == 1
    at.restart()
    assert (at.weights_hash(), events(at, "generation_rebuilt")) == (weights, 1)


def test_the_fact_of_a_damaged_shard_is_learned_again(at: Bench) -> None:
    first, second = at.store.artifacts.list_shards()
    (at.home.side_folder / f"{first.sha256}.safetensors").write_bytes(b"noise")
    at.restart()
    assert [f.id for f in at.store.list_facts((FactState.RECEIVED,))] == [TWO.id]
    assert set(at.served.side.shards) == {second.id}
    at.settle()
    assert [text for text, _ in answers(at)[:3]] == ["Oslo", "Lima", "Cairo"]
    assert not at.store.list_facts((FactState.RECEIVED,))


def test_a_shard_comes_back_as_it_was(at: Bench) -> None:
    before = dict(at.served.side.shards)
    at.restart()
    assert at.served.side.shards.keys() == before.keys()
    for number, found in at.served.side.shards.items():
        known = before[number]
        assert found.threshold == known.threshold
        assert torch.equal(found.delta.up, known.delta.up)
        assert torch.equal(found.delta.down, known.delta.down)


def test_the_fact_of_a_shard_of_an_older_form_is_learned_again(at: Bench) -> None:
    row, _ = at.store.artifacts.list_shards()
    weight = at.served.model.base_weight(at.served.site.side_layer)
    sha = save_tensors(at.home.side_folder, {"delta": torch.zeros_like(weight)})
    with at.store.db.transaction():
        at.store.artifacts.drop_shard(row.id)
        at.store.artifacts.add_shard(row.id, sha, row.facts, row.threshold)
    at.restart()
    assert [f.id for f in at.store.list_facts((FactState.RECEIVED,))] == [TWO.id]
    at.settle()
    assert [text for text, _ in answers(at)[:3]] == ["Oslo", "Lima", "Cairo"]


@pytest.mark.parametrize("data", [None, b"noise"])
def test_a_damaged_index_is_built_again(at: Bench, data: bytes | None) -> None:
    before, path = answers(at), only(at.home.index_folder)
    whole = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    at.restart()
    assert answers(at) == before
    assert len(only(at.home.index_folder).read_bytes()) == len(whole)


def indexed(bench: Bench) -> list[str]:
    return sorted(to_fact_id(n) for n in fact_numbers(bench.served.side.key_index))


def test_an_index_file_that_is_behind_is_brought_to_what_the_store_says(at: Bench) -> None:
    behind = only(at.home.index_folder).read_bytes()
    sha = at.store.db.get_meta(meta_keys.INDEX_SHA256)
    kept = {row.fact_id: row for row in at.store.artifacts.read_side_keys()}[THREE.id]
    turned = replace(unpack_keys(kept.blob), subject=torch.eye(2, at.loaded.model.hidden_size))
    with at.store.db.transaction():  # a fact is gone, one is learned again, and the process dies
        at.store.artifacts.drop_side_keys(TWO.id)
        at.store.change_state(TWO.id, FactState.REVERTED)
        at.store.artifacts.put_side_keys(THREE.id, kept.shard, pack_keys(turned))
    assert only(at.home.index_folder).read_bytes() == behind
    assert at.store.db.get_meta(meta_keys.INDEX_SHA256) == sha
    at.restart()
    index = at.served.side.key_index
    assert indexed(at) == [THREE.id]
    assert index.search(turned.subject, 1)[0][0].score == pytest.approx(1)
    assert index.changed_share == 0 and at.store.db.get_meta(meta_keys.INDEX_SHA256) != sha
    with at.store.db.transaction():
        at.store.artifacts.put_side_keys(THREE.id, kept.shard, kept.blob)
    at.restart()
    assert answers(at)[2] == ("Cairo", THREE.id)


def test_a_whole_index_file_is_taken_and_not_written_again(at: Bench) -> None:
    at.restart()
    (path,) = at.home.index_folder.iterdir()
    when = path.stat().st_mtime_ns
    answers_before = answers(at)
    at.restart()
    assert only(at.home.index_folder) == path
    assert path.stat().st_mtime_ns == when
    assert answers(at) == answers_before


def test_the_index_file_is_written_when_a_share_of_the_index_has_changed(at: Bench) -> None:
    at.served.save_index()
    sha, keys = at.store.db.get_meta(meta_keys.INDEX_SHA256), torch.eye(at.loaded.model.hidden_size)
    for number in range(10):
        at.served.side.key_index.add(number, keys[number : number + 1])
    at.served.save_index()
    assert at.store.db.get_meta(meta_keys.INDEX_SHA256) != sha
    sha = at.store.db.get_meta(meta_keys.INDEX_SHA256)
    for number in range(3):  # of 12
        at.served.side.key_index.remove(number)
        at.served.prune_side()
        assert (at.store.db.get_meta(meta_keys.INDEX_SHA256) == sha) == (number < 2)
    assert only(at.home.index_folder).stem == at.store.db.get_meta(meta_keys.INDEX_SHA256)


def test_a_crash_between_the_index_file_and_its_sha256_is_harmless(at: Bench) -> None:
    before = answers(at)
    at.served.side.key_index.remove(int(TWO.id, 16))
    at.served.side.key_index.save(at.home.index_folder)
    assert len(list(at.home.index_folder.iterdir())) == 2
    at.restart()
    assert answers(at) == before
    assert only(at.home.index_folder).stem == at.store.db.get_meta(meta_keys.INDEX_SHA256)


def test_files_that_a_crash_left_are_swept(at: Bench) -> None:
    folders = (at.home.generations_folder, at.home.side_folder, at.home.index_folder)
    kept = [set(folder.iterdir()) for folder in folders]
    for folder in folders:
        (folder / f"{'0' * 64}.safetensors").write_bytes(b"an orphan")
    at.restart()
    assert [set(folder.iterdir()) for folder in folders] == kept


def test_a_crash_between_the_end_of_a_fact_and_that_of_its_shard_leaves_none(at: Bench) -> None:
    row = next(row for row in at.store.artifacts.read_side_keys() if row.fact_id == TWO.id)
    with at.store.db.transaction():
        at.store.artifacts.drop_side_keys(TWO.id)
        at.store.change_state(TWO.id, FactState.REVERTED)
    at.restart()
    left = {shard.id for shard in at.store.artifacts.list_shards()}
    assert row.shard not in left and left == {*at.served.side.shards}
    assert {p.stem for p in at.home.side_folder.iterdir()} == {
        s.sha256 for s in at.store.artifacts.list_shards()
    }


def test_a_home_made_for_another_model_is_refused(
    at: Bench, load: Callable[..., LoadedModel]
) -> None:
    with pytest.raises(KeditError, match="made for another model") as caught:
        LiveModel(load("gpt2"), at.store, at.home).restore()
    assert (caught.value.exit_code, caught.value.code) == (78, "model")


def test_facts_computed_for_other_layers_are_refused(at: Bench) -> None:
    loaded = at.editor.live_model.loaded_model
    layers = tuple(n for n in range(loaded.model.layer_count) if n not in loaded.layers)[:1]
    moved = replace(loaded, site=replace(loaded.site, subject_layers=(), end_layers=layers))
    statistics = {n: loaded.statistics[loaded.layers[0]] for n in layers} | loaded.statistics
    with pytest.raises(KeditError, match="computed for the layers") as caught:
        LiveModel(replace(moved, statistics=statistics), at.store, at.home).restore()
    assert (caught.value.exit_code, caught.value.code) == (78, "site")


@pytest.mark.parametrize("loss", ["UPDATE terms SET tensors = x'00'", "DELETE FROM terms"])
def test_the_weights_are_solved_without_a_fact_whose_terms_are_damaged(
    bench: Make, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    monkeypatch.setattr("policies.memit_mass.SUMMED_SHARE", 0.0)  # two facts are many
    made = bench()
    made.receive(ONE, TWO, direct=True)
    made.settle()
    served = made.served
    assert set(served.list_weights_facts()) == {ONE.id, TWO.id}
    alone = served.solve([TWO.id])
    served.solve([ONE.id, TWO.id])
    with made.store.db.conn:
        made.store.db.conn.execute(f"{loss} WHERE fact_id = ?", (ONE.id,))
    found = served.solve([TWO.id])
    assert all(torch.equal(found[n], delta) for n, delta in alone.items())
