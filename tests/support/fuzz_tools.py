"""What is thrown at everything that reads, and what must hold whatever comes."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from foreign_records import FOREIGN
from hostile_tools import TEXTS, acting
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from paths import TESTS
from tiny_models import save_model

from kedit_daemon import config
from kedit_daemon.ingest.parser import FORMATS, extract_failed, parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.maintenance import backup
from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.openai.request_parser import parse_chat, parse_completion
from kedit_daemon.system.timespec import parse_time
from memory.db.event_log import read_head
from memory.errors import EXIT_BAD_CONFIG, KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel

MORE = os.environ.get("KEDIT_FUZZ_EXAMPLES")
LIMITS = FileLimits(20, 60, 2_000)
CORPUS = TESTS / "data" / "fuzzed.base64"
MOST = 8  # wishes in a request
NOW = datetime(2026, 3, 1, tzinfo=UTC)


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
    parsed = parse_file(data, name, format, LIMITS)
    assert parsed.facts or parsed.problems
    assert len(parsed.facts) <= LIMITS.max_facts
    last = max(data.count(b"\n"), data.count(b"\r")) + 1
    for line, fact in parsed.facts:
        assert 1 <= line <= last
        assert fact.subject and fact.prompt and 1 <= len(fact.target) <= LIMITS.max_target_chars
        for text in texts_of(fact):
            assert "\0" not in text
            text.encode()
    for problem in parsed.problems:
        assert 1 <= problem.line <= last
        assert problem.problem.strip() and problem.remedy.strip(), problem
        assert acting(problem.problem + problem.remedy) == ""
    extract_failed(data, name, parsed.problems)


TOML = config.render_default_config("shipped").encode()
SETTINGS = [(s, k) for s, m in config.SECTIONS.items() for k in m.model_fields]
SETTINGS += [("", "model"), ("", "device"), ("inbox", "max_fact"), ("x\x1b", "y\u202e")]


def refused(root: Path, environ: dict[str, str]) -> None:
    try:
        config.load_config(root, environ)
    except KeditError as error:
        assert error.exit_code == EXIT_BAD_CONFIG and error.hint
        assert (str(error) + error.hint).encode()


def reader_of_all(root: Path) -> Callable[[bytes], None]:
    """Takes what a fuzzer makes up: the first byte chooses who reads the rest. Raises what nobody
    who reads should."""
    model = EditableModel.load(save_model("llama", root / "model"), torch.device("cpu"))
    reader = Reader("tiny", model, None)  # type: ignore[arg-type]  # nobody answers

    def files(data: bytes) -> None:
        chosen, body = data[0], data[1:]
        format = (None, *FORMATS)[chosen % (len(FORMATS) + 1)]
        check(body, ("x.jsonl", "x.csv", "x\n.json")[chosen // 16 % 3], format)

    def toml(data: bytes) -> None:
        (root / config.CONFIG_FILE).write_bytes(data)
        refused(root, {})

    def head(data: bytes) -> None:
        (root / "head").write_bytes(data)
        with suppress(KeditError):
            read_head(root / "head")

    def manifest(data: bytes) -> None:
        (root / backup.MANIFEST).write_bytes(data)
        with suppress(KeditError):
            backup.check_backup(root)

    def moments(data: bytes) -> None:
        with suppress(ValueError):
            assert len(parse_time(data.decode(errors="surrogateescape"), NOW)) == 24

    def asked(data: bytes) -> None:
        for how in (parse_completion, parse_chat):
            try:
                how(data, reader, MOST)
            except RequestError as error:
                assert 400 <= error.status < 500 and acting(str(error)) == ""

    # Files come most often: they are what strangers hand in.
    reads = [files, files, files, asked, toml, head, manifest, moments]

    def one(data: bytes) -> None:
        if len(data) > 1:
            reads[data[0] % len(reads)](data[1:])

    return one
