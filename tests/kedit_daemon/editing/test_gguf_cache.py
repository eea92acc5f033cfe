"""The cache of converted models: each file once, whole or not at all."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forking import ended, forked
from tiny_gguf import write_gguf

from kedit_daemon.editing.gguf_cache import LOCK_FILE, SOURCE_FILE, GgufCache
from memory.errors import KeditError, UnusableModel
from memory.files import STAGED_NAME, hash_file
from memory.model.strict_loading import check_model_folder

CRASHED = 9  # the exit code of a child that ends in the middle


@pytest.fixture(scope="module")
def written(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model_folder("llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(written, tmp_path / "tiny.gguf"))


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, told: list[str]) -> GgufCache:
    return GgufCache(tmp_path / "cache", told.append)


def staged(cache: GgufCache) -> list[Path]:
    return [path for path in cache.folder.iterdir() if STAGED_NAME.fullmatch(path.name)]


def test_a_file_is_converted_once_and_named_by_its_sha256(
    cache: GgufCache, file: Path, told: list[str]
) -> None:
    folder = cache.find_checkpoint(file)
    assert folder == cache.folder / hash_file(file)
    assert [line.split()[0] for line in told] == ["converting", "converted"]
    check_model_folder(folder)
    inode = (folder / "model.safetensors").stat().st_ino
    assert cache.find_checkpoint(file) == folder
    moved = file.rename(file.with_name("another.gguf"))
    assert cache.find_checkpoint(moved) == folder
    assert GgufCache(cache.folder, told.append).find_checkpoint(moved) == folder
    assert (len(told), (folder / "model.safetensors").stat().st_ino) == (2, inode)
    assert {path.name for path in cache.folder.iterdir()} == {folder.name, LOCK_FILE}


def test_a_file_that_has_not_changed_is_not_hashed_again(cache: GgufCache, file: Path) -> None:
    folder = cache.find_checkpoint(file)
    other = file.with_name("other.gguf")
    other.write_text("whose sha256 would name another folder")
    found = other.stat()
    known = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    (folder / SOURCE_FILE).write_text(json.dumps(known))
    assert cache.find_checkpoint(other) == folder


def test_another_content_under_the_same_name_is_another_model(
    cache: GgufCache, file: Path, model_folder: Callable[[str], Path]
) -> None:
    first, times = cache.find_checkpoint(file), file.stat()
    write_gguf(model_folder("llama"), file, more={"output_norm.weight": torch.full((32,), 2.0)})
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # as some copies keep it
    second = cache.find_checkpoint(file)
    assert second != first
    assert second.name == hash_file(file)


def test_a_copy_is_recognised_by_its_content(cache: GgufCache, file: Path, told: list[str]) -> None:
    folder = cache.find_checkpoint(file)
    copy = Path(shutil.copy(file, file.with_name("copy.gguf")))
    assert cache.find_checkpoint(copy) == folder
    assert len(told) == 2


def test_what_a_crash_leaves_is_no_model_and_goes(
    cache: GgufCache, file: Path, tmp_path: Path
) -> None:
    def crash() -> int:
        os.fsync = lambda _: os._exit(CRASHED)  # all is written by then, and nothing renamed
        cache.find_checkpoint(file)
        return 0

    assert ended(forked(crash, tmp_path / "log")) == CRASHED
    [left] = staged(cache)
    assert (left / "model.safetensors").is_file()
    assert not (cache.folder / hash_file(file)).exists()
    check_model_folder(cache.find_checkpoint(file))
    assert staged(cache) == []


def test_two_processes_convert_a_file_once(cache: GgufCache, file: Path, tmp_path: Path) -> None:
    def convert(log: Path) -> Callable[[], int]:
        def work() -> int:
            lines: list[str] = []
            folder = GgufCache(cache.folder, lines.append).find_checkpoint(file)
            log.write_text(json.dumps([str(folder), lines]))
            return 0

        return work

    logs = [tmp_path / f"{n}.json" for n in range(3)]
    children = [forked(convert(log), log.with_suffix(".log")) for log in logs]
    assert [ended(child) for child in children] == [0, 0, 0]
    found = [json.loads(log.read_text()) for log in logs]
    assert {folder for folder, _ in found} == {str(cache.folder / hash_file(file))}
    assert sum("converted" in line for _, lines in found for line in lines) == 1
    check_model_folder(cache.folder / hash_file(file))
    assert staged(cache) == []


def test_a_disk_that_is_too_small_is_told_before(
    cache: GgufCache, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def full(path: Path) -> os.statvfs_result:
        values = list(real(path))
        values[4] = 1  # f_bavail
        return os.statvfs_result(values)

    monkeypatch.setattr("os.statvfs", full)
    with pytest.raises(KeditError, match="takes 0 MB when converted") as caught:
        cache.find_checkpoint(file)
    assert (caught.value.code, caught.value.exit_code) == ("disk-full", 1)
    assert "KEDIT_CACHE" in caught.value.hint
    assert staged(cache) == []


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    cache: GgufCache, file: Path, tmp_path: Path
) -> None:
    def work() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            cache.find_checkpoint(file)
        except KeditError as error:
            return 0 if error.code == "disk-full" else 1
        return 2

    assert ended(forked(work, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    assert {path.name for path in cache.folder.iterdir()} == {LOCK_FILE}


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path, file: Path) -> None:
    def append(_: str) -> None:
        with file.open("ab") as opened:
            opened.write(b"more")

    cache = GgufCache(tmp_path / "cache", append)
    with pytest.raises(UnusableModel, match="has changed while it was read"):
        cache.find_checkpoint(file)
    assert {path.name for path in cache.folder.iterdir()} == {LOCK_FILE}


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path: Path, file: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(UnusableModel, match="taken") as caught:
        GgufCache(tmp_path / "taken" / "models").find_checkpoint(file)
    assert "KEDIT_CACHE" in caught.value.hint


def test_a_file_that_is_gone_is_named(cache: GgufCache, file: Path) -> None:
    file.unlink()
    with pytest.raises(UnusableModel, match=f"{file}: No such file") as caught:
        cache.find_checkpoint(file)
    assert "put the file back" in caught.value.hint


def test_numbers_that_are_not_finite_are_found_before_the_model_is_kept(
    cache: GgufCache, file: Path, model_folder: Callable[[str], Path]
) -> None:
    more = {"output_norm.weight": torch.full((32,), float("nan"))}
    write_gguf(model_folder("llama"), file, more=more)
    with pytest.raises(UnusableModel, match=f"{file} holds numbers that are not finite"):
        cache.find_checkpoint(file)
    assert {path.name for path in cache.folder.iterdir()} == {LOCK_FILE}
