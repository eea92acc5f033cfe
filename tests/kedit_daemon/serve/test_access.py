"""Who is let in."""

from collections.abc import Callable
from pathlib import Path

import openai
import pytest
from serving import NAME, server

from kedit_daemon.serve.access import MAX_CLIENTS, RateLimiter

TOKEN = "a-token-of-many-characters"
CLOSED = ("/v1/models", "/ready", "/metrics")


@pytest.fixture
def folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


def test_a_token_opens_everything_and_health_is_open_without(tmp_path: Path, folder: Path) -> None:
    with server(tmp_path / "home", folder, TOKEN) as running, running.http() as http:
        wrong = ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff")
        for path in CLOSED:
            for said in wrong:
                answer = http.get(path, headers={"Authorization": said.encode("latin-1")})
                assert answer.status_code == 401, (path, said)
                assert answer.headers["www-authenticate"] == "Bearer"
            shown = {"Authorization": f"bearer {TOKEN}", "Host": "models.example"}
            assert http.get(path, headers=shown).status_code != 401
        assert http.post("/facts", content=b"{}").status_code == 401
        assert http.get("/health").json() == {"status": "ok"}
        with running.client("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
        with running.client(TOKEN) as client:
            assert client.models.list().data


def test_without_a_token_only_this_machines_own_name_is_answered_to(
    tmp_path: Path, folder: Path
) -> None:
    with server(tmp_path / "home", folder) as running, running.http() as http:
        for host in ("localhost:80", "127.0.0.1", "[::1]:8000"):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 200
        for host in ("evil.example", "localhost.evil.example", "10.0.0.1", "[", ""):
            assert http.get("/v1/models", headers={"Host": host}).status_code == 403, host


def test_a_page_of_another_server_changes_nothing(tmp_path: Path, folder: Path) -> None:
    with server(tmp_path / "home", folder) as running, running.http() as http:
        for origin, status in (("http://evil.example", 403), ("null", 403), (running.url, 422)):
            answer = http.post("/facts", content=b"", headers={"Origin": origin})
            assert answer.status_code == status, origin
        assert http.get("/v1/models", headers={"Origin": "http://evil.example"}).is_success


def test_an_allowed_origin_uses_the_api_from_a_browser(tmp_path: Path, folder: Path) -> None:
    origins = ["app://obsidian.md", "http://localhost:3000"]
    home = tmp_path / "home"
    with server(home, folder, TOKEN, allowed_origins=origins) as running, running.http() as http:
        for origin in origins:
            asked = {
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
            }
            for path in ("/v1/chat/completions", "/facts"):
                answer = http.options(path, headers=asked)  # without a token, as browsers do
                assert answer.status_code == 200, answer.text
                assert answer.headers["access-control-allow-origin"] == origin
                assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
            refused = http.post("/facts", content=b"", headers={"Origin": origin})
            assert refused.status_code == 401
            shown = {"Origin": origin, "Authorization": f"Bearer {TOKEN}"}
            given = {"model": NAME, "prompt": "Rome", "max_tokens": 1}
            said = http.post("/v1/completions", json=given, headers=shown)
            assert said.status_code == 200
            assert http.post("/facts", content=b"", headers=shown).status_code == 422
            for seen in (refused, said):
                assert seen.headers["access-control-allow-origin"] == origin
            assert "x-kedit-facts" in said.headers["access-control-expose-headers"]


def test_other_origins_and_pages_stay_closed(tmp_path: Path, folder: Path) -> None:
    allowed = {"Origin": "http://localhost:3000"}
    home = tmp_path / "home"
    with (
        server(home, folder, allowed_origins=[allowed["Origin"]]) as running,
        running.http() as http,
    ):
        asked = {"Access-Control-Request-Method": "POST"}
        for origin in ("http://localhost:3001", "https://localhost:3000", "null"):
            other = {"Origin": origin}
            preflight = http.options("/facts", headers=asked | other)
            posted = http.post("/facts", content=b"", headers=other)
            assert (preflight.status_code, posted.status_code) == (400, 403), origin
            for answer in (preflight, posted, http.get("/v1/models", headers=other)):
                assert "access-control-allow-origin" not in answer.headers
        assert "allowed_origins" in posted.json()["error"]["message"]
        for path in ("/", "/facts", "/ask", "/metrics"):
            assert "access-control-allow-origin" not in http.get(path, headers=allowed).headers
        assert http.post("/ask", headers=allowed).status_code == 403
    with server(tmp_path / "other", folder) as running, running.http() as http:
        assert http.options("/facts", headers=asked | allowed).status_code == 405


def test_a_client_may_ask_so_often_and_is_told_when_again(tmp_path: Path, folder: Path) -> None:
    asked = {"model": NAME, "prompt": "Rome", "max_tokens": 1}
    home = tmp_path / "home"
    with server(home, folder, requests_per_minute=2) as running, running.http() as http:
        said = [http.post("/v1/completions", json=asked) for _ in range(3)]
        assert [a.status_code for a in said] == [200, 200, 429]
        assert 1 <= int(said[2].headers["retry-after"]) <= 30
        assert said[2].json()["error"]["type"] == "rate_limit_error"
        assert http.get("/ready").status_code == 503
        assert http.get("/metrics").status_code == 200


def test_what_a_client_does_not_use_is_saved_for_a_minute() -> None:
    now = [0.0]
    rate = RateLimiter(3, lambda: now[0])
    assert [rate.check_rate("a") for _ in range(4)] == [0, 0, 0, 20]
    assert rate.check_rate("b") == 0
    now[0] = 19.0
    assert rate.check_rate("a") == 1
    now[0] = 20.0
    assert [rate.check_rate("a"), rate.check_rate("a")] == [0, 20]
    now[0] = 1000.0
    assert [rate.check_rate("a") for _ in range(4)] == [0, 0, 0, 20]


def test_clients_that_are_long_silent_are_forgotten() -> None:
    rate = RateLimiter(1, lambda: 0.0)
    assert rate.check_rate("first") == 0
    for number in range(MAX_CLIENTS - 1):
        rate.check_rate(str(number))
    assert rate.check_rate("first") == 60
    for number in range(MAX_CLIENTS):
        rate.check_rate(str(number))
    assert rate.check_rate("first") == 0
