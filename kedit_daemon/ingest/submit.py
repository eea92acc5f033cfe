"""Submits files of facts: parses one, predicts its outcome, and puts it into the inbox."""

import json
import os
import re
import secrets
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit_daemon.config import UNFINISHED_NAMES
from kedit_daemon.home import Home
from kedit_daemon.ingest.packed_files import PACKED_SUFFIXES
from kedit_daemon.ingest.parser import ParsedFile, parse_file
from kedit_daemon.ingest.record_pictures import ReadPicture, name_copy
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.unfinished_names import is_unfinished
from kedit_daemon.system.disk import describe_disk_error
from memory.db.queries import open_readonly
from memory.errors import KeditError, NoHome
from memory.facts import ACTIVE_STATES, OPEN_STATES, Fact
from memory.files import move_into_place, staging_path

if TYPE_CHECKING:
    from memory.db.rows import StoredFact

FILE_MODE = 0o640  # the daemon may run as another user, of the inbox's group
MAX_STEM_CHARS = 80


@dataclass(frozen=True)
class Submission:
    """A file to submit: the name that its copy is named after, its bytes, and their content. The
    pictures of its facts go into the inbox before it."""

    name: str
    data: bytes
    parsed: ParsedFile

    @property
    def facts(self) -> list[Fact]:
        """The facts of the file."""
        return [fact for _, fact in self.parsed.facts]


def prepare_submission(
    data: bytes,
    name: str,
    format: str | None,
    limits: FileLimits,
    read_picture: ReadPicture | None = None,
) -> Submission:
    """Parse a file; one that the daemon would read differently, or that has pictures, is rewritten
    in our own form."""
    parsed = parse_file(data, name, format, limits, read_picture)
    if not parsed.pictures and (format is None or parse_file(data, name, None, limits) == parsed):
        return Submission(name, data, parsed)
    lines = "".join(f"{format_native(fact)}\n" for _, fact in parsed.facts)
    return Submission(f"{Path(name).stem}.jsonl", lines.encode(), parsed)


def format_native(fact: Fact) -> str:
    """Format the fact as a line that `parse_file` reads as the same fact."""
    target = list(fact.targets) if fact.other_targets else fact.target
    record: dict[str, Any] = {"subject": fact.subject, "prompt": fact.prompt, "target": target}
    if fact.picture is not None:
        record = {"image": name_copy(fact.picture), "prompt": fact.prompt, "target": target}
    if "{}" in fact.prompt or fact.subject in fact.prompt:
        record["paraphrases"] = list(fact.paraphrases)
        record["neighbours"] = [{"prompt": n.prompt, "answer": n.answer} for n in fact.neighbours]
        record |= {"id": fact.external_id, "source": fact.source, "tags": list(fact.tags)}
        record |= {"valid_from": fact.valid_from, "valid_until": fact.valid_until}
        record |= {"aliases": list(fact.aliases), "questions": list(fact.questions)}
        record |= {"join": fact.join}
        record = {key: value for key, value in record.items() if value not in (None, [])}
    else:
        # A question that names its subject in other words; only this form allows that.
        record["rephrase"] = list(fact.paraphrases)
        record["locality"] = [{"loc": n.prompt, "loc_ans": n.answer} for n in fact.neighbours]
    return json.dumps(record, ensure_ascii=False)


def submit_to_inbox(
    inbox: Path,
    submission: Submission,
    token: str | None = None,
    unfinished_names: Sequence[str] = UNFINISHED_NAMES,
) -> str:
    """Put the file into the inbox, whole or not at all, and return its name there.

    The name holds the token, by default a random one. Raises KeditError.
    """
    name = _choose_file_name(submission.name, token or secrets.token_hex(8), unfinished_names)
    if is_unfinished(name, unfinished_names):
        raise KeditError(
            f"the daemon would leave {name} alone, by its name",
            code="bad-config",
            hint="correct unfinished_names under [inbox] in config.toml, or rename the file",
        )
    try:
        for digest, data in submission.parsed.pictures.items():
            _write_whole(inbox, name_copy(digest), data)
        _write_whole(inbox, name, submission.data)
    except FileNotFoundError as error:
        raise NoHome(f"there is no inbox {inbox}", hint="kedit-daemon init") from error
    except PermissionError as error:
        raise KeditError(
            f"{inbox} may not be written to by this user",
            code="no-permission",
            hint=f"join the group of the folder, or run as its owner: ls -ld {inbox}",
        ) from error
    except OSError as error:
        known = describe_disk_error(error, inbox)
        raise KeditError(
            f"{submission.name} could not be submitted to {inbox}: {error.strerror}",
            code="io",
            hint=known.hint if known else "",
        ) from error
    return name


def _write_whole(inbox: Path, name: str, data: bytes) -> None:
    """Put a file into the inbox, whole or not at all."""
    staged = staging_path(inbox)
    try:
        descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            os.fchmod(file.fileno(), FILE_MODE)
            file.write(data)
        move_into_place(staged, inbox / name)
    finally:
        staged.unlink(missing_ok=True)


def _choose_file_name(name: str, token: str, unfinished_names: Sequence[str]) -> str:
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in PACKED_SUFFIXES:  # then the one before it tells the format
        stem, inner = os.path.splitext(stem)
        suffix = inner + suffix
    stem = re.sub(r"[^\w.-]", "_", stem, flags=re.ASCII).lstrip(".")[:MAX_STEM_CHARS] or "facts"
    plain = re.fullmatch(r"(\.\w{1,10}){1,2}", suffix, re.ASCII)
    good = plain and not is_unfinished(f"facts{suffix}", unfinished_names)
    return f"{stem}-{token}{suffix if good else '.jsonl'}"


@dataclass(frozen=True)
class PredictedOutcome:
    """The predicted outcome of a fact, under its id in this home, and the reason: new, duplicate,
    amended, scheduled, supersedes or rejected."""

    fact: Fact
    outcome: str
    detail: str


def predict_outcomes(
    facts: Sequence[Fact], home: Home, now: str, direct_facts: int
) -> list[PredictedOutcome]:
    """Predict what the daemon would do with the facts, by its own rules and its present facts."""
    from policies.routing import choose_route

    stored = _read_stored(facts, home)
    known = {_statement(one.fact): one for one in stored}
    active = {one.fact.slot: one.fact for one in stored if one.state in ACTIVE_STATES}
    predicted, earlier = list[PredictedOutcome](), dict[tuple[str, ...], Fact]()
    for given in facts:
        key = _statement(given)
        same, older = known.get(key), active.get(given.slot)
        fact = given if same is None else given.with_id_of(same.fact)
        decision = choose_route(same, fact, now, len(facts), direct_facts)
        outcome, detail = _ROUTE_OUTCOMES.get(decision.route, "new"), decision.reason
        if (before := earlier.get(key)) is not None:
            outcome, detail = "amended", ", ".join(before.compare_terms(fact))
            if before == fact:
                outcome, detail = "duplicate", "is in the file before"
        elif outcome == "new" and older is not None:
            outcome, detail = "supersedes", f"{older.id} ({older.target})"
        predicted.append(PredictedOutcome(fact, outcome, detail))
        if outcome in ("supersedes", "new"):
            active[fact.slot] = fact
            if older is not None:  # it may come again behind this one
                earlier.pop(_statement(older), None)
        if outcome not in ("duplicate", "rejected"):
            earlier[key] = fact
    return predicted


_ROUTE_OUTCOMES = {
    "duplicate": "duplicate",
    "amend": "amended",
    "schedule": "scheduled",
    "reject": "rejected",
}


def find_shared_ids(facts: Sequence[Fact], home: Home) -> dict[str, int]:
    """Find the external ids that will be those of several facts, in different slots, which have
    not ended: the count of these slots by external id."""
    slots: dict[str, set[str]] = {}
    for fact in facts:
        if fact.external_id is not None:
            slots.setdefault(fact.external_id, set()).add(fact.slot)
    states = ", ".join("?" * len(OPEN_STATES))
    sql = "SELECT external_id, slot FROM facts WHERE external_id IN"
    sql += f" (SELECT value FROM json_each(?)) AND state IN ({states})"
    for external_id, slot in _query(home, sql, json.dumps([*slots]), *OPEN_STATES):
        slots[external_id].add(slot)
    return {name: len(found) for name, found in slots.items() if len(found) > 1}


def foresee_submission(
    facts: Sequence[Fact], home: Home, now: str, direct_facts: int
) -> tuple[list[PredictedOutcome], dict[str, int]]:
    """Predict the outcomes, and find the shared ids. Where the database cannot be read, as by a
    user who may only hand in, each fact is new: that stops no hand-in."""
    try:
        outcomes = predict_outcomes(facts, home, now, direct_facts)
        return outcomes, find_shared_ids(facts, home)
    except (KeditError, OSError, sqlite3.Error):
        return [PredictedOutcome(fact, "new", "") for fact in facts], {}


def _query(home: Home, sql: str, *values: str) -> list[tuple[Any, ...]]:
    """Read rows of the database; none where no daemon has made one yet."""
    try:
        conn = open_readonly(home.database_file)
    except NoHome:
        return []
    with closing(conn):
        return [tuple(row) for row in conn.execute(sql, values)]


def _read_stored(facts: Sequence[Fact], home: Home) -> "list[StoredFact]":
    """Read the facts in the slots of these, those that have not ended last."""
    from memory.db.rows import FACT_COLUMNS, StoredFact

    sql = f"SELECT {FACT_COLUMNS} FROM facts WHERE slot IN (SELECT value FROM json_each(?))"
    rows = _query(home, f"{sql} ORDER BY seq", json.dumps([fact.slot for fact in facts]))
    stored = [StoredFact.from_row(row) for row in rows]
    return sorted(stored, key=lambda one: one.state in OPEN_STATES)


def _statement(fact: Fact) -> tuple[str, ...]:
    return fact.slot, fact.prompt, fact.target
