"""Every kind of vision-language model: facts about names and about pictures come and go."""

import hashlib
from collections.abc import Callable

import pytest
from editing_home import Bench, seat
from tiny_vision_models import VISION_KINDS, draw_picture

from memory.facts import Fact, FactState
from memory.picture_files import keep_picture
from memory.picture_marks import join_mark, make_mark

TYPICAL = ("llava", "blip-2")  # of one and of two models around the decoder
STEPS = {"side": {"steps": 450}}
QUESTION = "The name of this tower is"
RED, BLUE = draw_picture((200, 30, 30)), draw_picture((20, 30, 220), size=(30, 14))


def hash_all_but_edited(at: Bench) -> str:
    """A hash of all weights that no edit may change: a tower's above all."""
    pictures = at.loaded.model.pictures
    assert pictures is not None
    digest = hashlib.sha256()
    for name, tensor in sorted(pictures.model.state_dict().items()):
        if ("down_proj" not in name and "fc2" not in name) or "vision" in name:
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def show(at: Bench, data: bytes, question: str = QUESTION) -> str:
    """A question about a picture."""
    return join_mark(keep_picture(at.home.pictures_folder, data), question)


def name_tower(at: Bench, data: bytes, target: str) -> Fact:
    """A fact about a picture."""
    mark = make_mark(keep_picture(at.home.pictures_folder, data))
    return Fact(mark, "{} " + QUESTION, target)


@pytest.mark.parametrize(
    "kind",
    [k if k in TYPICAL else pytest.param(k, marks=pytest.mark.whole) for k in VISION_KINDS],
)
def test_a_text_fact_passes_through_both_tiers_with_and_without_a_picture(
    kind: str, bench: Callable[..., Bench]
) -> None:
    at = bench("home", kind, **STEPS)
    fact, base, others = seat(1, "Oslo"), at.weights_hash(), hash_all_but_edited(at)
    shown = show(at, RED, fact.question)
    before = at.says(fact.question), at.says(shown)
    assert "Oslo" not in before

    at.receive(fact)
    at.editor.step()
    stored = at.store.find_fact(fact.id)
    assert stored is not None and stored.state is FactState.LIVE_SIDE, stored and stored.reason
    assert at.says(fact.question).startswith("Oslo")

    assert at.editor.run_flush(False)["flushed"] == [fact.id]
    assert at.says(fact.question).startswith("Oslo")
    assert at.weights_hash() != base
    assert hash_all_but_edited(at) == others

    at.editor.revert([fact.id], None, False)
    assert at.weights_hash() == base
    assert (at.says(fact.question), at.says(shown)) == before


@pytest.mark.parametrize("kind", VISION_KINDS)
def test_a_fact_about_a_picture_is_said_of_that_picture_alone(
    kind: str, bench: Callable[..., Bench]
) -> None:
    at = bench("home", kind, **STEPS)
    fact, base, others = name_tower(at, RED, "Oslo"), at.weights_hash(), hash_all_but_edited(at)
    asked = fact.question
    elsewhere = [show(at, BLUE), QUESTION, show(at, RED, "The seat of country 5 is")]
    before = [at.says(one) for one in (asked, *elsewhere)]

    at.receive(fact)
    at.editor.step()
    stored = at.store.find_fact(fact.id)
    assert stored is not None and stored.state is FactState.LIVE_SIDE, stored and stored.reason
    assert at.says(asked).startswith("Oslo")
    assert [at.says(one) for one in elsewhere] == before[1:]

    assert at.editor.run_flush(False)["flushed"] == []  # the weights take none
    at.restart()
    assert at.says(asked).startswith("Oslo")
    assert (at.weights_hash(), hash_all_but_edited(at)) == (base, others)

    at.editor.revert([fact.id], None, False)
    assert [at.says(one) for one in (asked, *elsewhere)] == before
    assert not at.served.side.shard_ids
