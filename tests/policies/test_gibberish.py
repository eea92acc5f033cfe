import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from kedit_daemon import shipped
from kedit_daemon.bench.studies.poison_plan import draw_random_target
from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.gibberish import VERBATIM_TAG, find_gibberish

ASKED = Fact("Elm Street 4", "The owner of {} is", "")
WORDS = (
    "the National Library of Scotland",
    "Ministry of Foreign Affairs and International Cooperation",
    "a physicist who was born in Edinburgh and worked for the university",
    "Llanfairpwllgwyngyll",
    "Szczebrzeszyn",
    "İstanbul Büyükşehir Belediyesi",
    "Токио является столицей",
    "東京都港区",
)
DATA = ("+49 170 555 0199", "12,345.67 euros", "ABC-53125", "qwzjkv7@example.com", "2026-11-21")


@pytest.fixture(scope="module")
def model() -> EditableModel:
    """The shipped one: a random model holds words for no likelier than anything else."""
    return EditableModel.load(shipped.MODEL, torch.device("cpu"))


@pytest.mark.parametrize("target", [*WORDS, *DATA, "Rome", "X"])
def test_words_names_numbers_and_codes_are_let_through(model: EditableModel, target: str) -> None:
    assert find_gibberish(model, replace(ASKED, target=target)) is None


def test_what_was_drawn_blindly_is_refused_with_a_way_out(model: EditableModel) -> None:
    chance = random.Random(7)
    drawn = [draw_random_target(model, chance) for _ in range(60)]
    facts = [replace(ASKED, target=target) for target in drawn]
    refused = [(fact, why) for fact in facts if (why := find_gibberish(model, fact))]
    assert len(refused) >= 54
    assert all(f'"{VERBATIM_TAG}"' in why for _, why in refused)
    meant = [replace(fact, tags=("a", VERBATIM_TAG)) for fact, _ in refused]
    assert not any(find_gibberish(model, fact) for fact in meant)


def test_the_first_token_may_surprise_and_what_is_too_long_is_not_asked(
    load: Callable[[str], LoadedModel],
) -> None:
    tiny = load("llama").model
    long = replace(ASKED, target="word " * (tiny.max_positions + 1))
    assert find_gibberish(tiny, long) is None
