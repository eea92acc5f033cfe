"""Whether what a process wrote would outlive a power loss, by the order of its system calls.

A rename is atomic, and no more: what is in the file has to be synced before it, and the folder
after it. And nothing may be said to be done before the database is synced.
"""

import os
import re
from collections.abc import Iterator

NAMED = re.compile(r'(?:(?:AT_FDCWD|\d+)(?:<([^>]*)>)?, )?"((?:[^"\\]|\\.)*)"')
OPEN = re.compile(r"\d+<([^>]*)>")
CALL = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+)")
DATABASE = re.compile(r"/home/state/kedit\.db(-wal)?$")
TENSORS = re.compile(r"/home/state/(generations|side|index)/[0-9a-f]{64}\.safetensors$")
TOLD = re.compile(r"/inbox/(done|failed)/[^.][^/]*$|/state/audit\.head$")  # what is said of it


class _Disk:
    """What is certain to be on it."""

    def __init__(self) -> None:
        self.unsynced = set[str]()  # files that were written to since
        self.synced = set[str]()
        self.named: dict[str, str] = {}  # folders to be synced -> what has got its name there

    def sync(self, path: str) -> None:
        self.unsynced.discard(path)
        self.synced.add(path)
        self.named.pop(path, None)

    def write(self, path: str) -> Iterator[str]:
        self.synced.discard(path)
        self.unsynced.add(path)
        if DATABASE.search(path):
            for folder, name in self.named.items():
                yield f"{folder} was not synced after {name} had come into it"
            self.named.clear()

    def rename(self, old: str, new: str) -> Iterator[str]:
        if new.endswith(".tmp"):  # how safetensors writes, too: it has no name yet
            self.unsynced ^= {old, new}
            return
        inside = {p for p in self.unsynced | self.synced if p.startswith(f"{old}/")}
        for path in inside & self.unsynced or ({old} - self.synced if not inside else ()):
            yield f"{path} was not synced before it became {new}"
        if old in self.synced:
            self.synced.add(new)
        self.named |= dict.fromkeys((os.path.dirname(new), os.path.dirname(old)), new)
        if TOLD.search(new):
            yield from self.told(new)

    def told(self, path: str) -> Iterator[str]:
        for database in filter(DATABASE.search, self.unsynced):
            yield f"{path} was changed before {database} was synced"


def faults(trace: list[str]) -> list[str]:
    """What a power loss could undo, or tear, in a trace of `strace -y` of one thread."""
    disk, found = _Disk(), list[str]()
    for line in trace:
        if (call := CALL.match(line)) and int(call[3]) >= 0:
            found += _seen(disk, call[1], call[2])
    return found + [f"{folder} was never synced after {n}" for folder, n in disk.named.items()]


def _seen(disk: _Disk, call: str, arguments: str) -> Iterator[str]:
    if call.startswith("rename"):
        old, new = (os.path.join(folder, name) for folder, name in NAMED.findall(arguments))
        if "/stock/" not in old:  # what somebody drops is his own
            yield from disk.rename(old, new)
    elif call.startswith("unlink"):
        path = "".join(os.path.join(*found) for found in NAMED.findall(arguments)[:1])
        disk.unsynced.discard(path)
        if TENSORS.search(path):
            yield from disk.told(path)
    elif path := OPEN.match(arguments):
        if call in ("fsync", "fdatasync"):
            disk.sync(path[1])
        else:
            yield from disk.write(path[1])
