"""An inbox with its intake and a store, without a model or a process around."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kedit_daemon.config import Config
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from memory.db.store import Store


class Room:
    """The inbox, its clocks, and what is known of the files that came into it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, datetime(2026, 1, 1, tzinfo=UTC)
        self.ticks = 0.0
        self.store = Store(folder.parent / "kedit.db", lambda: self.now)
        self.open()

    def open(self) -> None:
        self.inbox = Inbox(self.folder, 1.0, 4_000, lambda: self.now)
        self.intake = Intake(self.store, self.inbox, Config())

    def look(self, times: int = 3) -> None:
        """Scan until everything has stood still."""
        for claim in self.inbox.pending_claims():
            self.intake.take_file(claim)
        for _ in range(times):
            self.ticks += 1.1
            self.now += timedelta(seconds=1)
            for claim in self.inbox.claim_files(self.ticks):
                self.intake.take_file(claim)

    def targets(self) -> list[str]:
        return [f"{f.fact.subject[8:]} {f.fact.target} {f.state}" for f in self.store.list_facts()]

    def told(self) -> dict[str, list[int]]:
        reports = (self.folder / "failed").glob("*.error.json")
        return {
            path.name.removesuffix(".error.json"): [
                error["line"] for error in json.loads(path.read_text())["errors"]
            ]
            for path in reports
        }

    def kinds(self, kind: str) -> int:
        sql = "SELECT count(*) FROM events WHERE kind = ?"
        return int(self.store.db.conn.execute(sql, (kind,)).fetchone()[0])
