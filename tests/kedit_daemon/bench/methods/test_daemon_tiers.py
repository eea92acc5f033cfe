from collections.abc import Callable
from pathlib import Path

import pytest
from editing_home import seat

from kedit_daemon.bench.methods.daemon_tiers import VERDICTS, Auto, MemitMass, Wise, build_config
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import FactState
from memory.model.generate import generate_answers

FACTS = [seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")]
MakeSetup = Callable[..., MethodSetup]


@pytest.fixture
def setup(load: Callable[[str], LoadedModel], tmp_path: Path) -> MakeSetup:
    """Random models have no healthy norms, so there is no policy unless a test wants one."""

    def make(batch_size: int = 2, policy: bool = False) -> MethodSetup:
        return MethodSetup(load("llama"), tmp_path, batch_size, 0, policy)

    return make


def test_the_flush_takes_every_batch_into_the_weights(setup: MakeSetup) -> None:
    method = MemitMass(setup())
    model = method.model
    base = model.weights_hash(method.loaded_model.layers)
    method.edit(FACTS[:2])
    method.edit(FACTS[2:])
    assert generate_answers(model, [f.question for f in FACTS], 12) == ["Oslo", "Lima", "Cairo"]
    assert (method.not_edited, method.overlay) == (0, None)
    assert len(method.live_model.list_weights_facts()) == 3
    assert method.count_stored_bytes() == sum(
        len(method.store.artifacts.read_terms(f.id)) for f in FACTS
    )
    parts = method.stopwatch.seconds_by_part
    assert set(parts) == {"targets", "solve", "audit", "probe"} and min(parts.values()) > 0
    assert all(seconds > 0 for seconds in method.stopwatch.seconds_by_part.values())
    assert model.weights_hash(method.loaded_model.layers) != base
    method.close()


def test_what_the_policy_refuses_is_not_edited(setup: MakeSetup) -> None:
    method = MemitMass(setup(policy=True))
    base = method.model.weights_hash(method.loaded_model.layers)
    method.edit(FACTS[:2])
    assert method.not_edited == 2
    assert method.model.weights_hash(method.loaded_model.layers) == base
    assert [f.state for f in method.store.list_facts()] == [FactState.RECEIVED] * 2
    method.close()


def test_wise_leaves_the_weights_alone_and_answers_by_its_overlay(setup: MakeSetup) -> None:
    method = Wise(setup())
    method.editor.side_learner.steps = 300  # a random model learns slowly
    model = method.model
    base = model.weights_hash(range(model.layer_count))
    assert method.overlay is None
    method.edit(FACTS[:2])
    method.edit(FACTS[2:])
    assert method.not_edited == 0
    assert model.weights_hash(range(model.layer_count)) == base
    asked = [f.question for f in FACTS]
    assert method.overlay is not None
    assert generate_answers(model, asked, 12, method.overlay) == ["Oslo", "Lima", "Cairo"]
    assert generate_answers(model, asked, 12) != ["Oslo", "Lima", "Cairo"]
    shards = method.store.artifacts.list_shards()
    assert len(shards) == 3
    keys = sum(len(row.blob) for row in method.store.artifacts.read_side_keys())
    paths = [method.home.side_folder / f"{shard.sha256}.safetensors" for shard in shards]
    assert method.count_stored_bytes() == keys + sum(path.stat().st_size for path in paths)
    assert set(method.stopwatch.seconds_by_part) == {"learn", "probe", "chat"}
    method.close()


def test_wise_does_not_send_to_the_weights_what_it_cannot_learn(setup: MakeSetup) -> None:
    method = Wise(setup())
    method.editor.side_learner.steps = 1
    method.edit(FACTS[:2])
    assert method.not_edited == 2
    assert method.live_model.list_weights_facts() == []
    method.close()


def test_auto_uses_both_tiers_by_the_daemons_rules(setup: MakeSetup) -> None:
    method = Auto(setup())
    method.editor.side_learner.steps = 300
    method.edit(FACTS[:2])
    assert [f.state for f in method.store.list_facts()] == [FactState.LIVE_SIDE] * 2
    most = method.config.routing.direct_facts
    assert (method.goes_to_weights(most - 1), method.goes_to_weights(most)) == (False, True)
    method.editor.side_learner.steps = 1  # what the side memory cannot learn goes to the weights
    method.edit(FACTS[2:])
    assert method.store.list_facts()[2].state is FactState.LIVE_WEIGHTS
    assert method.not_edited == 0
    assert {"learn", "probe", "flush"} == set(method.stopwatch.seconds_by_part)
    method.close()


def test_the_run_sets_the_batch_and_the_policy_and_nothing_else(setup: MakeSetup) -> None:
    free, bound = build_config(setup(7)), build_config(setup(7, policy=True))
    assert free.flush.batch_facts == bound.flush.batch_facts == 7
    limits = {n: v for n, v in vars(free.stability).items() if n.endswith(VERDICTS)}
    known = [limit for limit in limits.values() if limit is not None]
    assert len(known) == 15 and min(known) > 1e12
    assert bound.stability.perplexity_revert is None  # the model has its own
    assert (free.side, free.routing) == (bound.side, bound.routing)


def test_a_batch_that_a_flush_cuts_goes_on_while_there_is_room(setup: MakeSetup) -> None:
    method = MemitMass(setup())
    method.flush.is_selective = True
    method.edit(FACTS[:1])  # one fact seen: no more than two are foreseen to be borne
    assert method.flush.generations.capacity_log.read_capacity() == 2
    method.edit(FACTS[1:])
    made = method.store.db.conn.execute("SELECT count(*) FROM generations").fetchone()
    assert made == (4,)  # the base, and three flushes
    assert (method.not_edited, len(method.live_model.list_weights_facts())) == (0, 3)
    method.close()
