"""The log as a table to carry away: Markdown for people, CSV for spreadsheets.

What strangers wrote can neither break out of its cell nor mean anything to who shows it: no
markup, no formula, no character that acts.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from kedit_daemon.report.render import format_figures, format_statement
from kedit_daemon.report.render_log import select_judged_figures
from kedit_daemon.report.worddiff import NEW, OLD, SAME, diff_words
from kedit_daemon.system.sanitize import clean_text

MARKDOWN_HEAD = (
    "| event | at (UTC) | kind | fact | statement | answer | what |\n|---|---|---|---|---|---|---|"
)
CSV_COLUMNS = (
    *("seq", "at", "kind", "fact_id", "statement", "from", "to"),
    *("before", "after", "why", "more", "hash"),
)
# Told in columns of their own.
_COLUMN_KEYS = ("from", "to", "before", "after", "reason", "reasons")
_OMITTED_KEYS = (*_COLUMN_KEYS, "fact", "figures")
_MARKUP_CHARS = re.compile(r"([\\`*_\[\]<>|~&$@#])")
_LINK_STARTS = re.compile(r"(?i)(?<=https)(?=://)|(?<=http)(?=://)|(?<=ftp)(?=://)|(?<=www)(?=\.)")
# A spreadsheet takes a cell that begins like this for a formula; the last four are full-width.
_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def format_markdown_row(event: Mapping[str, Any], said: str | None) -> str:
    """One event as a row of a Markdown table."""
    data = event["data"]
    cells = (
        event["seq"],
        event["at"],
        event["kind"],
        event["fact_id"] or "",
        _find_statement(data, said),
    )
    shown = (
        *(_escape_markdown(cell) for cell in cells),
        _format_answer(data),
        _escape_markdown(_describe_data(data)),
    )
    return f"| {' | '.join(shown)} |"


def format_csv_row(event: Mapping[str, Any], said: str | None) -> str:
    """One event as a line of CSV_COLUMNS, every cell in quotes."""
    data = event["data"]
    given = {
        **{name: event[name] for name in ("seq", "at", "kind", "fact_id", "hash")},
        **{name: data.get(name) for name in ("from", "to", "before", "after")},
        "statement": _find_statement(data, said),
        "why": "; ".join(map(str, _list_reasons(data))),
        "more": json.dumps({k: v for k, v in data.items() if k not in _COLUMN_KEYS}),
    }
    return format_csv_line(*(given[name] for name in CSV_COLUMNS))


def format_csv_line(*cells: object) -> str:
    """Cells that a spreadsheet takes for text, whatever is in them."""
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(
        map(_neutralize_cell, cells)
    )
    return line.getvalue()


def _neutralize_cell(cell: object) -> str:
    text = "" if cell is None else str(cell)
    return (
        f"'{clean_text(text)}" if text.lstrip(" ").startswith(_FORMULA_STARTS) else clean_text(text)
    )


def _find_statement(data: Mapping[str, Any], said: str | None) -> str:
    return format_statement(data["fact"]) if isinstance(data.get("fact"), dict) else said or ""


def _format_answer(data: Mapping[str, Any]) -> str:
    before, after = data.get("before"), data.get("after")
    if before is None or after is None:
        return _escape_markdown(next((text for text in (before, after) if text is not None), ""))
    marks = {SAME: "{}", OLD: "~~{}~~", NEW: "**{}**"}
    changes = diff_words(" ".join(str(before).split()), " ".join(str(after).split()))
    return " ".join(marks[sort].format(_escape_markdown(text)) for sort, text in changes if text)


def _describe_data(data: Mapping[str, Any]) -> str:
    told = [f"{data['from']} → {data['to']}"] if "from" in data and "to" in data else []
    told += [f"why: {why}" for why in _list_reasons(data)]
    told += [
        f"{name}: {value}" for name, value in data.items() if name not in _OMITTED_KEYS and value
    ]
    return "; ".join(
        [*told, format_figures(select_judged_figures(data.get("figures") or {}))]
    ).strip("; ")


def _list_reasons(data: Mapping[str, Any]) -> list[object]:
    reasons = data.get("reasons")
    listed = reasons if isinstance(reasons, list) else [reasons]
    return [why for why in (data.get("reason"), *listed) if why]


def _escape_markdown(cell: object) -> str:
    return _LINK_STARTS.sub(r"\\", _MARKUP_CHARS.sub(r"\\\1", clean_text(cell)))
