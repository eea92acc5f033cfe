"""Reads a Parquet table as JSON Lines, if pyarrow is installed."""

import importlib
import io
import json
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from kedit_daemon.ingest.json_syntax import UnreadableText

PARQUET_MARK = b"PAR1"
BATCH_ROWS = 1_000
INDEX_COLUMN = "__index_level_"  # pandas names its own columns so


def read_parquet(data: bytes, max_rows: int, max_bytes: int) -> bytes:
    """Return a table's rows as JSON Lines, one row a line. Raises UnreadableText."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        remedy = "pip install pyarrow beside the daemon, or save the table as CSV or JSON Lines"
        raise UnreadableText("a Parquet file needs pyarrow", remedy) from None
    try:
        table = parquet.ParquetFile(io.BytesIO(data))
        groups = [table.metadata.row_group(n) for n in range(table.metadata.num_row_groups)]
        if sum(group.total_byte_size for group in groups) > max_bytes:
            raise UnreadableText(f"the table takes more than {max_bytes} bytes", "split it")
        return _write_lines(table, max_rows, max_bytes)
    except (OSError, ValueError, TypeError, ArithmeticError) as error:
        if isinstance(error, UnreadableText):
            raise
        raise UnreadableText("a Parquet file that cannot be read", "write it again") from None


def _write_lines(table: Any, max_rows: int, max_bytes: int) -> bytes:
    lines, total = list[bytes](), 0
    for batch in table.iter_batches(BATCH_ROWS):
        for row in batch.to_pylist():
            kept = {key: value for key, value in row.items() if INDEX_COLUMN not in key}
            lines.append(json.dumps(kept, ensure_ascii=False, default=_write_value).encode())
            total += len(lines[-1])
        if total > max_bytes:
            raise UnreadableText(f"the table takes more than {max_bytes} bytes", "split it")
        if len(lines) > max_rows:
            break
    return b"\n".join(lines)


def _write_value(value: object) -> str:
    if isinstance(value, date | datetime):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError
