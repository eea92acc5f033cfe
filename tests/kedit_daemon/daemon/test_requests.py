"""What may be asked of the daemon, and what is said of anything else."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from editing_home import Bench, seat

from kedit_daemon.control import ControlRequest
from kedit_daemon.daemon.requests import answer_request, execute_command
from memory.errors import KeditError
from memory.facts import FactState


@pytest.mark.parametrize(
    ("name", "given", "why"),
    [
        ("ask", {}, "prompt is missing"),
        ("ask", {"prompt": ["x"]}, "prompt: Input should be a valid string"),
        ("ask", {"prompt": "x", "max_tokens": "7"}, "max_tokens: Input should be a valid integer"),
        ("ask", {"prompt": "x", "max_tokens": 0}, "max_tokens"),
        ("ask", {"prompt": "x", "promt": "y"}, "promt: Extra inputs"),
        ("ask", {"messages": []}, "messages"),
        ("ask", {"messages": [{"role": "user"}]}, r"messages\.0\.content"),
        ("ask", {"messages": [{"role": "tool", "content": "x"}]}, r"messages\.0\.role"),
        ("ask", {"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's"),
        ("ask", {"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "both given"),
        ("flush", {"dry_run": "yes"}, "dry_run"),
        ("revert", {"facts": "abc"}, "facts"),
        ("revert", {"facts": [1]}, r"facts\.0"),
        ("revert", {"generation": 1 << 63}, "generation"),
        ("revert", {"generation": -1}, "generation"),
        ("frob", {}, "no command 'frob'"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    bench: Callable[..., Bench], name: str, given: dict[str, Any], why: str
) -> None:
    with pytest.raises(KeditError, match=why) as caught:
        execute_command(bench().editor, name, given)
    assert caught.value.code == "bad-request" and caught.value.hint


def test_orders_are_carried_out(bench: Callable[..., Bench]) -> None:
    at = bench()
    at.receive(seat(1))
    asked = {"prompt": "The seat of country 1 is", "max_tokens": 2, "base": True, "explain": None}
    assert {"answer", "base_answer"} <= execute_command(at.editor, "ask", asked).keys()
    assert execute_command(at.editor, "revert", {"facts": [seat(1).id], "dry_run": True})["dry_run"]
    assert at.store.find_fact(seat(1).id).state is FactState.RECEIVED
    execute_command(at.editor, "revert", {"facts": [seat(1).id], "generation": None})
    assert at.store.find_fact(seat(1).id).state is FactState.REVERTED


def test_a_model_without_a_chat_template_is_not_asked_in_a_chat(
    bench: Callable[..., Bench],
) -> None:
    at, asked = bench(), {"messages": [{"role": "user", "content": "Hello"}]}
    with pytest.raises(KeditError, match="no chat template") as caught:
        execute_command(at.editor, "ask", asked)
    assert (caught.value.code, "without --chat" in caught.value.hint) == ("no-chat-template", True)
    at.served.model.tokenizer.chat_template = "{{ raise_exception('no such talk') }}"
    with pytest.raises(KeditError, match="refuses: no such talk") as caught:
        execute_command(at.editor, "ask", asked)
    assert (caught.value.code, bool(caught.value.hint)) == ("bad-request", True)


def refused(at: Bench, monkeypatch: pytest.MonkeyPatch, error: Exception) -> dict[str, Any]:
    def fail(*_: object) -> None:
        raise error

    request = ControlRequest("flush", {})
    monkeypatch.setattr(at.editor, "run_flush", fail)
    answer_request(request, at.editor, None, at.home.state_folder)
    return dict(json.loads(request.reply_queue.get_nowait()[1]))


def test_a_file_that_is_gone_is_no_disk_that_fails(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench()
    said = refused(at, monkeypatch, FileNotFoundError(2, "No such file", "/x"))
    assert (said["code"], said["hint"]) == ("unexpected", "")
    said = refused(at, monkeypatch, sqlite3.IntegrityError("UNIQUE constraint failed"))
    assert said["code"] == "unexpected"


def test_a_database_that_another_holds_refuses_the_order(bench: Callable[..., Bench]) -> None:
    at = bench()
    at.receive(seat(1))
    at.store.db.conn.execute("PRAGMA busy_timeout=0")
    request = ControlRequest("revert", {"facts": [seat(1).id]})
    with closing(sqlite3.connect(Path(at.home.database_file))) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError):
            answer_request(request, at.editor, None, at.home.state_folder)
    said = json.loads(request.reply_queue.get_nowait()[1])
    assert (said["code"], said["exit_code"]) == ("busy", 75)
