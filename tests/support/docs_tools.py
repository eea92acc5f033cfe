"""What the tests of the documents share: blocks, links, and a shell that plays what is shown."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paths import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECONDS = 120.0  # that one command may take
MARK = "@@ended@@"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_EXIT = re.compile(r"#.*\bexits with (\d+)")
# What may differ from run to run, and what may then stand there.
_VOLATILE = (
    (r"…", r".*?"),
    (r"\b[0-9a-f]{64}\b", r"[0-9a-f]{64}"),
    (r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(?:\.\d+)?Z?", r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:[\d.]+Z?"),
    (r"\b\d\d:\d\d\b", r"\d\d:\d\d"),
    (r"(?<![\w.])\d+\.\d+(?:e-?\d+)?(?![\w.])", r"-?[\d.]+(?:e-?\d+)?"),
)


@dataclass(frozen=True)
class Block:
    """A fenced block, and the line of its document that it begins in."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Step:
    """A command that a document shows, how it ends, and what it prints there."""

    line: int
    command: str
    code: int
    shown: list[str] = field(default_factory=list)


def blocks(text: str) -> Iterator[Block]:
    """All fenced blocks of a document."""
    for found in _FENCE.finditer(text):
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 1)


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return _FENCE.sub("", text)


def steps(text: str) -> Iterator[Step]:
    """What the console blocks of a document run, in order; a command goes on after "> "."""
    for block in blocks(text):
        if block.language != "console":
            continue
        parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
        assert not parts[0].strip(), f"line {block.line}: a console block begins with a command"
        line = block.line + 1
        for part in parts[1:]:
            first, *rest = part.splitlines()
            more = [r for r in rest if r.startswith("> ")]
            command = "\n".join([first, *(r.removeprefix("> ") for r in more)])
            ends = _EXIT.search(first)
            yield Step(line, command, int(ends[1]) if ends else 0, rest[len(more) :])
            line += len(part.splitlines())


def agrees(shown: Sequence[str], seen: str) -> bool:
    """Whether a document shows what was seen. "…" stands for anything, alone on a line for any
    lines; figures with a decimal point, moments and hashes may be others; all else is literal."""
    pattern = "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else _pattern(_squeezed(line)) + "\n" for line in shown
    )
    lines = [_squeezed(line) for line in seen.splitlines()]
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in lines)) is not None


def _squeezed(line: str) -> str:
    return re.sub(" +", " ", line).strip()


def _pattern(line: str) -> str:
    either = "|".join(f"({shape})" for shape, _ in _VOLATILE)
    result, end = "", 0
    for found in re.finditer(either, line):
        which = next(n for n, group in enumerate(found.groups()) if group is not None)
        result += re.escape(line[end : found.start()]) + _VOLATILE[which][1]
        end = found.end()
    return result + re.escape(line[end:])


class Shell:
    """A bash in a folder of its own that plays one document after another."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        tools = folder / ".bin"
        tools.mkdir()
        for name, words in {"kedit-daemon": "-m kedit_daemon", "python": ""}.items():
            tool = tools / name
            tool.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
            tool.chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("KEDIT_", "XDG_"))}
        kept |= {"PATH": f"{tools}:{kept['PATH']}", "PYTHONPATH": str(ROOT), "HOME": str(folder)}
        kept |= {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "LC_ALL": "C.UTF-8"}
        kept |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        self.folder = folder
        self.bash = subprocess.Popen(
            [shutil.which("bash") or "bash", "--noprofile", "--norc"],
            cwd=folder,
            env=kept,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def play(self, step: Step) -> tuple[int, str]:
        """Run one command; its exit code and all that a terminal would show."""
        assert self.bash.stdin is not None
        script = f"{{ {step.command}\n}} </dev/null\nprintf '\\n{MARK}%d\\n' $?\n"
        self.bash.stdin.write(script.encode())
        self.bash.stdin.flush()
        said = self._until_marked(step)
        text, _, code = said.rpartition(f"\n{MARK}")
        return int(code), text

    def _until_marked(self, step: Step) -> str:
        assert self.bash.stdout is not None
        said, deadline = b"", time.monotonic() + SECONDS
        while not re.search(rf"\n{MARK}\d+\n\Z".encode(), said):
            ready, _, _ = select.select(
                [self.bash.stdout], [], [], max(0.0, deadline - time.monotonic())
            )
            piece = os.read(self.bash.stdout.fileno(), 65536) if ready else b""
            assert piece, f"{step.command!r} does not end: {said.decode()}"
            said += piece
        return said.decode()

    def close(self) -> None:
        """End the bash and all that it has started."""
        os.killpg(self.bash.pid, signal.SIGTERM)
        try:
            self.bash.wait(20)
        finally:
            for stream in (self.bash.stdin, self.bash.stdout):
                assert stream is not None
                stream.close()
