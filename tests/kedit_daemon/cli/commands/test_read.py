import json
import os
import pty
import signal
import subprocess
from pathlib import Path

import pytest
from command_line import EVIL, EYRE, OSLO, called, make_home, process, read

from kedit_daemon.home import Home
from kedit_daemon.system import lock


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def test_status_of_a_dead_daemon(home: Home) -> None:
    result = called(home, "status")
    assert result.exit_code == 3
    assert "stopped" in result.stdout
    assert f"→ kedit-daemon --home {home.root} run" in result.stdout


def test_status_of_a_running_daemon(home: Home) -> None:
    with lock.hold_lock(home.lock_file):
        result = called(home, "status", "--json")
        assert result.exit_code == 0
        (home.inbox_folder / "failed" / "x.jsonl.error.json").write_text("{}")
        (home.inbox_folder / "failed" / "x.jsonl").write_text("{}")
        assert called(home, "status").exit_code == 4
    found = read(result)
    assert found["pid"] == os.getpid()
    assert set(found) == {
        *("applied_today", "at", "device", "disk_free_bytes", "events", "facts", "failed_facts"),
        *(
            "failed_files",
            "failed_today",
            "flush_held",
            "generation",
            "generations",
            "home",
            "jobs",
        ),
        *("last_audit", "model", "paused", "pending", "pid", "side_memory", "since", "state"),
        *(
            "flush_cost",
            "publish_failed",
            "warnings",
            "weights_capacity",
            "weights_facts",
            "weights_limit",
        ),
    }


def test_watching_goes_on_until_it_is_interrupted(home: Home) -> None:
    child = process(home, "status", "--watch", "--json", stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert json.loads(child.stdout.readline())["state"] == "stopped"
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    child.stdout.close()


def test_watching_on_a_terminal_draws_in_place(home: Home) -> None:
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    child = process(home, "status", "--watch", stdout=theirs, env=env)
    seen = b""
    while seen.count(b"Ctrl-C ends") < 2:
        seen += os.read(ours, 4096)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    os.close(theirs)
    os.close(ours)
    first, _, second = seen.partition(b"Ctrl-C ends")
    # The second status goes up over the lines of the first, and wipes each.
    assert b"\x1b[1A" not in first
    assert second.count(b"\x1b[1A\x1b[2K") == first.count(b"\n") > 3


def test_watching_off_a_terminal_puts_a_rule_between(home: Home) -> None:
    child = process(home, "status", "--watch", stdout=subprocess.PIPE)
    assert child.stdout is not None
    seen = b""
    while seen.count(b"kedit-daemon  stopped") < 2:
        seen += child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    child.stdout.close()
    assert seen.count(b"\n---- 20") == 1
    assert b"\x1b" not in seen


def test_facts_by_state_and_subject(home: Home) -> None:
    assert [row["id"] for row in read(called(home, "facts", "--json"))] == [
        EYRE.id,
        OSLO.id,
        EVIL.id,
    ]
    live = called(home, "facts", "--state", "live-weights")
    assert live.stdout.count("\n") == 2
    assert "Oslo lies in → Norway" in live.stdout
    by_subject = called(home, "facts", "--subject", "EYRE", "--json")
    assert [row["target"] for row in read(by_subject)] == ["Australia"]
    none = called(home, "facts", "--subject", "nowhere")
    assert (none.exit_code, none.stdout, none.stderr) == (0, "", "no such facts\n")
    assert called(home, "facts", "--state", "lost").exit_code == 2


@pytest.mark.parametrize("words", [["facts"], ["show", EVIL.id], ["log"], ["facts", "--json"]])
def test_hostile_text_does_not_reach_the_terminal(home: Home, words: list[str]) -> None:
    result = called(home, *words)
    assert result.exit_code == 0
    assert all(c.isprintable() or c == "\n" for c in result.stdout)


def test_json_keeps_text_as_it_was_handed_in(home: Home) -> None:
    assert read(called(home, "show", EVIL.id, "--json"))["target"] == EVIL.target


@pytest.mark.parametrize("name", [EYRE.id, "mine"])
def test_show_a_fact(home: Home, name: str) -> None:
    result = called(home, "show", name)
    for part in ("The country that Lake Eyre lies in is → Australia", "Egypt", "fact_received"):
        assert part in result.stdout
    fact = read(called(home, "show", name, "--json"))
    assert [event["kind"] for event in fact["events"]] == ["fact_received", "fact_live-side"]
    assert fact["edits"][0]["seconds"] == 1.5


def test_show_what_is_not_there(home: Home) -> None:
    (home.inbox_folder / "secret.error.json").write_text('{"errors": []}')
    hint = called(home, "show", EYRE.id[:-2]).stderr.splitlines()[1]
    assert hint.startswith(f"hint: did you mean {EYRE.id}? ")
    for name in ("nothing", "../secret"):
        result = called(home, "show", name)
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error[unknown-fact]: there is no fact {name}\nhint: ")


def test_show_a_failed_file_even_before_there_is_a_database(home: Home) -> None:
    home.database_file.unlink()
    errors = [{"line": 3, "problem": "target is empty", "remedy": "fill it in", "record": "{x"}]
    report = {"claim": "c", "file": "f.jsonl", "at": "2026-03-01T00:00:00Z", "errors": errors}
    (home.inbox_folder / "failed" / "f.jsonl.error.json").write_text(json.dumps(report))
    result = called(home, "show", "f.jsonl")
    for part in ("line 3: target is empty", "remedy  fill it in", "{x", "hand it in with submit"):
        assert part in result.stdout
    assert read(called(home, "show", "f.jsonl", "--json")) == report


def test_a_damaged_database_is_an_error_with_a_hint(home: Home) -> None:
    home.database_file.write_bytes(b"x" * 10_000)
    for words in (["facts"], ["status"], ["log"], ["log", "verify"]):
        result = called(home, *words)
        assert result.exit_code == 1
        assert "kedit-daemon doctor" in result.stderr.splitlines()[-1]
