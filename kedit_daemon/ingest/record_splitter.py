"""Splits a file's text into records, each with its line; knows JSON and CSV, but no facts.

A record that cannot be parsed is yielded too, with its problem, and reading goes on behind it. One
record takes time in proportion to `max_chars` characters at most, whatever it holds.
"""

import csv
import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from kedit_daemon.ingest.json_syntax import (
    NOT_UTF8,
    UnreadableText,
    blank_comments,
    decode_value,
    skip_gap,
)

# A JSON string holds no line break, so one that is not closed is taken to end with its line.
JSON_TOKEN = re.compile(r'"(?:[^"\\\n]++|\\.)*+"?|[\[\]{}]')
NEXT_RECORD = re.compile(r'(?:\}\s*,\s*|\n[ \t]*)(?=\{\s*")')
RECORD_OPENING = re.compile(r'\{\s*"[^"\\\n]{1,60}"')
COMMENT_LINE = re.compile(r"(?:#|//).*|/\*.*\*/")
BLANK_LINES = re.compile(r"(?:[ \t\r]*+\n)++|[ \t\r]++\Z")
INDENT = re.compile(r"[ \t]*")
MAX_INDENT_CHARS = 200
# A broken record is searched for its end so far; beyond, for the beginning of the next one.
RECOVERY_CHARS = 8_192
MAX_ROW_LINES = 100


@dataclass(frozen=True)
class RawRecord:
    """A record of the file, with its value, or with the problem and the remedy."""

    line: int
    start: int
    text: str
    value: object = None
    problem: str = ""
    remedy: str = ""


def _too_long_error(max_chars: int) -> UnreadableText:
    problem = f"longer than {max_chars} characters"
    return UnreadableText(problem, "a record is one fact: shorten its texts")


def split_json_lines(text: str, max_chars: int) -> Iterator[RawRecord]:
    """Yield one record per line; a line may be a comment."""
    for number, (start, line) in enumerate(_iterate_lines(text, 0), start=1):
        if not (record := line.strip()):
            continue
        record = record.lstrip("\ufeff")  # a mark may stand where files were joined
        if not COMMENT_LINE.fullmatch(record):
            yield _read_json_line(number, start, record, max_chars)


def _iterate_lines(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Yield each line and its offset; a list of millions of short ones would fill the memory."""
    while start < len(text):
        end = text.find("\n", start) + 1 or len(text)
        yield start, text[start:end]
        start = end


def _read_json_line(number: int, start: int, record: str, max_chars: int) -> RawRecord:
    try:
        if len(record) > max_chars:
            raise _too_long_error(max_chars)
        value, end = decode_value(record)
        if blank_comments(record[end:]).strip() not in ("", ","):
            raise UnreadableText("more text after the record", "put one record on each line")
    except UnreadableText as error:
        return RawRecord(number, start, record, problem=error.problem, remedy=error.remedy)
    return RawRecord(number, start, record, value)


def split_json_list(text: str, max_chars: int) -> Iterator[RawRecord]:
    """Yield the records of a list, or objects that follow each other over any number of lines."""
    position, line = 0, 1
    while (start := _find_next_value(text, position)) < len(text):
        line += text.count("\n", position, start)
        raw = _read_json_value(text, start, line, max_chars)
        yield raw
        position = start + len(raw.text)
        line += raw.text.count("\n")
    opening, rest = skip_gap(text, 0), blank_comments(text[position:]).rstrip()
    closed = text.rstrip().endswith("]") or rest.endswith("]")
    if text[opening : opening + 1] == "[" and not closed:
        yield _describe_cut_list(text, line)


def split_list_at(text: str, start: int, max_chars: int) -> Generator[RawRecord, None, int]:
    """Yield the records of the list that begins at `start`; return the offset behind it."""
    position, line = start + 1, 1 + text.count("\n", 0, start)
    last: RawRecord | None = None
    while True:
        begin = skip_gap(text, position)
        line += text.count("\n", position, begin)
        if text[begin : begin + 1] == "]":
            return begin + 1
        if begin >= len(text):
            if last is None or not last.problem:  # or the broken record has taken the end along
                yield _describe_cut_list(text, line)
            return begin
        yield (last := _read_json_value(text, begin, line, max_chars))
        position = begin + len(last.text)
        line += last.text.count("\n")


def _describe_cut_list(text: str, line: int) -> RawRecord:
    remedy = "the file seems cut short: check its end and submit it again"
    return RawRecord(line, len(text), "", problem="the list is not closed", remedy=remedy)


def _find_next_value(text: str, position: int) -> int:
    """Find the offset of the next record, behind the list's own brackets and commas."""
    opening = position == 0
    while True:
        position = skip_gap(text, position)
        mark = text[position : position + 1]
        if mark != "]" and not (opening and mark == "["):
            return position
        opening = False
        position += 1


def _read_json_value(text: str, start: int, line: int, max_chars: int) -> RawRecord:
    piece = text[start : start + max_chars + 1]
    try:
        value, length = decode_value(piece)
        if length > max_chars:
            raise _too_long_error(max_chars)
        return RawRecord(line, start, piece[:length], value)
    except UnreadableText as error:
        problem, remedy = error.problem, error.remedy
        fence = _find_next_sibling(text, start, start + len(piece))
        near = min(start + len(piece), start + RECOVERY_CHARS)
        end = _find_closing(text, start, near if fence is None else min(fence, near)) or fence
        if end is None:
            end = _find_resume_point(text, start, start + error.offset, near)
            if error.offset and len(piece) > max_chars:
                problem = f"not closed within {max_chars} characters, or {problem}"
        broken = text[start:end].rstrip(" \t\r\n,")
        return RawRecord(line, start, broken, problem=problem, remedy=remedy)


def _find_next_sibling(text: str, start: int, stop: int) -> int | None:
    """Find the next line that opens an object at the indent of this record: it is no part of it."""
    indent = text[max(0, start - MAX_INDENT_CHARS) : start].rpartition("\n")[2]
    if len(indent) == MAX_INDENT_CHARS or not INDENT.fullmatch(indent):
        return None
    found = text.find(f"\n{indent}{{", start, stop)
    return None if found < 0 else found


def _find_closing(text: str, start: int, stop: int) -> int | None:
    """Find the end of a record whose brackets match, though its syntax is broken."""
    opened: list[str] = []
    for token in JSON_TOKEN.finditer(text, start, stop):
        mark = token[0]
        if mark in ("{", "["):
            opened.append(mark)
        elif mark in ("}", "]"):
            if not opened or opened.pop() + mark not in ("{}", "[]"):
                return None
            if not opened:
                return token.end()
        elif not opened:
            return None
    return None


def _find_resume_point(text: str, start: int, error: int, near: int) -> int:
    """Find where the next record seems to begin: like this one, or after a separator."""
    opening = RECORD_OPENING.match(text, start)
    same = text.find(opening[0], start + 1, near) if opening else -1
    last = len(text) if same < 0 else same
    found = NEXT_RECORD.search(text, error, last)
    return found.end() if found else last


def split_csv_rows(
    text: str, max_chars: int, separator: str = ",", start: int = 0
) -> Iterator[RawRecord]:
    """Yield the rows of a table, the header first; a value is a list of texts."""
    line = 1 + text.count("\n", 0, start)
    while start < len(text):
        if blank := BLANK_LINES.match(text, start):
            record = blank[0]
        else:
            record, row, problem, remedy = _read_csv_row(text, start, max_chars, separator)
            yield RawRecord(line, start, record.rstrip("\r\n"), row, problem, remedy)
        start, line = start + len(record), line + record.count("\n")


def _read_csv_row(
    text: str, start: int, max_chars: int, separator: str
) -> tuple[str, list[str] | None, str, str]:
    """Read a row: its text, its cells, the problem and the remedy; a broken row is one line."""
    taken: list[str] = []
    lines = _feed_lines(text, start, max_chars, taken)
    # A blank behind a separator is no part of a value, and hides no quote.
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True, strict=True)
    try:
        row = next(reader)
    except csv.Error as error:
        return taken[0], None, f"broken CSV: {error}", _suggest_quoting(taken[0])
    record = "".join(taken)
    if NOT_UTF8.search(record):
        return record, None, "not valid UTF-8", "save the file as UTF-8"
    return record, row, "", ""


def _suggest_quoting(line: str) -> str:
    if "\r" in line.rstrip("\r\n"):
        return "end every line in the same way"
    return "close every quote, and double the quotes inside a quoted value"


def _feed_lines(text: str, start: int, max_chars: int, taken: list[str]) -> Iterator[str]:
    """Yield the lines from `start`, as far as one row may reach, and append them to `taken`."""
    total = 0
    for _, line in _iterate_lines(text, start):
        taken.append(line)
        total += len(line)
        if total > max_chars or len(taken) > MAX_ROW_LINES:
            raise csv.Error(f"longer than {max_chars} characters or {MAX_ROW_LINES} lines")
        yield line
