"""What one record says, in our form and in the data sets'."""

from typing import Any

import pytest
from pydantic import ValidationError

from kedit_daemon.ingest.field_types import quote_value
from kedit_daemon.ingest.json_syntax import decode_value
from kedit_daemon.ingest.schemas import (
    ClozeRecord,
    FlatRecord,
    MquakeRecord,
    NativeRecord,
    QuestionRecord,
    Record,
    RomeRecord,
    WikiBigEditRecord,
    ZsreRecord,
)
from memory.facts import Neighbour

LAKE = {"subject": "Lake Eyre", "prompt": "The country that {} lies in is", "target": "Australia"}


def test_native_record_keeps_everything_it_says() -> None:
    record = {
        **LAKE,
        "paraphrases": ["{} is found in"],
        "neighbours": [
            {"prompt": "Lake Geneva lies in", "answer": "Switzerland"},
            {"prompt": "Or"},
        ],
        "id": "mine-1",
        "source": "atlas",
        "valid_from": "2026-01-31",
        "valid_until": "2026-02-01T01:00:00+02:00",
        "tags": ["lakes"],
    }
    [fact] = NativeRecord.model_validate(record).to_facts()
    assert fact.question == "The country that Lake Eyre lies in is"
    assert fact.target == "Australia"
    assert fact.filled_paraphrases == ("Lake Eyre is found in",)
    assert fact.neighbours == (Neighbour("Lake Geneva lies in", "Switzerland"), Neighbour("Or"))
    assert (fact.external_id, fact.source, fact.tags) == ("mine-1", "atlas", ("lakes",))
    assert fact.valid_from == "2026-01-31T00:00:00Z"
    assert fact.valid_until == "2026-01-31T23:00:00Z"


def test_space_around_a_value_makes_no_other_fact() -> None:
    padded = {key: f"  {value}\n" for key, value in LAKE.items()}
    [one] = NativeRecord.model_validate(padded).to_facts()
    [other] = NativeRecord.model_validate(LAKE).to_facts()
    assert one.id == other.id


@pytest.mark.parametrize(
    "change",
    [
        {"target": None},
        {"target": []},
        {"target": ["Spain", ""]},
        {"target": ["Spain", None]},
        {"target": {"name": "Spain"}},
        {"tarjet": None},
        {"tags": [None]},
        {"target": "  "},
        {"target": "a\0b"},
        {"target": "\ud800"},
        {"prompt": "The capital is"},
        {"tarjet": "x"},
        {"tags": "lakes"},
        {"neighbours": [{"prompt": "x", "anwser": "y"}]},
        {"valid_until": "tomorrow"},
        {"valid_until": "0001-01-01T00:00:00+14:00"},
        {"valid_from": "2026-02-01", "valid_until": "2026-01-31"},
        {"id": 5},
        {"join": "-"},
        {"join": "  "},
        {"join": 0},
    ],
)
def test_native_record_is_strict(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NativeRecord.model_validate({**LAKE, **change})


OPTIONAL = [
    *("paraphrases", "neighbours", "tags", "aliases", "questions"),
    *("id", "source", "valid_from", "valid_until", "join"),
]


def test_null_in_an_optional_field_means_none() -> None:
    assert set(NativeRecord.model_fields) == {*LAKE, *OPTIONAL}
    nulls: dict[str, Any] = {**LAKE, **dict.fromkeys(OPTIONAL)}
    nulls["neighbours"] = [{"prompt": "Lake Como lies in", "answer": None}]
    [fact], [plain] = (
        NativeRecord.model_validate(record).to_facts() for record in (nulls, dict(LAKE))
    )
    assert fact.id == plain.id and fact.tags == () and fact.valid_until is None
    assert NativeRecord.model_validate({**nulls, "neighbours": None}).to_facts() == [plain]


FORMS: list[tuple[type[Record], str]] = [
    (NativeRecord, '{"subject": "A", "prompt": "{} is", "target": ANSWER}'),
    (FlatRecord, '{"subject": "A", "prompt": "{} is", "target_new": ANSWER}'),
    (QuestionRecord, '{"subject": "A", "prompt": "A?", "target": ANSWER, "rephrase": "B?"}'),
    (ZsreRecord, '{"subject": "A", "src": "A?", "alt": ANSWER}'),
    (WikiBigEditRecord, '{"subject": "A", "update": "A?", "ans": ANSWER}'),
    (
        RomeRecord,
        '{"requested_rewrite":'
        ' {"subject": "A", "prompt": "{} is", "target_new": {"str": ANSWER, "id": "Q1"}}}',
    ),
    (
        MquakeRecord,
        '{"requested_rewrite": [{"subject": "A", "prompt": "{} is", "target_new": ANSWER}]}',
    ),
]


@pytest.mark.parametrize(("form", "text"), FORMS)
@pytest.mark.parametrize(
    ("answer", "targets"),
    [
        ("7", ("7",)),
        ("-3.50", ("-3.50",)),
        ("1e6", ("1e6",)),
        ("9007199254740993", ("9007199254740993",)),
        ("0.1234567890123456789", ("0.1234567890123456789",)),
        ("true", ("true",)),
        ('["Spain"]', ("Spain",)),
        ('["Spain", " Kingdom of Spain", "Spain"]', ("Spain", "Kingdom of Spain")),
        ("[1.0, true, false]", ("1.0", "true", "false")),
    ],
)
def test_an_answer_may_be_a_number_or_several(
    form: type[Record], text: str, answer: str, targets: tuple[str, ...]
) -> None:
    value, _ = decode_value(text.replace("ANSWER", answer))
    [fact] = form.model_validate(value).to_facts()
    assert fact.targets == targets


def test_a_prompt_with_the_subject_in_it_needs_no_braces() -> None:
    record = NativeRecord.model_validate({**LAKE, "prompt": "Lake Eyre lies in"})
    assert record.to_facts()[0].question == "Lake Eyre lies in"


def rewrite(subject: str, new: str, true: str) -> dict[str, Any]:
    return {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": true, "id": "Q2"},
        "subject": subject,
        "question": f"Where is {subject}?",
    }


def test_rome_neighbours_share_the_replaced_answer() -> None:
    record = {
        "case_id": 3,
        "requested_rewrite": rewrite("Lake Eyre", "Spain", "Australia"),
        "paraphrase_prompts": ["It rained. Lake Eyre is in"],
        "neighborhood_prompts": ["Lake Torrens is in"],
    }
    [fact] = RomeRecord.model_validate(record).to_facts()
    assert fact.target == "Spain"
    assert fact.paraphrases == ("It rained. Lake Eyre is in",)
    assert fact.neighbours == (Neighbour("Lake Torrens is in", "Australia"),)


def test_mquake_states_one_fact_a_rewrite() -> None:
    rewrites = [rewrite("Lake Eyre", "Spain", "Australia"), rewrite("Spain", "Asia", "Europe")]
    first, second = MquakeRecord.model_validate({"requested_rewrite": rewrites}).to_facts()
    assert (first.subject, second.subject) == ("Lake Eyre", "Spain")
    assert second.paraphrases == ("Where is Spain?",)
    with pytest.raises(ValidationError):
        MquakeRecord.model_validate({"requested_rewrite": []})


def test_flat_counterfact_with_all_its_prompts() -> None:
    record = {
        "subject": "Lake Eyre",
        "prompt": "{} lies in",
        "target_new": "Spain",
        "target_true": "Australia",
        "paraphrase_prompts": ["One. Lake Eyre is in", "Two. Lake Eyre is in"],
        "neighborhood_prompts": ["Lake Torrens is in", "Lake Frome is in"],
    }
    [fact] = ClozeRecord.model_validate(record).to_facts()
    assert fact.filled_paraphrases == ("One. Lake Eyre is in", "Two. Lake Eyre is in")
    assert [n.answer for n in fact.neighbours] == ["Australia", "Australia"]


def test_easyedit_names_one_prompt_of_each_kind() -> None:
    record = {
        "subject": "Lake Eyre",
        "prompt": "Lake Eyre lies in",
        "target_new": "Spain",
        "ground_truth": "Australia",
        "rephrase_prompt": "Where Lake Eyre is, people live in",
        "locality_prompt": "Lake Como lies in",
        "locality_ground_truth": "Italy",
    }
    [fact] = ClozeRecord.model_validate(record).to_facts()
    assert fact.paraphrases == ("Where Lake Eyre is, people live in",)
    assert fact.neighbours == (Neighbour("Lake Como lies in", "Italy"),)
    with pytest.raises(ValidationError):
        ClozeRecord.model_validate({**record, "prompt": "It lies in"})


def test_knowedit_groups_may_be_empty_or_nested() -> None:
    record = {
        "subject": "Lake Eyre",
        "prompt": "The country of Lake Eyre is",
        "target_new": "Spain",
        "ground_truth": "",
        "portability": {},
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The depth of Lake Eyre is", "ground_truth": [["6 m", "six metres"]]},
                {"prompt": "The state of Lake Eyre is", "ground_truth": []},
                {"prompt": "", "ground_truth": "nobody asks"},
            ],
            "Forgetfulness": [],
        },
    }
    [fact] = FlatRecord.model_validate(record).to_facts()
    assert fact.neighbours == (
        Neighbour("The depth of Lake Eyre is", "6 m"),
        Neighbour("The state of Lake Eyre is", None),
    )


def test_zsre_takes_alt_as_the_new_answer() -> None:
    record = {
        "subject": "Lake Eyre",
        "src": "Which country is it in?",
        "pred": "Australia",
        "rephrase": "In what country is Lake Eyre?",
        "alt": "Spain",
        "answers": ["Australia"],
        "loc": "nq question: how deep is the sea",
        "loc_ans": "11 km",
    }
    [fact] = ZsreRecord.model_validate(record).to_facts()
    assert fact.prompt == "Which country is it in?"
    assert fact.target == "Spain"
    assert fact.neighbours == (Neighbour("nq question: how deep is the sea", "11 km"),)


def test_wikibigedit_as_published() -> None:
    record = {
        "tag": "new",
        "subject": "Lake Eyre",
        "update": "Where is Lake Eyre?",
        "rephrase": "Lake Eyre is where?",
        "ans": "Spain",
        "personas": "Mate, where is Lake Eyre?",
        "mhop": None,
        "loc": "Where is Lake Como?",
        "loc_ans": "Italy",
    }
    [fact] = WikiBigEditRecord.model_validate(record).to_facts()
    assert fact.target == "Spain"
    assert fact.paraphrases == ("Lake Eyre is where?",)
    assert fact.neighbours == (Neighbour("Where is Lake Como?", "Italy"),)


def test_qaedit_takes_a_question_in_other_words_than_the_subject() -> None:
    record = {
        "id": 9,
        "source": "NQ",
        "subject": "Lake Eyre",
        "prompt": "where is lake eyre",
        "target": "Spain",
        "rephrase": "In which country is Lake Eyre?",
        "locality": [{"loc": "who wrote emma", "loc_ans": "Jane Austen"}, {"loc": "who"}],
    }
    [fact] = QuestionRecord.model_validate(record).to_facts()
    assert fact.prompt == "where is lake eyre"
    assert fact.neighbours == (
        Neighbour("who wrote emma", "Jane Austen"),
        Neighbour("who", None),
    )


@pytest.mark.parametrize("text", ["\ud800", "a\nb\x1b[2J", "\u202egnp", "x" * 10_000])
def test_shown_is_short_and_harmless(text: str) -> None:
    safe = quote_value(text)
    assert safe.encode() and safe.isprintable() and len(safe) < 500
