"""Whoever guesses tokens is held back, and how long a comparison takes tells nothing."""

import hmac
from collections.abc import Callable
from pathlib import Path

import pytest
from serve_tools import OWN, application, browser, form_token
from serving import NAME, server
from starlette.testclient import TestClient

from kedit_daemon.home import Home
from kedit_daemon.serve.dashboard.login import MAX_WRONG_TOKENS

TOKEN = "a-token-of-many-characters"


def sign_in(client: TestClient, token: str) -> tuple[int, int, str]:
    """The status, after how many seconds it may be tried again, and the page."""
    fields = {"token": token, "form_token": form_token(client.get("/sign-in").text)}
    answer = client.post("/sign-in", data=fields, headers={"Origin": OWN}, follow_redirects=False)
    return answer.status_code, int(answer.headers.get("retry-after", 0)), answer.text


def test_who_guesses_at_the_sign_in_is_held_back_and_nobody_else(tmp_path: Path) -> None:
    now = [0.0]
    Home(tmp_path).create_folders()
    app = application(Home(tmp_path), TOKEN, monotonic=lambda: now[0])
    guessing = TestClient(app, base_url=OWN, client=("10.0.0.1", 1))
    other = TestClient(app, base_url=OWN, client=("10.0.0.2", 1))
    for _ in range(MAX_WRONG_TOKENS):
        assert sign_in(guessing, "wrong")[0] == 403
    status, seconds, page = sign_in(guessing, "wrong")
    assert (status, seconds, "Try again in 6 s" in page) == (429, 6, True)
    assert sign_in(guessing, TOKEN)[0] == 429  # not even the right one is looked at
    assert guessing.get("/facts", follow_redirects=False).status_code == 303
    assert sign_in(other, TOKEN)[0] == 303
    assert other.get("/", follow_redirects=False).status_code in (200, 503)
    now[0] = 6.0
    assert [sign_in(guessing, "wrong")[0] for _ in range(2)] == [403, 429]
    now[0] = 12.0
    assert sign_in(guessing, TOKEN)[0] == 303
    assert guessing.get("/", follow_redirects=False).status_code in (200, 503)


def test_to_sign_in_often_is_no_offence(tmp_path: Path) -> None:
    Home(tmp_path).create_folders()
    client = browser(Home(tmp_path), TOKEN, monotonic=lambda: 0.0)
    for _ in range(MAX_WRONG_TOKENS + 5):
        assert sign_in(client, TOKEN)[0] == 303
        client.cookies.clear()


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What is compared in a time that does not depend on where it differs."""
    seen: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def compare(one: bytes, two: bytes) -> bool:
        seen.append((one, two))
        return real(one, two)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    return seen


def test_tokens_are_compared_in_constant_time(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    compared: list[tuple[bytes, bytes]],
) -> None:
    with server(tmp_path, model_folder("llama"), TOKEN) as running, running.http() as http:
        for said in (TOKEN, TOKEN[:-1], "x"):
            http.get("/v1/models", headers={"Authorization": f"Bearer {said}"})
            assert compared.pop() == (said.encode(), TOKEN.encode())
            http.cookies.clear()
            page = http.get("/sign-in")
            fields = {"token": said, "form_token": form_token(page.text)}
            http.post("/sign-in", data=fields, headers={"Origin": running.url})
            sides = [one for pair in compared for one in pair if isinstance(one, bytes)]
            assert TOKEN.encode() not in sides  # digests, so that not even the length shows
            assert len(compared) == 2  # of the form's own token, and of the person's
            compared.clear()


def test_a_request_cannot_ask_for_a_batch_without_end(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    with server(tmp_path, model_folder("llama")) as running, running.http() as http:
        asked = {"model": NAME, "prompt": "Rome", "max_tokens": 1}
        for more in ({"n": 10**6}, {"prompt": ["Rome"] * 10**4}, {"max_tokens": 10**9}, {"n": -1}):
            answer = http.post("/v1/completions", json=asked | more)
            assert answer.status_code in (400, 413, 422, 429), (more, answer.status_code)
        assert http.post("/v1/completions", json=asked).is_success
