"""Tells systemd how the daemon is: one datagram a message, and nothing at all without systemd."""

import logging
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)
SEND_TIMEOUT_SECONDS = 5.0  # a supervisor that does not read must not hold up the edit loop


class SystemdNotifier:
    """The service's side of sd_notify; every method is a no-op when NOTIFY_SOCKET is not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._socket_address = environ.get("NOTIFY_SOCKET", "")
        if self._socket_address.startswith("@"):  # an abstract socket: a name without a file
            self._socket_address = "\0" + self._socket_address[1:]

    def notify_ready(self) -> None:
        """The model is loaded and facts are taken."""
        self._send_message("READY=1")

    def notify_watchdog(self) -> None:
        """The edit loop has made progress; systemd restarts the service when this stays away."""
        # It comes often. Where those before it are not read yet, they are told in time.
        self._send_message("WATCHDOG=1", 0.0)

    def notify_stopping(self) -> None:
        """The daemon is on its way out."""
        self._send_message("STOPPING=1")

    def send_status(self, text: str) -> None:
        """One line for `systemctl status`."""
        # A line break would start a new assignment, so a fact's text could forge one.
        self._send_message("STATUS=" + " ".join(text.split()))

    def extend_timeout(self, seconds: float) -> None:
        """Starting or stopping will take up to `seconds` longer, counted from now."""
        self._send_message(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}")

    def _send_message(self, message: str, seconds: float = SEND_TIMEOUT_SECONDS) -> None:
        if not self._socket_address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.settimeout(seconds)
            try:
                out.sendto(message.encode(errors="replace"), self._socket_address)
            except BlockingIOError:
                return
            except OSError as error:
                # Editing is worth more than the report of it.
                _log.warning("systemd was not told %r: %s", message, error)
