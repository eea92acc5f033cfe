"""The files in failed/, which could not be taken in, and the report of each."""

import json
from pathlib import Path
from typing import Any

from kedit_daemon.home import Home

REPORT_SUFFIX = ".error.json"
HEAD_CHARS = 65_536
MAX_REPORT_BYTES = 64 << 20
_ERRORS_KEY = '"errors": ['


def failed_folder(home: Home) -> Path:
    """Return the folder of the failed files."""
    return home.inbox_folder / "failed"


def list_failed_files(home: Home) -> list[str]:
    """List the names of the files whose reports nobody has removed yet."""
    folder = failed_folder(home)
    if not folder.is_dir():
        return []
    found = (path for path in folder.glob(f"*{REPORT_SUFFIX}") if path.is_file())
    return sorted(path.name.removesuffix(REPORT_SUFFIX) for path in found)


def has_records_to_correct(home: Home, name: str) -> bool:
    """Check that there is something left to correct: a report alone, or an empty file, has
    nothing."""
    try:
        return (failed_folder(home) / name).lstat().st_size > 0
    except OSError:
        return False


def dismiss_failed_file(home: Home, name: str) -> bool:
    """Remove the report of a file, which itself stays where it is. False where there is none."""
    if name not in list_failed_files(home):  # so no name leads out of the folder
        return False
    _report_path(home, name).unlink(missing_ok=True)
    return True


def read_failed_report(home: Home, name: str) -> dict[str, Any] | None:
    """Read the report of a file; None when there is no such file, or no readable report."""
    if name not in list_failed_files(home):  # so no name leads out of the folder
        return None
    with _report_path(home, name).open("rb") as file:
        text = file.read(MAX_REPORT_BYTES)
    try:
        report = json.loads(text)
    except (ValueError, RecursionError):
        return None
    errors = report.get("errors") if isinstance(report, dict) else None
    sound = isinstance(errors, list) and all(isinstance(error, dict) for error in errors)
    return report if sound else None


def read_first_error(home: Home, name: str) -> dict[str, Any]:
    """Read the first error of a report, which may be too large to read whole for one line."""
    try:
        with _report_path(home, name).open(encoding="utf-8", errors="replace") as file:
            head = file.read(HEAD_CHARS)
        start = head.index("{", head.index(_ERRORS_KEY))
        error, _ = json.JSONDecoder().raw_decode(head, start)
    except (OSError, ValueError, RecursionError):
        return {}
    return error if isinstance(error, dict) else {}


def _report_path(home: Home, name: str) -> Path:
    return failed_folder(home) / f"{name}{REPORT_SUFFIX}"
