"""Waits for submitted facts, by the state of the database and of the inbox's folders."""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing

from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import REPORT_SUFFIX, failed_folder
from kedit_daemon.system.lock import find_lock_holder
from memory.db.meta_keys import AMENDED
from memory.db.queries import open_readonly
from memory.errors import NoHome, NotRunning
from memory.facts import FactState

POLL_SECONDS = 0.2
FAILED_STATES = (FactState.FAILED, FactState.REJECTED)
LOST = "lost"
"""The state, for those who wait, of a fact that the daemon has not taken in."""

FactOutcome = tuple[str, str | None]
"""A fact's state, and the reason for it."""


def wait_until_settled(
    home: Home, name: str, ids: Sequence[str], report: Callable[[str], None]
) -> dict[str, FactOutcome]:
    """Wait until every fact of the file `name` is live or has failed: id -> state and reason.

    Raises NotRunning when the daemon does not run, or ends meanwhile.
    """
    last = ""
    while True:
        running = find_lock_holder(home.lock_file) is not None
        states = read_outcomes(home, name, ids)
        settled = [i for i in ids if states and states[i][0] != FactState.RECEIVED]
        if states is not None and len(settled) == len(ids):
            return states
        if not running:
            raise NotRunning("the daemon is not running: the facts wait for it")
        noun = "fact is" if len(ids) == 1 else "facts are"
        progress = f"{len(settled)} of {len(ids)} {noun} settled"
        if progress != last:
            report(progress)
            last = progress
        time.sleep(POLL_SECONDS)


def read_outcomes(home: Home, name: str, ids: Sequence[str]) -> dict[str, FactOutcome] | None:
    """Read the outcomes of the facts of the file `name`; None before it has been taken in."""
    failed = _is_file_failed(home, name)  # before the states, which are final once it is
    states = _read_states(home, name, ids)
    if states is None and failed:
        return dict.fromkeys(ids, (LOST, f"see inbox/failed/{name}{REPORT_SUFFIX}"))
    return states


def _read_states(home: Home, name: str, ids: Sequence[str]) -> dict[str, FactOutcome] | None:
    """Read the facts' states; None before the file is taken in, when they would be older ones."""
    try:
        opened = open_readonly(home.database_file)
    except NoHome:  # the daemon starts for the first time
        return None
    with closing(opened) as conn:
        taken = conn.execute("SELECT 1 FROM submissions WHERE file_name = ?", (name,)).fetchone()
        if taken is None:
            return None
        row = conn.execute("SELECT value FROM meta WHERE key = ?", (AMENDED,)).fetchone()
        relearned = json.loads(row[0]) if row else []
        sql = "SELECT id, state, reason FROM facts WHERE id IN (SELECT value FROM json_each(?))"
        found = {row[0]: (row[1], row[2]) for row in conn.execute(sql, (json.dumps(list(ids)),))}
    found |= {i: (FactState.RECEIVED, "amended") for i in relearned if i in found}
    return {i: found.get(i, (LOST, "the daemon has not taken it in")) for i in ids}


def _is_file_failed(home: Home, name: str) -> bool:
    """Check that the file has ended in failed/; one in work/ may still become facts."""
    try:
        report = json.loads((failed_folder(home) / f"{name}{REPORT_SUFFIX}").read_bytes())
        return not (home.inbox_folder / "work" / str(report["claim"])).exists()
    except FileNotFoundError:
        return False
