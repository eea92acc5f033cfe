"""Every remedy for a record, followed to the letter: then the record is good."""

import json
from typing import Any

import pytest
from foreign_records import FOREIGN

from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits

LIMITS = FileLimits(max_facts=3, max_line_chars=2_000)
GOOD: dict[str, Any] = {"subject": "A", "prompt": "{} is", "target": "x"}
ABSENT = object()
ROME_RECORD = FOREIGN["counterfact (ROME)"]

# What stands in a record, what is said to do about it, and what one then writes in its place.
FIELDS: list[tuple[str, Any, str, Any]] = [
    ("subject", ABSENT, 'add "subject"', "A"),
    ("subject", None, "write a text in its place", "A"),
    ("subject", 1984, "put the value in quotes", "1984"),
    ("subject", True, "put the value in quotes", "True"),
    ("subject", {"name": "A"}, "write the text alone in its place, without { }", "A"),
    ("subject", ["A", "B"], "write one text in its place", "A"),
    ("subject", " ", "fill it in, or leave the record out", "A"),
    ("subject", "a\0", "take that character out", "a"),
    ("subject", "\ud800a", "take that character out", "a"),
    ("prompt", 7, "write a text with {} for the subject in its place", "{} is"),
    ("prompt", "It is", "write {} in the prompt in the place of the subject", "{} is"),
    ("target", ABSENT, 'add "target"', "x"),
    ("target", None, "write a text in its place", "x"),
    ("target", {"name": "x"}, "write the text alone in its place, without { }", "x"),
    ("target", "", "fill it in, or leave the record out", "x"),
    ("target", [], "fill it in, or leave the record out", ["x"]),
    ("target", ["x", None], "take it out of the list", ["x"]),
    ("target", ["x", ["y"]], "write one text in its place", ["x", "y"]),
    ("target", "x" * 401, "state the fact in fewer words", "x"),
    ("paraphrases", "{} was", "put the value in [ ]", ["{} was"]),
    ("paraphrases", {"a": "b"}, 'write a list: ["a", "b"]', ["a", "b"]),
    ("paraphrases", ["a", ""], "fill it in, or take it out", ["a"]),
    ("tags", 7, 'write a list: ["a", "b"]', ["7"]),
    ("tags", [7], "put the value in quotes", ["7"]),
    ("tags", ["a", None], "take it out of the list", ["a"]),
    ("tags", [["a"]], "write one text in its place", ["a"]),
    ("id", 5, "put the value in quotes", "5"),
    ("id", 1.5, "put the value in quotes", "1.5"),
    ("id", ["a"], "write one text in its place", "a"),
    ("id", "", "fill it in, or take it out", ABSENT),
    ("source", {"url": "u"}, "write the text alone in its place, without { }", "u"),
    ("valid_until", 2030, "write the time in ISO-8601, such as", "2026-01-31T12:00:00Z"),
    ("valid_until", "soon", "write the time in ISO-8601, such as", "2026-01-31T12:00:00Z"),
    ("neighbours", "B is", "write a list of objects", [{"prompt": "B is"}]),
    ("neighbours", {"prompt": "B is"}, "write a list of objects", [{"prompt": "B is"}]),
    (
        "neighbours",
        ["B is"],
        'write {"prompt": "…", "answer": "…"}',
        [{"prompt": "B", "answer": "c"}],
    ),
    ("neighbours", [{"answer": "c"}], 'add "prompt"', [{"prompt": "B", "answer": "c"}]),
    ("neighbours", [{"promt": "B", "prompt": "B"}], 'did you mean "prompt"?', [{"prompt": "B"}]),
    ("neighbours", [{"prompt": "B", "zzz": 1}], "take it out; the keys are", [{"prompt": "B"}]),
    ("tarjet", "y", 'did you mean "target"?', ABSENT),
    ("zzz", "y", "take it out; the keys are", ABSENT),
    ("zzz", None, "take it out; the keys are", ABSENT),
]


def read(text: str, name: str = "x.json") -> tuple[int, list[str]]:
    parsed = parse_file(text.encode("utf-8", "surrogateescape"), name, None, LIMITS)
    assert all(problem.problem for problem in parsed.problems)
    return len(parsed.facts), [problem.remedy for problem in parsed.problems]


@pytest.mark.parametrize(("key", "bad", "remedy", "good"), FIELDS)
def test_a_field_is_good_once_its_remedy_is_followed(
    key: str, bad: Any, remedy: str, good: Any
) -> None:
    def write(value: Any) -> str:
        return json.dumps({k: v for k, v in {**GOOD, key: value}.items() if v is not ABSENT})

    facts, [told] = read(write(bad))
    assert facts == 0 and remedy in told
    assert read(write(good)) == (1, [])


@pytest.mark.parametrize(
    ("bad", "remedy", "good"),
    [
        ({**GOOD, "valid_from": "2026-02-02", "valid_until": "2026-02-01"}, "a later time",
         {**GOOD, "valid_from": "2026-02-02", "valid_until": "2026-02-03"}),
        ({"requested_rewrite": "x"}, '"target_new": {"str": …}', ROME_RECORD),
        ({"requested_rewrite": []}, "fill it in", ROME_RECORD),
        ({"requested_rewrite": {**ROME_RECORD["requested_rewrite"], "target_new": {"id": "Q1"}}},
         "write the text alone",
         {"requested_rewrite": {**ROME_RECORD["requested_rewrite"], "target_new": "Spain"}}),
        ({**FOREIGN["zsre"], "alt": ""}, "fill it in", FOREIGN["zsre"]),
        ({**FOREIGN["zsre"], "rephrase": "\0"}, "take that character out", FOREIGN["zsre"]),
        ({"a": GOOD}, 'write {"subject": …, "prompt": …, "target": …}', GOOD),
        ({"a": GOOD}, "or a list of such objects", [GOOD]),
        ("A is x", 'write {"subject": …, "prompt": …, "target": …}', GOOD),
        ({"subject": ["A"], "prompt": ["{} is"]}, 'orient="records"', [GOOD]),
    ],
)  # fmt: skip
def test_a_record_is_good_once_its_remedy_is_followed(bad: Any, remedy: str, good: Any) -> None:
    facts, [told] = read(json.dumps(bad))
    assert facts == 0 and remedy in told
    assert read(json.dumps(good)) == (1, [])


LINE = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("bad", "remedy", "good"),
    [
        (LINE.replace('"', "'"), "put names and texts in double quotes", LINE),
        (LINE.replace('"x"', "x"), "put names and texts in double quotes", LINE),
        (LINE.replace('"target"', "target"), "put names and texts in double quotes", LINE),
        (LINE.replace('"x"', "“x”"), "write straight quotes", LINE),
        (LINE.replace('"x"', '"x", "id": None'), "write null, true or false",
         LINE.replace('"x"', '"x", "id": null')),
        (LINE.replace('"x"', "True"), "write null, true or false", LINE.replace('"x"', "true")),
        (LINE.replace('"x"', '"x\ty"'), r"a tab as \t", LINE.replace('"x"', r'"x\ty"')),
        (LINE.replace('"x"', r'"C:\dir"'), "double each backslash",
         LINE.replace('"x"', r'"C:\\dir"')),
        (LINE[:-1], "close every quote and every bracket", LINE),
        (LINE[:-2], "close every quote and every bracket", LINE),
        (LINE.replace('"x"', "NaN"), "put it in quotes", LINE.replace('"x"', '"NaN"')),
        (LINE.replace('"x"', '"x", "id": Infinity'), "or write null for no value",
         LINE.replace('"x"', '"x", "id": null')),
        (LINE.replace('"x"', '"x", "target": "y"'), "keep one of the two", LINE),
        (LINE.replace('"x"', "1" * 1_900), "fewer words", LINE),
        (LINE.replace('"x"', "[" * 1_500), "a record needs few levels", LINE),
        (LINE.replace('"x"', '"x\udcff"'), "save the file as UTF-8", LINE),
        (LINE.replace('"x"', f'"{"x" * 2_000}"'), "shorten its texts", LINE),
        (f"[{LINE}", "check its end and submit it again", f"[{LINE}]"),
        ("", "write one a line", LINE),
        (f'{{"facts": [{LINE}], "n": }}', "into a list of their own", f"[{LINE}]"),
    ],
)  # fmt: skip
def test_text_is_good_once_its_remedy_is_followed(bad: str, remedy: str, good: str) -> None:
    _, told = read(bad)
    assert len(told) == 1 and remedy in told[0]
    assert read(good) == (1, [])


def test_lines_and_files_are_good_once_their_remedy_is_followed() -> None:
    assert read(f"{LINE} {LINE}") == (0, ["put one record on each line"])
    assert read(f"{LINE}\n{LINE}") == (2, [])
    facts, told = read("\n".join([LINE] * 5))
    assert (facts, told) == (3, ["submit the rest as a file of its own"])
    assert read("\n".join([LINE] * 2)) == (2, [])


@pytest.mark.parametrize(
    ("bad", "remedy", "good"),
    [
        ("A,{} is,x", "such as subject,prompt,target", "subject,prompt,target\nA,{} is,x"),
        (
            "subject,prompt,tarjet\nA,{},x",
            'did you mean "target"?',
            "subject,prompt,target\nA,{},x",
        ),
        ("subject,prompt,target,zzz\nA,{},x,1", "columns: ", "subject,prompt,target,id\nA,{},x,1"),
        ("subject,prompt,target,target\nA,{},x,y", "keep one", "subject,prompt,target\nA,{},x"),
        ("subject,prompt\nA,{}", "add it to the first line", "subject,prompt,target\nA,{},x"),
        ('subject,prompt,"target\nA,{},x', "line of column names", "subject,prompt,target\nA,{},x"),
        ("subject,prompt,target\nA,{}, the,x", "a comma", 'subject,prompt,target\nA,"{}, the",x'),
        (
            "subject;prompt;target\nA;{}; the;x",
            "a semicolon",
            'subject;prompt;target\nA;"{}; the";x',
        ),
        (
            "subject,prompt,target,id\nA,{},x",
            "or nothing between",
            "subject,prompt,target,id\nA,{},x,",
        ),
        ('subject,prompt,target\nA,{},"x', "close every quote", 'subject,prompt,target\nA,{},"x"'),
        (
            'subject,prompt,target\nA,{},"x"y""',
            "double the quotes",
            'subject,prompt,target\nA,{},"x""y"""',
        ),
        (
            "subject,prompt,target\nA,{},x\rB,{},y\n",
            "end every line",
            "subject,prompt,target\nA,{},x\n",
        ),
        (
            "subject,,prompt,target\nA,?,{},x",
            "name the column",
            "subject,id,prompt,target\nA,?,{},x",
        ),
        (
            "subject,,prompt,target\nA,?,{},x",
            "take the value out",
            "subject,,prompt,target\nA,,{},x",
        ),
        (
            "subject,prompt,target,tags\nA,{},x,[a]",
            "as a|b",
            "subject,prompt,target,tags\nA,{},x,a|b",
        ),
        (
            "subject;prompt;target;tags\nA;{};x;[a]",
            'or as ["a", "b"]',
            'subject;prompt;target;tags\nA;{};x;["a", "b"]',
        ),
    ],
)
def test_a_table_is_good_once_its_remedy_is_followed(bad: str, remedy: str, good: str) -> None:
    _, told = read(bad, "x.csv")
    assert any(remedy in one for one in told), told
    assert read(good, "x.csv") == (1, [])
