"""What systemd hears."""

import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kedit_daemon.system.sd_notify import SystemdNotifier


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.settimeout(5)
        yield inbox


def test_every_message_is_one_datagram(supervisor: socket.socket) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": supervisor.getsockname()})
    notifier.notify_ready()
    notifier.notify_watchdog()
    notifier.send_status("3 facts live")
    notifier.extend_timeout(1.5)
    notifier.notify_stopping()
    assert [supervisor.recv(4096) for _ in range(5)] == [
        b"READY=1",
        b"WATCHDOG=1",
        b"STATUS=3 facts live",
        b"EXTEND_TIMEOUT_USEC=1500000",
        b"STOPPING=1",
    ]


def test_a_status_cannot_carry_a_second_assignment(supervisor: socket.socket) -> None:
    SystemdNotifier({"NOTIFY_SOCKET": supervisor.getsockname()}).send_status(
        "fine\nMAINPID=1\r\n\ud800"
    )
    assert supervisor.recv(4096) == b"STATUS=fine MAINPID=1 ?"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="abstract sockets are Linux's alone")
def test_an_abstract_socket_is_reached() -> None:
    name = f"kedit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(f"\0{name}")
        inbox.settimeout(5)
        SystemdNotifier({"NOTIFY_SOCKET": f"@{name}"}).notify_ready()
        assert inbox.recv(4096) == b"READY=1"


def test_without_systemd_nothing_happens(caplog: pytest.LogCaptureFixture) -> None:
    notifier = SystemdNotifier({})
    notifier.notify_ready()
    notifier.send_status("unheard")
    assert caplog.records == []


def test_a_supervisor_that_is_gone_does_not_stop_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        SystemdNotifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).notify_watchdog()
    assert "WATCHDOG=1" in caplog.text


def test_a_supervisor_that_does_not_read_does_not_hold_the_watchdog_s_messages_up(
    supervisor: socket.socket, caplog: pytest.LogCaptureFixture
) -> None:
    notifier = SystemdNotifier({"NOTIFY_SOCKET": supervisor.getsockname()})
    began = time.monotonic()
    for _ in range(1000):
        notifier.notify_watchdog()
    assert time.monotonic() - began < 4  # one that waits does so for five
    assert supervisor.recv(4096) == b"WATCHDOG=1"
    assert caplog.records == []
