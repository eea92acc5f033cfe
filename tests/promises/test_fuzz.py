"""Whatever bytes come by a file, a setting, the socket or HTTP, they are answered in plain words.

The same examples at every run; KEDIT_FUZZ_EXAMPLES=20000 tries other ones, and more of them.
"""

import base64
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import daemon
from conftest import Bench
from hostile_tools import LINES, TEXTS, acting, good
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from serving import Running, server
from test_kedit_daemon_formats import FOREIGN

from kedit_daemon import config
from kedit_daemon.control import call
from kedit_daemon.formats import COLUMNS, FORMATS, only_failed, parse
from kedit_daemon.home import Home
from kedit_daemon.orders import carry_out
from kedit_daemon.records import Limits
from kedit_daemon.serve.asked import _HARMLESS
from memory.errors import KeditError
from memory.facts import Fact

MORE = os.environ.get("KEDIT_FUZZ_EXAMPLES")
LIMITS = Limits(20, 60, 2_000)
CORPUS = Path(__file__).parents[1] / "data" / "corpus" / "formats.base64"


def examples(count: int) -> settings:
    """So many, always the same, unless more are wanted."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=int(MORE) if MORE else count,
        derandomize=not MORE,
        database=None,
        deadline=None,
        suppress_health_check=quiet,
    )


NATIVE = {
    "subject": "Eyre",
    "prompt": "{} lies in",
    "target": "Spain",
    "paraphrases": ["{} is in"],
    "neighbours": [{"prompt": "Como lies in", "answer": None}],
    "id": "1",
    "source": "x",
    "valid_from": "2026-01-31T12:00:00Z",
    "valid_until": "2027-01-31",
    "tags": ["a"],
}
TABLE = b'subject,prompt,target,tags,valid_until\n"a ""b""",{} is,c,x|y,2026-01-01\r\nd,{} e,f,,\n'
RECORDS = [NATIVE, *FOREIGN.values()]
KEYS = sorted({key for record in RECORDS for key in record} | {"promt", "str"})
SEEDS = [json.dumps(r).encode() + b"\n" for r in RECORDS] + [json.dumps(RECORDS).encode(), TABLE]
BITS = [
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"\\",
    b",",
    b":",
    b"\n",
    b"\r",
    b"\0",
    b"\x1b",
    b"\xff",
    b"NaN",
]
BITS += [
    b'\\ud800"',
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b'{"',
    b'"\n',
    b"null",
    b"1e999",
    b"9" * 30,
    b"|",
]
TEXT = st.one_of(st.text(max_size=12), st.sampled_from([*TEXTS.values(), "{}", "\ud800", "\0", ""]))
LEAF = st.one_of(
    TEXT,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([10**400, -1, 0, 1 << 63]),
)
KEY = st.one_of(st.sampled_from(KEYS), TEXT)
VALUE = st.recursive(
    LEAF,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEY, inner, max_size=4)),
    max_leaves=8,
)

# What is tried in every place, since chance seldom puts the one value into the one place.
ODD: list[Any] = [
    "",
    "\0",
    "\ud800",
    "a\0b",
    "0001-01-01T00:00:00+23:59",
    10**400,
    1 << 70,
    -1,
    1.5,
]
ODD += [None, True, [], {}, [1 << 70], [-1], [400_000], ["\0"], [["\ud800"]], [None], {"a": {}}]


@st.composite
def altered(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Sound files, cut, spliced and peppered."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        stop = min(len(data), start + draw(st.sampled_from([0, 0, 1, 5, 50])))
        put = draw(st.one_of(st.sampled_from([*BITS, *seeds]), st.binary(max_size=4)))
        data[start:stop] = put
    return bytes(data)


@st.composite
def restated(draw: st.DrawFn) -> bytes:
    """Records with other values under known keys."""
    lines = []
    for _ in range(draw(st.integers(1, 4))):
        record = dict(draw(st.sampled_from(RECORDS)))
        record |= draw(st.dictionaries(st.sampled_from([*record, *KEYS]), VALUE, max_size=3))
        lines.append(json.dumps(record, ensure_ascii=draw(st.booleans())))
    text = f"[{','.join(lines)}]" if draw(st.booleans()) else "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def texts_of(fact: Fact) -> Iterator[str]:
    yield from (fact.subject, fact.prompt, fact.target, *fact.paraphrases, *fact.tags)
    yield from (text for n in fact.neighbours for text in (n.prompt, n.answer or ""))
    yield from (fact.source or "", fact.external_id or "", fact.id, fact.slot)


def check(data: bytes, name: str, format: str | None) -> None:
    parsed = parse(data, name, format, LIMITS)
    assert parsed.facts or parsed.problems
    assert len(parsed.facts) <= LIMITS.max_facts
    for line, fact in parsed.facts:
        assert 1 <= line <= data.count(b"\n") + 1
        assert fact.subject and fact.prompt and 1 <= len(fact.target) <= LIMITS.max_target_chars
        for text in texts_of(fact):
            assert "\0" not in text
            text.encode()
    for problem in parsed.problems:
        assert 1 <= problem.line <= data.count(b"\n") + 1
        assert problem.problem.strip() and problem.remedy.strip(), problem
        assert acting(problem.problem + problem.remedy) == ""
    only_failed(data, name, parsed.problems)


@pytest.mark.parametrize("format", [None, *FORMATS])
@examples(60)
@given(altered(SEEDS), st.sampled_from(["x.jsonl", "x.csv", "\udcff\n.JSON"]))
def test_files(format: str | None, data: bytes, name: str) -> None:
    check(data, name, format)


@pytest.mark.parametrize("format", [None, *FORMATS])
@examples(40)
@given(restated())
def test_records(format: str | None, data: bytes) -> None:
    check(data, "x.jsonl", format)


def test_odd_values_under_every_key() -> None:
    for record in RECORDS:
        for key in [*record, "x"]:
            for odd in ODD:
                check(json.dumps({**record, key: odd}).encode(), "x.jsonl", None)


@examples(100)
@given(
    st.lists(st.one_of(st.sampled_from([*COLUMNS, "x"]), TEXT), min_size=1, max_size=6),
    st.lists(st.lists(TEXT, max_size=6), max_size=4),
    st.sampled_from([",", '","', "\t", ";"]),
)
def test_tables(columns: list[str], rows: list[list[str]], between: str) -> None:
    text = "\n".join(between.join(row) for row in [columns, *rows])
    check(text.encode("utf-8", "surrogatepass"), "x.csv", None)


def test_what_a_fuzzer_has_found_to_matter() -> None:
    """What libFuzzer kept of 430,000 files: each goes a way through the code that no other does."""
    lines = CORPUS.read_bytes().split()
    assert len(lines) > 100
    for line in lines:
        chosen, *data = base64.b64decode(line)
        format = (None, *FORMATS)[chosen % (len(FORMATS) + 1)]
        check(bytes(data), ("x.jsonl", "x.csv", "x\n.json")[chosen // 16 % 3], format)


TOML = config.default_text("shipped").encode()
SETTINGS = [(s, k) for s, m in config.SECTIONS.items() for k in m.model_fields]
SETTINGS += [("", "model"), ("", "device"), ("inbox", "max_fact"), ("x\x1b", "y\u202e")]


def refused(root: Path, environ: dict[str, str]) -> None:
    try:
        config.load(root, environ)
    except KeditError as error:
        assert error.exit_code == config.BAD_CONFIG and error.hint
        assert (str(error) + error.hint).encode()


@examples(100)
@given(data=altered([TOML, b'model = "x"\n[inbox]\nmax_facts = 3\n']))
def test_settings(tmp_path: Path, data: bytes) -> None:
    (tmp_path / config.FILE).write_bytes(data)
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
    tmp_path: Path, given: list[tuple[tuple[str, str], Any]], environ: dict[str, str]
) -> None:
    # JSON's texts, lists and numbers are nearly TOML's.
    lines = [
        (f"[{json.dumps(s)}]\n" if s else "") + f"{json.dumps(k)} = {json.dumps(value)}\n"
        for (s, k), value in given
    ]
    (tmp_path / config.FILE).write_bytes("".join(lines).encode("utf-8", "surrogatepass"))
    refused(tmp_path, environ)


# The control socket ---------------------------------------------------------------------------

ASK = b'POST /ask HTTP/1.1\r\nHost: x\r\nContent-Length: 15\r\n\r\n{"prompt": "x"}'


def test_requests_on_the_socket(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.create()
    seeds = [ASK, ASK + ASK, b"GET / HTTP/0.9\r\n\r\n", ASK.replace(b"15", b"99999999")]

    @examples(100)
    @given(altered(seeds))
    @example(ASK.replace(b'"x"', b"[" * 100))
    @example(b"POST /ask HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    @example(b"A" * 70_000)
    def one(data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(10)
            client.connect(str(home.socket))
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
        assert call(home.socket, "ask", {"prompt": "still there?"}) == {"answer": "x"}


class AnyReply(dict[str, dict[str, Any]]):
    def __missing__(self, name: str) -> dict[str, Any]:
        return {"answer": "x"}


NAMES = ("ask", "flush", "audit", "consolidate", "revert", "frob")
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": VALUE,
        "max_tokens": st.one_of(VALUE, st.integers(-1, 3)),
        "base": VALUE,
        "explain": VALUE,
        "dry_run": st.one_of(st.just(True), VALUE),
        "facts": st.one_of(VALUE, st.lists(TEXT, max_size=3)),
        "generation": st.one_of(VALUE, st.integers(-1, 2)),
    },
)


def test_orders(bench: Callable[..., Bench]) -> None:
    at = bench()

    @examples(40)
    @given(st.sampled_from(NAMES), ARGUMENTS)
    def one(name: str, arguments: dict[str, Any]) -> None:
        if name in ("audit", "consolidate", "flush"):
            arguments["dry_run"] = arguments.get("dry_run", True)
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except ValueError:
            return  # the socket lets none of these in
        try:
            json.dumps(carry_out(at.editor, name, arguments))
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
                    carry_out(at.editor, name, {**asked, key: odd})
    assert at.says("The seat of country 1 is") is not None


# HTTP -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]
) -> Iterator[Running]:
    with server(tmp_path_factory.mktemp("fuzz") / "home", model_folder("llama")) as made:
        yield made


def test_facts_over_http(running: Running) -> None:
    seeds = [*SEEDS, good("a"), *LINES.values()]

    @examples(60)
    @given(
        st.one_of(altered(seeds), restated()),
        st.fixed_dictionaries(
            {}, optional={"format": st.sampled_from([*FORMATS, "\x1b[2J"]), "wait": TEXT}
        ),
    )
    def one(body: bytes, query: dict[str, str]) -> None:
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


def test_completions(running: Running) -> None:
    asked = st.dictionaries(
        st.sampled_from([*FIELDS, *_HARMLESS, "prompt", "model"]), VALUE, max_size=3
    ).map(lambda more: json.dumps(COMPLETION | more).encode())

    @examples(100)
    @given(st.one_of(altered([json.dumps(COMPLETION).encode()]), asked))
    @example(b"[" * 100_000)
    @example(json.dumps(COMPLETION | {"prompt": "\ud800"}).encode())
    @example(json.dumps(COMPLETION | {"prompt": [1 << 70]}).encode())
    def one(body: bytes) -> None:
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
