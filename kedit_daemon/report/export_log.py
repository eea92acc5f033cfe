"""The log as a table: Markdown for people, CSV for spreadsheets.

Untrusted text can neither leave its cell nor act in it: it is no markup, no formula, and has no
control characters.
"""

import csv
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from kedit_daemon.report.render import format_figures
from kedit_daemon.report.render_log import (
    find_event_statement,
    list_reasons,
    select_judged_figures,
)
from kedit_daemon.report.worddiff import NEW, OLD, SAME, diff_words
from kedit_daemon.system.sanitize import clean_text

MARKDOWN_HEAD = (
    "| event | at (UTC) | kind | fact | statement | answer | what |\n|---|---|---|---|---|---|---|"
)
CSV_COLUMNS = (
    *("seq", "at", "kind", "fact_id", "statement", "from", "to"),
    *("before", "after", "why", "more", "hash"),
)
# Shown in columns of their own.
_COLUMN_KEYS = ("from", "to", "before", "after", "reason", "reasons")
_OMITTED_KEYS = (*_COLUMN_KEYS, "fact", "figures")
_MARKUP_CHARS = re.compile(r"([\\`*_\[\]<>|~&$@#])")
_LINK_STARTS = re.compile(r"(?i)(?<=https)(?=://)|(?<=http)(?=://)|(?<=ftp)(?=://)|(?<=www)(?=\.)")
# A spreadsheet takes a cell that begins like this for a formula; the last four are full-width.
_FORMULA_STARTS = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def format_markdown_row(event: Mapping[str, Any], statement: str | None) -> str:
    """Format an event as a row of a Markdown table."""
    cells = (
        *(event["seq"], event["at"], event["kind"], event["fact_id"] or ""),
        find_event_statement(event, statement) or "",
    )
    answer, description = _format_answer(event["data"]), _describe_data(event["data"])
    shown = (*map(_escape_markdown, cells), answer, _escape_markdown(description))
    return f"| {' | '.join(shown)} |"


def format_csv_row(event: Mapping[str, Any], statement: str | None) -> str:
    """Format an event as a line of CSV_COLUMNS, every cell in quotes."""
    data = event["data"]
    cells = {
        **{name: event[name] for name in ("seq", "at", "kind", "fact_id", "hash")},
        **{name: data.get(name) for name in ("from", "to", "before", "after")},
        "statement": find_event_statement(event, statement) or "",
        "why": "; ".join(map(str, list_reasons(data))),
        "more": json.dumps({k: v for k, v in data.items() if k not in _COLUMN_KEYS}),
    }
    return format_csv_line(*(cells[name] for name in CSV_COLUMNS))


def format_csv_line(*cells: object) -> str:
    """Format cells so that a spreadsheet takes each for text."""
    line = io.StringIO()
    writer = csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="")
    writer.writerow(map(_neutralize_cell, cells))
    return line.getvalue()


def _neutralize_cell(cell: object) -> str:
    text = "" if cell is None else str(cell)
    quote = "'" if text.lstrip(" ").startswith(_FORMULA_STARTS) else ""
    return quote + clean_text(text)


def _format_answer(data: Mapping[str, Any]) -> str:
    before, after = data.get("before"), data.get("after")
    if before is None or after is None:
        return _escape_markdown(next((text for text in (before, after) if text is not None), ""))
    marks = {SAME: "{}", OLD: "~~{}~~", NEW: "**{}**"}
    changes = diff_words(" ".join(str(before).split()), " ".join(str(after).split()))
    return " ".join(marks[sort].format(_escape_markdown(text)) for sort, text in changes if text)


def _describe_data(data: Mapping[str, Any]) -> str:
    parts = [f"{data['from']} → {data['to']}"] if "from" in data and "to" in data else []
    parts += [f"why: {why}" for why in list_reasons(data)]
    parts += [f"{k}: {value}" for k, value in data.items() if k not in _OMITTED_KEYS and value]
    figures = format_figures(select_judged_figures(data.get("figures") or {}))
    return "; ".join([*parts, figures]).strip("; ")


def _escape_markdown(cell: object) -> str:
    return _LINK_STARTS.sub(r"\\", _MARKUP_CHARS.sub(r"\\\1", clean_text(cell)))
