"""Only the token opens, bodies and rates have limits, and nothing outside the home is written."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import ROOT
from editing_home import LOOSE
from serve_tools import OWN, browser, form_token
from serving import NAME, free_port, server
from tiny_models import save_model

from kedit_daemon.control import MAX_BODY_BYTES
from kedit_daemon.home import Home
from memory.db.queries import open_readonly

pytestmark = pytest.mark.timeout(250)

ASKED = "marker-of-a-prompt"
SUBJECT = "marker-of-a-subject"
SETTINGS = """\
model = {model}
device = "cpu"
[inbox]
settle_seconds = 0.0
rescan_seconds = 0.2
[side]
steps = 300
[serve]
port = {port}
[stability]
{limits}
"""
# What changes something, by whatever name it is given.
CALLS = "openat,open,creat,openat2,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir"
CALLS += ",link,linkat,symlink,symlinkat,truncate,mknod,mknodat,chmod,fchmodat,bind"
TRACE = ["strace", "-f", "-qq", "--seccomp-bpf", "-y", "-s", "4096", "-e", f"trace={CALLS}"]
TOKEN = "a-token-of-many-characters"


@dataclass(frozen=True)
class Life:
    """What one life of a daemon has left behind."""

    home: Home
    secret: Path
    trace: list[str]
    log: str
    metrics: str
    modes: dict[str, int]  # while it ran, by path within the home


def living(folder: Path, umask: int, traced: bool, whole: bool) -> Life:
    """init, run, submit, and if it is to be a whole life ask, audit, revert; stop."""
    home, secret, port = Home(folder / "home"), folder / "secret", free_port() if whole else 0
    secret.write_bytes(b'{"subject": "SECRET", "prompt": "{}", "target": "x"}\n')
    model = save_model("llama", folder / "model")
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environ["PYTHONDONTWRITEBYTECODE"] = "1"  # what Python keeps beside its modules is its own

    def start(*words: str, **more: Any) -> "subprocess.Popen[bytes]":
        traces = [*TRACE, "-o", str(folder / f"{words[0]}.trace")] if traced else []
        command = [*traces, sys.executable, "-m", "kedit_daemon", "--home", str(home.root)]
        return subprocess.Popen([*command, *words], cwd=ROOT, env=environ, umask=umask, **more)

    def call(*words: str, given: bytes = b"") -> bytes:
        done = start(*words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        said, _ = done.communicate(given, timeout=100)
        assert done.returncode == 0, (words, said)
        return said

    call("init", "--model", str(model))
    limits = "\n".join(f"{name} = {value}" for name, value in LOOSE["stability"].items())
    text = SETTINGS.format(model=json.dumps(str(model)), port=port, limits=limits)
    home.config_file.write_text(text)
    (home.inbox_folder / "link.jsonl").symlink_to(secret)
    os.mkfifo(home.inbox_folder / "pipe.jsonl")
    metrics = ""
    with (folder / "log").open("wb") as log:
        daemon = start("run", stdout=log, stderr=log)
        try:
            wait(home.socket_file.exists, folder / "log")
            record = {"subject": SUBJECT, "prompt": "{} lies in", "target": "Rome"}
            [fact] = call("submit", "-", given=json.dumps(record).encode()).decode().split()
            wait(lambda: settled(home), folder / "log")
            modes = {str(p.relative_to(home.root)): p.lstat().st_mode for p in walk(home.root)}
            if whole:
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                    wait(lambda: up(http), folder / "log")
                    metrics = asking(http)
                call("ask", ASKED, "--explain")
                call("audit")
                call("revert", fact, "--yes")
        finally:
            os.kill(pid_of(home) or daemon.pid, signal.SIGTERM)
            assert daemon.wait(60) == 0
    trace = [line for path in folder.glob("*.trace") for line in path.read_text().splitlines()]
    return Life(home, secret, trace, (folder / "log").read_text(), metrics, modes)


def asking(http: httpx.Client) -> str:
    """Ask in every way that can go right or wrong; the figures afterwards."""
    asked = {"model": http.get("/v1/models").json()["data"][0]["id"], "max_tokens": 1}
    said = [
        http.post("/v1/completions", json=asked | more).status_code
        for more in ({"prompt": ASKED}, {"prompt": ASKED, "n": ASKED}, {"prompt": ASKED * 5_000})
    ]
    assert said == [200, 400, 400]
    http.get(f"/{ASKED}?{ASKED}")
    http.post("/v1/completions", content=f'{{"prompt": "{ASKED}')
    return http.get("/metrics").text


def up(http: httpx.Client) -> bool:
    try:
        return http.get("/ready").is_success
    except httpx.TransportError:
        return False


def settled(home: Home) -> bool:
    with closing(open_readonly(home.database_file)) as conn:
        return bool(conn.execute("SELECT 1 FROM facts WHERE state != 'received'").fetchone())


def pid_of(home: Home) -> int | None:
    with closing(open_readonly(home.database_file)) as conn:
        row = conn.execute("SELECT value FROM meta WHERE key = 'pid'").fetchone()
    return int(row[0]) if row else None


def wait(what: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)


def walk(root: Path) -> Iterator[Path]:
    yield root
    for folder, names, files in os.walk(root):
        yield from (Path(folder) / name for name in (*names, *files))


@pytest.fixture(scope="module")
def open_life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    """Under the loosest umask, and watched where that can be done."""
    folder = tmp_path_factory.mktemp("open")
    return living(folder, 0o000, shutil.which("strace") is not None, True)


@pytest.fixture(scope="module")
def closed_life(tmp_path_factory: pytest.TempPathFactory) -> Life:
    return living(tmp_path_factory.mktemp("closed"), 0o077, False, False)


# What it touches ------------------------------------------------------------------------------

# Outside the home, each with why.
ALLOWED = {
    r"/dev/null": "what is not wanted goes there",
    r"/dev/tty": "whether there is a terminal",
    r"/dev/shm/.*": "OpenMP's and torch's shared memory",
    r"/proc/self/.*": "the process about itself",
    r"/tmp/torchinductor_\w+": "torch makes it when it is imported",
    r"/tmp/[a-z0-9_]{8}": "Python tries whether /tmp can be written to, and takes it away again",
}
WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_APPEND")
CALL = re.compile(r"^\d+\s+(\w+)\((.*)")
NAMED = re.compile(r'(?:(?:AT_FDCWD|\d+)<([^>]*)>, )?"((?:[^"\\]|\\.)*)"')


def changed(trace: list[str]) -> Iterator[str]:
    """The paths that calls would have changed."""
    for line in trace:
        if not (found := CALL.match(line)):
            continue
        name, arguments = found.groups()
        if name.startswith("open") and not WRITES.search(arguments):
            continue
        if name == "bind" and "AF_UNIX" not in arguments:
            continue
        for folder, path in NAMED.findall(arguments):
            yield os.path.normpath(os.path.join(folder or str(ROOT), path))


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_nothing_outside_the_home_is_written(open_life: Life) -> None:
    root = str(open_life.home.root)
    paths = set(changed(open_life.trace))
    inside = {path for path in paths if path == root or path.startswith(f"{root}/")}
    assert f"{root}/state/kedit.db" in inside and f"{root}/config.toml" in inside
    assert any(path.startswith(f"{root}/state/side/") for path in inside)
    strange = {p for p in paths - inside if not any(re.fullmatch(a, p) for a in ALLOWED)}
    assert strange == set()


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_what_a_link_in_the_inbox_leads_to_is_never_opened(open_life: Life) -> None:
    assert not [line for line in open_life.trace if str(open_life.secret) in line]


def test_what_is_no_file_is_reported(open_life: Life) -> None:
    with closing(open_readonly(open_life.home.database_file)) as conn:
        rows = conn.execute("SELECT data FROM events WHERE kind = 'file_refused'").fetchall()
    assert sorted(json.loads(row[0])["file"] for row in rows) == ["link.jsonl", "pipe.jsonl"]
    assert (open_life.home.inbox_folder / "link.jsonl").is_symlink()
    assert (open_life.home.inbox_folder / "pipe.jsonl").is_fifo()


def test_the_home_is_closed_to_others_whatever_the_umask(open_life: Life) -> None:
    modes = open_life.modes
    assert stat.S_IMODE(modes["state/control.sock"]) == 0o600
    for path, mode in modes.items():
        if path in ("inbox/link.jsonl", "inbox/pipe.jsonl", "config.toml"):  # made by the test
            continue
        if stat.S_ISDIR(mode):
            assert not mode & (stat.S_IRWXO | stat.S_IWGRP), (path, oct(mode))
        assert not mode & (stat.S_IWGRP | stat.S_IWOTH), (path, oct(mode))


def test_a_strict_umask_is_kept(closed_life: Life) -> None:
    assert stat.S_IMODE(closed_life.modes["state/control.sock"]) == 0o600
    for path, mode in closed_life.modes.items():
        # A file that is handed in is for the daemon's group, which may be another one.
        handed_in = path.startswith("inbox/done/")
        if stat.S_ISDIR(mode):
            assert stat.S_IMODE(mode) == 0o700, path
        elif path not in ("inbox/link.jsonl", "inbox/pipe.jsonl", "config.toml"):
            assert not mode & (0o037 if handed_in else 0o077), (path, oct(mode))


def test_prompts_are_kept_nowhere(open_life: Life) -> None:
    assert "ready" in open_life.log and ASKED not in open_life.log
    for path in walk(open_life.home.root):
        if path.is_file() and not path.is_symlink():
            assert ASKED.encode() not in path.read_bytes(), path


def test_figures_hold_no_text(open_life: Life) -> None:
    assert "kedit_facts" in open_life.metrics
    assert "kedit_http_requests_total" in open_life.metrics
    for text in (SUBJECT, ASKED, "Rome", "lies in"):
        assert text not in open_life.metrics
    assert SUBJECT not in open_life.log


# Who gets in, and how much --------------------------------------------------------------------

WRONG = (
    b"",
    b"Bearer",
    TOKEN.encode(),
    f"Basic {TOKEN}".encode(),
    f"Bearer {TOKEN[:-1]}".encode(),
    f"Bearer {TOKEN}x".encode(),
    f"Bearer {TOKEN} x".encode(),
    f"Bearer {TOKEN.upper()}".encode(),
    f"Bearer Bearer {TOKEN}".encode(),
    f"Bearer {TOKEN}é".encode(),
    b"Bearer \xff\xfe",
    "Bearer \u202e".encode(),
    b"Bearer " + b"x" * 8_000,
)


def test_only_the_very_token_opens(tmp_path: Path, model_folder: Callable[[str], Path]) -> None:
    with server(tmp_path, model_folder("llama"), TOKEN) as running, running.http() as http:
        for said in WRONG:
            for method, path in (("GET", "/metrics"), ("GET", "/v1/models"), ("POST", "/facts")):
                answer = http.request(method, path, headers={"Authorization": said})
                assert answer.status_code == 401, (path, said)
                assert TOKEN not in answer.text
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert http.get("/v1/models", headers=right).is_success


def test_nobody_signs_in_with_less(tmp_path: Path) -> None:
    Home(tmp_path).create_folders()
    client = browser(Home(tmp_path), TOKEN)
    given = [
        "",
        " ",
        TOKEN[:-1],
        TOKEN + "x",
        f" {TOKEN}",
        TOKEN.upper(),
        "é" * 20,
        "\0",
        TOKEN * 9,
    ]
    for token in given:
        fields = {"token": token, "form_token": form_token(client.get("/sign-in").text)}
        answer = client.post("/sign-in", data=fields, headers={"Origin": OWN})
        assert answer.status_code == 403, token
        assert client.get("/facts", follow_redirects=False).status_code == 303
    broken = b"token=%ED%A0%80&form_token=x"
    kind = {"Origin": OWN, "Content-Type": "application/x-www-form-urlencoded"}
    assert client.post("/sign-in", content=broken, headers=kind).status_code == 400


def test_bodies_and_prompts_have_limits(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    def pieces() -> Iterator[bytes]:  # without saying how many
        for _ in range(100):
            yield b" " * 100

    with (
        server(tmp_path, model_folder("llama"), max_body_bytes=2_000) as running,
        running.http() as http,
    ):
        for path in ("/facts", "/v1/completions", "/v1/chat/completions"):
            assert http.post(path, content=b" " * 2_001).status_code == 413
            assert http.post(path, content=pieces()).status_code == 413
            assert http.post(path, content=b" " * 2_000).status_code in (400, 422)
        asked = {"model": NAME, "prompt": "a b " * 300, "max_tokens": 1}
        answer = http.post("/v1/completions", json=asked)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        form = {"Origin": running.url}
        answer = http.post("/ask", content=b"prompt=" + b"x" * 70_000, headers=form)
        assert answer.status_code == 413
    assert MAX_BODY_BYTES == 16 << 20  # of a command: a picture of the largest size


def test_one_rate_is_for_all_that_costs(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    with (
        server(tmp_path, model_folder("llama"), requests_per_minute=3) as running,
        running.http() as http,
    ):
        asked = {"model": NAME, "prompt": "Rome", "max_tokens": 1}
        said = [http.post("/facts", content=b"{}").status_code]
        said += [http.post("/v1/completions", json=asked).status_code]
        said += [http.post("/v1/chat/completions", content=b"").status_code]
        assert 429 not in said
        for path in ("/facts", "/v1/completions", "/v1/chat/completions"):
            assert http.post(path, content=b"{}").status_code == 429
        assert http.get("/health").is_success
