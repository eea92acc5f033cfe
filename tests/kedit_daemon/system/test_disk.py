"""What a disk's errors mean."""

import errno
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from kedit_daemon.system.disk import (
    describe_disk_error,
    find_disk_shortage,
    is_database_locked,
    is_disk_failure,
    is_disk_full,
)
from memory.errors import KeditError


def os_error(number: int, path: str = "/x/y") -> OSError:
    return OSError(number, os.strerror(number), path)


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("something")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_no_broken_one(number: int) -> None:
    error = describe_disk_error(os_error(number), Path("/home/of/mine"))
    assert is_disk_full(os_error(number)) and error is not None and error.code == "disk-full"
    # What is full is where the file was to lie.
    assert str(error) == "/x/y: disk full" and "the disk of /x" in error.hint
    error = describe_disk_error(sqlite_error(sqlite3.SQLITE_FULL), Path("/home/of/mine"))
    assert error is not None and "the disk of /home/of/mine" in error.hint
    assert is_disk_full(sqlite_error(sqlite3.SQLITE_FULL)) and not is_disk_full(os_error(errno.EIO))


def test_each_error_has_its_remedy() -> None:
    def said(error: OSError | sqlite3.Error) -> KeditError:
        known = describe_disk_error(error, Path("/home"))
        assert known is not None
        return known

    assert "dmesg" in said(os_error(errno.EIO)).hint
    assert "dmesg" in said(sqlite_error(sqlite3.SQLITE_IOERR_FSYNC)).hint
    assert "read-only" in said(os_error(errno.EROFS)).hint
    assert "read-only" in said(sqlite_error(sqlite3.SQLITE_READONLY)).hint
    assert "user" in said(os_error(errno.EACCES)).hint
    broken = said(sqlite_error(sqlite3.SQLITE_CORRUPT))
    assert broken.exit_code == 78 and "restore" in broken.hint
    assert said(sqlite_error(sqlite3.SQLITE_IOERR_SHMSIZE)).code == "io"  # a write succeeds there
    assert is_disk_full(sqlite_error(sqlite3.SQLITE_IOERR_SHMSIZE))


def test_what_is_no_disks_fault_is_not_told_as_one(tmp_path: Path) -> None:
    with closing(sqlite3.connect(":memory:")) as conn:
        conn.execute("CREATE TABLE t(a UNIQUE)")
        conn.execute("INSERT INTO t VALUES (1)")
        for sql in ("SELECT * FROM nothing", "INSERT INTO t VALUES (1)"):
            with pytest.raises(sqlite3.Error) as caught:
                conn.execute(sql)
            assert (
                not is_disk_failure(caught.value)
                and describe_disk_error(caught.value, tmp_path) is None
            )
    gone = os_error(errno.ENOENT)
    assert not is_disk_failure(gone) and describe_disk_error(gone, tmp_path) is None
    assert is_disk_failure(os_error(errno.EIO)) and is_disk_failure(
        sqlite_error(sqlite3.SQLITE_IOERR_WRITE)
    )


def test_a_database_that_another_holds_is_not_broken(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "db", timeout=0)) as one:
        one.execute("BEGIN EXCLUSIVE")
        with (
            closing(sqlite3.connect(tmp_path / "db", timeout=0)) as other,
            pytest.raises(sqlite3.Error) as caught,
        ):
            other.execute("BEGIN IMMEDIATE")
    known = describe_disk_error(caught.value, tmp_path)
    assert known is not None and (known.code, known.exit_code) == ("busy", 75)
    assert (
        is_database_locked(caught.value)
        and not is_disk_failure(caught.value)
        and "dmesg" not in known.hint
    )


def test_a_limit_that_sqlite_keeps_to_itself_is_found(tmp_path: Path) -> None:
    """EFBIG, as EDQUOT, comes as SQLITE_IOERR_WRITE; in a child, whose limit it is."""
    assert not is_disk_full(sqlite_error(sqlite3.SQLITE_IOERR_WRITE), tmp_path)
    code = f"""
import resource, sqlite3
from pathlib import Path
from kedit_daemon.system.disk import is_disk_full
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
conn = sqlite3.connect({str(tmp_path / "db")!r})
conn.execute("CREATE TABLE t(a)")
try:
    conn.execute("INSERT INTO t VALUES (zeroblob(1 << 20))")
    conn.commit()
except sqlite3.Error as error:
    print(error.sqlite_errorname, is_disk_full(error), is_disk_full(error, Path({str(tmp_path)!r})))
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout == "SQLITE_IOERR_WRITE False True\n"


def test_a_disk_with_room_lacks_nothing(tmp_path: Path) -> None:
    assert find_disk_shortage(tmp_path) is None
