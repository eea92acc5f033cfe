"""libFuzzer at everything that reads: `python tests/soak/fuzz.py FOLDER -max_total_time=600`.

It needs `pip install atheris` and goes on until something breaks. FOLDER keeps the inputs that went
a new way; `python tests/soak/fuzz.py --start FOLDER` puts into it what was kept before, in
tests/data/corpus, and `--keep FOLDER` after `-merge=1` writes that file anew.
"""

import base64
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
MOST = 8
NOW = datetime(2026, 3, 1, tzinfo=UTC)
READING = ["memory.ledger", "csv", "json", "tomllib"]
READING += [f"kedit_daemon.{name}" for name in ("formats", "splitting", "records", "config")]
READING += [f"kedit_daemon.{name}" for name in ("moments", "backup", "serve.asked")]


def targets(root: Path) -> list[Callable[[bytes], object]]:
    """What reads bytes; each raises what it should not."""
    from conftest import save_model
    from fuzz_tools import check, refused
    from hostile_tools import acting

    from kedit_daemon import backup, config
    from kedit_daemon.formats import FORMATS
    from kedit_daemon.moments import moment
    from kedit_daemon.serve.asked import chat, completion
    from kedit_daemon.serve.reader import Reader
    from kedit_daemon.serve.refusals import Refused
    from memory.errors import KeditError
    from memory.ledger import read_head
    from memory.model import EditableModel

    import torch  # isort: skip

    model = EditableModel.load(save_model("llama", root / "model"), torch.device("cpu"))
    reader = Reader("tiny", model, None)  # type: ignore[arg-type]  # nobody answers

    def files(data: bytes) -> None:
        chosen, body = data[0], data[1:]
        format = (None, *FORMATS)[chosen % (len(FORMATS) + 1)]
        check(body, ("x.jsonl", "x.csv", "x\n.json")[chosen // 16 % 3], format)

    def settings(data: bytes) -> None:
        (root / config.FILE).write_bytes(data)
        refused(root, {})

    def head(data: bytes) -> None:
        (root / "head").write_bytes(data)
        with contextlib.suppress(KeditError):
            read_head(root / "head")

    def manifest(data: bytes) -> None:
        (root / backup.MANIFEST).write_bytes(data)
        with contextlib.suppress(KeditError):
            backup.check(root)

    def moments(data: bytes) -> None:
        with contextlib.suppress(ValueError):
            assert len(moment(data.decode(errors="surrogateescape"), NOW)) == 24

    def asked(data: bytes) -> None:
        for how in (completion, chat):
            try:
                how(data, reader, MOST)
            except Refused as error:
                assert 400 <= error.status < 500 and acting(str(error)) == ""

    # Files come most often: they are what strangers hand in.
    return [files, files, files, asked, settings, head, manifest, moments]


def start(folder: Path) -> None:
    """Put into the folder what was kept, and what the tests begin with."""
    from fuzz_tools import CORPUS, SEEDS, TOML

    folder.mkdir(parents=True, exist_ok=True)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    texts = {0: SEEDS, 3: [b'{"model": "tiny", "prompt": "x"}', json.dumps(chat).encode()]}
    texts |= {4: [TOML], 5: [b'{"seq": 1, "hash": "0"}'], 6: [b'{"format": "kedit-backup-1"}']}
    texts |= {7: [b"2h", b"2026-01-31T12:00+01:00"]}
    kept = [b"\0" + base64.b64decode(line) for line in CORPUS.read_bytes().split()]
    found = kept + [bytes([n]) + (b"\0" * (n < 3)) + t for n, many in texts.items() for t in many]
    for number, data in enumerate(found):
        (folder / f"start{number}").write_bytes(data)


def keep(folder: Path) -> None:
    """Write the corpus that tests/promises/test_fuzz.py plays: of files, without the first byte."""
    from fuzz_tools import CORPUS

    found = sorted(path.read_bytes() for path in folder.iterdir())
    lines = [base64.b64encode(data[1:]) for data in found if len(data) > 1 and data[0] % 8 < 3]
    CORPUS.write_bytes(b"\n".join(dict.fromkeys(lines)) + b"\n")


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] in ("--start", "--keep"):
        {"--start": start, "--keep": keep}[sys.argv[1]](Path(sys.argv[2]))
        return
    import atheris

    with (
        tempfile.TemporaryDirectory() as root,
        atheris.instrument_imports(include=READING, enable_loader_override=False),
    ):
        reads = targets(Path(root))

        def one(data: bytes) -> None:
            if len(data) > 1:
                reads[data[0] % len(reads)](data[1:])

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
