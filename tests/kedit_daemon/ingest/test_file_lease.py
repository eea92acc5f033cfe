"""Whether a file is still written: asked of the system, without getting in anybody's way."""

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kedit_daemon.ingest import file_lease
from kedit_daemon.ingest.file_lease import can_detect_closed, has_writer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="leases are Linux's")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    if not can_detect_closed(tmp_path):
        pytest.skip("no leases on this file system")
    path = tmp_path / "a.jsonl"
    path.write_text("{}")
    return path


def asked(path: Path, leases: bool = True) -> bool | None:
    with path.open("rb") as file:
        return has_writer(file.fileno(), path, leases=leases)


def test_it_is_closed_when_nobody_else_has_it(path: Path) -> None:
    assert asked(path) is False


def test_readers_do_not_count_and_writers_do(path: Path) -> None:
    with path.open("rb"):
        assert asked(path) is False
    with path.open("ab"):
        assert asked(path) is True
    assert asked(path) is False


@pytest.mark.parametrize("mode", ["ab", "r+b", "wb"])
def test_without_leases_the_open_files_of_processes_tell_of_writers(path: Path, mode: str) -> None:
    with path.open("rb"), path.with_name("b.jsonl").open("ab"):
        assert asked(path, leases=False) is None
    with path.open(mode):
        assert asked(path, leases=False) is True
        path.rename(path.with_name("c.jsonl"))  # to which a writer writes on
        assert asked(path.with_name("c.jsonl"), leases=False) is True
    assert asked(path.with_name("c.jsonl"), leases=False) is None


def test_writers_in_other_processes_count(path: Path) -> None:
    command = [sys.executable, "-c", "import sys; f = open(sys.argv[1], 'ab'); print(); input()"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([*command, str(path)], text=True, **pipes) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        assert asked(path) is True
        assert asked(path, leases=False) is True
        writer.communicate("\n")
    assert asked(path) is False


def test_nothing_is_held_afterwards(path: Path) -> None:
    with path.open("rb") as file:
        assert has_writer(file.fileno(), path, leases=True) is False
        # A lease that is still held makes this wait, and so fail without blocking.
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))


def test_a_writer_who_comes_in_between_does_no_harm(path: Path) -> None:
    """One process asks again and again, until another has met its lease three times."""
    asking = (
        "import sys\n"
        "from pathlib import Path\n"
        "from kedit_daemon.ingest.file_lease import has_writer\n"
        "with open(sys.argv[1], 'rb') as file:\n"
        "    while True:\n        has_writer(file.fileno(), Path(), leases=True)\n"
    )
    met, tries = 0, 0
    with subprocess.Popen([sys.executable, "-c", asking, str(path)]) as asker:
        while met < 3 and tries < 1_000_000 and asker.poll() is None:
            tries += 1
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            except BlockingIOError:
                met += 1
                time.sleep(0.01)  # for the signal to arrive
        still_there = asker.poll() is None
        asker.kill()
    assert still_there and met == 3


def test_it_is_believed_of_local_file_systems_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = os.stat(tmp_path).st_dev
    known, mounts = f"{os.major(device)}:{os.minor(device)}", tmp_path / "mountinfo"
    monkeypatch.setattr(file_lease, "MOUNT_TABLE", mounts)
    for kind, told in (("ext4", True), ("fuse.sshfs", False), ("nfs4", False)):
        other = "22 1 0:99 / /other rw shared:1 - ext4 /dev/x rw"
        mounts.write_text(f"{other}\n23 22 {known} / /here rw shared:2 - {kind} host:/x rw\n")
        assert can_detect_closed(tmp_path) is told
    mounts.write_text(f"{other}\n")
    assert not can_detect_closed(tmp_path)
    monkeypatch.delattr(fcntl, "F_SETLEASE")
    assert not can_detect_closed(tmp_path)
