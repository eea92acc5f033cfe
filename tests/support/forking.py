"""Daemons as forks of the process that runs the tests, which has loaded everything already."""

import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from process_tools import starts, wait

from kedit_daemon.config import load_config
from kedit_daemon.daemon.loop import run_daemon
from kedit_daemon.home import Home
from memory.errors import KeditError

BROKEN = 70  # the exit code of a daemon that ended by an exception


def forked(work: Callable[[], int], log: Path) -> int:
    """Let a child do the work, and end with what it returns; its pid."""
    child = os.fork()
    if child:
        return child
    code = BROKEN
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def daemon(
    home: Home, environ: dict[str, str] | None = None, twist: Callable[[], object] = lambda: None
) -> int:
    """A daemon on a home, after `twist` has been done in its process; its pid."""

    def work() -> int:
        twist()
        try:
            return run_daemon(home, load_config(home.root, {}), environ=environ or {})
        except KeditError as error:
            print(error, file=sys.stderr)
            return error.exit_code

    return forked(work, home.root / "daemon.log")


def ended(pid: int, seconds: float = 60.0) -> int:
    """How a child has ended: its exit code, or minus the signal. One that hangs is killed."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def up(home: Home, environ: dict[str, str] | None = None) -> int:
    """A daemon that has loaded; its pid."""
    before = starts(home)
    pid = daemon(home, environ)
    wait(lambda: starts(home) > before, home)
    return pid


def copied(home: Home, root: Path) -> Home:
    """Another home like one whose daemon is down."""
    shutil.copytree(home.root, root, ignore=shutil.ignore_patterns(home.socket_file.name))
    return Home(root)


def kill(pid: int) -> None:
    """End a child that may have ended already."""
    try:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    except (ProcessLookupError, ChildProcessError):
        return
