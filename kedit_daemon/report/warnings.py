"""Warnings about the state of a daemon: a message each, and the command that helps.

Imports nothing heavy, because `status` has to answer at once.
"""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import has_records_to_correct, read_first_error
from memory.facts import FactState

OLD_FACT_SECONDS = 900.0
LOW_DISK_BYTES = 500 << 20
GOOD_VERDICTS = ("keep", "ok")
# The verdicts that need no attention, and the commands that help.
MILD_VERDICT_COMMANDS = {"warn": "log --kind audit", "consolidate": "consolidate"}
NEARLY_FULL_SHARE = 0.95  # of the capacity; the edit loop's own module takes long to import
INTERRUPTED = "interrupted"  # the store's outcome of a job whose process ended
RUNNABLE_JOBS = ("audit", "consolidate", "flush")


def collect_warnings(found: Mapping[str, Any], home: Home, program: str) -> list[dict[str, Any]]:
    """Return {message, command, attention} for each warning in the data of `gather_status`."""
    sources = (
        *(_process_warnings(found, home), _fact_warnings(found, home), _weights_warnings(found)),
        *(_audit_warnings(found), _publish_warnings(found), _job_warnings(found)),
    )
    return [
        {"message": message, "command": f"{program} {command}", "attention": attention}
        for source in (*sources, _disk_warnings(found))
        for message, command, attention in source
    ]


_Warnings = Iterator[tuple[str, str, bool]]


def _process_warnings(found: Mapping[str, Any], home: Home) -> _Warnings:
    if found["pid"] is not None:
        if found["paused"]:
            yield f"paused: {found['paused']}", "doctor", True
    elif home.config_file.is_file():
        yield "the daemon is not running", "run", False
    else:
        yield f"there is no home {home.root}", "init", False


def _fact_warnings(found: Mapping[str, Any], home: Home) -> _Warnings:
    if failed := found["failed_facts"]:
        what = "1 fact has failed" if len(failed) == 1 else f"{len(failed)} facts have failed"
        reason = f": {failed[0]['reason']}" if failed[0]["reason"] else ""
        command = f"show {failed[0]['id']}" if len(failed) == 1 else "facts --state failed"
        yield what + reason, command, True
    if files := found["failed_files"]:
        what = "1 file" if len(files) == 1 else f"{len(files)} files"
        files = sorted(files, key=lambda name: not has_records_to_correct(home, name))
        error = read_first_error(home, files[0])
        where = f" line {error.get('line')}: {error['problem']}" if error.get("problem") else ""
        # Where there is nothing to correct, nobody is needed.
        needed = any(has_records_to_correct(home, name) for name in files)
        yield f"{what} in failed/: {files[0]}{where}", f"show {shlex.quote(files[0])}", needed
    age = found["pending"]["oldest_seconds"]
    if found["pid"] is not None and age is not None and age > OLD_FACT_SECONDS:
        yield f"a fact has waited for {age / 60:.0f} minutes", "facts --state received", False


def _weights_warnings(found: Mapping[str, Any]) -> _Warnings:
    capacity, side = found["weights_capacity"], found["facts"][FactState.LIVE_SIDE]
    if capacity is not None and found["weights_facts"] >= NEARLY_FULL_SHARE * capacity and side:
        message = f"weights full: {'1 fact stays' if side == 1 else f'{side:,} facts stay'}"
        yield f"{message} in the side memory", f"facts --state {FactState.LIVE_SIDE}", False


def _audit_warnings(found: Mapping[str, Any]) -> _Warnings:
    if found["flush_held"]:
        yield f"flushes are held back: {found['flush_held']}", "consolidate", True
    audit = found["last_audit"]
    if audit is not None and audit["verdict"] not in GOOD_VERDICTS:
        why = f": {audit['reasons'][0]}" if audit["reasons"] else ""
        verdict = audit["verdict"]
        command = MILD_VERDICT_COMMANDS.get(verdict, "audit")
        yield f"the last audit says {verdict}{why}", command, verdict not in MILD_VERDICT_COMMANDS


def _publish_warnings(found: Mapping[str, Any]) -> _Warnings:
    if why := found["publish_failed"]:  # servers may still answer with what was reverted
        yield f"publishing has failed: {why}", "log --kind publish_failed --limit 1", True


def _job_warnings(found: Mapping[str, Any]) -> _Warnings:
    for name, job in found["jobs"].items():
        # An interrupted job is repeated at the next start.
        if job["outcome"] not in (None, "ok", INTERRUPTED):
            detail = f": {job['detail']}" if job["detail"] else ""
            command = name if name in RUNNABLE_JOBS else "doctor"
            # Without audits the weights are not watched.
            yield f"the last {name} ended as {job['outcome']}{detail}", command, name == "audit"


def _disk_warnings(found: Mapping[str, Any]) -> _Warnings:
    free = found["disk_free_bytes"]
    if free is not None and free < LOW_DISK_BYTES:
        yield f"only {free >> 20} MB of disk are free", "doctor", False
