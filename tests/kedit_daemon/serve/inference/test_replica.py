import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from editing_home import Bench
from home_tools import LIMA, OSLO, ROME, Published
from safetensors import SafetensorError

from kedit_daemon.editing.tensor_files import load_deltas, pack_keys
from kedit_daemon.serve.inference.batch_decoder import BatchDecoder
from kedit_daemon.serve.inference.replica import RETRY_SECONDS, Replica
from kedit_daemon.serve.inference.types import BASE, EDITED
from memory.errors import KeditError
from memory.files import save_tensors
from memory.model.editable import EditableModel
from memory.side.shards import RetrievalKeys


@pytest.fixture
def published(tmp_path: Path, model: EditableModel) -> Iterator[Published]:
    made = Published(tmp_path / "home", model)
    yield made
    made.store.close()


@pytest.fixture
def replica(published: Published, model_folder: Callable[[str], Path]) -> Iterator[Replica]:
    made = published.replica(EditableModel.load(model_folder("llama"), torch.device("cpu")))
    yield made
    made.close()


def fired(replica: Replica) -> list[str | None]:
    """Of ROME, OSLO and LIMA, by the number of the fact."""
    model = replica.model
    prompts = [model.encode(f.question) for f in (ROME, OSLO, LIMA)]
    return [
        m and m.fact_id for m in BatchDecoder(model, replica.side).prefill_rows(prompts).matches
    ]


def weights(model: EditableModel) -> str:
    return model.weights_hash(range(model.layer_count))


def weights_of(published: Published, generation: int) -> str:
    """What the daemon's own model would be."""
    row = published.store.artifacts.get_generation(generation)
    published.model.set_deltas(load_deltas(published.home.generations_folder, row))
    found = weights(published.model)
    published.model.set_deltas({})
    return found


def test_what_is_in_the_home_is_served_from_the_start(
    published: Published, replica: Replica
) -> None:
    published.learn(ROME, 1)
    number = published.generation(5)
    replica.sync()
    replica.set_generation(replica.resolve_generation(EDITED))
    assert fired(replica) == [ROME.id, None, None]
    assert replica.generation == number
    assert weights(replica.model) == weights_of(published, number)
    assert replica.problems == ()


def test_facts_come_and_go_as_the_daemon_says(published: Published, replica: Replica) -> None:
    replica.sync()
    assert fired(replica) == [None, None, None]
    published.learn(ROME, 1)
    published.learn(OSLO, 2, seed=2)
    replica.sync()
    assert fired(replica) == [ROME.id, OSLO.id, None]
    published.forget(ROME, 1)
    replica.sync()
    assert fired(replica) == [None, OSLO.id, None]
    assert set(replica.side.shards) == {2}


def test_what_stays_is_not_read_again(published: Published, replica: Replica) -> None:
    published.learn(ROME, 1)
    replica.sync()
    kept = replica.side.shards[1]
    published.learn(OSLO, 2)
    replica.sync()
    assert replica.side.shards[1] is kept


def test_a_shards_number_may_come_to_mean_another_one(
    published: Published, replica: Replica
) -> None:
    published.learn(ROME, 1, seed=1)
    replica.sync()
    before = replica.side.shards[1].delta.up
    published.forget(ROME, 1)
    published.learn(OSLO, 1, seed=2)
    replica.sync()
    assert fired(replica) == [None, OSLO.id, None]
    assert not torch.equal(replica.side.shards[1].delta.up, before)
    published.forget(OSLO, 1)
    published.learn(OSLO, 1, seed=3)  # the same fact, learned anew
    replica.sync()
    assert fired(replica) == [None, OSLO.id, None]
    random = torch.Generator().manual_seed(3)
    assert torch.equal(
        replica.side.shards[1].delta.up,
        torch.randn(replica.side.shards[1].delta.up.shape, generator=random),
    )


def test_a_look_at_an_unchanged_home_reads_nothing(published: Published, replica: Replica) -> None:
    published.learn(ROME, 1)
    replica.sync()
    asked: list[str] = []
    replica._follower.db.conn.set_trace_callback(asked.append)
    replica.sync()
    assert asked == ["PRAGMA data_version"]
    published.learn(OSLO, 2)
    replica.sync()
    assert len(asked) > 3


def test_weights_move_with_the_next_use_and_every_generation_can_be_had(
    published: Published, replica: Replica
) -> None:
    base = weights(replica.model)
    one, two = published.generation(5), published.generation(6)
    replica.sync()
    assert weights(replica.model) == base
    found = {}
    for which in (EDITED, BASE, one, two, 0):
        replica.set_generation(replica.resolve_generation(which))
        found[which] = weights(replica.model)
    assert found[EDITED] == found[two] == weights_of(published, two)
    assert found[one] == weights_of(published, one) != found[two]
    assert found[BASE] == found[0] == base


def test_weights_that_were_laid_half_are_laid_anew(published: Published, replica: Replica) -> None:
    good = published.generation(5)
    sha = save_tensors(
        published.home.generations_folder, {"0": torch.ones(1), "1": torch.ones(3, 3)}
    )
    with published.store.db.transaction():
        bad = published.store.artifacts.add_generation(sha, "", good, "flush", (), {})
    replica.sync()
    replica.set_generation(good)
    with pytest.raises(RuntimeError):
        replica.set_generation(bad)
    assert weights(replica.model) != weights_of(published, good)
    replica.set_generation(good)
    assert weights(replica.model) == weights_of(published, good)


@pytest.mark.parametrize("which", [7, -1, "generation"])
def test_an_unknown_generation_is_refused(replica: Replica, which: str | int) -> None:
    with pytest.raises(KeditError, match=f"no generation {which!r}") as caught:
        replica.resolve_generation(which)
    assert caught.value.code == "model"


@pytest.mark.parametrize("damage", [None, b"noise"])
def test_a_lost_generation_leaves_the_last_good_one_and_is_told(
    published: Published, replica: Replica, damage: bytes | None
) -> None:
    good = published.generation(5)
    replica.sync()
    lost = published.generation(6)
    path = published.file_of(lost)
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    replica.sync()
    replica.set_generation(replica.resolve_generation(EDITED))
    assert replica.generation == good
    assert weights(replica.model) == weights_of(published, good)
    assert len(replica.problems) == 1
    assert f"generation {lost} is not served, {good} still is" in replica.problems[0]
    with pytest.raises(KeditError) as caught:
        replica.set_generation(lost)
    assert caught.value.code == "corrupt"
    assert weights(replica.model) == weights_of(published, good)
    replica.sync()
    assert len(replica.problems) == 1  # still, though nothing has changed
    path.write_bytes(whole)
    published.learn(ROME, 1)
    replica.sync()
    assert (replica.generation, replica.problems) == (lost, ())


def test_a_fact_that_moved_into_lost_weights_stays_in_the_side_memory(
    published: Published, replica: Replica
) -> None:
    published.learn(ROME, 1)
    replica.sync()
    path = published.file_of(published.generation(5))
    whole = path.read_bytes()
    path.unlink()
    published.forget(ROME, 1)
    published.learn(OSLO, 1, seed=2)  # by the same number, another shard
    replica.sync()
    assert fired(replica) == [ROME.id, None, None]
    path.write_bytes(whole)
    published.seconds += RETRY_SECONDS
    replica.sync()
    assert (fired(replica), replica.problems) == ([None, OSLO.id, None], ())


def test_what_could_not_be_followed_is_tried_again_after_a_while(
    published: Published, replica: Replica
) -> None:
    path = published.learn(ROME, 1)
    whole = path.read_bytes()
    path.unlink()
    replica.sync()
    path.write_bytes(whole)
    asked: list[str] = []
    replica._follower.db.conn.set_trace_callback(asked.append)
    published.seconds += RETRY_SECONDS / 2
    replica.sync()
    assert (len(asked), len(replica.problems)) == (1, 1)
    published.seconds += RETRY_SECONDS / 2
    replica.sync()
    assert (fired(replica), replica.problems) == ([ROME.id, None, None], ())


def test_a_change_that_nobody_foresaw_does_not_count_as_seen(
    published: Published, replica: Replica
) -> None:
    published.learn(ROME, 1)
    with published.store.db.transaction():
        published.store.artifacts.put_side_keys(ROME.id, 1, b"whole, but no tensors")
    for _ in range(2):
        with pytest.raises(SafetensorError):
            replica.sync()


def test_a_generation_that_is_not_known_is_told(published: Published, replica: Replica) -> None:
    with published.store.db.transaction():
        published.store.db.set_meta("active_generation", "9")
    replica.sync()
    assert replica.generation == 0
    assert "no generation 9" in replica.problems[0]


@pytest.mark.parametrize("damage", ["file", "keys", "not finite"])
def test_only_the_fact_that_is_damaged_is_missing(
    published: Published, replica: Replica, damage: str
) -> None:
    path = published.learn(ROME, 1)
    published.learn(OSLO, 2, seed=2)
    conn = published.store.db.conn
    if damage == "file":
        path.write_bytes(b"noise")
    elif damage == "keys":
        conn.execute("UPDATE side_keys SET tensors = x'00' WHERE fact_id = ?", (ROME.id,))
        conn.commit()
    else:
        width = published.model.hidden_size
        with published.store.db.transaction():
            keys = RetrievalKeys(torch.full((1, width), torch.nan), torch.zeros(1, width))
            published.store.artifacts.put_side_keys(ROME.id, 1, pack_keys(keys))
    replica.sync()
    assert fired(replica) == [None, OSLO.id, None]
    assert len(replica.problems) == 1
    assert f"fact {ROME.id} is not served" in replica.problems[0]
    published.forget(ROME, 1)
    published.learn(ROME, 1)
    replica.sync()
    assert fired(replica) == [ROME.id, OSLO.id, None]
    assert replica.problems == ()


def test_a_database_that_cannot_be_read_is_told_and_read_again_later(
    published: Published, replica: Replica
) -> None:
    published.learn(ROME, 1)
    deny, fine = sqlite3.SQLITE_DENY, sqlite3.SQLITE_OK
    conn = replica._follower.db.conn
    conn.set_authorizer(lambda _action, name, *_: deny if name == "shards" else fine)
    replica.sync()
    assert "the database cannot be read: access to shards" in replica.problems[0]
    conn.set_authorizer(None)
    replica.sync()  # though nothing has changed
    assert (fired(replica), replica.problems) == ([ROME.id, None, None], ())


@pytest.mark.parametrize("tries", ["resolve_generation", "set_generation"])
def test_a_reader_is_told_of_a_database_that_cannot_be_read(replica: Replica, tries: str) -> None:
    replica._follower.db.conn.set_authorizer(lambda *_: sqlite3.SQLITE_DENY)
    with pytest.raises(KeditError, match="cannot be read") as caught:
        getattr(replica, tries)(3)
    assert caught.value.code == "unreadable"


def test_a_layer_that_the_model_does_not_have_leaves_the_last_good_generation(
    published: Published, replica: Replica
) -> None:
    sha = save_tensors(published.home.generations_folder, {"no layer": torch.ones(1)})
    with published.store.db.transaction():
        published.store.artifacts.activate_generation(
            published.store.artifacts.add_generation(sha, "", 0, "flush", (), {})
        )
    replica.sync()
    assert replica.generation == 0
    assert "no layer" in replica.problems[0]


def test_nothing_is_ever_written(published: Published, replica: Replica) -> None:
    published.learn(ROME, 1)
    published.generation(5)

    def listed() -> dict[Path, int]:
        files = [p for p in published.home.root.rglob("*") if p.is_file() and "-shm" not in p.name]
        return {path: path.stat().st_mtime_ns for path in files}

    orphan = published.home.side_folder / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"swept by the daemon alone")
    before = listed()
    replica.sync()
    replica.set_generation(1)
    fired(replica)
    assert listed() == before
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        replica._follower.db.conn.execute("DELETE FROM facts")


def test_a_home_made_for_another_model_is_refused(
    bench: Callable[..., Bench], model_folder: Callable[[str], Path]
) -> None:
    home = bench(kind="llama").home
    with pytest.raises(KeditError, match="made for another model than") as caught:
        Replica.load(home, str(model_folder("gpt2")), "cpu")
    assert (caught.value.code, caught.value.exit_code) == ("model", 78)


def test_the_model_is_loaded_by_name_with_what_was_measured_of_it(
    bench: Callable[..., Bench], model_folder: Callable[[str], Path]
) -> None:
    made = bench(kind="llama")
    replica = Replica.load(made.home, str(model_folder("llama")), "cpu")
    assert replica.side.gates == made.served.side.gates
    assert replica.side.layer == made.loaded.site.side_layer
    for layer, centre in made.served.side.centres.items():
        assert torch.allclose(replica.side.centres[layer], centre)
    assert replica.model is not made.loaded.model
    replica.close()
