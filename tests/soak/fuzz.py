#!/usr/bin/env python
"""libFuzzer at everything that reads: `tests/soak/fuzz.py FOLDER -max_total_time=600`.

It needs `pip install atheris` and goes on until something breaks. FOLDER keeps the inputs that
went a new way. `--start FOLDER` puts into it what was kept in tests/data; `-merge=1 SMALL FOLDER`
chooses those that are needed, and `--keep SMALL` writes that file anew.
"""

import base64
import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]
MOST_BYTES = 2_000  # of an input that is kept
READING = ["memory.db.event_log", "csv", "json", "tomllib"]
READING += [
    f"kedit_daemon.{name}" for name in ("ingest.parser", "ingest.record_splitter", "config")
]
READING += [
    f"kedit_daemon.{name}" for name in ("ingest.schemas", "system.timespec", "maintenance.backup")
]
READING += ["kedit_daemon.serve.openai.request_parser"]


def start(folder: Path) -> None:
    """Put into the folder what was kept, and what the tests begin with."""
    from fuzz_tools import CORPUS, SEEDS, TOML

    folder.mkdir(parents=True, exist_ok=True)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    texts = {0: SEEDS, 3: [b'{"model": "tiny", "prompt": "x"}', json.dumps(chat).encode()]}
    texts |= {4: [TOML], 5: [b'{"seq": 1, "hash": "0"}'], 6: [b'{"format": "kedit-backup-1"}']}
    texts |= {7: [b"2h", b"2026-01-31T12:00+01:00"]}
    kept = [base64.b64decode(line) for line in CORPUS.read_bytes().split()]
    found = kept + [bytes([n]) + (b"\0" * (n < 3)) + t for n, many in texts.items() for t in many]
    for number, data in enumerate(found):
        (folder / f"start{number}").write_bytes(data)


def keep(folder: Path) -> None:
    """Write the corpus that tests/promises/test_fuzz.py plays."""
    from fuzz_tools import CORPUS

    found = sorted(path.read_bytes() for path in folder.iterdir())
    lines = [base64.b64encode(data) for data in found if 1 < len(data) <= MOST_BYTES]
    CORPUS.write_bytes(b"\n".join(lines) + b"\n")


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in ("--start", "--keep"):
        {"--start": start, "--keep": keep}[sys.argv[1]](Path(sys.argv[2]))
        return
    import atheris

    with tempfile.TemporaryDirectory() as root:
        with atheris.instrument_imports(include=READING, enable_loader_override=False):
            from fuzz_tools import reader_of_all
        atheris.Setup(sys.argv, reader_of_all(Path(root)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
