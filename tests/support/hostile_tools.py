"""Hostile input, as one corpus for all tests: records, files, names, things that are no files, and
text that obeys nobody. Run as a program it takes in a home's inbox within small limits."""

import gzip
import io
import json
import os
import pickle
import re
import resource
import socket
import sys
import time
import zipfile
from datetime import UTC, datetime
from pathlib import Path

MEGABYTE = 1 << 20
MOST_BYTES = 10 * MEGABYTE  # what a file may have, by default
ADDRESS_BYTES = 640 * MEGABYTE  # of the process that takes them in, with all its libraries
CPU_SECONDS = 100
SGR = "\x1b[38;5;201m"  # a colour that we never use: a style that came through is seen by it

# Text that a record may hold: it is taken, kept as it came, and never shown as it came.
TEXTS = {
    "clear": "\x1b[2J\x1b[H",
    "colour": f"{SGR}red",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;ZXZpbA==\x1b\\",
    "link": "\x1b]8;;http://evil.example\x1b\\here\x1b]8;;\x1b\\",
    "device": "\x1bP$q\x1b\\\x1b[6n\x1b[c",
    "c1": "\x9b2J\x9d0;owned\x9c\x90q\x85",
    "overwrite": "innocent\rguilty\b\b\b\x7f",
    "lines": "one\n\u2028two\u2029\x0b\x0cthree",
    "bidi": "\u202eevil\u202c \u2066x\u2069 \u200f\u200e\u061c\u202a\u202b\u202d",
    "tags": "".join(chr(0xE0000 + ord(c)) for c in "hidden") + "\U000e0001\ufeff",
    "markup": '<script>alert(1)</script><img src=x onerror=alert(1)>" onload="x',
    "template": "{{7*7}} {% x %} ${7*7} #{7*7} %s%n {0.__class__}",
    "formula": "=cmd|'/c calc'!A0",
    "table": "a | b | ` * _ [x](javascript:y)\n# head",
    "sql": "'; DROP TABLE facts; --",
    "path": "../../../../etc/passwd",
    "option": "--help",
    "zalgo": "Z" + "\u0301\u0489" * 80,
}

# Lines that state no fact. Each is laid between two that do.
LINES = {
    "half a pair": b'{"subject": "\\ud800", "prompt": "{}", "target": "x"}',
    "half a pair in a key": b'{"subject": "a", "prompt": "{}", "target": "x", "\\udfff": 1}',
    "nan": b'{"subject": "B", "prompt": "{}", "target": NaN}',
    "infinity": b'{"subject": "B", "prompt": "{}", "target": -Infinity}',
    "digits": b'{"subject": "B", "prompt": "{}", "target": ' + b"1" * 5_000 + b"}",
    "twice": b'{"subject": "B", "prompt": "{}", "target": "x", "subject": "D"}',
    "twice inside": b'{"subject":"B","prompt":"{}","target":"x","neighbours":'
    b'[{"prompt":"a","prompt":"b"}]}',
    "latin-1": b'{"subject": "B\xff", "prompt": "{}", "target": "x"}',
    "cesu-8": b'{"subject": "B\xed\xa0\x80", "prompt": "{}", "target": "x"}',
    "overlong": b'{"subject": "B\xc0\xaf", "prompt": "{}", "target": "x"}',
    "nul": b'{"subject": "B", "prompt": "{}", "target": "a\x00b"}',
    "nul escaped": b'{"subject": "B", "prompt": "{}", "target": "a\\u0000b"}',
    "control": b'{"subject": "B", "prompt": "{}", "target": "a\x1bb"}',
    "long": b'{"subject": "B", "prompt": "{}", "target": "' + b"x" * 70_000 + b'"}',
    "long key": b'{"' + b"k" * 50_000 + b'": 1}',
    "many keys": b"{" + b",".join(b'"%d":1' % n for n in range(5_000)) + b"}",
    "arrays": b"[" * 30_000 + b"]" * 30_000,
    "objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "deep neighbour": b'{"subject":"B","prompt":"{}","target":"x","neighbours":'
    + b"[" * 900
    + b"]" * 900
    + b"}",
    "binary": bytes(range(1, 10)) + b"\x80\xfe\xff",
    "null": b"null",
    "number": b"-0",
    "text": b'"subject"',
    "unclosed": b'{"subject": "B", "prompt": "{}", "target": "x',
    "quotes": b"{'subject': 'B', 'prompt': '{}', 'target': 'x'}",
    "typed": b'{"subject": {"$ne": 1}, "prompt": ["{}"], "target": true}',
    "class": b'{"__class__": "os.system", "__reduce__": ["id"]}',
    "late": b'{"subject":"B","prompt":"{}","target":"x","valid_until":"9999-99-99"}',
    "far": b'{"subject":"B","prompt":"{}","target":"x","valid_from":"0001-01-01T00:00:00+23:59"}',
    "backwards": b'{"subject":"B","prompt":"{}","target":"x","valid_from":"2030-01-01",'
    b'"valid_until":"2020-01-01"}',
    "blank": '{"subject": "\u2003", "prompt": "{}", "target": "\u3000"}'.encode(),
    "two": b'{"subject": "B", "prompt": "{}", "target": "x"} {"subject": "C"}',
    "rewrite": b'{"requested_rewrite": [[[[1]]]]}',
    "zsre": b'{"src": null, "alt": [], "subject": 0}',
}

NAMES = (
    b"new\nline.jsonl",
    b"\x1b[2J\x1b]0;owned\x07.jsonl",
    b"\xff\xfe.jsonl",
    "\u202elnosj.exe.jsonl".encode(),
    b"..\\..\\windows.jsonl",
    b"...jsonl",
    b"-rf",
    b"--help",
    b" ",
    b"$(touch pwned);`id`|&.jsonl",
    b"%s%n%(x)s{}.jsonl",
    b"'; DROP TABLE facts; --.jsonl",
    b"<script>alert(1)<|script>.jsonl",
    b"x" * 249 + b".jsonl",
    "é".encode() * 127,
    b"same.jsonl.error.json",
    b"same.jsonl",
    b"con.csv.jsonl",
    b"kedit.db",
)


# What nothing that is shown may hold: controls, half pairs, marks of direction, hidden text.
_ACTING = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# Our own colours, and how a terminal ends a line.
_OURS = re.compile(r"\x1b\[(?:0|1|2|3[0-7]|9|22|29)?m|\r(?=\n)")


def acting(shown: str) -> str:
    """What in a shown text could act on a terminal or deceive its reader."""
    return "".join(_ACTING.findall(_OURS.sub("", shown)))


def good(name: str) -> bytes:
    """A line that states a fact."""
    return json.dumps({"subject": name, "prompt": "{} lies in", "target": "Spain"}).encode()


def _repeated(unit: bytes, size: int = MOST_BYTES) -> bytes:
    return (unit * (size // len(unit) + 1))[:size]


def _zipped() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(zipfile.ZipInfo("facts.jsonl"), bytes(20 * MEGABYTE), zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def files() -> dict[str, bytes]:
    """Files of which nothing can be taken, by their names."""
    text = "".join(good(c).decode() + "\n" for c in "AB")
    return {
        "mark.jsonl": b"\xef\xbb\xbf",
        "blank.jsonl": b" \n\t\r\n",
        "utf-32.jsonl": text.encode("utf-32"),
        "bomb.zip": _zipped(),
        "bomb.jsonl.gz": gzip.compress(bytes(20 * MEGABYTE), mtime=0),
        "facts.pkl": pickle.dumps({"subject": "A"}),
        "nul.jsonl": bytes(MEGABYTE),
        "line.jsonl": b'{"subject": "' + b"x" * (MOST_BYTES - 100),
        "arrays.json": _repeated(b"["),
        "objects.json": _repeated(b'{"a":{', 8_000),
        "openings.json": _repeated(b'{"', 4_000),
        "quotes.json": _repeated(b'"'),
        "newlines.jsonl": _repeated(b"\n"),
        "too large.jsonl": _repeated(good("A") + b"\n", MOST_BYTES + 1),
        "quotes.csv": b"subject,prompt,target\n" + _repeated(b'"\n', 40_000),
        "commas.csv": b"subject,prompt,target\n" + _repeated(b",", MEGABYTE),
        "heading.csv": _repeated(b"subject,", MEGABYTE),
        "twice.csv": b"subject,subject,target\na,b,c\n",
        "unknown.csv": b"subject,\x1b[2J,target\na,b,c\n",
    }


def things(inbox: Path, elsewhere: Path) -> set[str]:
    """Put what is no plain file into the inbox; their names. Nothing may be taken from them."""
    elsewhere.mkdir()
    (elsewhere / "secret.jsonl").write_bytes(good("SECRET"))
    (inbox / "link.jsonl").symlink_to(elsewhere / "secret.jsonl")
    (inbox / "passwd.jsonl").symlink_to("/etc/passwd")
    (inbox / "upwards.jsonl").symlink_to("../state/kedit.db")
    (inbox / "loop.jsonl").symlink_to("loop.jsonl")
    (inbox / "dangling.jsonl").symlink_to(elsewhere / "made.jsonl")
    (inbox / "linked folder").symlink_to(elsewhere)
    (inbox / "folder").mkdir()
    (inbox / "folder" / "facts.jsonl").write_bytes(good("SECRET"))
    os.mkfifo(inbox / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(inbox / "socket.jsonl"))
    if os.geteuid() == 0:
        os.mknod(inbox / "zero.jsonl", 0o20666, os.makedev(1, 5))
    return {path.name for path in inbox.iterdir() if path.is_symlink() or not path.is_file()} - {
        "work",
        "done",
        "failed",
    }


def drop(inbox: Path) -> None:
    """Put every hostile file into the inbox."""
    for number, (name, line) in enumerate(LINES.items()):
        lines = b"\n".join((good(f"before {name}"), line, good(f"behind {name}")))
        (inbox / f"line {number}.jsonl").write_bytes(lines + b"\n")
        # Where lines do not part them, a record that is not closed takes the next one with it.
        listed = b",\n".join((good(f"first {name}"), line, good(f"last {name}")))
        (inbox / f"list {number}.json").write_bytes(b"[" + listed + b"]")
    texts = [
        {"subject": f"{key} {text}", "prompt": f"{{}} {text}", "target": text, "source": text}
        for key, text in TEXTS.items()
    ]
    (inbox / "texts.jsonl").write_bytes(b"".join(json.dumps(t).encode() + b"\n" for t in texts))
    for number, raw in enumerate(NAMES):
        (inbox / os.fsdecode(raw)).write_bytes(good(f"name {number}") + b"\n\x00\n")
    for name, data in files().items():
        (inbox / name).write_bytes(data)
    with (inbox / "sparse.jsonl").open("wb") as file:
        file.truncate(1 << 30)
    ends = good("mark") + b"\r\n\r\n" + good("crlf") + b"\r\n"
    (inbox / "ends.jsonl").write_bytes(b"\xef\xbb\xbf" + ends)
    past = time.time() - 60
    for path in inbox.iterdir():
        if path.is_file() and not path.is_symlink():
            os.utime(path, (past, past))


def take_in(root: Path) -> dict[str, object]:
    """Take in what lies in the inbox, as the daemon does; the most memory, and seconds a file."""
    from kedit_daemon.config import Config
    from kedit_daemon.home import Home
    from kedit_daemon.ingest.inbox import Inbox
    from kedit_daemon.ingest.intake import Intake
    from memory.db.store import Store

    home, config = Home(root), Config()
    home.create_folders()
    store = Store(home.database_file, lambda: datetime.now(UTC))
    at = config.inbox
    inbox = Inbox(home.inbox_folder, at.settle_seconds, at.max_bytes, lambda: datetime.now(UTC))
    intake, slowest = Intake(store, inbox, config), 0.0
    for scan in range(3):
        for claim in inbox.claim_files(float(scan)):
            began = time.process_time()
            intake.take_file(claim)
            slowest = max(slowest, time.process_time() - began)
    refused = [found.name for found in inbox.take_refusals()]
    store.close()
    # Not from getrusage, which counts what the process was before it became this program.
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return {"peak": int(peak) << 10, "slowest": slowest, "refused": refused}


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    json.dump(take_in(Path(sys.argv[1])), sys.stdout)
