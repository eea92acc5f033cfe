"""The whole life of some facts, in parts: what a daemon is asked to do in a kill sweep.

Nothing is left to chance: the next step is taken when the daemon has nothing more to do. How far
a life has come is known outside of the process, so that whoever takes it up again after a crash
goes on with the step that was under way, as people and their scripts do.
"""

import json
import queue
import re
import shutil
import struct
import time
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from mmap import mmap
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from editing_home import LOOSE, seat
from tiny_models import CITIES

from kedit_daemon.cli.main import cli
from kedit_daemon.config import Config
from kedit_daemon.control import ControlRequest
from kedit_daemon.daemon.loop import WAKE_REQUEST, Daemon
from kedit_daemon.home import Home
from kedit_daemon.ingest.submit import format_native
from kedit_daemon.maintenance.backup import PARTIAL_MARK, check_backup, create_backup
from kedit_daemon.system.lock import hold_lock
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db import queries
from memory.db.event_log import read_head, verify_chain
from memory.db.store import Store
from memory.facts import FactState
from memory.files import hash_file, tensors_path

BATCH = [seat(n, CITIES[n]) for n in range(4)]
NEWER = seat(1, "Delhi")  # takes the place of one of them
ENDING, BESIDE = "ending", "beside"  # external ids
# The home is whole between the parts, so that each can be lived by itself.
PARTS: dict[str, list[str]] = {
    "first": [],
    "batch": ["drop batch"],
    "mixed": ["drop mixed"],
    "flush": ["flush", "audit"],
    "beside": ["drop beside", f"revert {BESIDE}"],
    "expire": ["tomorrow", f"revert {BATCH[2].id}"],
    "back": ["consolidate", "back 1", "backup"],
}
TOMORROW = timedelta(days=1, hours=1)
NEVER = "0 0 29 2 *"  # but for the first start, at which all jobs are due
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "inbox": {"settle_seconds": 0.0},
    "routing": {"direct_facts": 4, "flush_age_seconds": 1e9},
    "side": {"steps": 60},
    "schedule": {"audit": NEVER, "consolidate": NEVER, "retention": NEVER, "expire": "0 0 * * *"},
    **LOOSE,
}


class Progress:
    """How many steps have been done, and by how much the clock has been set forward: bytes that
    a killed process leaves to its parent."""

    def __init__(self) -> None:
        self._bytes = mmap(-1, 16)  # shared with what is forked

    def set(self, steps: int, ahead: timedelta) -> None:
        struct.pack_into("qq", self._bytes, 0, steps, int(ahead.total_seconds()))

    @property
    def done(self) -> int:
        return int(struct.unpack_from("q", self._bytes, 0)[0])

    @property
    def ahead(self) -> timedelta:
        return timedelta(seconds=struct.unpack_from("q", self._bytes, 8)[0])

    def step(self, ahead: timedelta | None = None) -> None:
        self.set(self.done + 1, self.ahead if ahead is None else ahead)

    def clock(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Case:
    """A folder with a home, and beside it the files that are going to be dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, Home(folder / "home")
        self.stock, self.backup = folder / "stock", folder / "backup"

    @classmethod
    def made(cls, folder: Path) -> "Case":
        """One in which no daemon has lived yet."""
        case = cls(folder)
        case.stock.mkdir(parents=True)
        case.home.create_folders()
        end = (datetime.now(UTC) + TOMORROW / 2).isoformat(timespec="seconds")
        ending = seat(7, "Lima", valid_until=end.replace("+00:00", "Z"), external_id=ENDING)
        files = {
            "batch": [*map(format_native, BATCH)],
            "mixed": [
                format_native(seat(4, "Quito")),
                format_native(BATCH[0]),
                format_native(NEWER),
                '{"subject": 1}',
            ],
            "beside": [format_native(ending), format_native(seat(5, "Paris", external_id=BESIDE))],
        }
        for name, lines in files.items():
            (case.stock / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        return case

    def copied(self, folder: Path) -> "Case":
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.folder, folder)
        return Case(folder)


class Script(queue.Queue[ControlRequest]):
    """The daemon's queue of requests: who waits at it has nothing more to do, and is given the
    next step."""

    def __init__(self, case: Case, steps: list[str], progress: Progress, daemon: Daemon) -> None:
        super().__init__()
        self.case, self.steps, self.progress, self.daemon = case, steps, progress, daemon
        self.asked: ControlRequest | None = None
        self.served: list[str] = []  # what is wrong with it, at the start and at the end

    def get(self, block: bool = True, timeout: float | None = None) -> ControlRequest:
        with suppress(queue.Empty):
            return super().get(block=False)
        if not block:
            raise queue.Empty
        if self.asked is not None:
            self.answered(*self.asked.reply_queue.get_nowait())
        self.served += wrong(self.daemon)
        if self.progress.done < len(self.steps):
            return self.taken(*self.steps[self.progress.done].split())
        self.daemon.stop_flag.set()
        return ControlRequest(WAKE_REQUEST, {})

    def answered(self, status: int, body: bytes) -> None:
        """A step has been done; or before, as whoever asks again after a crash is told."""
        answer = json.loads(body)
        assert status == 200 or answer["code"] == "unknown-fact", answer
        self.progress.step()
        self.asked = None

    def taken(self, name: str, *words: str) -> ControlRequest:
        if name == "drop":  # what `mv` does; it is done before the file is taken
            path = self.case.stock / f"{words[0]}.jsonl"
            with suppress(FileNotFoundError):
                path.rename(self.case.home.inbox_folder / path.name)
            self.progress.step()
        elif name == "tomorrow":
            self.progress.step(TOMORROW)
        elif name == "backup":
            if not self.case.backup.exists():
                create_backup(self.case.home, self.case.backup, self.progress.clock())
            self.progress.step()
        else:
            arguments: dict[str, Any] = {"facts": list(words)} if name == "revert" else {}
            if name == "back":
                name, arguments = "revert", {"generation": int(words[0])}
            self.asked = ControlRequest(name, arguments)
            return self.asked
        return ControlRequest(WAKE_REQUEST, {})


def live(case: Case, model: Path, steps: list[str], progress: Progress) -> list[str]:
    """Live on from the step that is under way, as `kedit-daemon run` does; what was wrong with
    what was served."""
    config = Config.model_validate({"model": str(model), **SETTINGS})
    home = case.home
    home.create_folders()
    with hold_lock(home.lock_file):
        store = Store(home.database_file, progress.clock)
        try:
            now = time.monotonic
            daemon = Daemon(home, config, store, SystemdNotifier({}), progress.clock, now)
            script = daemon.control_server.requests = Script(case, steps, progress, daemon)
            assert daemon.run() == 0
            return sorted({*script.served, *wrong(daemon)})
        finally:
            store.close()


# What is found -----------------------------------------------------------------------------------


def wrong(daemon: Daemon) -> list[str]:
    """Where what is served is not what the ledger says."""
    at, found = daemon.editor.live_model, []
    row = at.store.artifacts.get_generation(at.store.artifacts.active_generation())
    weights = at.model.weights_hash(at.loaded_model.layers)
    if weights != (row.weights_hash if row.sha256 else at.unedited_hash):
        found.append("other weights are served than the ledger says")
    if row.sha256 and hash_file(tensors_path(at.home.generations_folder, row.sha256)) != row.sha256:
        found.append("the active generation's file is not what the ledger says")
    beside = {f.id for f in at.store.list_facts((FactState.LIVE_SIDE,))}
    if beside != {n for n, shard in at.side.shard_ids.items() if shard in at.side.shards}:
        found.append("other facts are served beside the weights than the ledger says")
    return found


FOUND = {
    "facts": "SELECT id, state, tier, generation, reason, before, after FROM facts ORDER BY id",
    "events": "SELECT fact_id, kind FROM events WHERE fact_id IS NOT NULL ORDER BY fact_id, seq",
    "edits": "SELECT fact_id, tier, outcome FROM edits ORDER BY fact_id, id",
    "files taken": "SELECT file_name, sha256, accepted, failed, duplicates FROM submissions"
    " ORDER BY file_name",
    "kept beside": "SELECT fact_id FROM side_keys ORDER BY fact_id",
    "generations": "SELECT id, weights_hash, fact_ids, reason FROM generations ORDER BY id",
    "active": "SELECT value FROM meta WHERE key = 'active_generation'",
}


def findings(case: Case) -> dict[str, Any]:
    """What a part of a life leaves behind: the same however it was interrupted."""
    home = case.home
    command = ["--home", str(home.root), "doctor", "--fix", "--json"]
    said = CliRunner().invoke(cli, command)
    backup = case.backup
    # Outside of the home a killed backup may leave what it was filling, and nothing takes it away.
    for left in case.folder.glob(f".{backup.name}{PARTIAL_MARK}*"):
        shutil.rmtree(left)
    found: dict[str, Any] = {"files": listing(case.folder)}
    with closing(queries.open_readonly(home.database_file)) as conn:
        for name, sql in FOUND.items():
            found[name] = [list(row) for row in conn.execute(sql)]
        found["chain"] = verify_chain(conn, read_head(home.head_file)).problem
    checks = json.loads(said.stdout)["checks"]
    found["doctor"] = sorted({c["name"] for c in checks if c["outcome"] != "ok"})
    if backup.exists():
        found["backup"] = check_backup(backup).manifest["facts"]
    return found


def listing(root: Path) -> list[str]:
    """The files of a folder; a claim's time and random part are left out of their names."""
    paths = (str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
    return sorted(re.sub(r"\d{8}T\d{12}Z-[0-9a-f]{8}-", "", path) for path in paths)
