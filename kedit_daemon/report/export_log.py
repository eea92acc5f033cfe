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

from kedit_daemon.report.render import figures_text, statement
from kedit_daemon.report.render_log import judged
from kedit_daemon.report.worddiff import NEW, OLD, SAME, word_changes
from kedit_daemon.system.sanitize import clean

MARKDOWN_HEAD = (
    "| event | at (UTC) | kind | fact | statement | answer | what |\n|---|---|---|---|---|---|---|"
)
CSV_COLUMNS = (
    *("seq", "at", "kind", "fact_id", "statement", "from", "to"),
    *("before", "after", "why", "more", "hash"),
)
# Told in columns of their own.
_IN_COLUMNS = ("from", "to", "before", "after", "reason", "reasons")
_TOLD = (*_IN_COLUMNS, "fact", "figures")
_MARKUP = re.compile(r"([\\`*_\[\]<>|~&$@#])")
_LINKS = re.compile(r"(?i)(?<=https)(?=://)|(?<=http)(?=://)|(?<=ftp)(?=://)|(?<=www)(?=\.)")
# A spreadsheet takes a cell that begins like this for a formula; the last four are full-width.
_FORMULA = tuple("=+-@\t\r\n＝＋－＠")  # noqa: RUF001


def markdown_row(event: Mapping[str, Any], said: str | None) -> str:
    """One event as a row of a Markdown table."""
    data = event["data"]
    cells = (event["seq"], event["at"], event["kind"], event["fact_id"] or "", _said(data, said))
    shown = (*(_escaped(cell) for cell in cells), _answer(data), _escaped(_what(data)))
    return f"| {' | '.join(shown)} |"


def csv_row(event: Mapping[str, Any], said: str | None) -> str:
    """One event as a line of CSV_COLUMNS, every cell in quotes."""
    data = event["data"]
    given = {
        **{name: event[name] for name in ("seq", "at", "kind", "fact_id", "hash")},
        **{name: data.get(name) for name in ("from", "to", "before", "after")},
        "statement": _said(data, said),
        "why": "; ".join(map(str, _whys(data))),
        "more": json.dumps({k: v for k, v in data.items() if k not in _IN_COLUMNS}),
    }
    return csv_line(*(given[name] for name in CSV_COLUMNS))


def csv_line(*cells: object) -> str:
    """Cells that a spreadsheet takes for text, whatever is in them."""
    line = io.StringIO()
    csv.writer(line, quoting=csv.QUOTE_ALL, lineterminator="").writerow(map(_harmless, cells))
    return line.getvalue()


def _harmless(cell: object) -> str:
    text = "" if cell is None else str(cell)
    return f"'{clean(text)}" if text.lstrip(" ").startswith(_FORMULA) else clean(text)


def _said(data: Mapping[str, Any], said: str | None) -> str:
    return statement(data["fact"]) if isinstance(data.get("fact"), dict) else said or ""


def _answer(data: Mapping[str, Any]) -> str:
    before, after = data.get("before"), data.get("after")
    if before is None or after is None:
        return _escaped(next((text for text in (before, after) if text is not None), ""))
    marks = {SAME: "{}", OLD: "~~{}~~", NEW: "**{}**"}
    changes = word_changes(" ".join(str(before).split()), " ".join(str(after).split()))
    return " ".join(marks[sort].format(_escaped(text)) for sort, text in changes if text)


def _what(data: Mapping[str, Any]) -> str:
    told = [f"{data['from']} → {data['to']}"] if "from" in data and "to" in data else []
    told += [f"why: {why}" for why in _whys(data)]
    told += [f"{name}: {value}" for name, value in data.items() if name not in _TOLD and value]
    return "; ".join([*told, figures_text(judged(data.get("figures") or {}))]).strip("; ")


def _whys(data: Mapping[str, Any]) -> list[object]:
    reasons = data.get("reasons")
    listed = reasons if isinstance(reasons, list) else [reasons]
    return [why for why in (data.get("reason"), *listed) if why]


def _escaped(cell: object) -> str:
    return _LINKS.sub(r"\\", _MARKUP.sub(r"\\\1", clean(cell)))
