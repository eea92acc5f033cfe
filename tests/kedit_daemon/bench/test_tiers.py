from collections.abc import Callable
from pathlib import Path

import pytest
from editing_home import seat

from kedit_daemon.bench.method import Setup
from kedit_daemon.bench.tiers import VERDICTS, Auto, MemitMass, Wise, config_of
from kedit_daemon.editing.model_loading import Loaded
from memory.facts import State
from memory.model.generate import answers

FACTS = [seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")]
MakeSetup = Callable[..., Setup]


@pytest.fixture
def setup(load: Callable[[str], Loaded], tmp_path: Path) -> MakeSetup:
    """Random models have no healthy norms, so there is no policy unless a test wants one."""

    def make(batch_size: int = 2, policy: bool = False) -> Setup:
        return Setup(load("llama"), tmp_path, batch_size, 0, policy)

    return make


def test_the_flush_takes_every_batch_into_the_weights(setup: MakeSetup) -> None:
    method = MemitMass(setup())
    model = method.model
    base = model.weights_hash(method.loaded.layers)
    method.edit(FACTS[:2])
    method.edit(FACTS[2:])
    assert answers(model, [f.question for f in FACTS], 12) == ["Oslo", "Lima", "Cairo"]
    assert (method.not_edited, method.overlay) == (0, None)
    assert len(method.served.weights_facts()) == 3
    assert method.stored_bytes() == sum(len(method.store.terms(f.id)) for f in FACTS)
    assert set(method.watch.parts) == {"targets", "solve", "audit", "probe"}
    assert all(seconds > 0 for seconds in method.watch.parts.values())
    assert model.weights_hash(method.loaded.layers) != base
    method.close()


def test_what_the_policy_refuses_is_not_edited(setup: MakeSetup) -> None:
    method = MemitMass(setup(policy=True))
    base = method.model.weights_hash(method.loaded.layers)
    method.edit(FACTS[:2])
    assert method.not_edited == 2
    assert method.model.weights_hash(method.loaded.layers) == base
    assert [f.state for f in method.store.facts()] == [State.RECEIVED] * 2
    method.close()


def test_wise_leaves_the_weights_alone_and_answers_by_its_overlay(setup: MakeSetup) -> None:
    method = Wise(setup())
    method.editor.hot.steps = 300  # a random model learns slowly
    model = method.model
    base = model.weights_hash(range(model.layers))
    assert method.overlay is None
    method.edit(FACTS[:2])
    method.edit(FACTS[2:])
    assert method.not_edited == 0
    assert model.weights_hash(range(model.layers)) == base
    asked = [f.question for f in FACTS]
    assert method.overlay is not None
    assert answers(model, asked, 12, method.overlay) == ["Oslo", "Lima", "Cairo"]
    assert answers(model, asked, 12) != ["Oslo", "Lima", "Cairo"]
    shards = method.store.shards()
    assert len(shards) == 3
    keys = sum(len(row.blob) for row in method.store.side_rows())
    paths = [method.home.side / f"{shard.sha256}.safetensors" for shard in shards]
    assert method.stored_bytes() == keys + sum(path.stat().st_size for path in paths)
    assert set(method.watch.parts) == {"learn", "probe"}
    method.close()


def test_wise_does_not_send_to_the_weights_what_it_cannot_learn(setup: MakeSetup) -> None:
    method = Wise(setup())
    method.editor.hot.steps = 1
    method.edit(FACTS[:2])
    assert method.not_edited == 2
    assert method.served.weights_facts() == []
    method.close()


def test_auto_uses_both_tiers_by_the_daemons_rules(setup: MakeSetup) -> None:
    method = Auto(setup())
    method.editor.hot.steps = 300
    method.edit(FACTS[:2])
    assert [f.state for f in method.store.facts()] == [State.LIVE_SIDE] * 2
    most = method.config.routing.direct_facts
    assert (method.direct(most - 1), method.direct(most)) == (False, True)
    method.editor.hot.steps = 1  # what the side memory cannot learn goes to the weights
    method.edit(FACTS[2:])
    assert method.store.facts()[2].state is State.LIVE_WEIGHTS
    assert method.not_edited == 0
    assert {"learn", "probe", "flush"} == set(method.watch.parts)
    method.close()


def test_the_run_sets_the_batch_and_the_policy_and_nothing_else(setup: MakeSetup) -> None:
    free, bound = config_of(setup(7)), config_of(setup(7, policy=True))
    assert free.flush.batch_facts == bound.flush.batch_facts == 7
    limits = {n: v for n, v in vars(free.stability).items() if n.endswith(VERDICTS)}
    assert len(limits) == 15 and min(limits.values()) > 1e12
    assert bound.stability.perplexity_revert < 2
    assert (free.side, free.routing) == (bound.side, bound.routing)


def test_a_batch_that_a_flush_cuts_goes_on_while_there_is_room(setup: MakeSetup) -> None:
    method = MemitMass(setup())
    method.flush.selective = True
    method.edit(FACTS[:1])  # one fact seen: no more than two are foreseen to be borne
    assert method.flush.weights.room.known() == 2
    method.edit(FACTS[1:])
    assert len(method.store.generations()) == 4  # the base, and three flushes
    assert (method.not_edited, len(method.served.weights_facts())) == (0, 3)
    method.close()
