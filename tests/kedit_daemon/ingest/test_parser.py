"""Files of every form, and of none: facts for the good records, a problem for each bad one."""

import json
import random
from typing import Any

import pytest
from foreign_records import FOREIGN

from kedit_daemon.ingest.parser import FORMATS, ParsedFile, extract_failed, parse_file
from kedit_daemon.ingest.schemas import FileLimits
from memory.errors import KeditError

LIMITS = FileLimits()


def fact(name: str, **more: Any) -> dict[str, Any]:
    return {"subject": name, "prompt": "{} lies in", "target": "Spain", **more}


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def subjects(parsed: ParsedFile) -> list[str]:
    return [fact.subject for _, fact in parsed.facts]


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("chosen", [True, False])
@pytest.mark.parametrize("as_list", [True, False])
def test_every_data_set_is_known_by_its_keys(name: str, chosen: bool, as_list: bool) -> None:
    record = FOREIGN[name]
    data = json.dumps([record, record]).encode() if as_list else lines(record, record)
    parsed = parse_file(data, "x.json", name.split()[0] if chosen else None, LIMITS)
    assert parsed.problems == []
    assert [(f.subject, f.target) for _, f in parsed.facts] == [("Eyre", "Spain")] * 2


def test_a_cloze_has_to_name_its_subject_and_a_question_need_not() -> None:
    vague = {"prompt": "Where is it?"}
    for record in (fact("Eyre", **vague), {**FOREIGN["counterfact"], **vague}):
        [problem] = parse_file(lines(record), "x", None, LIMITS).problems
        assert "neither {} nor the subject" in problem.problem and "{}" in problem.remedy
    assert not parse_file(lines({**FOREIGN["qaedit"], **vague}), "x", None, LIMITS).problems


@pytest.mark.parametrize(
    ("record", "problem", "remedy"),
    [
        ({**fact("B"), "tarjet": "x"}, 'unknown key "tarjet"', 'did you mean "target"?'),
        ({"subject": "B", "prompt": "{} is"}, '"target" is missing', 'add "target"'),
        (fact("B", target=""), '"target" is empty', "fill it in"),
        (fact("B", target=None), '"target" must be a string, not null', "write a text"),
        (fact("B", target=[]), '"target" is empty', "fill it in"),
        (fact("B", target=["x", None]), '"target.1" must be a string, not null', "take it out"),
        (fact("B", target=["x", "y" * 401]), "401 characters, more than 400", "fewer words"),
        (fact("B", target="x" * 401), "401 characters, more than 400", "fewer words"),
        (fact("B", target="a\0"), "NUL", "take that character out"),
        (fact("B", source="\udc00"), "surrogate", "take that character out"),
        (fact("B", valid_until="soon"), '"soon" is not a time', "ISO-8601"),
        (fact("B", neighbours=[{"promt": "x"}]), '"neighbours.0.prompt" is missing', "prompt"),
        (fact("B", paraphrases="x"), '"paraphrases" must be a list, not a string', "[ ]"),
        (fact("B", neighbours=["x"]), '"neighbours.0" must be an object', '{"prompt": "…"'),
        ({**FOREIGN["zsre"], "alt": ""}, '"alt" is empty', "fill it in"),
        ({**FOREIGN["zsre"], "rephrase": "\ud800"}, "surrogate", "take that character out"),
        ({**FOREIGN["counterfact"], "target_new": {"id": "x"}}, "not an object", "text alone"),
        ({"requested_rewrite": "x"}, "must be an object, not a string", '"target_new": {"str"'),
        ({"requested_rewrite": []}, "is empty", "fill it in"),
    ],
)
def test_a_bad_record_is_explained_and_leaves_the_others(
    record: dict[str, Any], problem: str, remedy: str
) -> None:
    parsed = parse_file(lines(fact("A"), record, fact("C")), "facts.jsonl", None, LIMITS)
    assert [(line, f.subject) for line, f in parsed.facts] == [(1, "A"), (3, "C")]
    [found] = parsed.problems
    assert found.line == 2 and json.loads(found.record) == record
    assert problem in found.problem and remedy in found.remedy


@pytest.mark.parametrize(
    "poison",
    [
        b'{"subject": "\\ud800", "prompt": "{}", "target": "x"}',
        b'{"subject": "B", "prompt": "{}", "target": NaN}',
        b'{"subject": "B", "prompt": "{}", "target": "x", "subject": "D"}',
        b'{"subject": "B\xff", "prompt": "{}", "target": "x"}',
        b'{"subject": "B\xed\xa0\x80", "prompt": "{}", "target": "x"}',
        b'{"subject": "B", "prompt": "{}", "target": ' + b"1" * 5_000 + b"}",
        b'{"subject": "B", "prompt": "{}", "target": "a\x00b"}',
        b'{"subject": "B", "prompt": "{}", "target": "' + b"x" * 70_000 + b'"}',
        b"[" * 50_000 + b"]" * 50_000,
        b"\x00\x01\x80\xfe",
        b"null",
        b'"just text"',
    ],
)
@pytest.mark.parametrize("as_list", [True, False])
def test_poison_stops_nothing(poison: bytes, as_list: bool) -> None:
    good = [json.dumps(fact(name)).encode() for name in ("A", "C")]
    data = b"\n".join([good[0], poison, good[1]])
    if as_list:
        data = b"[\n" + b",\n".join([good[0], poison, good[1]]) + b"\n]"
    parsed = parse_file(data, "facts.json", None, LIMITS)
    assert subjects(parsed) == ["A", "C"]
    assert {p.line for p in parsed.problems} == {3 if as_list else 2}
    assert all(p.problem and p.remedy for p in parsed.problems)
    assert parsed.problems[0].record.encode("utf-8", "surrogateescape") == poison


@pytest.mark.parametrize("data", [b"", b"  \n\n", b"[]", b"[\n]\n", b"\xef\xbb\xbf"])
def test_a_file_without_records_is_a_problem(data: bytes) -> None:
    parsed = parse_file(data, "x.json", None, LIMITS)
    assert parsed.facts == []
    assert [p.problem for p in parsed.problems] == ["the file holds no record"]


def test_one_record_over_several_lines() -> None:
    data = json.dumps(fact("A"), indent=2).encode()
    assert subjects(parse_file(data, "x.json", None, LIMITS)) == ["A"]


def test_random_bytes_never_raise() -> None:
    generator = random.Random(7)
    whole = lines(fact("A"), fact("B", neighbours=[{"prompt": "x"}])) + b'[{"a": [1, "b"]}]'
    for _ in range(500):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        start = generator.randrange(40)
        for name in ("x.jsonl", "x.csv"):
            parsed = parse_file(bytes(data[start:]), name, None, LIMITS)
            assert parsed.facts or parsed.problems


@pytest.mark.parametrize("as_list", [True, False])
def test_what_stands_behind_the_limit_is_kept_as_one_problem(as_list: bool) -> None:
    records = [fact(name) for name in "ABCDE"]
    data = json.dumps(records).encode() if as_list else lines(*records)
    parsed = parse_file(data, "x.json", None, FileLimits(max_facts=2))
    assert subjects(parsed) == ["A", "B"]
    [problem] = parsed.problems
    assert "more than 2 facts" in problem.problem
    rest = extract_failed(data[:20], "x.json", parsed.problems)
    assert subjects(parse_file(rest, "x.json", None, LIMITS)) == ["C", "D", "E"]


def test_a_file_at_the_limit_is_taken_whole() -> None:
    assert not parse_file(lines(fact("A"), fact("B")), "x", None, FileLimits(max_facts=2)).problems


def test_endless_small_records_end_at_the_limit() -> None:
    parsed = parse_file(b"{}\n" * 200_000, "x", None, FileLimits(max_facts=50))
    assert len(parsed.problems) == 51


TABLE = (
    "subject,prompt,target,paraphrases,id,source,valid_from,valid_until,tags\r\n"
    'Eyre,{} lies in,"Spain, Europe",{} is in|{} belongs to,7,atlas,2026-01-01,,a|b\r\n'
    "Como,{} lies in,Italy,,,,,,\r\n"
)


@pytest.mark.parametrize(("name", "format"), [("x.csv", None), ("-", None), ("x.txt", "csv")])
def test_tables(name: str, format: str | None) -> None:
    parsed = parse_file(TABLE.encode(), name, format, LIMITS)
    assert parsed.problems == []
    (line, first), (_, second) = parsed.facts
    assert (line, first.target) == (2, "Spain, Europe")
    assert first.paraphrases == ("{} is in", "{} belongs to")
    assert (first.external_id, first.tags) == ("7", ("a", "b"))
    assert (first.valid_from, first.valid_until) == ("2026-01-01T00:00:00Z", None)
    assert (second.subject, second.external_id, second.paraphrases) == ("Como", None, ())


@pytest.mark.parametrize(
    ("cell", "targets"),
    [
        ("3.50", ("3.50",)),
        ("TRUE", ("TRUE",)),
        ("a|b", ("a|b",)),
        ("[sic]", ("[sic]",)),
        ("['a', 'b']", ("a", "b")),
        ('["a"]', ("a",)),
    ],
)
def test_answers_in_a_cell(cell: str, targets: tuple[str, ...]) -> None:
    text = f"subject;prompt;target\nEyre;{{}} is;{cell}\n"
    [(_, found)] = parse_file(text.encode(), "x.csv", None, LIMITS).facts
    assert found.targets == targets


def test_bad_rows_leave_the_others() -> None:
    rows = [
        "A,{} is,x",
        "B,{} is",
        "C,{} is,",
        'D,{} is,"x',
        "E,no,x",
        "F,{} is,\udcff",
        "G,{} is,x",
    ]
    data = "\n".join(["subject,prompt,target", *rows]).encode("utf-8", "surrogateescape")
    parsed = parse_file(data, "x.csv", None, LIMITS)
    assert subjects(parsed) == ["A", "G"]
    assert [(p.line, p.record) for p in parsed.problems] == list(enumerate(rows, 2))[1:-1]
    again = extract_failed(data, "x.csv", parsed.problems).replace(b"E,no,x", b"E,{},x")
    assert subjects(parse_file(again, "x.csv", None, LIMITS)) == ["E"]


@pytest.mark.parametrize(
    ("heading", "problem"),
    [
        ("subject,prompt,tarjet", 'unknown column "tarjet"'),
        ("subject,prompt", 'no column "target"'),
        ("subject,prompt,target,target", "twice"),
        ('subject,prompt,"target', "broken CSV"),
        ("", "no record"),
    ],
)
def test_a_table_stands_or_falls_with_its_heading(heading: str, problem: str) -> None:
    parsed = parse_file(
        f"{heading}\nA,{{}} is,x\n".encode() if heading else b"", "x.csv", None, LIMITS
    )
    assert parsed.facts == []
    assert problem in parsed.problems[0].problem


def test_failed_records_come_back_in_their_own_form() -> None:
    records = [fact("A", target=""), fact("B"), fact("C", target="")]
    for data in (lines(*records), json.dumps(records, indent=2).encode()):
        problems = parse_file(data, "x", None, LIMITS).problems
        again = parse_file(extract_failed(data, "x", problems), "x", None, LIMITS)
        assert [json.loads(p.record) for p in again.problems] == [records[0], records[2]]


def test_an_unknown_format_is_a_usage_error() -> None:
    with pytest.raises(KeditError, match="conterfact") as caught:
        parse_file(b"", "x", "conterfact", LIMITS)
    assert caught.value.exit_code == 2 and "counterfact" in caught.value.hint
    for name in FORMATS:
        assert parse_file(b"", "x", name, LIMITS).problems
