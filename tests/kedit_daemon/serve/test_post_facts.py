"""Facts that come in over HTTP."""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from editing_home import seat
from serving import Running, server

from kedit_daemon.config import Config
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from memory.db.store import Store
from memory.facts import Fact, FactState

OTHER = seat(12, "Lima")


@pytest.fixture
def running(tmp_path: Path, model_folder: Callable[[str], Path]) -> Iterator[Running]:
    with server(tmp_path / "home", model_folder("llama"), max_body_bytes=4000) as found:
        yield found


def line(fact: Fact, **more: Any) -> bytes:
    record = {"subject": fact.subject, "prompt": fact.prompt, "target": fact.target} | more
    return json.dumps(record).encode() + b"\n"


def in_inbox(running: Running) -> list[str]:
    return sorted(path.name for path in running.home.inbox_folder.iterdir() if path.is_file())


def take(running: Running, stop: FactState | None = None) -> int:
    """What the daemon does with its inbox; then all facts move on to a state. How many files."""
    store = Store(running.home.database_file, lambda: datetime.now(UTC))
    inbox = Inbox(running.home.inbox_folder, 0.0, 100_000, lambda: datetime.now(UTC))
    intake = Intake(store, inbox, Config())
    inbox.claim_files(0.0)
    claims = inbox.pending_claims()
    for claim in claims:
        intake.take_file(claim)
    with store.db.transaction():
        for fact in store.list_facts((FactState.RECEIVED,)) if stop else ():
            store.change_state(fact.id, stop or FactState.RECEIVED, reason="because")
    store.close()
    return len(claims)


def test_facts_go_into_the_inbox_and_are_named(running: Running) -> None:
    body = line(seat(11)) + b"{broken\n" + line(OTHER)
    with running.http() as http:
        answer = http.post("/facts", content=body)
    assert answer.status_code == 202
    told = answer.json()
    assert told["ids"] == [seat(11).id, OTHER.id]
    assert told["problems"][0]["line"] == 2
    assert told["problems"][0]["problem"] and told["problems"][0]["remedy"]
    assert in_inbox(running) == [told["file"]]
    assert (running.home.inbox_folder / told["file"]).read_bytes() == body
    with running.http() as http:
        again = http.post("/facts", content=body).json()
    assert again["file"] != told["file"]


def test_every_format_of_the_inbox_is_taken(running: Running) -> None:
    table = f"subject,prompt,target\n{OTHER.subject},{OTHER.prompt},{OTHER.target}\n"
    with running.http() as http:
        for query in ("", "?format=csv"):
            assert http.post(f"/facts{query}", content=table).json()["ids"] == [OTHER.id]
        wrong = http.post("/facts?format=cvs", content=table)
        assert wrong.status_code == 400
        assert "did you mean csv?" in wrong.json()["error"]["message"]
        assert wrong.json()["error"]["param"] == "format"


def test_without_a_fact_nothing_is_handed_in(running: Running) -> None:
    with running.http() as http:
        for body in (b"", b"{broken\n"):
            answer = http.post("/facts", content=body)
            assert answer.status_code == 422
            (problem,) = answer.json()["problems"]
            assert problem["line"] == 1 and problem["remedy"]
        assert http.post("/facts", content=line(OTHER, tags=["x" * 5000])).status_code == 413
    assert in_inbox(running) == []


def test_the_parts_of_a_form_are_refused_whole(running: Running) -> None:
    with running.http() as http:
        for name in ("facts.jsonl", "facts.csv"):
            answer = http.post("/facts", files={"file": (name, line(OTHER) * 2)})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (415, "unsupported")
            assert error["param"] == "Content-Type"
            assert "--data-binary @FILE" in error["message"] and "problems" not in answer.json()
        # What curl says of --data-binary.
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert http.post("/facts", content=line(OTHER), headers=form).status_code == 202
    assert len(in_inbox(running)) == 1


def test_a_key_counts_once_wherever_its_file_is(running: Running) -> None:
    key, body = {"Idempotency-Key": "order 66"}, line(OTHER)
    with running.http() as http:

        def again() -> None:
            answer = http.post("/facts", content=body, headers=key)
            assert (answer.status_code, answer.content) == (202, first.content)
            other = http.post("/facts", content=line(seat(13)), headers=key)
            assert other.status_code == 409
            assert other.json()["error"]["code"] == "idempotency_key_reused"

        first = http.post("/facts", content=body, headers=key)
        assert first.status_code == 202
        name = first.json()["file"]
        assert in_inbox(running) == [name]
        again()
        assert in_inbox(running) == [name]
        inbox = Inbox(running.home.inbox_folder, 0.0, 100_000, lambda: datetime.now(UTC))
        assert len(inbox.claim_files(0.0)) == 1
        again()
        assert in_inbox(running) == []
        assert take(running) == 1
        shutil.rmtree(running.home.inbox_folder / "done")
        again()
        assert in_inbox(running) == []
        http.post("/facts", content=body, headers={"Idempotency-Key": "order 67"})
        assert len(in_inbox(running)) == 1


def test_two_requests_with_one_key_at_once_hand_in_once(running: Running) -> None:
    answers = []

    def post(body: bytes) -> None:
        with running.http() as http:
            key = {"Idempotency-Key": "k"}
            answers.append(http.post("/facts", content=body, headers=key).status_code)

    threads = [threading.Thread(target=post, args=(line(seat(11 + n % 2)),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [202, 202, 202, 409, 409, 409]
    assert len(in_inbox(running)) == 1


def test_keys_that_are_none(running: Running) -> None:
    with running.http() as http:
        for key in ("", "k" * 256):
            answer = http.post("/facts", content=line(OTHER), headers={"Idempotency-Key": key})
            assert (answer.status_code, in_inbox(running)) == (400, [])


def test_waiting_ends_when_all_facts_are_settled(running: Running) -> None:
    def settle() -> None:
        while not in_inbox(running):
            time.sleep(0.05)
        take(running, FactState.FAILED)

    settling = threading.Thread(target=settle)
    settling.start()
    with running.http() as http:
        answer = http.post("/facts?wait=20", content=line(OTHER))
    settling.join()
    assert answer.status_code == 200
    assert answer.json()["facts"] == [{"id": OTHER.id, "state": "failed", "reason": "because"}]


def test_waiting_ends_after_the_time_that_was_given(running: Running) -> None:
    with running.http() as http:
        answer = http.post("/facts?wait=0.1", content=line(OTHER))
        assert answer.status_code == 202
        assert answer.json()["facts"] == [{"id": OTHER.id, "state": "received", "reason": None}]
        for wrong in ("-1", "soon", "nan", "1e9"):
            assert http.post(f"/facts?wait={wrong}", content=line(OTHER)).status_code == 400


def test_nobody_waits_for_a_client_that_has_left(running: Running) -> None:
    with running.http() as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/facts?wait=20", content=line(OTHER), timeout=0.5)
        deadline = time.monotonic() + 5
        while 'kedit_http_requests_total{route="/facts",status="499"} 1.0' not in (
            http.get("/metrics").text
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
