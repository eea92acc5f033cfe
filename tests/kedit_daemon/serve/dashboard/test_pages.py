"""The pages, over a home that answers commands on a tiny model, and over homes that do not."""

import queue
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from command_line import EVIL, EYRE, NOW, OSLO, daemon
from command_line import make_home as written_home
from editing_home import LOOSE, Bench, Clock, seat
from serve_tools import OWN, application, browser, by_daemon, form_token, send, text_of
from starlette.testclient import TestClient
from tiny_models import CITIES

from kedit_daemon.config import Config
from kedit_daemon.daemon.loop import Daemon
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.serve.dashboard.ask_page import AnswerPair, AskedPrompt
from kedit_daemon.serve.dashboard.login import MAX_SESSIONS, NONCE_COOKIE, SESSION_COOKIE
from kedit_daemon.serve.dashboard.pages import PAGE_SIZE
from kedit_daemon.system import lock
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState

pytestmark = pytest.mark.timeout(120)

TOKEN = "a-long-and-random-word"
PAGES = ("/", "/norms", "/log", "/facts", "/ask")
HOSTILE = Fact("<script>alert(1)</script>\x1b[2J", "{} \u202e is", "<b>\x07&amp;</b>")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with a history and no daemon; a fact of hostile text is in it."""
    made = written_home(tmp_path / "home")
    with written(made) as store, store.db.transaction():
        store.receive_fact(HOSTILE, "<i>.jsonl", False)
        said = {"before": "\x1b]0;owned\x07 one two", "after": "one <script>three</script>"}
        store.change_state(HOSTILE.id, FactState.LIVE_SIDE, tier="side", **said)
    return made


class written:
    """The home's store, open for writing within the block."""

    def __init__(self, home: Home) -> None:
        self._store = Store(home.database_file, lambda: NOW)

    def __enter__(self) -> Store:
        return self._store

    def __exit__(self, *_: object) -> None:
        self._store.close()


@pytest.fixture
def client(home: Home) -> TestClient:
    return browser(home, clock=lambda: NOW)


# What is shown ----------------------------------------------------------------------------------


def test_the_overview_of_a_daemon_that_does_not_run(client: TestClient) -> None:
    page = client.get("/")
    seen = text_of(page.text)
    assert page.status_code == 200
    assert "The daemon is not running" in seen
    assert "Start it with kedit-daemon run" in seen
    for part in ("In the weights 1", "Beside the weights 2", "Waiting 1", "keep", "fact live-side"):
        assert part in seen
    assert "norm ratio (4: 1.01)" in seen


def test_the_overview_says_what_needs_a_person(home: Home) -> None:
    with written(home) as store, store.db.transaction():
        store.change_state(OSLO.id, FactState.FAILED, reason="it would not")
        store.add_audit(1, "warn", {"norm_ratio": {"4": 1.2}}, ["norm of layer 4"], 0.1)
    page = browser(home, clock=lambda: NOW).get("/").text
    seen = text_of(page)
    assert "Needs a person: 1 fact has failed: it would not" in seen
    assert f"kedit-daemon show {OSLO.id}" in seen
    assert f'href="/facts/{OSLO.id}">Look here' in page
    assert "To know: the last audit says warn: norm of layer 4" in seen


def test_a_folder_without_a_home_is_explained(tmp_path: Path) -> None:
    client = browser(Home(tmp_path / "none"))
    seen = text_of(client.get("/").text)
    assert "kedit-daemon init and then kedit-daemon run" in seen
    assert "Nothing has happened yet" in seen
    for path in ("/norms", "/log", "/facts", f"/facts/{EYRE.id}", f"/ask?fact={EYRE.id}"):
        page = client.get(path)
        assert (page.status_code, "The daemon has not run here" in page.text) == (503, True), path
    assert client.get("/ask").status_code == 200


def test_an_empty_home_is_no_error(tmp_path: Path) -> None:
    made = Home(tmp_path / "home")
    made.create_folders()
    made.config_file.write_text("")
    with written(made):
        pass
    client = browser(made)
    assert "There are no facts yet" in client.get("/facts").text
    assert "Nothing has been measured yet" in client.get("/norms").text
    assert "No event is like that" in client.get("/log").text


def test_norms(home: Home) -> None:
    figures = {"norm_ratio": {"4": 1.2, "11": 1.05}, "perplexity_ratio": "nan", "agreement": 0.99}
    with written(home) as store, store.db.transaction():
        store.add_audit(1, "warn", {**figures, "retention": 0.9}, ["norm"], 0.1)
    client = browser(home, clock=lambda: NOW)
    page = client.get("/norms").text
    chart = re.search(r'<section class="chart" aria-labelledby="norm">.*?</section>', page, re.S)
    assert chart is not None
    assert "Now layer 4 is at 1.2. Thresholds: warn 1.15, consolidate 1.3, revert 1.6." in chart[0]
    assert '<title id="norm-title">Norm of each edited matrix, 2 measurements</title>' in chart[0]
    assert "audit 2 1.2 1.05 warn" in text_of(chart[0])  # the table; layers in their order
    assert len(re.findall("<polyline", chart[0])) == 4  # two curves and their marks below
    assert '<text class="limit warn"' in chart[0]
    assert '<text class="limit consolidate"' in chart[0]
    assert "Outside of this picture: revert 1.6" in chart[0]
    assert "consolidate 0.95" in page  # of retention, which falls
    assert "nan" in text_of(page)
    close = client.get("/norms?view=close").text
    assert "Outside of this picture: consolidate 1.3, revert 1.6" in text_of(close)


def test_norms_before_the_model_is_loaded(home: Home) -> None:
    page = browser(home, get_thresholds=lambda: None).get("/norms")
    assert (page.status_code, "not known until the model" in page.text) == (200, True)
    assert 'class="limit' not in page.text


@pytest.mark.parametrize(
    ("query", "kinds"),
    [
        (f"fact={OSLO.id}", ["fact live-weights", "fact received"]),
        ("fact=mine", ["fact live-side", "fact received"]),
        ("kind=audit", ["audit"]),
        ("subject=LAKE", ["fact live-side", "fact received"]),
        ("subject=lake&kind=fact_received", ["fact received"]),
        ("since=2026-03-01T12:00:01", []),
        ("since=1h&kind=stopped", ["stopped"]),
        ("subject=%25", []),
    ],
)
def test_the_log_is_filtered(client: TestClient, query: str, kinds: list[str]) -> None:
    page = client.get(f"/log?{query}").text
    found = re.findall(r'<span class="kind">([^<]*?)\s*<', page)
    assert [kind.strip() for kind in found] == kinds


def test_a_moment_that_cannot_be_read_is_explained(client: TestClient) -> None:
    page = client.get("/log?since=yesterday")
    assert page.status_code == 200
    assert "Since: write ISO-8601" in page.text
    assert "fact received" in page.text


def test_the_log_has_pages(home: Home) -> None:
    with written(home) as store, store.db.transaction():
        for _ in range(PAGE_SIZE):
            store.db.write_event("resumed")
    client = browser(home)
    page, seen = client.get("/log").text, list[str]()
    while True:
        seen += re.findall(r'id="event-(\d+)"', page)
        link = re.search(r'href="([^"]*before=\d+)"', page)
        if link is None:
            break
        page = client.get(link[1].replace("&amp;", "&")).text
    assert seen == [str(n) for n in range(len(seen), 0, -1)]
    assert len(seen) > PAGE_SIZE
    assert "The newest" in page


def test_the_log_shows_what_became_of_an_answer(client: TestClient) -> None:
    page = client.get(f"/log?fact={EYRE.id}").text
    assert "<del>Egypt</del> <ins>Australia</ins>" in page


@pytest.mark.parametrize("path", ["/", "/log?kind=fact_reverted", f"/facts/{EYRE.id}"])
def test_a_revert_shows_the_answer_that_went(home: Home, path: str) -> None:
    with written(home) as store, store.db.transaction():
        store.change_state(EYRE.id, FactState.REVERTED, reason="wrong", after="Egypt")
    page = browser(home, clock=lambda: NOW).get(path).text
    assert "<del>Australia</del> <ins>Egypt</ins>" in page


@pytest.mark.parametrize(
    ("query", "facts"),
    [
        ("", {EYRE, OSLO, EVIL, HOSTILE}),
        ("text=NORWAY", {OSLO}),
        ("text=eyre+lies+in", {EYRE}),
        (f"text={OSLO.id}", {OSLO}),
        ("text=mine", {EYRE}),
        ("state=live-side", {EYRE, HOSTILE}),
        ("state=live-side&text=eyre", {EYRE}),
        ("state=reverted", set()),
        ("state=nonsense&before=nonsense", {EYRE, OSLO, EVIL, HOSTILE}),
    ],
)
def test_facts_are_searched(client: TestClient, query: str, facts: set[Fact]) -> None:
    page = client.get(f"/facts?{query}").text
    assert set(re.findall(r'href="/facts/([0-9a-f]{12})"', page)) == {f.id for f in facts}


def test_facts_have_pages(home: Home) -> None:
    with written(home) as store, store.db.transaction():
        for n in range(PAGE_SIZE):
            store.receive_fact(Fact(f"Hill {n}", "{} lies in", "Peru"), "b.jsonl", False)
    client = browser(home)
    first = client.get("/facts").text
    link = re.search(r'href="([^"]*before=\d+)"', first)
    assert link is not None
    second = client.get(link[1].replace("&amp;", "&")).text
    shown = [set(re.findall(r'href="/facts/([0-9a-f]{12})"', page)) for page in (first, second)]
    assert (len(shown[0]), len(shown[1]), shown[0] & shown[1]) == (PAGE_SIZE, 4, set())


def test_a_fact(client: TestClient) -> None:
    page = client.get(f"/facts/{EYRE.id}").text
    seen = text_of(page)
    assert "The country that Lake Eyre lies in is → Australia" in seen
    for part in ("live-side", "in the side memory", "Before Egypt After Australia", "your id mine"):
        assert part in seen
    assert "answers yes" in seen  # the probe of its edit
    assert f'name="fact" value="{EYRE.id}"' in page
    assert client.get("/facts/mine").text == page
    missing = client.get("/facts/nothing")
    assert (missing.status_code, "there is no fact nothing" in missing.text) == (404, True)


def test_what_has_ended_cannot_be_reverted(home: Home) -> None:
    with written(home) as store, store.db.transaction():
        store.change_state(OSLO.id, FactState.REVERTED, reason="by hand")
    page = browser(home).get(f"/facts/{OSLO.id}").text
    assert "Why by hand" in text_of(page)
    assert "/actions/revert" not in page


# What is hidden ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/facts", "/log", f"/facts/{HOSTILE.id}"])
def test_hostile_text_is_never_raw(client: TestClient, path: str) -> None:
    page = client.get(path).text
    for raw in ("\x1b", "\u202e", "\x07", "<script>alert", "<script>three", "<b>", "<i>.jsonl"):
        assert raw not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\N{REPLACEMENT CHARACTER}[2J" in page


def test_what_a_person_writes_is_never_raw(client: TestClient) -> None:
    for path in ("/log?subject=", "/facts?text=", "/log?since=", "/facts/", "/sign-in?next="):
        page = client.get(path + '"><script>x</script>\u202e').text
        assert "<script>x" not in page
        assert "\u202e" not in page


def test_headers_let_nothing_in_from_elsewhere(client: TestClient) -> None:
    for path in (*PAGES, "/facts/none", "/static/pages.css", "/static/refresh.js"):
        found = client.get(path).headers
        assert "default-src 'none'" in found["content-security-policy"]
        assert "unsafe" not in found["content-security-policy"]
        assert found["x-content-type-options"] == "nosniff"
        assert found["referrer-policy"] == "same-origin"
    assert client.get("/").headers["cache-control"] == "no-store"


@pytest.mark.parametrize("path", [*PAGES, f"/facts/{HOSTILE.id}"])
def test_pages_need_nothing_inline_and_nothing_from_elsewhere(
    client: TestClient, path: str
) -> None:
    page = client.get(path).text
    assert not re.search(r"<style|<script(?! src=\"/static/)|\sstyle=|\son\w+=|javascript:", page)
    assert not re.search(r"(?:src|href|action)=\"(?!/|#)", page)
    assert not re.search(r"=\"//", page)


@pytest.mark.parametrize("path", [*PAGES, f"/facts/{EYRE.id}"])
def test_pages_are_made_for_everybody(client: TestClient, path: str) -> None:
    page = client.get(path).text
    assert '<html lang="en">' in page
    assert 'href="#main">Skip' in page
    assert page.count("<h1") == 1
    for field in re.findall(
        r"<(?:input|select|textarea) (?!type=\"hidden\")[^>]*id=\"([^\"]+)", page
    ):
        assert f'<label for="{field}">' in page
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^" ]+)', page)) <= set(ids)


# Who may ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/actions/flush", "/actions/flush/try", "/ask", "/sign-out"])
def test_foreign_forms_are_refused(home: Home, path: str) -> None:
    with daemon(home, flush={}) as running:
        client = browser(home)
        token = form_token(client.get("/").text)
        tries: list[tuple[dict[str, str], dict[str, str]]] = [
            ({}, {"Origin": OWN}),
            ({"form_token": ""}, {"Origin": OWN}),
            ({"form_token": "0" * 64}, {"Origin": OWN}),
            ({"form_token": "\u00e9"}, {"Origin": OWN}),
            ({"form_token": token}, {}),
            ({"form_token": token}, {"Origin": "null"}),
            ({"form_token": token}, {"Origin": "http://evil.example"}),
            ({"form_token": token}, {"Origin": OWN + "1"}),
        ]
        for fields, headers in tries:
            page = client.post(path, data={"prompt": "x", **fields}, headers=headers)
            assert (page.status_code, "open the page again" in page.text) == (403, True), fields
        client.cookies.clear()
        page = client.post(path, data={"form_token": token}, headers={"Origin": OWN})
        assert page.status_code == 403
    assert running.asked == []


@pytest.mark.parametrize("name", ["audit", "flush", "consolidate", "revert", "go-back"])
def test_actions_are_not_for_links(client: TestClient, name: str) -> None:
    assert client.get(f"/actions/{name}").status_code == 405
    assert client.get(f"/actions/{name}/try").status_code == 405


def test_another_server_s_forms_do_not_fit(home: Home) -> None:
    token = form_token(browser(home).get("/").text)
    client = browser(home)
    client.get("/")
    page = client.post("/actions/audit", data={"form_token": token}, headers={"Origin": OWN})
    assert page.status_code == 403


def test_forms_are_short(client: TestClient) -> None:
    page = client.post("/ask", content=b"x" * 70_000, headers={"Origin": OWN})
    assert page.status_code == 413
    page = client.post("/ask", content=b"prompt=\xff", headers={"Origin": OWN})
    assert page.status_code == 400
    page = client.post("/ask", content=b"&".join([b"a=1"] * 30), headers={"Origin": OWN})
    assert page.status_code == 400


def test_without_a_token_no_foreign_name_is_answered(home: Home) -> None:
    for host, status in {
        "evil.example": 421,
        "localhost.evil.example": 421,
        "localhost:8000": 200,
        "[::1]:8000": 200,
        "192.168.1.7": 200,
    }.items():
        page = browser(home).get("/", headers={"Host": host})
        assert page.status_code == status, host
    assert browser(home, TOKEN).get("/", headers={"Host": "kedit.example"}).status_code == 200


@pytest.mark.parametrize("path", [*PAGES, f"/facts/{EYRE.id}", "/facts?text=eyre"])
def test_pages_are_locked(home: Home, path: str) -> None:
    page = browser(home, TOKEN).get(path)
    assert page.url.path == "/sign-in"
    assert "Lake Eyre" not in page.text
    assert "Overview" not in page.text


def test_actions_are_locked(home: Home) -> None:
    with daemon(home, flush={}) as running:
        page = send(browser(home, TOKEN), "/actions/flush", "/sign-in")
    assert (page.url.path, running.asked) == ("/sign-in", [])


def test_signing_in_and_out(home: Home) -> None:
    client = browser(home, TOKEN)
    wrong = send(client, "/sign-in", "/sign-in", token="x")
    assert (wrong.status_code, "That is not the token" in wrong.text) == (403, True)
    assert SESSION_COOKIE not in client.cookies
    page = send(client, "/sign-in", "/sign-in", token=TOKEN, next="/facts?text=eyre")
    assert str(page.url) == f"{OWN}/facts?text=eyre"
    assert "Lake Eyre" in page.text
    (cookie,) = page.history[0].headers.get_list("set-cookie")
    assert all(part in cookie for part in ("HttpOnly", "SameSite=strict", "Path=/"))
    assert TOKEN not in cookie
    assert client.get("/sign-in").url.path == "/"
    session = client.cookies[SESSION_COOKIE]
    assert send(client, "/sign-out", "/").url.path == "/sign-in"
    assert client.get("/").url.path == "/sign-in"
    client.cookies.set(SESSION_COOKIE, session)
    assert client.get("/").url.path == "/sign-in"  # it has ended, whoever has kept it


def test_a_form_belongs_to_a_session(home: Home) -> None:
    client = browser(home, TOKEN)
    before = form_token(client.get("/sign-in").text)
    send(client, "/sign-in", "/sign-in", token=TOKEN)
    page = client.post("/actions/audit", data={"form_token": before}, headers={"Origin": OWN})
    assert page.status_code == 403


def test_cookies_are_secure_where_the_line_is(home: Home) -> None:
    client = TestClient(application(home, TOKEN), base_url="https://kedit.example")
    assert "Secure" in client.get("/sign-in").headers["set-cookie"]
    assert "Secure" not in browser(home, TOKEN).get("/sign-in").headers["set-cookie"]
    assert NONCE_COOKIE in client.cookies


@pytest.mark.parametrize("wanted", ["//evil.example", "https://evil.example", "/\\evil.example"])
def test_signing_in_leads_nowhere_else(home: Home, wanted: str) -> None:
    page = send(browser(home, TOKEN), "/sign-in", "/sign-in", token=TOKEN, next=wanted)
    assert str(page.url) == f"{OWN}/"


def test_sessions_end(home: Home, clock: Clock) -> None:
    client = browser(home, TOKEN, clock=clock)
    send(client, "/sign-in", "/sign-in", token=TOKEN)
    clock.now += timedelta(hours=11)
    assert client.get("/").url.path == "/"
    clock.now += timedelta(hours=2)
    assert client.get("/").url.path == "/sign-in"


def test_the_oldest_session_makes_room(home: Home) -> None:
    app = application(home, TOKEN)
    clients = [TestClient(app, base_url=OWN) for _ in range(MAX_SESSIONS + 1)]
    for client in clients:
        send(client, "/sign-in", "/sign-in", token=TOKEN)
    assert clients[0].get("/ask").url.path == "/sign-in"
    assert clients[1].get("/ask").url.path == "/ask"


# What is done -----------------------------------------------------------------------------------


def test_without_a_daemon_nothing_is_done_and_it_is_said(client: TestClient) -> None:
    page = send(client, "/actions/flush/try", "/")
    assert page.status_code == 503
    assert "The daemon is not running Nothing has been changed" in text_of(page.text)
    assert "kedit-daemon run" in page.text


def test_a_refusal_is_shown(home: Home) -> None:
    refusal = KeditError("busy with <b>a flush</b>", code="busy", hint="wait")
    with daemon(home, audit=refusal):
        page = send(browser(home), "/actions/audit", "/")
    assert page.status_code == 409
    assert "busy with <b>a flush</b> What to do: wait" in text_of(page.text)


def test_what_was_left_as_it_was(home: Home) -> None:
    reply: dict[str, Any] = {"taken": False, "verdict": "keep", "reasons": ["it would get worse"]}
    with daemon(home, consolidate=reply) as running:
        page = send(browser(home), "/actions/consolidate", "/")
    assert running.asked == [("consolidate", {"dry_run": False})]
    assert "left everything as it was" in page.text
    assert "why it would get worse" in text_of(page.text)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/actions/revert", {}),
        ("/actions/go-back", {}),
        ("/actions/go-back", {"generation": "-1"}),
        ("/actions/go-back/try", {"generation": "1; drop"}),
    ],
)
def test_actions_want_to_know_of_what(home: Home, path: str, fields: dict[str, str]) -> None:
    with daemon(home, revert={}) as running:
        assert send(browser(home), path, "/", **fields).status_code == 400
    assert running.asked == []


# With a daemon ----------------------------------------------------------------------------------

FACTS = [seat(n, CITIES[n]) for n in range(4)]


def live(at: Callable[[], Bench], ready: threading.Event, stopping: threading.Event) -> None:
    """The daemon's edit loop, as far as it answers commands: all of it in one thread."""
    bench = at()
    bench.receive(*FACTS)
    bench.settle()
    clock = bench.clock
    ours = Daemon(bench.home, bench.config, bench.store, SystemdNotifier({}), clock, time.monotonic)
    ours.editor = bench.editor
    with lock.hold_lock(bench.home.lock_file):
        ours.control_server.start()
        ready.set()
        while not stopping.is_set():
            with suppress(queue.Empty):
                ours._answer_request(ours.control_server.requests.get(timeout=0.05))
        ours.control_server.stop()
    bench.store.close()


@pytest.fixture(scope="module")
def lived(
    model_folder: Callable[[str], Path],
    statistics_cache: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Home]:
    """A home whose facts are live in the side memory, and that answers commands."""
    root = tmp_path_factory.mktemp("pages") / "home"
    loaded = load_model(str(model_folder("llama")), "cpu", statistics_cache, iter)
    config = Config.model_validate(LOOSE | {"side": {"steps": 300}})
    ready, stopping = threading.Event(), threading.Event()
    arguments = (lambda: Bench(root, loaded, Clock(), config), ready, stopping)
    thread = threading.Thread(target=live, args=arguments, daemon=True)
    thread.start()
    try:
        assert ready.wait(100)
        yield Home(root)
    finally:
        stopping.set()
        thread.join()


def states(home: Home) -> dict[str, int]:
    """How many facts are in which state, where they no longer wait."""
    with closing(sqlite3.connect(f"file:{home.database_file}?mode=ro", uri=True)) as conn:
        rows = conn.execute("SELECT state, count(*) FROM facts GROUP BY state").fetchall()
    return {state: count for state, count in rows if state != "received"}


def test_the_way_of_a_fact(lived: Home) -> None:
    """Asked, moved into the weights, reverted, brought back: each tried first."""
    client = browser(lived, ask_both=by_daemon(lived))
    first = FACTS[0]
    asked = send(client, "/ask", f"/ask?fact={first.id}", prompt=first.question, tokens="20")
    assert f'href="/facts/{first.id}"' in asked.text
    assert "Of the side memory." in asked.text
    assert first.target in text_of(asked.text)
    trial = text_of(send(client, "/actions/flush/try", "/").text)
    assert "Nothing has been changed so far" in trial
    for figure in ("norm ratio", "perplexity ratio", "agreement"):
        assert figure in trial
    assert states(lived) == {"live-side": 4}
    done = text_of(send(client, "/actions/flush", "/").text)
    assert "The daemon has done it" in done
    moved = states(lived)["live-weights"]
    assert moved > 0
    row = next(n for n in FACTS if f"{n.question} → {n.target}" in done.split("Not held")[0])
    trial = text_of(send(client, "/actions/revert/try", "/", fact=row.id).text)
    assert f"Taken out: 1 {row.question} → {row.target}" in trial
    assert f"Before {row.target}" in trial
    assert states(lived)["live-weights"] == moved
    send(client, "/actions/revert", f"/facts/{row.id}", fact=row.id)
    assert (states(lived).get("live-weights", 0), states(lived)["reverted"]) == (moved - 1, 1)
    twice = send(client, "/actions/revert", "/", fact=row.id)
    assert (twice.status_code, "reverted already" in twice.text) == (404, True)
    log = client.get(f"/log?fact={row.id}").text
    kinds = [kind.strip() for kind in re.findall(r'<span class="kind">([^<]*)', log)]
    assert kinds[:2] == ["fact reverted", "fact live-weights"]
    trial = text_of(send(client, "/actions/go-back/try", "/norms", generation="1").text)
    assert "to go back to generation 1" in trial
    assert "Live again: 1" in trial
    send(client, "/actions/go-back", "/norms", generation="1")
    assert states(lived)["live-weights"] == moved
    norms = text_of(client.get("/norms").text)
    assert "generation 3" in norms
    assert "back to generation 1" in norms


def test_an_audit_by_hand(lived: Home) -> None:
    client = browser(lived)
    before = client.get("/log?kind=audit").text.count('id="event-')
    tried = text_of(send(client, "/actions/audit/try", "/").text)
    assert re.search("verdict (keep|warn)", tried)  # of replies beside the facts
    assert client.get("/log?kind=audit").text.count('id="event-') == before
    assert "The daemon has done it" in send(client, "/actions/audit", "/").text
    assert client.get("/log?kind=audit").text.count('id="event-') == before + 1


def test_questions_have_limits(lived: Home) -> None:
    client = browser(lived)
    assert "Write something" in send(client, "/ask", "/ask", prompt=" ").text
    assert "longer than 4,000" in send(client, "/ask", "/ask", prompt="x" * 4001).text


def test_a_question_in_a_chat_keeps_its_form(home: Home) -> None:
    asked: list[AskedPrompt] = []

    async def ask(prompt: AskedPrompt, max_tokens: int) -> AnswerPair:
        asked.append(prompt)
        if "refuse" in prompt.text:
            raise KeditError("the model has no chat template", code="no-chat-template")
        return AnswerPair("Lima", "Quito", 0)

    client = browser(home, ask_both=ask)
    given = {"form": "chat", "prompt": "Where is it?", "system": " Be brief. "}
    page = send(client, "/ask", "/ask", **given)
    assert asked[0].messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is it?"},
    ]
    assert 'value="chat" checked' in page.text and "\nBe brief.</textarea>" in page.text
    assert "Lima" in text_of(page.text)
    page = send(client, "/ask", "/ask", form="chat", prompt="refuse")
    assert (page.status_code, "has no chat template." in page.text) == (400, True)
    assert "\nrefuse</textarea>" in page.text and 'value="chat" checked' in page.text
    send(client, "/ask", "/ask", prompt="Lima is in", system="Be brief.")
    assert (asked[-1].is_chat, asked[-1].system) == (False, "")
    assert "Write a question" in send(client, "/ask", "/ask", form="chat", prompt=" ").text
    longest = {"form": "chat", "prompt": "x", "system": "y" * 4001}
    assert "longer than 4,000" in send(client, "/ask", "/ask", **longest).text


def test_a_question_that_no_fact_answers(lived: Home) -> None:
    asked = send(
        browser(lived, ask_both=by_daemon(lived)), "/ask", "/ask", prompt="Rain\nfell <b>on"
    )
    assert "None: the weights answered by themselves" in asked.text
    assert "Rain\nfell &lt;b&gt;on</textarea>" in asked.text


def test_nothing_is_written_by_looking(lived: Home) -> None:
    client = browser(lived)
    before = lived.database_file.with_name("kedit.db-wal").stat().st_mtime_ns
    for path in (*PAGES, f"/facts/{FACTS[1].id}"):
        assert client.get(path).status_code == 200
    assert lived.database_file.with_name("kedit.db-wal").stat().st_mtime_ns == before
