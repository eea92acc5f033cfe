"""What the processes of a daemon tell of their work: on stderr, to a person or the journal."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping

CHATTY = ("apscheduler", "faiss", "httpx", "uvicorn", "watchfiles")


def set_up(debug: bool, environ: Mapping[str, str]) -> None:
    """Once, at the start of a process."""
    # The journal has its own clock.
    clock = "" if environ.get("JOURNAL_STREAM") else "%(asctime)s "
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO,
        format=f"{clock}%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.DEBUG if debug else logging.WARNING)


def on_terminal(description: str) -> Callable[[Iterable[str]], Iterable[str]]:
    """A progress bar on a terminal's stderr, and nothing elsewhere."""
    if not sys.stderr.isatty():
        return iter
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return lambda items: track(list(items), description=description, console=console)
