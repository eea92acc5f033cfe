import json

from hypothesis import given
from hypothesis import strategies as st

from memory.facts import Fact, Neighbour, fact_from_json, fact_to_json

text = st.text(max_size=20)
facts = st.builds(
    Fact,
    subject=text,
    prompt=text,
    target=text,
    paraphrases=st.lists(text, max_size=3).map(tuple),
    neighbours=st.lists(st.builds(Neighbour, prompt=text, answer=st.none() | text), max_size=3).map(
        tuple
    ),
    external_id=st.none() | text,
    valid_until=st.none() | text,
    tags=st.lists(text, max_size=3).map(tuple),
    other_targets=st.lists(text, max_size=3).map(tuple),
    join=st.sampled_from([None, "", " "]),
)


@given(facts)
def test_json_gives_back_the_whole_fact(fact: Fact) -> None:
    again = fact_from_json(fact_to_json(fact))
    assert again == fact
    assert again.id == fact.id
    assert hash(again) == hash(fact)


def test_records_of_older_versions_are_read() -> None:
    fact = Fact("Peru", "{} lies in", "Asia")
    older = json.loads(fact_to_json(fact))
    for name in ("aliases", "questions", "other_targets", "join"):
        del older[name]
    assert fact_from_json(json.dumps(older)) == fact


def test_further_right_answers_make_no_other_fact() -> None:
    fact, more = Fact("Peru", "{} is", "x"), Fact("Peru", "{} is", "x", other_targets=("y",))
    assert (fact.id, fact.slot) == (more.id, more.slot)
    assert (fact.targets, more.targets) == (("x",), ("x", "y"))


def test_a_join_is_learned_and_makes_no_other_fact() -> None:
    fact, joined = Fact("Peru", "{} is LR", "77"), Fact("Peru", "{} is LR", "77", join="")
    assert (fact.id, fact.slot) == (joined.id, joined.slot)
    assert not fact.is_learned_like(joined) and joined.is_learned_like(joined)
    assert (fact.statement, joined.statement) == ("Peru is LR 77", "Peru is LR77")
    assert Fact("法国", "{}的首都是", "里昂").statement == "法国的首都是里昂"


def test_json_is_canonical() -> None:
    fact = Fact("Ørsted", "{} is in", "Paris", neighbours=(Neighbour("Rome is in"),))
    said = json.loads(fact_to_json(fact))
    assert list(said) == sorted(said)
    assert fact_to_json(fact_from_json(fact_to_json(fact))) == fact_to_json(fact)
    assert fact_to_json(fact).isascii()


def test_a_fact_is_unnamed_if_one_of_its_prompts_does_not_name_the_subject_as_a_word() -> None:
    assert not Fact("Peru", "{} lies in", "Asia").omits_subject
    assert not Fact("Peru", "The land of PERU lies in", "Asia", ("Where is {}?",)).omits_subject
    assert Fact("Peru", "It lies in", "Asia").omits_subject
    assert Fact(
        "Peru", "{} lies in", "Asia", ("{} is in", "The land of the Inca is in")
    ).omits_subject
    assert Fact("Peru", "{}s lie in", "Asia").omits_subject
    assert Fact("Peru", "The founder of {} Airlines is", "Asia").omits_subject
    assert Fact("!!!", "{} plays", "dance").omits_subject
