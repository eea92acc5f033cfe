"""The regular jobs, run one after the other by the edit loop, each with a record of its outcome."""

import logging
from collections.abc import Collection

from kedit_daemon.daemon.job_schedule import JobSchedule
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.memory_backoff import guard_memory
from kedit_daemon.system.disk import is_database_locked, is_disk_failure
from memory.db.store import JOB_OK, Store
from memory.errors import KeditError, ends_daemon

LONG_JOBS = ("audit", "consolidate", "retention")
log = logging.getLogger(__name__)


def run_due_jobs(
    schedule: JobSchedule, store: Store, editor: Editor, postponed: Collection[str] = ()
) -> None:
    """Run every job that is due, except for those `postponed`, and record how it ended; one that
    fails stops no other.

    Raises what is no fault of a job: the daemon stops, the database is damaged or locked by
    another process, or the disk fails. After the last two the job is due again.
    """
    while (due := schedule.take_due_job(postponed)) is not None:
        name, planned = due
        with store.db.transaction():
            number = store.start_job(name, planned)
        outcome, detail = JOB_OK, ""
        try:
            with guard_memory(editor.live_model):
                detail = run_job(editor, name)
        except KeditError as error:
            if ends_daemon(error):
                raise
            outcome, detail = "failed", str(error)
        except Exception as error:  # the next job must still run
            if is_disk_failure(error) or is_database_locked(error):
                schedule.due_jobs.put((name, planned))
                raise
            log.exception("job %s failed", name)
            outcome, detail = "failed", f"{type(error).__name__}: {error}"
        with store.db.transaction():
            store.finish_job(number, outcome, detail)


def run_job(editor: Editor, name: str) -> str:
    """Run a regular job and return its result in words."""
    if name == "audit":
        return str(editor.audit()["verdict"])
    if name == "consolidate":
        if not editor.live_model.list_weights_facts():
            return "no facts in the weights"
        done = editor.consolidate(False)
        return "changed" if done["taken"] else "; ".join(done["reasons"]) or "unchanged"
    if name == "retention":
        figures = editor.auditor.retention.probe_retention()["figures"]
        return ", ".join(f"{n} {v:.3f}" for n, v in figures.items() if v is not None) or "none"
    return f"{editor.expire_facts()} expired, {editor.begin_facts()} began"
