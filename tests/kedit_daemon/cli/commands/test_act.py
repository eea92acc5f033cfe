from pathlib import Path
from typing import Any

import pytest
from command_line import EYRE, OSLO, called, daemon, make_home, on_terminal, read

from kedit_daemon.home import Home
from memory.errors import KeditError


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


@pytest.mark.parametrize(
    "words", [["ask", "x"], ["flush"], ["audit"], ["consolidate"], ["revert", "x", "--yes"]]
)
def test_commands_that_need_the_daemon(home: Home, words: list[str]) -> None:
    result = called(home, *words)
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == "error[not-running]: daemon not running\nhint: kedit-daemon run\n"


def test_a_refusal_comes_through_as_it_is(home: Home) -> None:
    refusal = KeditError("busy with a flush", code="busy", hint="wait")
    with daemon(home, audit=refusal):
        result = called(home, "audit")
    assert result.exit_code == 75
    assert result.stderr == "error[busy]: busy with a flush\nhint: wait\n"


def test_ask(home: Home) -> None:
    reply = {"answer": "Australia", "generation": 1, "seconds": 0.1, "fired": []}
    with daemon(home, ask=reply) as running:
        assert called(home, "ask", "Lake Eyre lies in").stdout == "Australia\n"
        assert read(called(home, "ask", "x", "--json", "--max-tokens", "5")) == reply
        assert "none: the main weights" in called(home, "ask", "x", "--base", "--explain").stdout
    assert running.asked == [
        ("ask", {"prompt": "Lake Eyre lies in", "max_tokens": 40, "base": False, "explain": False}),
        ("ask", {"prompt": "x", "max_tokens": 5, "base": False, "explain": False}),
        ("ask", {"prompt": "x", "max_tokens": 40, "base": True, "explain": True}),
    ]


def test_ask_in_a_chat(home: Home) -> None:
    reply = {"answer": "Australia.", "generation": 1, "seconds": 0.1, "fired": []}
    with daemon(home, ask=reply) as running:
        assert called(home, "ask", "--chat", "Where is it?").stdout == "Australia.\n"
        words = ["--system", "Be brief.", "--turn", "Do you know Lake Eyre?", "--turn", "Yes."]
        assert read(called(home, "ask", "--chat", "Where is it?", *words, "--json")) == reply
    options = {"max_tokens": 40, "base": False, "explain": False}
    asked = {"role": "user", "content": "Where is it?"}
    earlier = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Do you know Lake Eyre?"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert running.asked == [
        ("ask", options | {"messages": [asked]}),
        ("ask", options | {"messages": [*earlier, asked]}),
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--system", "Be brief."], "add --chat"),
        (["--turn", "Hello", "--turn", "Hi"], "add --chat"),
        (["--chat", "--turn", "Hello"], "needs its reply"),
    ],
)
def test_half_a_chat_is_not_asked(home: Home, words: list[str], why: str) -> None:
    with daemon(home, ask={"answer": ""}) as running:
        result = called(home, "ask", "Where is it?", *words)
    assert (result.exit_code, running.asked) == (2, [])
    assert why in result.stderr


def test_flush_and_consolidate(home: Home) -> None:
    flushed = {"flushed": [EYRE.id], "failed": [], "generation": 2, "dry_run": True}
    solved = {"generation": 3, "changed": False, "figures": {"norm_ratio": {"4": float("nan")}}}
    with daemon(home, flush=flushed, consolidate=solved) as running:
        result = called(home, "flush", "--dry-run")
        assert (result.exit_code, f"1  {EYRE.id}" in result.stdout) == (0, True)
        assert read(called(home, "consolidate", "--json"))["figures"]["norm_ratio"]["4"] == "nan"
    assert running.asked == [("flush", {"dry_run": True}), ("consolidate", {"dry_run": False})]
    with daemon(home, flush={**flushed, "kept": [OSLO.id]}):
        kept = called(home, "flush")
        assert (kept.exit_code, f"kept              1  {OSLO.id}" in kept.stdout) == (0, True)
    with daemon(home, flush={**flushed, "failed": [OSLO.id]}):
        assert called(home, "flush").exit_code == 1
    with daemon(home, flush={**flushed, "verdict": "revert", "reasons": ["norm"]}):
        assert called(home, "flush").exit_code == 1


@pytest.mark.parametrize(("verdict", "code"), [("keep", 0), ("consolidate", 0), ("revert", 4)])
def test_audit(home: Home, verdict: str, code: int) -> None:
    reply = {"audit": 3, "verdict": verdict, "reasons": ["norm"], "figures": {"perplexity": 8.5}}
    with daemon(home, audit=reply):
        result = called(home, "audit")
    assert result.exit_code == code
    for part in (verdict, "norm", "perplexity", "8.5"):
        assert part in result.stdout


REVERTED = {"reverted": [EYRE.id], "restored": [], "generation": 2, "answers": {}}


@pytest.mark.parametrize(
    "words",
    [[], ["--yes"], [EYRE.id, "--generation", "1", "--yes"], [EYRE.id], ["--generation", "1"]],
)
def test_revert_wants_one_thing_and_an_answer(home: Home, words: list[str]) -> None:
    with daemon(home, revert=REVERTED) as running:
        assert called(home, "revert", *words).exit_code == 2
    assert running.asked == []


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["a", "b", "--yes"], {"facts": ["a", "b"], "generation": None, "dry_run": False}),
        (["a", "--dry-run"], {"facts": ["a"], "generation": None, "dry_run": True}),
        (["--generation", "0", "--yes"], {"facts": [], "generation": 0, "dry_run": False}),
    ],
)
def test_revert_without_a_question(home: Home, words: list[str], arguments: dict[str, Any]) -> None:
    with daemon(home, revert=REVERTED) as running:
        result = called(home, "revert", *words)
    assert (result.exit_code, running.asked) == (0, [("revert", arguments)])
    assert EYRE.id in result.stdout


def test_revert_asks_on_a_terminal(home: Home) -> None:
    with daemon(home, revert=REVERTED) as running:
        code, seen = on_terminal(home, "revert", EYRE.id, typed="n\n")
        assert (code, running.asked) == (1, [])
        assert "Lake Eyre" in seen
        assert "Take these facts out? [y/N]" in seen
        assert on_terminal(home, "revert", "nothing", typed="y\n")[0] == 1
        assert running.asked == []
        assert on_terminal(home, "revert", EYRE.id, typed="y\n")[0] == 0
        code, seen = on_terminal(home, "revert", "--generation", "0", typed="y\n")
    assert (code, "Go back to generation 0?" in seen) == (0, True)
    assert len(running.asked) == 2
