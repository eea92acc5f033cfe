"""Text cut into records: one broken record costs itself and nothing else."""

import json
import time
from collections.abc import Iterable

import pytest

from kedit_daemon.ingest.record_splitter import (
    RawRecord,
    split_csv_rows,
    split_json_lines,
    split_json_list,
)

CAP = 2_000


def item(name: str, **more: object) -> dict[str, object]:
    return {"subject": name, "inner": [{"a": 1}, {"b": 2}], **more}


def names(raws: Iterable[RawRecord]) -> list[object]:
    return [
        raw.value.get("subject") if isinstance(raw.value, dict) else raw.problem for raw in raws
    ]


def test_lines_carry_their_numbers_and_offsets() -> None:
    text = '\n{"subject": "A"}\r\n\n  {"subject": "é"}'
    first, second = split_json_lines(text, CAP)
    assert (first.line, first.value) == (2, {"subject": "A"})
    assert (second.line, second.value) == (4, {"subject": "é"})
    assert text[second.start :].strip() == second.text


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": ', "broken JSON"),
        ("{'a': 1}", "broken JSON"),
        ('{"a": 1} {"a": 2}', "more text"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": 1, "a": 2}', "twice"),
        ("[" * 1_900, "nested"),
        ('{"a": ' + "1" * 1_900 + "}", None),
        ('{"a": "' + "x" * CAP + '"}', "longer than"),
        ('{"a": "\udcff"}', "UTF-8"),
        ("\0\x01\x02", "broken JSON"),
    ],
)
def test_a_bad_line_leaves_its_neighbours(line: str, problem: str | None) -> None:
    first, bad, last = split_json_lines(f'{{"n": 1}}\n{line}\n{{"n": 3}}', CAP)
    assert (first.value, last.value, last.line) == ({"n": 1}, {"n": 3}, 3)
    assert bad.line == 2
    assert problem in bad.problem if problem else not bad.problem


def test_a_number_that_python_refuses_to_read_is_a_problem() -> None:
    [raw] = split_json_lines('{"a": ' + "1" * 5_000 + "}", 10_000)
    assert "digits" in raw.problem


LAYOUTS = {
    "one line": lambda items: "[" + ", ".join(map(json.dumps, items)) + "]",
    "a line each": lambda items: "[\n" + ",\n".join(map(json.dumps, items)) + "\n]",
    "indented": lambda items: json.dumps(items, indent=2),
    "glued": lambda items: "[" + ",\n ".join(map(json.dumps, items)) + "]\n",
    "no list": lambda items: "\n".join(json.dumps(i, indent=2) for i in items),
}
BREAKS = {
    "two commas": ('"key": "value"', '"key": "value",,'),
    "no comma": ('"key": "value"', '"key" "value"'),
    "odd quote": ('"key": "value"', '"key": "val"ue"'),
    "no closing quote": ('"key": "value"', '"key": "value'),
    "bare word": ('"key": "value"', '"key": value'),
    "bad escape": ('"key": "value"', r'"key": "\x"'),
    "stray bracket": ('"key": "value"', '"key": "value"]'),
    "NaN": ('"key": "value"', '"key": NaN'),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flaw", BREAKS)
def test_a_broken_record_in_a_list_leaves_the_others(layout: str, flaw: str) -> None:
    whole = LAYOUTS[layout]([item("A"), item("B", key="value"), item("C"), item("D")])
    text = whole.replace(*BREAKS[flaw])
    found = list(split_json_list(text, CAP))
    assert [n for n in names(found) if n in ("A", "B", "C", "D")] == ["A", "C", "D"]
    [bad, *_] = [raw for raw in found if raw.problem]
    assert '"B"' in bad.text and '"C"' not in bad.text
    assert [raw.line for raw in found] == [text.count("\n", 0, r.start) + 1 for r in found]
    assert all(text.startswith(raw.text, raw.start) for raw in found)


HABITS = {
    "comma before the end": ('"key": "value"', '"key": "value",'),
    "comment": ('"key": "value"', '"key": "value" /* "why" */'),
    "comments on lines of their own": ('"key": "value"', '# x\n // {\n"key": "value"\n//,\n'),
    "comma and comment": ('"key": "value"', '"key": "value", // why, ]\n'),
    "what looks like one": ('"value"', '"http://x#,}/*"'),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("habit", HABITS)
def test_comments_and_last_commas_are_read_over(layout: str, habit: str) -> None:
    whole = LAYOUTS[layout]([item("A"), item("B", key="value"), item("C")])
    text = "// head\n" + whole.replace(*HABITS[habit]) + "\n/* tail */\n"
    found = list(split_json_list(text, CAP))
    assert names(found) == ["A", "B", "C"]
    assert [raw.line for raw in found] == [text.count("\n", 0, r.start) + 1 for r in found]
    assert isinstance(found[1].value, dict) and found[1].value["inner"] == [{"a": 1}, {"b": 2}]


def test_comments_and_last_commas_in_lines() -> None:
    text = '# x\n{"n": 1}, // one\n// y\n{"n": [2,],}\n/* z */\n\ufeff{"n": "//", } #\n'
    found = list(split_json_lines(text, CAP))
    assert [(raw.line, raw.value) for raw in found] == [
        (2, {"n": 1}),
        (4, {"n": [2]}),
        (6, {"n": "//"}),
    ]


def test_a_last_comma_in_the_list_itself() -> None:
    found = split_json_list('[{"subject": "A"}, {"subject": "B"},\n]\n# end', CAP)
    assert names(found) == ["A", "B"]


def test_a_record_without_its_closing_brace() -> None:
    text = '[\n{"subject": "A"},\n{"subject": "B",\n{"subject": "C"}\n]'
    assert [n for n in names(split_json_list(text, CAP)) if n in ("A", "B", "C")] == ["A", "C"]


def test_a_list_that_is_cut_short_keeps_its_whole_records() -> None:
    text = json.dumps([item("A"), item("B")], indent=1)
    found = list(split_json_list(text[:-12], CAP))
    assert found[0].value == item("A")
    assert found[-1].problem == "the list is not closed"
    assert [raw.problem for raw in split_json_list(text, CAP)] == ["", ""]


def test_what_is_not_an_object_is_handed_out_as_it_is() -> None:
    found = list(split_json_list('[1, "x", [2], null, {"subject": "A"}]', CAP))
    assert [raw.value for raw in found] == [1, "x", [2], None, {"subject": "A"}]


def test_an_overlong_record_in_a_list() -> None:
    text = json.dumps([item("A"), item("B", key="x" * 2 * CAP), item("C")], indent=1)
    found = list(split_json_list(text, CAP))
    assert names(found)[0] == "A" and names(found)[-1] == "C"
    assert "characters" in found[1].problem


@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        '[{"a":' * 200_000,
        '["' + '\\"' * 500_000,
        "[" + '{"a": "b, ' * 100_000,
        "[\n" + '{"a": [1,\n' * 100_000,
        "[" + "}" * 500_000,
        "[{" + "\n" * 2_000_000 + "[{" + "\n" * 2_000_000,
    ],
)
def test_hostile_lists_cost_little(text: str) -> None:
    began = time.monotonic()
    for count, _ in enumerate(split_json_list(text, 65_536)):
        if count > 1_000:
            break
    assert time.monotonic() - began < 10


def test_table_rows_know_their_first_line() -> None:
    text = 'a,b\r\n1,"two\nlines"\r\n\r\n3,"say ""x"""\n'
    found = [(raw.line, raw.value) for raw in split_csv_rows(text, CAP)]
    assert found == [(1, ["a", "b"]), (2, ["1", "two\nlines"]), (5, ["3", 'say "x"'])]


@pytest.mark.parametrize("row", ['1,"open', '1,"shut"x', '1,"\udcff"', "1," + "x" * CAP])
def test_a_broken_row_leaves_the_others(row: str) -> None:
    head, bad, last = split_csv_rows(f"a,b\n{row}\n3,4", CAP)
    assert (head.value, last.value, last.line) == (["a", "b"], ["3", "4"], 3)
    assert bad.line == 2 and bad.problem


def test_quotes_that_stay_open_for_ever_cost_little() -> None:
    began = time.monotonic()
    for count, _ in enumerate(split_csv_rows('a","\n' * 200_000, 65_536)):
        if count > 200:
            break
    assert time.monotonic() - began < 10
