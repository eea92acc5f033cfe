"""Whatever bytes come in by a file, a setting, the socket or HTTP, the answer is in plain words.

The same examples at every run; KEDIT_FUZZ_EXAMPLES=20000 tries other ones, and more of them.
"""

import base64
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import daemon
from editing_home import Bench
from fuzz_tools import (
    CORPUS,
    ODD,
    RECORDS,
    SEEDS,
    SETTINGS,
    TEXT,
    TOML,
    VALUE,
    altered,
    check,
    examples,
    reader_of_all,
    refused,
    restated,
)
from hostile_tools import LINES, acting, good
from hypothesis import example, given
from hypothesis import strategies as st
from promise_table import Tally
from serving import Running, server

from kedit_daemon import config
from kedit_daemon.control import send_request
from kedit_daemon.daemon.requests import execute_command
from kedit_daemon.home import Home
from kedit_daemon.ingest.parser import FORMATS
from kedit_daemon.ingest.table_rows import COLUMNS
from kedit_daemon.serve.openai.request_forms import HARMLESS_VALUES
from memory.errors import KeditError


@pytest.mark.parametrize("format", [None, *FORMATS])
@examples(60)
@given(altered(SEEDS), st.sampled_from(["x.jsonl", "x.csv", "\udcff\n.JSON"]))
def test_files(tally: Tally, format: str | None, data: bytes, name: str) -> None:
    tally.tried()
    check(data, name, format)


@pytest.mark.parametrize("format", [None, *FORMATS])
@examples(40)
@given(restated())
def test_records(tally: Tally, format: str | None, data: bytes) -> None:
    tally.tried()
    check(data, "x.jsonl", format)


def test_odd_values_under_every_key(tally: Tally) -> None:
    for record in RECORDS:
        for key in [*record, "x"]:
            for odd in ODD:
                tally.tried()
                check(json.dumps({**record, key: odd}).encode(), "x.jsonl", None)


@examples(100)
@given(
    st.lists(st.one_of(st.sampled_from([*COLUMNS, "x"]), TEXT), min_size=1, max_size=6),
    st.lists(st.lists(TEXT, max_size=6), max_size=4),
    st.sampled_from([",", '","', "\t", ";"]),
)
def test_tables(tally: Tally, columns: list[str], rows: list[list[str]], between: str) -> None:
    tally.tried()
    text = "\n".join(between.join(row) for row in [columns, *rows])
    check(text.encode("utf-8", "surrogatepass"), "x.csv", None)


def test_what_a_fuzzer_has_found_to_matter(tmp_path: Path, tally: Tally) -> None:
    """What libFuzzer kept of 680,000: each goes a way through the code that no other does."""
    read, lines = reader_of_all(tmp_path), CORPUS.read_bytes().split()
    assert len(lines) > 400
    for line in lines:
        tally.tried()
        read(base64.b64decode(line))


@examples(100)
@given(data=altered([TOML, b'model = "x"\n[inbox]\nmax_facts = 3\n']))
def test_settings(tmp_path: Path, tally: Tally, data: bytes) -> None:
    tally.tried()
    (tmp_path / config.CONFIG_FILE).write_bytes(data)
    refused(tmp_path, {})


@examples(150)
@given(
    given=st.lists(st.tuples(st.sampled_from(SETTINGS), VALUE), max_size=4),
    environ=st.dictionaries(
        st.sampled_from([f"KEDIT_{s}_{k}".upper().replace("__", "_") for s, k in SETTINGS]),
        st.text(st.characters(exclude_characters="\0"), max_size=8),
        max_size=2,
    ),
)
def test_values_of_settings(
    tmp_path: Path,
    tally: Tally,
    given: list[tuple[tuple[str, str], Any]],
    environ: dict[str, str],
) -> None:
    tally.tried()
    # JSON's texts, lists and numbers are nearly TOML's.
    lines = [
        (f"[{json.dumps(s)}]\n" if s else "") + f"{json.dumps(k)} = {json.dumps(value)}\n"
        for (s, k), value in given
    ]
    (tmp_path / config.CONFIG_FILE).write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    refused(tmp_path, environ)


# The control socket ---------------------------------------------------------------------------

ASK = b'POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"prompt": "x"}'


def test_requests_on_the_socket(tmp_path: Path, tally: Tally) -> None:
    home = Home(tmp_path)
    home.create_folders()
    seeds = [ASK, ASK + ASK, b"GET / HTTP/0.9\r\n\r\n", ASK.replace(b"15", b"99999999")]

    @examples(100)
    @given(altered(seeds))
    @example(ASK.replace(b'"x"', b"[" * 100))
    @example(b"POST /ask HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    @example(b"A" * 70_000)
    def one(data: bytes) -> None:
        tally.tried()
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(home.socket_file))
            try:
                client.sendall(data)
                client.shutdown(socket.SHUT_WR)
                said = b"".join(iter(lambda: client.recv(65_536), b""))
            except ConnectionError:
                return
        assert b"Traceback" not in said
        if said:
            assert said.startswith((b"HTTP/1.", b"{")), said

    with daemon(home) as running:
        running.replies = AnyReply()
        one()
        assert send_request(home.socket_file, "ask", {"prompt": "still there?"}) == {"answer": "x"}


class AnyReply(dict[str, dict[str, Any]]):
    def __missing__(self, name: str) -> dict[str, Any]:
        return {"answer": "x"}


NAMES = ("ask", "flush", "audit", "consolidate", "revert", "frob")
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT}
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": VALUE,
        "messages": st.one_of(VALUE, st.lists(MESSAGE, max_size=3)),
        "max_tokens": st.one_of(VALUE, st.integers(-1, 3)),
        "base": VALUE,
        "explain": VALUE,
        "dry_run": st.one_of(st.just(True), VALUE),
        "facts": st.one_of(VALUE, st.lists(TEXT, max_size=3)),
        "generation": st.one_of(VALUE, st.integers(-1, 2)),
    },
)


def test_orders(bench: Callable[..., Bench], tally: Tally) -> None:
    at = bench()

    @examples(40)
    @given(st.sampled_from(NAMES), ARGUMENTS)
    def one(name: str, arguments: dict[str, Any]) -> None:
        tally.tried()
        if name in ("audit", "consolidate", "flush"):
            arguments["dry_run"] = arguments.get("dry_run", True)
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except ValueError:
            return  # the socket lets none of these in
        try:
            json.dumps(execute_command(at.editor, name, arguments))
        except KeditError as error:
            assert error.code != "unexpected" and str(error)

    one()
    asked = {"prompt": "x", "max_tokens": 1, "facts": [], "generation": None, "base": False}
    for name in ("ask", "revert"):
        for key in asked:
            for odd in ODD:
                if odd == "\ud800":
                    continue  # the socket lets none of these in
                with suppress(KeditError):
                    execute_command(at.editor, name, {**asked, key: odd})
    assert at.says("The seat of country 1 is") is not None


# HTTP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("fuzz") / "home", model_folder("llama")) as made:
        yield made


def test_facts_over_http(running: Running, tally: Tally) -> None:
    seeds = [*SEEDS, good("a"), *LINES.values()]

    @examples(60)
    @given(
        st.one_of(altered(seeds), restated()),
        st.fixed_dictionaries(
            {}, optional={"format": st.sampled_from([*FORMATS, "\x1b[2J"]), "wait": TEXT}
        ),
    )
    def one(body: bytes, query: dict[str, str]) -> None:
        tally.tried()
        query = {k: v.encode(errors="replace").decode() for k, v in query.items()}
        answer = http.post("/facts", content=body, params=query)
        assert answer.status_code in (202, 400, 422), answer.text
        assert acting(json.dumps(answer.json(), ensure_ascii=False)) == ""
        if answer.status_code == 422:
            assert answer.json()["error"]["message"]

    with running.http() as http:
        one()
        assert http.get("/health").is_success


COMPLETION = {"model": "tiny", "prompt": "Rome", "max_tokens": 1}
FIELDS = ["temperature", "top_p", "n", "stream", "stream_options", "stop", "seed", "logprobs"]


def test_completions(running: Running, tally: Tally) -> None:
    asked = st.dictionaries(
        st.sampled_from([*FIELDS, *HARMLESS_VALUES, "prompt", "model"]), VALUE, max_size=3
    ).map(lambda more: json.dumps(COMPLETION | more).encode())

    @examples(100)
    @given(st.one_of(altered([json.dumps(COMPLETION).encode()]), asked))
    @example(b"[" * 100_000)
    @example(json.dumps(COMPLETION | {"prompt": "\ud800"}).encode())
    @example(json.dumps(COMPLETION | {"prompt": [1 << 70]}).encode())
    def one(body: bytes) -> None:
        tally.tried()
        answer = http.post("/v1/completions", content=body)
        assert answer.status_code in (200, 400, 404, 429), (body, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]

    with running.http() as http:
        one()
        for field in [*FIELDS, "prompt", "model", "max_tokens", "echo", "suffix"]:
            for odd in ODD:
                body = COMPLETION | {field: odd}
                answer = http.post("/v1/completions", content=json.dumps(body).encode())
                assert answer.status_code in (200, 400, 404), (body, answer.text)
        assert http.post("/v1/completions", json=COMPLETION).is_success
