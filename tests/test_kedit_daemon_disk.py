"""What a disk's errors mean."""

import errno
import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from kedit_daemon.disk import is_full, lacking, told
from memory.errors import KeditError


def os_error(number: int, path: str = "/x/y") -> OSError:
    return OSError(number, os.strerror(number), path)


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("something")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_no_broken_one(number: int) -> None:
    error = told(os_error(number), Path("/home/of/mine"))
    assert is_full(os_error(number)) and error.code == "disk-full"
    assert str(error) == "/x/y: disk full" and "/home/of/mine" in error.hint
    assert is_full(sqlite_error(sqlite3.SQLITE_FULL)) and not is_full(os_error(errno.EIO))


def test_each_error_has_its_remedy() -> None:
    def said(error: OSError | sqlite3.Error) -> KeditError:
        return told(error, Path("/home"))

    assert "dmesg" in said(os_error(errno.EIO)).hint
    assert "dmesg" in said(sqlite_error(sqlite3.SQLITE_IOERR_FSYNC)).hint
    assert "read-only" in said(os_error(errno.EROFS)).hint
    assert "read-only" in said(sqlite_error(sqlite3.SQLITE_READONLY)).hint
    assert "user" in said(os_error(errno.EACCES)).hint
    broken = said(sqlite_error(sqlite3.SQLITE_CORRUPT))
    assert broken.exit_code == 78 and "restore" in broken.hint
    assert said(sqlite_error(sqlite3.SQLITE_IOERR_SHMSIZE)).code == "disk-full"
    with closing(sqlite3.connect(":memory:")) as conn, pytest.raises(sqlite3.Error) as caught:
        conn.execute("SELECT * FROM absent")
    assert str(said(caught.value)) == "/home: no such table: absent"


def test_a_disk_with_room_lacks_nothing(tmp_path: Path) -> None:
    assert lacking(tmp_path) is None
