"""One daemon a home, and a truthful answer to whether it runs."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from paths import ROOT

from kedit_daemon.system import lock
from memory.errors import KeditError

HOLD_FOR_EVER = """
import sys, time
from pathlib import Path
from kedit_daemon.system.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def start_holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD_FOR_EVER, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_nobody_holds_a_lock_that_was_never_taken(tmp_path: Path) -> None:
    assert lock.find_lock_holder(tmp_path / "daemon.lock") is None
    assert list(tmp_path.iterdir()) == []


def test_the_holder_is_named_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    with lock.hold_lock(path):
        assert lock.find_lock_holder(path) == os.getpid()
        assert lock.find_lock_holder(path) == os.getpid()
    assert lock.find_lock_holder(path) is None


def test_an_error_in_the_block_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    with pytest.raises(ZeroDivisionError), lock.hold_lock(path):
        _ = 1 // 0
    assert lock.find_lock_holder(path) is None


def test_a_second_daemon_is_refused_and_a_killed_one_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    with start_holder(path) as first:
        try:
            assert lock.find_lock_holder(path) == first.pid
            with (
                pytest.raises(KeditError, match=f"pid {first.pid}") as caught,
                lock.hold_lock(path),
            ):
                pytest.fail("two hold the lock")
            assert caught.value.exit_code == 75
            assert str(first.pid) in caught.value.hint
        finally:
            first.send_signal(signal.SIGKILL)
    assert path.read_text().strip() == str(first.pid)
    assert lock.find_lock_holder(path) is None
    with lock.hold_lock(path):
        assert lock.find_lock_holder(path) == os.getpid()


def test_a_longer_pid_of_an_earlier_holder_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    path.write_text("99999999999\n")
    with lock.hold_lock(path):
        assert lock.find_lock_holder(path) == os.getpid()


def test_a_passing_probe_does_not_keep_the_daemon_from_starting(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    path.touch()
    with path.open() as probe:
        fcntl.flock(probe, fcntl.LOCK_SH)
        threading.Timer(lock.LOCK_RETRY_SECONDS * 2, fcntl.flock, (probe, fcntl.LOCK_UN)).start()
        with lock.hold_lock(path):
            assert lock.find_lock_holder(path) == os.getpid()


def test_a_lock_held_without_a_pid_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    path.touch()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(KeditError, match="no pid") as caught:
            lock.find_lock_holder(path)
    assert caught.value.exit_code == 75


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "daemon.lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError), lock.hold_lock(tmp_path / "daemon.lock"):
        pytest.fail("the link was followed")
    assert (tmp_path / "target").read_text() == "precious"
