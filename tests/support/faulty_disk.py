"""What the tests of disks share: small disks, and a daemon that is forked rather than started."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from kedit_daemon.cli.main import cli
from kedit_daemon.daemon import disk_pause, loop
from kedit_daemon.home import Home

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
traced = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs on a folder."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int = 0) -> Path:
    """Fill the disk of a folder up to so many bytes; the file to remove."""
    ballast, block = folder / "ballast", 4096
    at = os.statvfs(folder)
    with suppress(OSError), ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(block, at.f_bavail * at.f_frsize - left))
    with suppress(OSError), (folder / "rest").open("wb", buffering=0) as file:
        while not left:
            file.write(bytes(block))
    return ballast


def remove(folder: Path) -> None:
    """Make room again."""
    for name in ("ballast", "rest"):
        (folder / name).unlink(missing_ok=True)


class Forked:
    """`kedit-daemon run` in a child of this process, which has imported all that it needs."""

    def __init__(self, home: Home, inject: str = "") -> None:
        """`inject` is what strace does to its calls, once it has begun."""
        self.home, self.log, self.trace = home, home.root.parent / "log", home.root.parent / "trace"
        go, told = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of forking where there are threads
            self.pid = os.fork()
        if not self.pid:
            os.close(told)
            self._live(go)
        os.close(go)
        self._strace = self._attach(inject) if inject else None
        os.close(told)
        self.code: int | None = None

    def _attach(self, inject: str) -> "subprocess.Popen[bytes]":
        command = ["strace", "-f", "-qq", "-o", str(self.trace), "-p", str(self.pid)]
        command += ["-e", f"trace={inject.split(':')[0]},fsync,fdatasync", "-e", f"inject={inject}"]
        status = Path(f"/proc/{self.pid}/status")
        running = subprocess.Popen(command)
        while "TracerPid:\t0" in status.read_text():
            time.sleep(0.01)
        return running

    def _live(self, go: int) -> None:
        code = 70
        try:
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            for stream in (1, 2):
                os.dup2(log, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            logging.getLogger().handlers.clear()  # those of pytest
            torch.set_num_threads(1)  # of its threads none has come along
            disk_pause.RETRY_SECONDS, disk_pause.DISK_CHECK_SECONDS = 0.3, 0.1
            loop.IDLE_WAIT_SECONDS = 0.1
            os.read(go, 1)
            cli.main(["--home", str(self.home.root), "run"], "kedit-daemon")
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        """Whether it has; its exit code is known then."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                if self._strace is not None:
                    self._strace.wait(20)
        return self.code is not None

    def wait(self, what: Callable[[], bool], seconds: float = 60.0) -> None:
        """Until it is so."""
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def said(self) -> str:
        """All of it, of this life and of those before."""
        return self.log.read_text() if self.log.exists() else ""

    def stop(self) -> int:
        """End it politely, or else not; its exit code."""
        with suppress(ProcessLookupError):
            if not self.ended():
                os.kill(self.pid, signal.SIGTERM)
        try:
            self.wait(self.ended, 30.0)
        finally:
            if not self.ended():
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        assert self.code is not None
        return self.code
