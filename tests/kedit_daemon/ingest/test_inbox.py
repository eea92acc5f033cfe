"""What the inbox takes, what it leaves alone, and where each file ends, crash or no crash."""

import gzip
import json
import os
import shutil
import socket
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kedit_daemon.ingest import file_lease
from kedit_daemon.ingest.inbox import Claim, Inbox
from kedit_daemon.ingest.parser import RecordProblem
from memory.errors import KeditError

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
BAD = [
    RecordProblem(2, "it is empty", "fill it", '{"bad": "é"}'),
    RecordProblem(4, "no", "yes", '{"x": 1}'),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "inbox"


@pytest.fixture
def inbox(folder: Path) -> Inbox:
    return Inbox(folder, settle_seconds=1.0, max_bytes=1_000, clock=lambda: NOW)


def drop(folder: Path, name: str | bytes, data: bytes = b"{}\n", age: float = 60) -> str:
    path = os.path.join(os.fsencode(folder), os.fsencode(name))
    with open(path, "wb") as file:
        file.write(data)
    moment = NOW.timestamp() - age
    os.utime(path, (moment, moment))
    return os.fsdecode(path)


def claim_one(inbox: Inbox, name: str = "a.jsonl", data: bytes = b"{}\n") -> Claim:
    drop(inbox.folder, name, data)
    [claim] = inbox.claim_files(0)
    return claim


def visible(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def test_an_old_file_is_claimed_at_once(inbox: Inbox, folder: Path) -> None:
    claim = claim_one(inbox, "facts 1.jsonl", b"hello")
    assert claim.name == "facts 1.jsonl"
    assert claim.work_name.startswith("20260301T120000000000Z-")
    assert claim.work_name.endswith("-facts_1.jsonl")
    assert visible(folder) == ["done", "failed", "work"]
    assert inbox.read_claim(claim) == b"hello"
    assert inbox.claim_files(9) == []


def test_a_file_is_claimed_when_its_writer_closes_it(inbox: Inbox, folder: Path) -> None:
    if not file_lease.can_detect_closed(folder):
        pytest.skip("no leases on this file system")
    path = drop(folder, "a.jsonl", b"1", age=0)
    with open(path, "ab") as file:
        assert inbox.claim_files(10.0) == [] and inbox.settling_count == 1
        assert inbox.claim_files(10.1) == []
        file.write(b"2")
    assert inbox.claim_files(10.2) == []  # it is another one than in the scan before
    [claim] = inbox.claim_files(10.3)
    assert inbox.read_claim(claim) == b"12" and inbox.settling_count == 0


def test_a_closed_file_on_a_file_system_of_others_has_to_stand_still(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_lease, "LOCAL_FILE_SYSTEMS", frozenset())
    inbox = Inbox(folder, settle_seconds=1.0, max_bytes=1_000, clock=lambda: NOW)
    drop(folder, "a.jsonl", b"1", age=-500)
    assert [inbox.claim_files(at) for at in (10.0, 10.1, 10.9)] == [[], [], []]
    assert len(inbox.claim_files(11.0)) == 1


def test_an_empty_file_may_be_about_to_be_filled(inbox: Inbox, folder: Path) -> None:
    drop(folder, "a.jsonl", b"")
    assert [inbox.claim_files(at) for at in (10.0, 11.0, 999.0)] == [[], [], []]
    assert inbox.settling_count == 0
    drop(folder, "a.jsonl", b"{}\n")
    assert len(inbox.claim_files(1_000.0)) == 1


@pytest.mark.parametrize("leases", [True, False])
def test_a_file_that_is_held_open_waits_however_long_its_writer_pauses(
    folder: Path, monkeypatch: pytest.MonkeyPatch, leases: bool
) -> None:
    """By leases or, where they are not to be relied on, by the open files of processes."""
    if not leases:
        monkeypatch.setattr(file_lease, "LOCAL_FILE_SYSTEMS", frozenset())
    inbox = Inbox(folder, settle_seconds=1.0, max_bytes=1_000, clock=lambda: NOW)
    path = drop(folder, "a.jsonl", b"1", age=500)
    with open(path, "ab", buffering=0) as file:
        for at in (10.0, 10.1, 20.0, 69.0):
            assert inbox.claim_files(at) == [] and inbox.settling_count == 1
        assert inbox.claim_files(5_000.0) == [] and inbox.settling_count == 0
        file.write(b"2")
        assert inbox.claim_files(5_001.0) == [] and inbox.settling_count == 1
        assert inbox.claim_files(9_000.0) == []
    [claim] = inbox.claim_files(9_000.1)
    assert inbox.read_claim(claim) == b"12" and inbox.settling_count == 0


def test_the_oldest_file_comes_first(inbox: Inbox, folder: Path) -> None:
    for name, age in (("a", 10), ("b", 30), ("c", 20)):
        drop(folder, name, age=age)
    assert [claim.name for claim in inbox.claim_files(0)] == ["b", "c", "a"]


UNFINISHED = [
    *(".a.jsonl", ".~lock.a.csv#", ".DS_Store", "a.jsonl.tmp", "a.jsonl.part", "a.csv.filepart"),
    *("a.csv.crdownload", "Unconfirmed 7.crdownload", "a.csv.Partial", "a.csv.download"),
    *("a.swp", ".a.csv.swp", "a.csv~", "#a.csv#", "~$a.csv", "Desktop.ini", "Thumbs.db", "A.PART"),
]
FINISHED = ["a.party.jsonl", "a~b.csv", "#1.csv", "downloads.csv", "desktop.ini.csv", "part"]


@pytest.mark.parametrize("name", UNFINISHED)
def test_unfinished_and_hidden_files_are_not_even_looked_at(
    inbox: Inbox, folder: Path, name: str
) -> None:
    drop(folder, name)
    (folder / "x.part").mkdir()
    assert inbox.claim_files(0) == [] and inbox.take_refusals() == []
    (folder / name).rename(folder / "facts.csv")
    assert [claim.name for claim in inbox.claim_files(0)] == ["facts.csv"]


@pytest.mark.parametrize("name", FINISHED)
def test_a_name_that_only_resembles_those_is_taken(inbox: Inbox, folder: Path, name: str) -> None:
    drop(folder, name)
    assert [claim.name for claim in inbox.claim_files(0)] == [name]


def test_names_of_unfinished_files_can_be_chosen(folder: Path) -> None:
    inbox = Inbox(folder, 1.0, 1_000, lambda: NOW, ["draft-*", "*.[bo]ak"])
    for name in ("draft-1.csv", "x.bak", "x.OAK", ".hidden", "x.part"):
        drop(folder, name)
    assert [claim.name for claim in inbox.claim_files(0)] == ["x.part"]


def test_nothing_but_plain_files_is_touched(inbox: Inbox, folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (folder / "link").symlink_to(secret)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    (folder / "sub").mkdir()
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.close()
    assert inbox.claim_files(0) == []
    refused = inbox.take_refusals()
    assert sorted(r.name for r in refused) == ["dangling", "link", "pipe", "socket", "sub"]
    assert all(r.problem and r.remedy for r in refused)
    inbox.claim_files(5)
    assert inbox.take_refusals() == []
    assert secret.read_text() == "secret" and (folder / "link").is_symlink()
    (folder / "sub").rmdir()
    inbox.claim_files(6)
    (folder / "sub").mkdir()
    inbox.claim_files(7)
    assert [r.name for r in inbox.take_refusals()] == ["sub"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_left_until_it_is_readable(inbox: Inbox, folder: Path) -> None:
    path = drop(folder, "a.jsonl")
    os.chmod(path, 0)
    assert inbox.claim_files(0) == [] and inbox.claim_files(5) == []
    assert [r.name for r in inbox.take_refusals()] == ["a.jsonl"]
    os.chmod(path, 0o600)
    assert len(inbox.claim_files(6)) == 1


@pytest.mark.parametrize(
    "name", [b"bad\xff.jsonl", b"two\nlines", b"..x", b"..\\..\\x", b"x" * 250 + b".json", b"-rf"]
)
def test_no_name_does_harm(inbox: Inbox, folder: Path, name: bytes) -> None:
    drop(folder, name)
    claims = inbox.claim_files(0)
    if name.startswith(b"."):
        assert claims == []
        return
    [claim] = claims
    assert claim.name.encode() and json.dumps(claim.name)
    assert claim.work_name.isascii() and "/" not in claim.work_name
    [resumed] = Inbox(folder, 1.0, 1_000, lambda: NOW).pending_claims()
    assert resumed == claim
    inbox.fail_claim(claim, BAD, whole=True)
    [report, kept] = sorted(os.listdir(folder / "failed"), key=len, reverse=True)
    assert report == kept + ".error.json"
    assert json.loads((folder / "failed" / report).read_text())["file"] == claim.name
    drop(folder, name)
    [claim] = inbox.claim_files(1)
    inbox.finish_claim(claim)
    assert len(visible(folder / "done")) == 1 and os.listdir(folder / "work") == []


def test_equal_names_never_overwrite_each_other(inbox: Inbox, folder: Path) -> None:
    for data in (b"1", b"2"):
        inbox.finish_claim(claim_one(inbox, "a.jsonl", data))
    assert sorted(p.read_bytes() for p in (folder / "done").iterdir()) == [b"1", b"2"]
    for data in (b"3", b"4"):
        inbox.fail_claim(claim_one(inbox, "a.jsonl", data), BAD, whole=True)
    names = visible(folder / "failed")
    assert len(names) == 4 and {"a.jsonl", "a.jsonl.error.json"} < set(names)
    assert {(folder / "failed" / n).read_bytes() for n in names if "error" not in n} == {b"3", b"4"}


def test_failed_records_lie_beside_their_explanation(inbox: Inbox, folder: Path) -> None:
    claim = claim_one(inbox, "a.jsonl", b'{"good": 1}\n{"bad": 1}\n')
    inbox.fail_claim(claim, BAD, whole=False)
    assert (folder / "failed" / "a.jsonl").read_text() == '{"bad": "é"}\n{"x": 1}\n'
    report = json.loads((folder / "failed" / "a.jsonl.error.json").read_text())
    assert (report["file"], report["at"]) == ("a.jsonl", "2026-03-01T12:00:00Z")
    assert report["errors"][0] == {
        "line": 2,
        "problem": "it is empty",
        "remedy": "fill it",
        "record": '{"bad": "é"}',
    }
    inbox.finish_claim(claim)
    assert visible(folder / "done") == ["a.jsonl"] and os.listdir(folder / "work") == []


def test_failed_records_of_a_packed_file_are_packed_too(inbox: Inbox, folder: Path) -> None:
    data = gzip.compress(b"subject;prompt;target\nA;{};x\nB;{};\n")
    claim = claim_one(inbox, "a.csv.gz", data)
    inbox.fail_claim(claim, [RecordProblem(3, "it is empty", "fill it", "B;{};")], whole=False)
    failed = (folder / "failed" / "a.csv.gz").read_bytes()
    assert gzip.decompress(failed) == b"subject;prompt;target\nB;{};\n"
    report = json.loads((folder / "failed" / "a.csv.gz.error.json").read_text())
    assert report["errors"] == [
        {"line": 3, "problem": "it is empty", "remedy": "fill it", "record": "B;{};"}
    ]


def test_a_record_that_is_no_utf8_is_explained_and_kept_byte_for_byte(
    inbox: Inbox, folder: Path
) -> None:
    claim = claim_one(inbox)
    inbox.fail_claim(
        claim, [RecordProblem(1, "not valid UTF-8", "save it so", "a\udcffb" * 2_000)], False
    )
    assert (folder / "failed" / "a.jsonl").read_bytes() == b"a\xffb" * 2_000 + b"\n"
    report = (folder / "failed" / "a.jsonl.error.json").read_text(encoding="utf-8")
    assert len(json.loads(report)["errors"][0]["record"]) == 2_000


def test_a_huge_file_is_put_aside_unread(inbox: Inbox, folder: Path) -> None:
    path = drop(folder, "huge.jsonl", b"")
    os.truncate(path, 1 << 30)
    os.utime(path, (0, 0))
    assert inbox.claim_files(0) == []
    [refusal] = inbox.take_refusals()
    assert refusal.name == "huge.jsonl" and "max_bytes" in refusal.remedy
    assert (folder / "failed" / "huge.jsonl").stat().st_size == 1 << 30
    [error] = json.loads((folder / "failed" / "huge.jsonl.error.json").read_text())["errors"]
    assert "1073741824 bytes" in error["problem"]


def test_a_file_that_grows_after_its_claim_is_not_loaded(inbox: Inbox, folder: Path) -> None:
    claim = claim_one(inbox)
    os.truncate(folder / "work" / claim.work_name, 1 << 30)
    with pytest.raises(KeditError, match="too large"):
        inbox.read_claim(claim)


def test_a_claim_that_became_a_link_is_not_followed(inbox: Inbox, folder: Path) -> None:
    claim = claim_one(inbox)
    (folder / "work" / claim.work_name).unlink()
    (folder / "work" / claim.work_name).symlink_to("/etc/passwd")
    with pytest.raises(KeditError, match="not a plain file"):
        inbox.read_claim(claim)


@pytest.mark.parametrize("name", ["work", "done", "failed"])
def test_our_own_folders_are_not_followed_elsewhere(
    inbox: Inbox, folder: Path, tmp_path: Path, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    claim = claim_one(inbox)
    drop(folder, "b.jsonl")
    shutil.move(folder / name, folder / f".{name}")
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(KeditError, match="not a folder"):
        if name == "work":
            inbox.claim_files(9)
        elif name == "done":
            inbox.finish_claim(claim)
        else:
            inbox.fail_claim(claim, BAD, whole=True)
    assert list(elsewhere.iterdir()) == []


def test_a_crash_between_note_and_rename_leaves_the_file_in_the_inbox(
    inbox: Inbox, folder: Path
) -> None:
    claim = claim_one(inbox)
    os.rename(folder / "work" / claim.work_name, folder / "a.jsonl")
    (folder / "work" / ".0123.tmp").write_bytes(b"half")
    again = Inbox(folder, 1.0, 1_000, lambda: NOW)
    assert again.pending_claims() == [] and os.listdir(folder / "work") == []
    [claim] = again.claim_files(0)
    assert claim.name == "a.jsonl"


def test_claims_outlive_a_crash_in_their_order(inbox: Inbox, folder: Path) -> None:
    ticks = iter(NOW.replace(second=s) for s in range(60))
    inbox = Inbox(folder, 1.0, 1_000, lambda: next(ticks))
    for name, age in (("c", 30), ("a", 20), ("b", 10)):
        drop(folder, name, age=age)
    claims = inbox.claim_files(0)
    assert [claim.name for claim in claims] == ["c", "a", "b"]
    assert Inbox(folder, 1.0, 1_000, lambda: NOW).pending_claims() == claims


@pytest.mark.parametrize("whole", [True, False])
def test_ending_a_claim_again_after_a_crash_changes_nothing(
    inbox: Inbox, folder: Path, whole: bool
) -> None:
    drop(folder / "failed", "a.jsonl", b"another's")

    def end(claim: Claim) -> None:
        inbox.fail_claim(claim, BAD, whole)
        if not whole:
            inbox.finish_claim(claim)

    claim = claim_one(inbox)
    before = {p.name: p.read_bytes() for p in (folder / "work").iterdir()}
    steps: list[Callable[[], None]] = [
        lambda: inbox.fail_claim(claim, BAD, whole=False),
        lambda: end(claim),
    ]
    seen = []
    for step in steps:
        step()
        for name, data in before.items():
            (folder / "work" / name).write_bytes(data)
        seen.append(visible(folder / "failed"))
    for name in before:
        (folder / "work" / name).unlink()
    inbox.finish_claim(claim)
    assert seen[0] == seen[1] == visible(folder / "failed")
    assert (folder / "failed" / "a.jsonl").read_bytes() == b"another's"
    assert len(seen[0]) == 3
