"""Finds the records in a JSON object that wraps lists of them, as exports and web services do."""

import re
from collections.abc import Iterator
from typing import Any

from kedit_daemon.ingest.json_syntax import (
    DECODER,
    UnreadableText,
    decode_value,
    skip_gap,
)
from kedit_daemon.ingest.record_splitter import RawRecord, split_list_at

MEMBER = re.compile(r'"((?:[^"\\\n]|\\.)*+)"\s*+:\s*+')
RECORD_KEY = re.compile(r'"(?:subject|requested_rewrite)"\s*+:')
OWN_KEYS = {"subject", "requested_rewrite", "prompt", "target", "target_new", "src", "update"}


def is_wrapped(text: str, max_chars: int) -> bool:
    """Check that a text begins with an object that holds a list of records and is none itself."""
    position = skip_gap(text, 0)
    if text[position : position + 1] != "{":
        return False
    position += 1
    while member := MEMBER.match(text, skip_gap(text, position)):
        if member[1] in OWN_KEYS:
            return False
        if _opens_records(text, member.end(), max_chars):
            return True
        if (end := _skip_value(text, member.end())) is None:
            return False
        position = end
    return False


def split_wrapped(text: str, max_chars: int) -> Iterator[RawRecord]:
    """Yield the records of every list in the object, and of such objects behind it."""
    position = skip_gap(text, 0)
    while text[position : position + 1] == "{":
        position += 1
        while member := MEMBER.match(text, skip_gap(text, position)):
            end: int | None
            if _opens_records(text, member.end(), max_chars):
                end = yield from split_list_at(text, member.end(), max_chars)
            else:
                end = _skip_value(text, member.end())
            if end is None:
                yield _describe_rest(text, member.start(), "broken JSON around the records")
                return
            position = end
        position = skip_gap(text, position)
        if position >= len(text):
            return  # the list that was cut short has said so, if one was
        if text[position] != "}":
            yield _describe_rest(text, position, "broken JSON around the records")
            return
        position = skip_gap(text, position + 1)
    if position < len(text):
        yield _describe_rest(text, position, "more text behind the object around the records")


def unwrap_row(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record that the datasets server of Hugging Face wraps in a row."""
    row = record.get("row")
    return row if isinstance(row, dict) and "subject" not in record else record


def _skip_value(text: str, position: int) -> int | None:
    try:
        return DECODER.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return None


def _opens_records(text: str, position: int, max_chars: int) -> bool:
    """Check that a list begins here whose first element is a record, or a row that holds one."""
    if text[position : position + 1] != "[":
        return False
    start = skip_gap(text, position + 1)
    piece = text[start : start + max_chars + 1]
    if not piece.startswith("{"):
        return False
    try:
        length = decode_value(piece)[1]
    except UnreadableText:
        length = piece.find("}")
    return RECORD_KEY.search(piece, 0, length) is not None


def _describe_rest(text: str, start: int, problem: str) -> RawRecord:
    line = 1 + text.count("\n", 0, start)
    remedy = "put the records into a list of their own: [ … ]"
    return RawRecord(line, start, text[start:].rstrip(), problem=problem, remedy=remedy)
