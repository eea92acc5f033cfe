"""Logging and progress of the daemon's processes: on stderr, for people or the journal."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from kedit_daemon.system.sanitize import clean_text

T = TypeVar("T")
CHATTY_LOGGERS = ("apscheduler", "faiss", "httpx", "uvicorn", "watchfiles")


class _CleanFormatter(logging.Formatter):
    """A formatter whose messages, which may quote facts, cannot act on a terminal or add lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return clean_text(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:
        return clean_text(super().formatException(ei), lines=True)


def configure_logging(debug: bool, environ: Mapping[str, str]) -> None:
    """Set logging up, once, at the start of a process."""
    # The journal has its own timestamps.
    clock = "" if environ.get("JOURNAL_STREAM") else "%(asctime)s "
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_CleanFormatter(f"{clock}%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.WARNING)


def make_progress_bar(description: str) -> Callable[[Iterable[T]], Iterable[T]]:
    """Return a wrapper that shows progress on a terminal's stderr, and nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda items: items
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items: track(list(items), description=description, console=console)
