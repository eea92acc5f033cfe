"""Notifications to systemd, one datagram each; none without systemd."""

import logging
import socket
from collections.abc import Mapping

_log = logging.getLogger(__name__)
SEND_TIMEOUT_SECONDS = 5.0  # a supervisor that does not read must not block the edit loop


class SystemdNotifier:
    """The service's side of sd_notify; every method is a no-op when NOTIFY_SOCKET is not set."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._socket_address = environ.get("NOTIFY_SOCKET", "")
        if self._socket_address.startswith("@"):  # an abstract socket: a name without a file
            self._socket_address = "\0" + self._socket_address[1:]

    def notify_ready(self) -> None:
        """Report that the model is loaded and facts are accepted."""
        self._send_message("READY=1")

    def notify_watchdog(self) -> None:
        """Report progress of the edit loop; without it, systemd restarts the service."""
        # Sent often, so it does not wait where systemd has not read those before.
        self._send_message("WATCHDOG=1", 0.0)

    def notify_stopping(self) -> None:
        """Report that the daemon is stopping."""
        self._send_message("STOPPING=1")

    def send_status(self, text: str) -> None:
        """Send the line that `systemctl status` shows."""
        # A line break would start a new assignment, so a fact's text could forge one.
        self._send_message("STATUS=" + " ".join(text.split()))

    def extend_timeout(self, seconds: float) -> None:
        """Extend the timeout of the start or the stop to `seconds` from now."""
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
                # Editing matters more than its status line.
                _log.warning("Cannot notify systemd of %r: %s", message, error)
