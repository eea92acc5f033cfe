"""Parquet tables, where pyarrow is there to read them; elsewhere they are named."""

import importlib
import io
import sys
from datetime import date
from typing import Any

import pytest

from kedit_daemon.ingest.parser import extract_failed, parse_file
from kedit_daemon.ingest.schemas import FileLimits

ROWS: list[dict[str, Any]] = [
    {"subject": "A", "prompt": "{} is", "target": "x", "tags": ["a", "b"], "valid_until": None},
    {"subject": "B", "prompt": "{} is", "target": "", "tags": None, "valid_until": None},
    {"subject": "C", "prompt": "{} is", "target": "z", "tags": [], "valid_until": date(2090, 1, 2)},
]


def test_without_pyarrow_the_file_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    [told] = parse_file(b"PAR1" + bytes(40) + b"PAR1", "x.parquet", None, FileLimits()).problems
    assert "pyarrow" in told.problem and "pip install pyarrow" in told.remedy


def written(rows: list[dict[str, Any]], **more: list[Any]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    columns = {key: [row[key] for row in rows] for key in rows[0]} | more
    data = io.BytesIO()
    importlib.import_module("pyarrow.parquet").write_table(pyarrow.table(columns), data)
    return data.getvalue()


def test_rows_are_records() -> None:
    data = written(ROWS, __index_level_0__=[5, 6, 7])
    parsed = parse_file(data, "x.parquet", None, FileLimits())
    assert [(line, f.subject, f.tags) for line, f in parsed.facts] == [
        (1, "A", ("a", "b")),
        (3, "C", ()),
    ]
    assert parsed.facts[1][1].valid_until is not None
    [told] = parsed.problems
    assert (told.line, told.problem) == (2, '"target" is empty')
    again = parse_file(extract_failed(data, "x", [told]), "x.parquet", None, FileLimits())
    assert [p.problem for p in again.problems] == ['"target" is empty']


def test_tables_are_bounded_and_damaged_ones_told() -> None:
    data = written(ROWS * 2_000)
    assert len(data) < 100_000
    [told] = parse_file(data, "x", None, FileLimits(max_bytes=50_000)).problems
    assert "more than 50000 bytes" in told.problem
    parsed = parse_file(data, "x", None, FileLimits(max_facts=10))
    assert len(parsed.facts) + len(parsed.problems) == 11
    [told] = parse_file(data[:-50], "x", None, FileLimits()).problems
    assert "cannot be read" in told.problem
