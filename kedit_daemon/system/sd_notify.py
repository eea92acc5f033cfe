"""Tells systemd how the daemon is: one datagram a message, and nothing at all without systemd."""

import logging
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)
SEND_SECONDS = 5.0  # a supervisor that does not read must not hold up the edit loop


class Notifier:
    """The service's side of sd_notify; every method is a no-op when NOTIFY_SOCKET is not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract socket: a name without a file
            self._address = "\0" + self._address[1:]

    def ready(self) -> None:
        """The model is loaded and facts are taken."""
        self._send("READY=1")

    def watchdog(self) -> None:
        """The edit loop has made progress; systemd restarts the service when this stays away."""
        # It comes often. Where those before it are not read yet, they are told in time.
        self._send("WATCHDOG=1", 0.0)

    def stopping(self) -> None:
        """The daemon is on its way out."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        # A line break would start a new assignment, so a fact's text could forge one.
        self._send("STATUS=" + " ".join(text.split()))

    def extend(self, seconds: float) -> None:
        """Starting or stopping will take up to `seconds` longer, counted from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send(self, message: str, seconds: float = SEND_SECONDS) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(seconds)
            try:
                out.sendto(message.encode(errors="replace"), self._address)
            except BlockingIOError:
                return
            except OSError as error:
                # Editing is worth more than the report of it.
                _log.warning("systemd was not told %r: %s", message, error)
