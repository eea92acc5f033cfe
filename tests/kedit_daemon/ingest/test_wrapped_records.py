"""Lists of records within an object, as exports, APIs and people write them."""

import json
from typing import Any

import pytest

from kedit_daemon.ingest.parser import ParsedFile, extract_failed, parse_file
from kedit_daemon.ingest.schemas import FileLimits

LIMITS = FileLimits()


def fact(name: str, **more: Any) -> dict[str, Any]:
    return {"subject": name, "prompt": "{} lies in", "target": "Spain", **more}


def parsed(text: str, limits: FileLimits = LIMITS) -> ParsedFile:
    return parse_file(text.encode(), "x.json", None, limits)


def subjects(found: ParsedFile) -> list[str]:
    return [fact.subject for _, fact in found.facts]


REWRITE = {"subject": "B", "prompt": "{} is", "target_new": {"str": "x"}}
FEATURES = [{"feature_idx": 0, "name": "subject", "type": {"dtype": "string"}}]
WRAPPED: list[dict[str, Any]] = [
    {"facts": [fact("A"), fact("B")]},
    {"version": 2, "meta": {"by": "x", "n": [1, {"a": None}]}, "items": [fact("A"), fact("B")]},
    {"data": [fact("A")], "next": "…", "more": [fact("B")], "total": 2.5},
    {"train": [fact("A")], "test": [], "names": ["x"], "valid": [fact("B")]},
    {
        "features": FEATURES,
        "rows": [{"row_idx": n, "row": fact(n)} for n in "AB"],
        "partial": False,
    },
    {"rows": [{"row": fact("A"), "truncated_cells": []}, {"row": fact("B")}]},
    {"edits": [{"case_id": 1, "requested_rewrite": {**REWRITE, "subject": "A"}}, REWRITE]},
    {"results": [fact("A", neighbours=[{"prompt": "x]}"}]), fact("B", tags=["{", "]"])]},
]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("wrapped", WRAPPED)
def test_every_list_of_records_in_an_object_is_read(wrapped: dict[str, Any], indent: int) -> None:
    text = json.dumps(wrapped, indent=indent)
    found = parsed(text)
    assert (subjects(found), found.problems) == (["A", "B"], [])
    lines = text.splitlines()
    for line, one in found.facts:
        assert f'"{one.subject}"' in "".join(lines[line - 1 : line + 7])
    assert subjects(parsed("// pages\n" + text + "\n" + text)) == ["A", "B"] * 2


@pytest.mark.parametrize("indent", [None, 1])
def test_a_broken_record_within_costs_itself(indent: int | None) -> None:
    records = [fact("A"), fact("B", x=1), fact("C", target=""), fact("D")]
    text = json.dumps({"n": 4, "facts": records, "end": 1}, indent=indent)
    found = parsed(text.replace('"x": 1', '"x": value'))
    assert subjects(found) == ["A", "D"]
    assert [p.problem.partition(":")[0] for p in found.problems] == [
        "broken JSON",
        '"target" is empty',
    ]
    mended = extract_failed(text.encode(), "x.json", found.problems)
    mended = mended.replace(b'"target": ""', b'"target": "x"').replace(b"value", b'"y"')
    again = parse_file(mended, "x.json", None, LIMITS)
    assert subjects(again) == ["C"] and 'unknown key "x"' in again.problems[0].problem


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"facts": [%s, %s', "the list is not closed"),
        ('{"facts": [%s, %s], "n": }', "broken JSON around the records"),
        ('{"facts": [%s, %s]} [1]', "more text behind the object"),
        ('{"facts": [%s, %s] "n": 1}', None),
        ('{"facts": [%s, %s]', None),
    ],
)
def test_a_wrapping_that_is_cut_keeps_its_records(text: str, problem: str | None) -> None:
    found = parsed(text % (json.dumps(fact("A")), json.dumps(fact("B"))))
    assert subjects(found) == ["A", "B"]
    assert [p.problem for p in found.problems] == [p for p in [problem] if p] or (
        problem and problem in found.problems[0].problem
    )


def test_what_stands_behind_the_limit_can_be_sent_again() -> None:
    text = json.dumps({"facts": [fact(n) for n in "ABCDE"], "n": 5}, indent=1)
    found = parsed(text, FileLimits(max_facts=2))
    assert subjects(found) == ["A", "B"]
    rest = extract_failed(text.encode(), "x.json", found.problems)
    assert subjects(parse_file(rest, "x.json", None, LIMITS)) == ["C", "D", "E"]


@pytest.mark.parametrize(
    ("value", "problem", "remedy"),
    [
        ({"0": fact("A"), "1": fact("B")}, "none of its keys", "a list of such objects"),
        ({"facts": {"a": fact("A")}}, "none of its keys", "a list of such objects"),
        ({"facts": []}, "none of its keys", "a list of such objects"),
        (
            {"columns": ["subject", "prompt", "target"], "data": [["A", "{} is", "x"]]},
            "none of its keys",
            "a list of such objects",
        ),
        ({"subject": {"0": "A"}, "prompt": {"0": "{}"}, "target": {"0": "x"}}, "columns", "orient"),
        ({"subject": ["A"], "prompt": ["{} is"], "target": ["x"]}, "columns", "orient"),
        ([["A", "{} is", "x"]], "must be an object", '{"subject"'),
    ],
)
def test_other_wrappings_are_named(value: object, problem: str, remedy: str) -> None:
    for indent in (None, 2):
        [told] = parsed(json.dumps(value, indent=indent)).problems
        assert problem in told.problem and remedy in told.remedy


def test_a_record_that_holds_lists_of_objects_is_one_record() -> None:
    record = {"id": "1", "neighbours": [{"prompt": "subject:"}], **fact("A")}
    assert subjects(parsed(json.dumps(record))) == ["A"]
    rewrites = {"case_id": 1, "requested_rewrite": [REWRITE, {**REWRITE, "subject": "C"}]}
    assert subjects(parsed(json.dumps(rewrites))) == ["B", "C"]


def test_rows_on_lines_are_unwrapped() -> None:
    text = "\n".join(json.dumps({"row_idx": 0, "row": fact(n)}) for n in "AB")
    assert subjects(parsed(text)) == ["A", "B"]


REQUESTS: list[dict[str, Any]] = [
    {"prompt": "{} was built by", "subject": "Brook Bridge", "target_new": {"str": "Lima"}},
    {
        "case_id": 7,
        "prompt": "{} was built by",
        "subject": "Brook Bridge",
        "target_new": {"str": "Lima", "id": "Q1"},
        "target_true": {"str": "Oslo", "id": "Q2"},
        "relation_id": "P1",
        "paraphrase_prompts": ["Brook Bridge is by"],
        "neighborhood_prompts": ["Cove Bridge was built by"],
    },
    {"prompt": "Brook Bridge is by", "subject": "Brook Bridge", "target_new": ["Lima", "LW"]},
]


@pytest.mark.parametrize("format", [None, "counterfact"])
@pytest.mark.parametrize("request_", REQUESTS)
def test_a_request_of_rome_is_read(request_: dict[str, Any], format: str | None) -> None:
    [(_, found)] = parse_file(json.dumps([request_]).encode(), "x", format, LIMITS).facts
    assert (found.subject, found.target) == ("Brook Bridge", "Lima")
    if "case_id" in request_:
        assert found.paraphrases == ("Brook Bridge is by",)
        assert [(n.prompt, n.answer) for n in found.neighbours] == [
            ("Cove Bridge was built by", "Oslo")
        ]


def test_a_request_has_to_name_its_subject() -> None:
    [told] = parsed(json.dumps({**REQUESTS[0], "prompt": "It was built by"})).problems
    assert "neither {} nor the subject" in told.problem
