"""Logging and progress of the daemon's processes: on stderr, for people or the journal."""

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from kedit_daemon.system.sanitize import clean_text

T = TypeVar("T")
CHATTY_LOGGERS = ("apscheduler", "faiss", "httpx", "uvicorn", "watchfiles")
PROGRESS_SECONDS = 5.0  # between two lines about work that takes long
log = logging.getLogger(__name__)


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


def make_progress_bar(
    description: str, monotonic: Callable[[], float] = time.monotonic
) -> Callable[[Iterable[T]], Iterable[T]]:
    """Return a wrapper that shows progress: a bar on a terminal's stderr, elsewhere a line of the
    log each PROGRESS_SECONDS."""
    if not sys.stderr.isatty():
        return lambda items: _log_progress(list(items), description, monotonic)
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items: track(list(items), description=description, console=console)


def _log_progress(
    items: Sequence[T], description: str, monotonic: Callable[[], float]
) -> Iterator[T]:
    said_at = monotonic()
    for done, item in enumerate(items):
        if monotonic() - said_at >= PROGRESS_SECONDS:
            log.info("%s: %d %% done", description, 100 * done // len(items))
            said_at = monotonic()
        yield item
