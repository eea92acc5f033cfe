"""No text of a fact, a file or an answer can act on the terminal or the page that shows it."""

import io
import json
import logging
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import NOW, ROOT, daemon, on_terminal
from hostile_tools import SGR, TEXTS, acting, good
from serve_tools import browser, send

from kedit_daemon.home import Home
from kedit_daemon.serve.dashboard.ask_page import AnswerPair, AskedPrompt
from kedit_daemon.system.log_setup import configure_logging
from memory.db.store import Store
from memory.facts import Fact, FactState, Neighbour

ALL = " ".join(TEXTS.values())
FACTS = [
    Fact(
        f"{key} {text}",
        f"{{}} {text}",
        text,
        (f"{{}} once more {text}",),
        (Neighbour(f"near {text}", text),),
        external_id=f"{key}{text}",
        source=text,
        tags=(text, "x"),
    )
    for key, text in TEXTS.items()
]
STATES = (
    FactState.LIVE_SIDE,
    FactState.LIVE_WEIGHTS,
    FactState.FAILED,
    FactState.REJECTED,
    FactState.REVERTED,
)
# As they would stand in a page if they were not escaped.
MARKUP = ("<script>alert(1)", "<img src=x", '"" onload=', "<bad")
FILE = os.fsdecode(b"bad\x1b[2J\n\xff\xe2\x80\xae.jsonl")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """All that is kept as text is hostile."""
    home = Home(tmp_path_factory.mktemp("shown") / "home")
    home.create_folders()
    home.config_file.write_text("")
    with closing(Store(home.database_file, lambda: NOW)) as store, store.db.transaction():
        for number, fact in enumerate(FACTS):
            store.receive_fact(fact, FILE.encode(errors="replace").decode(), number % 2 == 0)
            state = STATES[number % len(STATES)]
            said = {"before": f"was {ALL}", "after": f"is {fact.target}"}
            tier = "side" if state is FactState.LIVE_SIDE else None
            store.change_state(fact.id, state, tier=tier, reason=ALL, **said)
            store.add_edit(fact.id, "side", None, 1.5, ALL, {ALL: ALL})
            store.db.write_event(
                "quarantined", fact.id, fact={"subject": ALL, "prompt": "{}", "target": ALL}
            )
        store.add_audit(0, "revert", {"norm_ratio": {ALL: 1.5}, ALL: ALL}, [ALL], 0.5)
        store.db.write_event("audit", figures={ALL: [ALL]}, reasons=[ALL], verdict=ALL)
        store.db.write_event("file_refused", file=ALL, problem=ALL, remedy=ALL)
        store.db.write_event("record_failed", file=ALL, line=1, problem=ALL, remedy=ALL)
        store.db.write_event(f"odd {SGR}", **{ALL: ALL})
        for name in ("model", "device", "paused", "flush_held"):
            store.db.set_meta(name, f"{name} {ALL}")
        store.finish_job(store.start_job("audit", NOW), "failed", ALL)
    error = {"line": 3, "problem": ALL, "remedy": ALL, "record": ALL}
    report = {"file": ALL, "at": "2026-01-01T00:00:00Z", "errors": [error]}
    (home.inbox_folder / "failed" / f"{FILE}.error.json").write_text(json.dumps(report))
    return home


READING = [
    ["status"],
    ["facts"],
    ["facts", "--subject", ALL],
    *(["show", fact.id] for fact in FACTS[:6]),
    ["show", "x\x1b[2J\u202e"],
    ["show", FILE],
    ["log"],
    ["log", "--fact", FACTS[0].id],
    ["log", "--fact", ALL],
    ["log", "verify"],
    ["log", "export"],
    ["log", "export", "--format", "md"],
    ["log", "export", "--format", "csv"],
    ["doctor"],
    ["revert", "--dry-run", ALL],
    ["frob\x1b[2J\u202e"],
    ["--\x1b[2J\u202e"],
    ["facts", "--state", "\x1b[2J\u202e"],
    ["log", "--kind", "\x1b[2J\u202e"],
    ["log", "--since", "\x1b[2J\u202e"],
    ["completion", "\x1b[2J\u202e"],
    ["submit", "\x1b[2J\u202e"],
]


@pytest.mark.parametrize("words", READING, ids=lambda w: repr(" ".join(w))[:40])
def test_no_command_hands_it_to_a_terminal(home: Home, words: list[str]) -> None:
    _, shown = on_terminal(home, *words)
    assert len(shown) > 10
    assert acting(shown) == ""
    assert "Traceback" not in shown and "error[unexpected]" not in shown


@pytest.mark.parametrize("words", READING[:17:2], ids=lambda w: repr(" ".join(w))[:40])
@pytest.mark.parametrize("more", [(), ("--json",)])
def test_nor_to_a_pipe(home: Home, words: list[str], more: tuple[str, ...]) -> None:
    if more and words[:2] in (["log", "verify"], ["log", "export"]):
        return
    command = [sys.executable, "-m", "kedit_daemon", "--home", str(home.root), *words, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert acting((done.stdout + done.stderr).decode()) == ""


def test_what_is_shown_is_there_at_all(home: Home) -> None:
    """Or the tests above would hold for a program that shows nothing."""
    shown = on_terminal(home, "facts")[1]
    for key in TEXTS:
        assert key in shown
    assert "owned" in on_terminal(home, "log", "export", "--format", "md")[1]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_offered_nothing_that_acts(home: Home, shell: str) -> None:
    names = {"bash": "bash_complete", "zsh": "zsh_complete", "fish": "fish_complete"}
    for words in ("show ", "revert ", "log --fact ", "show c", "show bad"):
        line = f"kedit-daemon --home {home.root} {words}"
        environ = {
            **os.environ,
            "_KEDIT_DAEMON_COMPLETE": names[shell],
            "COMP_WORDS": line,
            # Fish hands over the word itself.
            "COMP_CWORD": line.split(" ")[-1] if shell == "fish" else str(len(line.split(" ")) - 1),
        }
        done = subprocess.run(
            [sys.executable, "-m", "kedit_daemon"], cwd=ROOT, env=environ, capture_output=True
        )
        assert done.stderr == b""
        assert acting(done.stdout.decode()) == ""
        if words == "show ":
            assert FACTS[0].id in done.stdout.decode()
            assert "bad" not in [w for w in done.stdout.decode().split() if FILE.startswith(w)]


def reply(text: str) -> dict[str, Any]:
    fired = {
        "fact": FACTS[0].id,
        "subject": text,
        "prompt": f"{{}} {text}",
        "target": text,
        "tier": "side",
        "score": 0.9,
        "margin": 1.0,
    }
    return {"answer": text, "base_answer": text, "generation": 1, "seconds": 0.1, "fired": [fired]}


def test_answers_of_the_model(home: Home) -> None:
    with daemon(home, ask=reply(ALL)):
        for more in ([], ["--base", "--explain"], ["--json"]):
            code, shown = on_terminal(home, "ask", ALL.replace("\0", ""), *more)
            assert code == 0 and "owned" in shown
            assert acting(shown) == ""


def test_records_that_are_handed_in(home: Home, tmp_path: Path) -> None:
    bad = [{"subject": text, "prompt": "{}", "target": text, text: 1} for text in TEXTS.values()]
    bad += [
        {"subject": "x", "prompt": "{}", "target": "y", "valid_from": t} for t in TEXTS.values()
    ]
    file = tmp_path / "\x1b[2J\u202e.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in bad) + "\x1b[2J\n")
    for more in ([], ["--format", "\x1b[2J"]):
        _, shown = on_terminal(home, "submit", "--dry-run", str(file), *more)
        assert ":1: " in shown or more
        assert acting(shown) == ""
    file.write_bytes(
        b"".join(
            json.dumps({**json.loads(good(t)), "target": t}).encode() + b"\n"
            for t in TEXTS.values()
        )
    )
    code, shown = on_terminal(home, "submit", "--dry-run", str(file))
    assert code == 0 and "owned" in shown and acting(shown) == ""


def test_pages(home: Home) -> None:
    async def ask(asked: AskedPrompt, max_tokens: int) -> AnswerPair:
        return AnswerPair(ALL, ALL, 0, (FACTS[0].id,))

    client = browser(home, clock=lambda: NOW, ask_both=ask)
    paths = ["/", "/norms", "/norms?view=close", "/log", "/facts", "/ask", "/nothing<bad"]
    paths += [f"/facts/{fact.id}" for fact in FACTS]
    paths += [f"/ask?fact={fact.id}" for fact in FACTS[:4]]
    pages = {path: client.get(path) for path in paths}
    for where in ("/log", "/facts", "/norms", "/"):
        given = dict.fromkeys(("text", "subject", "since", "kind", "fact", "state", "last"), ALL)
        pages[f"{where}?…"] = client.get(where, params=given)
    pages["asked"] = send(client, "/ask", "/ask", prompt=ALL, tokens="20")
    chat = {"form": "chat", "system": ALL}
    pages["asked in a chat"] = send(client, "/ask", "/ask", prompt=ALL, **chat)
    pages["refused"] = send(client, "/revert", "/", facts=ALL, fact=ALL)
    for path, page in pages.items():
        assert page.status_code < 500 or page.status_code == 503, (path, page.text)
        assert acting(page.text.replace("\t", "")) == "", path
        assert not [raw for raw in MARKUP if raw in page.text], path
        assert all(acting(f"{k}: {v}") == "" for k, v in page.headers.items())
    assert "owned" in pages["/facts"].text and "owned" in pages["asked"].text


def test_what_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr(sys, "stderr", seen)
    before, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        configure_logging(False, {})
        try:
            raise ValueError(f"{ALL}\nsecond line")
        except ValueError:
            logging.exception("of %s\nforged", ALL)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert "owned" in seen.getvalue() and "second line" in seen.getvalue()
    assert acting(seen.getvalue()) == ""
    assert seen.getvalue().splitlines()[1].startswith("Traceback")
