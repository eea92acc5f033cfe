"""Packed files: what is in them is read within bounds, and what is no text is named."""

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import time
import zipfile

import pytest

from kedit_daemon.ingest import packed_files
from kedit_daemon.ingest.parser import ParsedFile, extract_failed, parse_file
from kedit_daemon.ingest.schemas import FileLimits

LIMITS = FileLimits(max_bytes=100_000)
LINE = b'{"subject": "A", "prompt": "{} is", "target": "x"}\n'
TABLE = b"subject;prompt;target\nB;{} is;y\nC;{} is;\n"


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return packed.getvalue()


def parsed(data: bytes, name: str = "x") -> ParsedFile:
    return parse_file(data, name, None, LIMITS)


def subjects(found: ParsedFile) -> list[str]:
    return [fact.subject for _, fact in found.facts]


PACKERS = {
    "gz": gzip.compress,
    "xz": lzma.compress,
    "two gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    "two xz": lambda data: lzma.compress(data[:20]) + bytes(8) + lzma.compress(data[20:]),
    "zip": lambda data: zipped({"x.csv": data}),
    "stored": lambda data: zipped({"x.csv": data}, zipfile.ZIP_STORED),
}


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("name", ["facts.jsonl", "facts.csv.gz", "facts", "facts.XZ"])
def test_a_packed_file_is_known_by_its_bytes(packer: str, name: str) -> None:
    pack = PACKERS[packer]
    assert subjects(parsed(pack(LINE * 2), name)) == ["A", "A"]
    found = parsed(pack(TABLE.decode().encode("utf-16")), name)
    assert subjects(found) == ["B"]
    assert [(p.line, p.record) for p in found.problems] == [(3, "C;{} is;")]
    failed = extract_failed(pack(TABLE), name, found.problems)
    again = parsed(failed, name)
    assert [(p.line, p.record) for p in again.problems] == [(2, "C;{} is;")]
    assert packed_files.find_packing(failed) == packed_files.find_packing(pack(TABLE))


@pytest.mark.parametrize("packer", PACKERS)
def test_a_packed_file_that_is_cut_or_damaged_is_told(packer: str) -> None:
    data = PACKERS[packer](LINE * 50)
    for broken in (data[:-10], data[: len(data) // 2], data[:8]):
        [told] = parsed(broken).problems
        assert "broken" in told.problem and "pack it again" in told.remedy
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x55
        found = parsed(bytes(changed))
        assert found.facts or all(p.problem and p.remedy for p in found.problems)


@pytest.mark.parametrize("packer", ["gz", "xz", "zip"])
@pytest.mark.parametrize("filler", [b"\0", b" ", LINE])
def test_a_bomb_is_refused_early(packer: str, filler: bytes) -> None:
    bomb = PACKERS[packer](filler * (50_000_000 // len(filler)))
    began = time.monotonic()
    found = parse_file(bomb, "x", None, FileLimits())
    assert time.monotonic() - began < 5
    [told] = found.problems
    assert "unpacks to more than" in told.problem and "smaller" in told.remedy


def test_the_bound_is_on_all_files_of_an_archive(monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped({f"{n}.jsonl": LINE * 900 for n in range(4)})
    found = parse_file(archive, "x.zip", None, LIMITS)
    assert len(found.facts) == 2 * 900
    assert [p.problem.partition(":")[0] for p in found.problems] == ['"2.jsonl"', '"3.jsonl"']
    monkeypatch.setattr(packed_files, "MAX_FILES", 3)
    [told] = parsed(archive).problems
    assert "more than 3 files" in told.problem


def test_each_file_of_an_archive_is_read_for_itself() -> None:
    archive = zipped(
        {
            "a.jsonl": LINE + b'{"subject": "A2", "prompt": "no", "target": "x"}\n',
            "b.csv": TABLE,
            "list.json": b'[{"subject": "D", "prompt": "{} is", "target": ""}]',
            "folder/e.jsonl": LINE,
            "../up.jsonl": LINE,
            "inner.zip": zipped({"x.jsonl": LINE}),
            "__MACOSX/._a.jsonl": b"\0\5\x16\7",
            ".DS_Store": b"\0\0\0\1Bud1",
            "folder/": b"",
        }
    )
    found = parsed(archive, "x.zip")
    assert subjects(found) == ["A", "B"]
    told = {p.member: p.problem for p in found.problems}
    assert list(told) == [
        "a.jsonl",
        "b.csv",
        "list.json",
        "folder/e.jsonl",
        "../up.jsonl",
        "inner.zip",
    ]
    assert "neither" in told["a.jsonl"] and told["b.csv"] == '"b.csv": "target" is empty'
    assert "folder" in told["folder/e.jsonl"] and "folder" in told["../up.jsonl"]
    assert "packed twice" in told["inner.zip"]
    failed = extract_failed(archive, "x.zip", found.problems)
    with zipfile.ZipFile(io.BytesIO(failed)) as again:
        assert again.namelist() == ["a.jsonl", "b.csv", "list.json"]
        assert again.read("b.csv") == b"subject;prompt;target\nC;{} is;\n"
    assert "member" not in found.problems[0].as_dict(10)


def test_an_empty_archive_holds_no_record() -> None:
    for data in (zipped({}), zipped({"a.jsonl": b""}), gzip.compress(b""), lzma.compress(b"")):
        [told] = parsed(data).problems
        assert told.problem == "the file holds no record"


def test_locked_and_rare_archives_are_named() -> None:
    data = bytearray(zipped({"a.jsonl": LINE}))
    for mark, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(mark) + at] |= 1
    [told] = parsed(bytes(data)).problems
    assert "encrypted" in told.problem and "password" in told.remedy
    [told] = parsed(zipped({"a.jsonl": LINE}, zipfile.ZIP_LZMA)).problems
    assert "rare method" in told.problem and "deflate" in told.remedy


def _tarred() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("a.jsonl")
        info.size = len(LINE)
        archive.addfile(info, io.BytesIO(LINE))
    return packed.getvalue()


def _stored() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("CREATE TABLE t (x)")
    data = database.serialize()
    database.close()
    return data


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (bz2.compress(LINE), "bzip2"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd"),
        (_tarred(), "tar"),
        (gzip.compress(_tarred()), "tar"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(20), "7z"),
        (zipped({"[Content_Types].xml": b"<x/>", "xl/workbook.xml": b"<x/>"}), "Office"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "Office"),
        (_stored(), "SQLite"),
        (b"\x80\x04\x95" + bytes(20), "dump of Python objects"),
        (b"%PDF-1.7\n", "PDF"),
        (b"ARROW1\0\0" + bytes(20), "Arrow"),
    ],
)
def test_other_kinds_of_files_are_named(data: bytes, word: str) -> None:
    [told] = parsed(data, "facts.csv").problems
    assert word in told.problem and told.remedy and told.record == ""
