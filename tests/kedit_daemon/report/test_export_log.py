import csv
import json
from typing import Any

import pytest

from kedit_daemon.report.export_log import (
    CSV_COLUMNS,
    MARKDOWN_HEAD,
    format_csv_line,
    format_csv_row,
    format_markdown_row,
)

HOSTILE = "\x1b[2J\x07\u202eevil\n| x"


def event(**data: Any) -> dict[str, Any]:
    return {
        "seq": 7,
        "at": "2026-03-01T10:00:01.000Z",
        "kind": "fact_live-side",
        "fact_id": "0123456789ab",
        "hash": "ff" * 32,
        "data": {"from": "received", "to": "live-side", **data},
    }


def cells(line: str) -> dict[str, str]:
    (row,) = csv.reader([line])
    return dict(zip(CSV_COLUMNS, row, strict=True))


def test_a_row_of_markdown() -> None:
    row = format_markdown_row(event(before="in Egypt", after="in Peru", reason="x"), "Lake → Peru")
    assert row == (
        "| 7 | 2026-03-01T10:00:01.000Z | fact\\_live-side | 0123456789ab | Lake → Peru"
        " | in ~~Egypt~~ **Peru** | received → live-side; why: x |"
    )
    audit = event(figures={"norm_ratio": 1.5, "costs": {"chain": 1}}, reasons=["a", "b"])
    assert "why: a; why: b; norm ratio 1.5 |" in format_markdown_row(audit, None)


def test_a_row_of_csv() -> None:
    data = {"before": "in Egypt", "after": 'in "Peru"', "reasons": ["a", "b"], "n": 1}
    row = cells(format_csv_row(event(**data), "Lake → Peru"))
    assert (row["before"], row["after"], row["why"]) == ("in Egypt", 'in "Peru"', "a; b")
    assert (row["from"], row["to"], row["statement"]) == ("received", "live-side", "Lake → Peru")
    assert json.loads(row["more"]) == {"n": 1}


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "＝1"],  # noqa: RUF001
)
def test_no_cell_is_a_formula(text: str) -> None:
    (row,) = csv.reader([format_csv_line(text, "a")])
    assert row[0].startswith("'")
    assert row[0].isprintable()
    assert cells(format_csv_row(event(after=text), text))["statement"].startswith("'")


def test_what_is_harmless_stays() -> None:
    assert format_csv_line("a-b", 1, None, "2 = 2") == '"a-b","1","","2 = 2"'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[x](javascript:y)", "\\[x\\](javascript:y)"),
        ("![](https://x.y)", "!\\[\\](https\\://x.y)"),
        ("www.x.y and a@b.c", "www\\.x.y and a\\@b.c"),
        ("<script>`*_~|&lt", "\\<script\\>\\`\\*\\_\\~\\|\\&lt"),
    ],
)
def test_no_text_is_markup(text: str, shown: str) -> None:
    row = format_markdown_row(event(before=text, after="new", note=text), text)
    assert row.count(shown) == 3


def test_no_text_of_a_stranger_breaks_out() -> None:
    data = {"before": HOSTILE, "after": HOSTILE + "y", "reason": HOSTILE, HOSTILE: [HOSTILE]}
    row = format_markdown_row(event(**data), HOSTILE)
    assert row.isprintable()
    assert row.replace("\\|", "").count("|") == MARKDOWN_HEAD.partition("\n")[0].count("|")
    line = format_csv_row(event(**data), HOSTILE)
    assert line.isprintable()
    assert len(cells(line)) == len(CSV_COLUMNS)
