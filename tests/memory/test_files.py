import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memory.errors import KeditError
from memory.files import hash_file, load_tensors, save_tensors, tensors_path, write_atomic


def test_sha256_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    assert hash_file(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_write_replaces_the_whole_content_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)  # a longer temporary name would not fit
    write_atomic(path, b"a long first content")
    write_atomic(path, b"short")
    assert path.read_bytes() == b"short"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.mkdir()
    (path / "inside").write_bytes(b"kept")
    with pytest.raises(IsADirectoryError):
        write_atomic(path, b"new")
    assert (path / "inside").read_bytes() == b"kept"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_reaches_the_disk_in_the_right_order(tmp_path: Path) -> None:
    code = f"""
import os, sys
from pathlib import Path
from memory.files import write_atomic
seen = []
names = {{"open", "os.rename"}}
def hook(name, args):
    if name in names and str(args[0]).startswith({str(tmp_path)!r}):
        seen.append((name, str(args[0])))
sync = os.fsync
def fsync(fd):
    seen.append(("fsync", os.readlink(f"/proc/self/fd/{{fd}}")))
    sync(fd)
os.fsync = fsync
sys.addaudithook(hook)
write_atomic(Path({str(tmp_path)!r}) / "f", b"x")
steps = [(n, p) for n, p in seen if n != "open"]
assert [n for n, _ in steps] == ["fsync", "os.rename", "fsync"], steps
assert steps[0][1].endswith(".tmp") and steps[2][1] == {str(tmp_path)!r}, steps
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_come_back_and_the_name_follows_from_them(tmp_path: Path) -> None:
    weights = torch.arange(6.0).reshape(2, 3)
    sha = save_tensors(tmp_path, {"b": weights.T, "a": weights[0].to(torch.bfloat16)})
    again = save_tensors(tmp_path, {"a": weights[0].to(torch.bfloat16), "b": weights.T})
    assert again == sha
    assert list(tmp_path.iterdir()) == [tensors_path(tmp_path, sha)]
    back = load_tensors(tmp_path, sha)
    assert torch.equal(back["b"], weights.T)
    assert back["a"].dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_tensors_are_refused(tmp_path: Path, damage: str) -> None:
    sha = save_tensors(tmp_path, {"w": torch.ones(16)})
    path = tensors_path(tmp_path, sha)
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "cut":
        path.write_bytes(data[:-4])
    else:
        path.unlink()
    with pytest.raises(KeditError, match=path.name) as caught:
        load_tensors(tmp_path, sha)
    assert caught.value.code == "corrupt"
    assert str(path) in caught.value.hint


def test_tensors_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = tensors_path(tmp_path, "0" * 64)
    path.symlink_to("/proc/self/mem")  # a file that opens, and whose first byte nobody can read
    with pytest.raises(KeditError, match=f"{path.name} cannot be read") as caught:
        load_tensors(tmp_path, "0" * 64)
    assert caught.value.code == "corrupt"


def test_importing_needs_no_torch() -> None:
    code = "import sys, memory.files; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
