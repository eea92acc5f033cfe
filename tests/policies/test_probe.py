from dataclasses import replace

import pytest
from editing_home import seat

from memory.facts import Fact, Neighbour
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers
from policies.probe import (
    answer_probes,
    compare_answers,
    count_answer_tokens,
    is_same_answer,
    list_probe_prompts,
    normalize_answer,
    says_answers,
)

FACT = Fact(
    "Norway",
    "The seat of {} is",
    "Oslo",
    paraphrases=("{} is ruled from", "Seat of {}:", "A third"),
    neighbours=tuple(Neighbour(f"The seat of country {n} is") for n in range(5)),
)


@pytest.mark.parametrize(
    ("answer", "target", "is_same"),
    [
        ("Oslo", "oslo.", True),
        ("the Hague", "Hague", True),
        ("  St.  Louis ", "St Louis", True),
        ("Jean-Paul", "jean paul", True),
        ("STRASSE", "straße", True),
        ("ﬁve", "five", True),
        ("Oslo, Norway", "Oslo", False),
        ("Os lo", "Oslo", False),
        ("anthem", "them", False),
        ("", "Oslo", False),
        ("東京", "東京。", True),
        ("Zürich", "Zurich", False),
        ("กีน", "กิน", False),
        ("दिल", "दल", False),
        (" 里昂", "里昂", True),
    ],
)
def test_answers_are_compared_as_people_would(answer: str, target: str, is_same: bool) -> None:
    assert is_same_answer(answer, target) is is_same
    assert is_same_answer(target, answer) is is_same


def test_normalizing_again_changes_nothing() -> None:
    for text in ("A Tale of the Two Cities!", "the a an", "  x ", "an the-a theatre"):
        assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@pytest.mark.parametrize("target", ["A", "The The", "+", "?!"])
def test_silence_is_no_answer(target: str) -> None:
    assert not is_same_answer("", target)


def test_a_probe_asks_prompt_paraphrases_and_neighbours() -> None:
    assert list_probe_prompts(FACT) == [
        "The seat of Norway is",
        "Norway is ruled from",
        "Seat of Norway:",
        "The seat of country 0 is",
        "The seat of country 1 is",
        "The seat of country 2 is",
    ]
    assert list_probe_prompts(Fact("x", "{} is", "y")) == ["x is"]


def test_answers_are_sorted_by_fact(model: EditableModel) -> None:
    facts = [FACT, seat(11), seat(12, "Oslo and Rome")]
    tokens = count_answer_tokens(model, facts)
    assert tokens == len(model.encode_target("It is", "Oslo and Rome")) + 4
    asked = answer_probes(model, facts)
    assert list(asked) == [f.id for f in facts]
    for fact in facts:
        assert asked[fact.id] == generate_answers(model, list_probe_prompts(fact), tokens)
    assert answer_probes(model, []) == {}


def test_the_overlay_is_laid_over_what_is_asked(model: EditableModel) -> None:
    def overlay(_places: list[int]):  # type: ignore[no-untyped-def]
        return model.tap_layers({3: lambda _k, y: y * 0 + 7})

    assert answer_probes(model, [FACT], overlay) != answer_probes(model, [FACT])


def test_a_probe_counts_what_is_right_and_what_has_moved() -> None:
    before = ["Bergen", "Bergen", "Bergen", "Rome", "Lima", "Cairo"]
    after = ["Oslo.", "oslo", "Bergen", "Rome", "Quito", "Cairo"]
    probe = compare_answers(FACT, before, after)
    assert (probe.answer, probe.right) == ("Oslo.", True)
    assert (probe.paraphrases, probe.paraphrases_right) == (2, 1)
    assert (probe.neighbours, probe.neighbours_unchanged) == (3, 2)
    assert probe.as_dict()["neighbours_unchanged"] == 2
    assert not compare_answers(FACT, before, before).right


def test_each_of_several_targets_is_right(model: EditableModel) -> None:
    fact = replace(FACT, target="Oslo", other_targets=("Kristiania", "the city of Oslo in Norway"))
    before = ["Bergen", "Bergen", "Bergen", "Rome", "Lima", "Cairo"]
    after = ["Kristiania.", "oslo", "Bergen", "Rome", "Lima", "Cairo"]
    probe = compare_answers(fact, before, after)
    assert (probe.right, probe.paraphrases_right) == (True, 1)
    assert not compare_answers(FACT, before, after).right
    assert count_answer_tokens(model, [fact]) > count_answer_tokens(model, [FACT])


def test_a_fact_without_company_is_probed_by_its_prompt_alone() -> None:
    probe = compare_answers(Fact("x", "{} is", "y"), ["z"], ["y"])
    assert probe.right
    assert (probe.paraphrases, probe.neighbours) == (0, 0)


@pytest.mark.parametrize(
    ("reply", "wanted", "says"),
    [
        ("It is Oslo.", ["Oslo"], True),
        ("It is Oslovia.", ["Oslo"], False),
        ("法国的首都是里昂。", ["里昂"], True),
        ("法国的首都是巴黎。", ["里昂"], False),
        ("Oslo, and then Lima", ["Lima", "Oslo"], True),
        ("Oslo", ["Lima", "Oslo"], False),
        ("It is written with a + sign", ["+"], True),
        ("It is written with a sign", ["+"], False),
    ],
)
def test_a_reply_says_whole_words_where_they_stand_apart(
    reply: str, wanted: list[str], says: bool
) -> None:
    assert says_answers(reply, wanted) is says
