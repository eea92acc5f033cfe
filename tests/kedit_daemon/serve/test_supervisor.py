"""The server's process: it runs beside the daemon, and neither needs the other to live."""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from editing_home import LOOSE, seat
from engine_tools import BASE_MODEL, make_store, stand_in
from openai import OpenAI
from serving import free_port

from kedit_daemon import control
from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve import supervisor
from kedit_daemon.serve.supervisor import ProcessKeeper, check_settings, keep_serving, read_token
from memory.errors import KeditError
from memory.facts import Fact

pytestmark = pytest.mark.timeout(120)
TOKEN = "a-token-of-many-characters"
SLEEPS = "open(sys.argv[1], 'a').write('ready\\n')\ntime.sleep(60)"


def wait(what: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# Settings ---------------------------------------------------------------------------------------


def config(**serve: object) -> Config:
    return Config.model_validate({"serve": {"port": 1, **serve}})


def test_a_token_is_read_from_the_home(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f" {TOKEN}\n")
    (tmp_path / "token").chmod(0o640)
    assert read_token(Home(tmp_path), config(token_file="token")) == TOKEN
    assert read_token(Home(tmp_path / "else"), config(token_file=f"{tmp_path}/token")) == TOKEN
    assert read_token(Home(tmp_path), config()) is None


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        (TOKEN, 0o644, "everybody may read"),
        (TOKEN, 0o602, "everybody may read"),
        ("", 0o600, "must hold one word"),
        ("too short", 0o600, "must hold one word"),
        (f"{TOKEN} {TOKEN}", 0o600, "must hold one word"),
        ("schlüssel-mit-umlaut", 0o600, "not plain ASCII"),
        (None, 0o600, "No such file"),
    ],
)
def test_a_token_that_is_none_or_no_secret_is_refused(
    tmp_path: Path, text: str | None, mode: int, said: str
) -> None:
    if text is not None:
        (tmp_path / "token").write_text(text)
        (tmp_path / "token").chmod(mode)
    with pytest.raises(KeditError, match=said) as caught:
        check_settings(Home(tmp_path), config(token_file="token"))
    assert caught.value.exit_code == 78 and caught.value.hint
    check_settings(Home(tmp_path), config(token_file="token", port=0))  # there is no server


def test_a_folder_of_adapters_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(KeditError, match="adapters") as caught:
        check_settings(Home(tmp_path), config(engine=engine, adapters=str(tmp_path / "file")))
    assert caught.value.exit_code == 78 and caught.value.hint
    check_settings(Home(tmp_path), config(engine=engine, adapters=str(tmp_path / "new")))
    assert list((tmp_path / "new").iterdir()) == []


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_settings(Home(tmp_path), config())
    monkeypatch.setattr(supervisor, "EXTRA", ("starlette", "no_such_module"))
    with pytest.raises(KeditError, match="no_such_module is not installed") as caught:
        check_settings(Home(tmp_path), config())
    assert caught.value.exit_code == 78 and "kedit-daemon[serve]" in caught.value.hint


# The keeper -------------------------------------------------------------------------------------


def script(text: str, *words: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time\n{text}", *words]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def keeper(notes: Path, text: str) -> ProcessKeeper:
    write = "open(sys.argv[1], 'a').write(f'{os.getpid()} {sys.stdin.readline()}')"
    return ProcessKeeper(script(f"{write}\n{text}", str(notes)), b"hello\n", pause=0.05)


def lines(notes: Path) -> list[str]:
    return notes.read_text().splitlines() if notes.exists() else []


def test_a_child_that_ends_is_started_again_later_each_time(
    notes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = keeper(notes, "sys.exit(7)")
    kept.start()
    wait(lambda: len(lines(notes)) >= 4)
    kept.stop()
    told = [r.args[1] for r in caplog.records if "starts again" in r.msg and r.args]
    assert told[:3] == [0.05, 0.1, 0.2]
    assert all(r.args and r.args[0] == "ended with 7" for r in caplog.records)
    seen = [line.split() for line in lines(notes)]
    assert {word for _, word in seen} == {"hello"} and len({pid for pid, _ in seen}) == len(seen)


@pytest.mark.parametrize(("life", "pauses"), [(120.0, [0.01, 0.02, 0.04]), (700.0, [0.01] * 3)])
def test_only_a_child_that_lived_long_is_started_again_at_once(
    life: float,
    pauses: list[float],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    times = itertools.count(0.0, life)  # read when it starts, and when it has ended
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: next(times)))
    kept = ProcessKeeper(["/no/such/command"], b"", pause=0.01)
    kept.start()
    wait(lambda: len(caplog.records) >= 3)
    kept.stop()
    assert [r.args[1] for r in caplog.records if r.args][:3] == pauses


def test_a_child_is_asked_to_end_and_not_started_again(notes: Path) -> None:
    kept = keeper(
        notes,
        f"signal.signal(15, lambda *_: sys.exit(0))\n{SLEEPS}",
    )
    kept.start()
    wait(lambda: "ready" in lines(notes))
    assert kept.pid is not None
    kept.stop()
    assert not alive(kept.pid)
    assert len(lines(notes)) == 2


def test_a_child_that_does_not_end_is_killed(
    notes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "STOP_SECONDS", 0.2)
    kept = keeper(
        notes,
        f"signal.signal(15, signal.SIG_IGN)\n{SLEEPS}",
    )
    kept.start()
    wait(lambda: "ready" in lines(notes))
    kept.stop()
    assert kept.pid is not None and not alive(kept.pid)
    assert "killing it" in caplog.text


def test_what_cannot_be_started_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    kept = ProcessKeeper(["/no/such/command"], b"", pause=0.01)
    kept.start()
    wait(lambda: "could not be started" in caplog.text)
    kept.stop()
    assert kept.pid is None


def test_without_a_port_there_is_no_server(tmp_path: Path) -> None:
    with keep_serving(Home(tmp_path), Config()):
        assert not [t for t in threading.enumerate() if t.name == "serve"]


def test_a_router_is_a_server_too(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    fact = Fact("Quillon Insurance", "The chief executive officer of {} is", "Maud Ferreira")
    store = make_store(home, fact)
    with stand_in() as engine:
        port = free_port()  # once the engine has its own: it might be given the same
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
            with keep_serving(home, config(port=port, engine=engine.url)):
                wait(lambda: _is_up(http))
                wait(lambda: "loaded" not in http.get("/ready").text)
                fields = {"model": BASE_MODEL, "prompt": fact.question}
                answer = http.post("/v1/completions", json=fields)
                assert answer.headers["x-kedit-facts"] == fact.id
                assert answer.json()["kedit"]["by"] == "context"
            assert not _is_up(http)
    store.close()


def _is_up(http: httpx.Client) -> bool:
    try:
        return http.get("/health").is_success
    except httpx.HTTPError:
        return False


# The whole --------------------------------------------------------------------------------------


def make_home(root: Path, model: Path, port: int) -> Home:
    home = Home(root)
    home.create_folders()
    (root / "token").write_text(TOKEN)
    (root / "token").chmod(0o600)
    limits = "\n".join(f"{name} = {value}" for name, value in LOOSE["stability"].items())
    home.config_file.write_text(
        f'model = {json.dumps(str(model))}\ndevice = "cpu"\n[inbox]\nsettle_seconds = 0.0\n'
        f"rescan_seconds = 0.2\n[side]\nsteps = 300\n[stability]\n{limits}\n"
        f'[serve]\nport = {port}\ntoken_file = "token"\n',
        encoding="utf-8",
    )
    return home


class Daemon:
    """A daemon in a process of its own, with a server beside it."""

    def __init__(self, root: Path, model: Path) -> None:
        self.port = free_port()
        self.home = make_home(root, model, self.port)
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{self.port}",
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
        )
        self.log = root / "daemon.log"
        command = [sys.executable, "-m", "kedit_daemon", "--home", str(root), "run"]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def ready(self) -> bool:
        try:
            return self.http.get("/ready").is_success
        except httpx.TransportError:
            return False

    def child(self) -> int:
        """The server's pid."""
        folder = Path(f"/proc/{self.process.pid}/task")
        found = {c for t in folder.iterdir() for c in (t / "children").read_text().split()}
        (pid,) = [p for p in found if b"serve.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]
        return int(pid)


@pytest.fixture(scope="module")
def daemon(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[Daemon]:
    """It runs while this part of the file is tested: loading torch twice takes its time."""
    made = Daemon(tmp_path_factory.mktemp("serve") / "home", model_folder("llama"))
    try:
        wait(made.ready)
        yield made
    finally:
        made.http.close()
        made.process.kill()
        made.process.wait(60)


def test_a_fact_that_is_posted_is_answered_with(daemon: Daemon) -> None:
    fact = seat(1, "Oslo")
    record = {"subject": fact.subject, "prompt": fact.prompt, "target": fact.target}
    with OpenAI(base_url=f"{daemon.http.base_url}/v1", api_key=TOKEN) as client:
        name = client.models.list().data[0].id
        key = {"Idempotency-Key": "one"}
        taken = daemon.http.post("/facts?wait=40", json=record, headers=key)
        assert taken.status_code == 200
        assert taken.json()["facts"] == [{"id": fact.id, "state": "live-side", "reason": None}]
        asked = {"model": name, "prompt": fact.question, "max_tokens": 3, "temperature": 0}
        raw = client.completions.with_raw_response.create(**asked)  # type: ignore[call-overload]
        assert json.loads(raw.text)["choices"][0]["text"].strip().startswith("Oslo")
        assert raw.headers["x-kedit-facts"] == fact.id
        base = {**asked, "model": f"{name}@base"}
        assert not client.completions.create(**base).choices[0].text.strip().startswith("Oslo")  # type: ignore[call-overload]
    assert daemon.http.post("/facts", json=record, headers=key).json()["ids"] == [fact.id]
    found = daemon.http.get("/metrics").text
    assert 'kedit_facts{state="live-side"} 1.0' in found


def test_where_memory_runs_out_the_server_goes_before_the_daemon(daemon: Daemon) -> None:
    scores = [
        int(Path(f"/proc/{pid}/oom_score_adj").read_text())
        for pid in (daemon.process.pid, daemon.child())
    ]
    assert scores[0] < scores[1]


def test_a_server_that_dies_comes_back_and_the_daemon_goes_on(daemon: Daemon) -> None:
    first = daemon.child()
    os.kill(first, signal.SIGKILL)
    wait(lambda: not daemon.ready())
    assert "answer" in control.send_request(
        daemon.home.socket_file, "ask", {"prompt": "Rome", "max_tokens": 1}
    )
    wait(daemon.ready)
    assert daemon.child() != first


def test_the_server_ends_with_the_daemon_and_streams_with_it(daemon: Daemon) -> None:
    pid, name = daemon.child(), daemon.http.get("/v1/models").json()["data"][0]["id"]
    asked = {"model": name, "prompt": "Rome", "max_tokens": 200, "stream": True, "seed": 1}
    with daemon.http.stream("POST", "/v1/completions", json=asked) as answer:
        found = answer.iter_lines()
        next(found)
        daemon.process.send_signal(signal.SIGTERM)
        rest = [line for line in found if line]
    assert rest[-1] == "data: [DONE]" or "stopping" in rest[-1]
    assert daemon.process.wait(30) == 0
    assert not alive(pid)


def test_the_server_ends_when_nobody_holds_its_stdin(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    port = free_port()
    home = make_home(tmp_path / "home", model_folder("llama"), port)
    settings = {"home": str(home.root), "cache": None, "debug": False}
    settings["config"] = {"serve": {"port": port}}
    command = [sys.executable, "-m", "kedit_daemon.serve.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()

        def lives() -> bool:
            try:
                return httpx.get(f"http://127.0.0.1:{port}/health").is_success
            except httpx.TransportError:
                return child.poll() is not None

        wait(lives)
        child.stdin.close()  # as when the daemon is killed
        assert child.wait(20) == -signal.SIGTERM


def test_a_server_without_a_model_ends_with_the_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"home": str(tmp_path), "cache": None, "debug": False}
    settings["config"] = {"serve": {"port": free_port()}}
    command = [sys.executable, "-m", "kedit_daemon.serve.worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()
        assert child.wait(60) == 1
    assert "The HTTP server cannot run: there is no database" in capfd.readouterr().err
