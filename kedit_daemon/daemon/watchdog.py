"""Pings of systemd's watchdog: they come from the work itself, never from a thread or a timer."""

import math
from collections.abc import Callable

from torch import nn

from kedit_daemon.system.sd_notify import SystemdNotifier

PASS_PING_SECONDS = 1.0  # at least, between two pings from passes of the model


class Watchdog:
    """Pings systemd's watchdog, which restarts the service when the pings stay away."""

    def __init__(self, notifier: SystemdNotifier, monotonic: Callable[[], float]) -> None:
        self._notifier, self._monotonic = notifier, monotonic
        self._last_pass_ping = -math.inf

    def ping(self) -> None:
        """Report progress: the edit loop has begun a turn, or an edit another step."""
        self._notifier.notify_watchdog()

    def ping_on_passes_of(self, model: nn.Module) -> None:
        """Report progress also when the model begins a pass.

        An audit, or the probes of a flush, may take minutes without another sign of life.
        """
        model.register_forward_pre_hook(lambda *_: self._ping_for_pass())

    def _ping_for_pass(self) -> None:
        now = self._monotonic()
        if now - self._last_pass_ping >= PASS_PING_SECONDS:
            self._last_pass_ping = now
            self.ping()
