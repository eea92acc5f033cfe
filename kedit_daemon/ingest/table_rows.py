"""Reads a table as records: its separator, its columns, and the cells of each row."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace

from kedit_daemon.ingest.field_types import quote_value
from kedit_daemon.ingest.json_syntax import UnreadableText
from kedit_daemon.ingest.list_cells import read_list, split_cell
from kedit_daemon.ingest.record_splitter import RawRecord, split_csv_rows

REQUIRED_COLUMNS = ("subject", "prompt", "target")
LIST_COLUMNS = ("paraphrases", "tags", "aliases", "questions")
COLUMNS = (*REQUIRED_COLUMNS, *LIST_COLUMNS, "id", "source", "valid_from", "valid_until", "join")
TABLE_SUFFIXES = (".csv", ".tsv", ".tab")
SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "|"}
# Excel reads and writes such a first line.
SEPARATOR_LINE = re.compile(r'\s*"?sep=([^\w\s"]|\t)"?[;,\t]*[ \r]*(?:\n|\Z)', re.IGNORECASE)
NAMELESS = re.compile(r"(?:unnamed: \d+(?:[._]\w+)*)?")  # pandas names a column so
ROW_NUMBER = re.compile(r"-?\d+(?:\.0)?")
NULL_CELLS = ("null", "NULL", "None", "nan", "NaN", r"\N")
HEADING_CHARS = 1_000
MAX_BLANK_LINES = 1_000


def is_table(text: str, name: str) -> bool:
    """Check by its name or its first line that a file is a table."""
    if text.lstrip()[:1] in ("{", "["):
        return False
    heading = {"subject", "target"}
    return (
        name.lower().endswith(TABLE_SUFFIXES)
        or SEPARATOR_LINE.match(text) is not None
        or any(heading <= set(_split_heading(text, separator)) for separator in SEPARATORS)
    )


def extract_heading(text: str) -> str:
    """Return the line of column names, and the one before it that states the separator."""
    stated = SEPARATOR_LINE.match(text)
    first = stated[0].strip(" \r\n") + "\n" if stated else ""
    lines = text[stated.end() if stated else 0 :].split("\n", MAX_BLANK_LINES)
    return first + next((line.rstrip("\r") for line in lines if line.strip()), "")


def split_table(text: str, max_chars: int) -> Iterator[RawRecord]:
    """Yield the rows as records by column; a heading that is none ends them with its problem."""
    stated = SEPARATOR_LINE.match(text)
    separator = stated[1] if stated else _find_separator(text)
    start = stated.end() if stated else 0
    rows = split_csv_rows(text, max_chars, separator, start)
    head = next(rows, None)
    if head is None:
        return
    remedy = "begin with a line of column names"
    if not isinstance(head.value, list):
        yield replace(head, text="", remedy=remedy)
        return
    columns = [_normalize_heading(str(cell)) for cell in head.value]
    while columns and not columns[-1]:
        columns.pop()
    if fault := _find_heading_fault(columns):
        yield replace(head, text="", value=None, problem=fault[0], remedy=fault[1])
        return
    for row in rows:
        if isinstance(row.value, list) and not any(cell.strip() for cell in row.value):
            continue
        yield _fill_row(row, columns, separator)


def _normalize_heading(cell: str) -> str:
    name = cell.strip(' "\r').lower()
    return "" if NAMELESS.fullmatch(name) else name


def _split_heading(text: str, separator: str) -> list[str]:
    line = text.lstrip("\r\n ")[:HEADING_CHARS].partition("\n")[0]
    return [_normalize_heading(cell) for cell in line.split(separator)]


def _find_separator(text: str) -> str:
    """Find the separator by which most columns are known; a comma if none is."""
    counts = {s: len(set(_split_heading(text, s)) & set(COLUMNS)) for s in SEPARATORS}
    return max(counts, key=lambda separator: counts[separator])


def _find_heading_fault(columns: list[str]) -> tuple[str, str] | None:
    named = [column for column in columns if column]
    if not set(named) & set(COLUMNS):
        near = difflib.get_close_matches(named[0] if named else "", COLUMNS, 1)
        if not near:
            problem = "the first line names no known column"
            return (
                problem,
                f"begin with a line of column names, such as {','.join(REQUIRED_COLUMNS)}",
            )
    for column in named:
        if column not in COLUMNS:
            near = difflib.get_close_matches(column, COLUMNS, 1)
            hint = f'did you mean "{near[0]}"?' if near else f"columns: {', '.join(COLUMNS)}"
            return f"unknown column {quote_value(column)}", hint
        if columns.count(column) > 1:
            return f"column {quote_value(column)} occurs twice", "keep one of the two"
    missing = [column for column in REQUIRED_COLUMNS if column not in columns]
    return (f"no column {quote_value(missing[0])}", "add it to the first line") if missing else None


def _fill_row(raw: RawRecord, columns: list[str], separator: str) -> RawRecord:
    if not isinstance(raw.value, list):
        return raw
    cells = [str(cell) for cell in raw.value]
    while len(cells) > len(columns) and not cells[-1].strip():
        cells.pop()
    if len(cells) != len(columns):
        mark = SEPARATORS.get(separator, separator)
        mark = f"a {mark}" if mark.isalpha() else f'"{mark}"'
        many = len(cells) > len(columns)
        remedy = f"quote each value that holds {mark}" if many else _SHORT_ROW_REMEDY
        return replace(
            raw, problem=f"{len(cells)} values under {len(columns)} columns", remedy=remedy
        )
    filled: dict[str, object] = {}
    try:
        for number, (column, cell) in enumerate(zip(columns, cells, strict=True)):
            if not column:
                _check_nameless(cell, is_index=not any(columns[:number]))
            elif column in REQUIRED_COLUMNS or (cell.strip() and cell.strip() not in NULL_CELLS):
                filled[column] = _read_cell(column, cell)
    except UnreadableText as error:
        return replace(raw, problem=error.problem, remedy=error.remedy)
    return replace(raw, value=filled)


_SHORT_ROW_REMEDY = "write a value under each column, or nothing between two separators"


def _check_nameless(cell: str, is_index: bool) -> None:
    """Check that a cell under no name holds nothing, or the number of its row."""
    if cell.strip() and not (is_index and ROW_NUMBER.fullmatch(cell.strip())):
        problem = f"a value under a column without a name: {quote_value(cell)}"
        raise UnreadableText(problem, "name the column, or take the value out")


def _read_cell(column: str, cell: str) -> object:
    if column == "target":
        return read_list(cell.strip()) or cell
    if column not in LIST_COLUMNS:
        return cell
    try:
        return split_cell(cell)
    except UnreadableText as error:
        raise UnreadableText(f'"{column}": {error.problem}', error.remedy) from None
