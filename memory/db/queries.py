"""Read-only views of the database for people and scripts.

It knows nothing of the daemon: only the file is needed, and only sqlite3, so that `status` is
quick and works when nothing runs.
"""

import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from memory.errors import KeditError, NoHome, Unreadable
from memory.facts import ACTIVE_STATES, FactState

_LISTED_COLUMNS = (
    "id, external_id, seq, state, tier, generation, subject, prompt, target, reason, file_name,"
    " received_at, changed_at, valid_until, attempts, direct, before, after"
)


def open_readonly(path: Path, *, moves: bool = False) -> sqlite3.Connection:
    """A connection that cannot write, to a database that a daemon may be writing to. It belongs to
    the thread that made it, or where it `moves`, to one thread at a time."""
    if not path.is_file():
        raise NoHome(f"there is no database {path}", hint="kedit-daemon init")
    still = "&immutable=1" if _is_immutable(path) else ""
    conn = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro{still}", uri=True, check_same_thread=not moves
    )
    conn.row_factory = sqlite3.Row
    # SQLite knows only ASCII's cases.
    conn.create_function("casefold", 1, str.casefold, deterministic=True)
    try:
        ready = conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'events'").fetchone()
    except sqlite3.DatabaseError as error:
        conn.close()
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHMSIZE:
            raise KeditError(
                f"{path} cannot be read: disk full",
                code="disk-full",
                hint=f"free some space on the disk of {path.parent}",
            ) from error
        raise Unreadable(
            f"{path} cannot be read: {error}",
            hint="run it as the user that owns the home; kedit-daemon doctor checks the rest",
        ) from error
    if ready is None:
        conn.close()
        raise NoHome(f"{path} is empty", hint="kedit-daemon run")
    return conn


def _is_immutable(path: Path) -> bool:
    """Whether nobody can be writing to a database: there SQLite cannot make the file that it shares
    with a writer, and has to be told to do without."""
    if not os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        return False
    # Who has it open, and sees the disk in another way, shares a file from the first moment on,
    # when the log may be empty still.
    log, shared = (path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm"))
    return not shared.exists() and (not log.exists() or not log.stat().st_size)


def fetch_facts(
    conn: sqlite3.Connection, state: str | None = None, subject: str | None = None
) -> list[dict[str, Any]]:
    """Facts in the order in which they were received; `subject` is a part of it, in any case."""
    tests = {"state = ?": state, "instr(casefold(subject), casefold(?))": subject}
    where, values = _where_clause(tests)
    return list(
        fetch_dicts(conn, f"SELECT {_LISTED_COLUMNS} FROM facts{where} ORDER BY seq", *values)
    )


def fetch_fact_detail(conn: sqlite3.Connection, name: str) -> dict[str, Any] | None:
    """One fact by its id or its owner's, with its edits, its events and what it takes up."""
    fact_id = _resolve_id(conn, name)
    row = next(fetch_dicts(conn, "SELECT * FROM facts WHERE id = ?", fact_id), None)
    if row is None:
        return None
    return {
        **row,
        "terms_bytes": _tensor_bytes(conn, "terms", fact_id),
        "side_bytes": _tensor_bytes(conn, "side_keys", fact_id),
        "edits": list(
            fetch_dicts(conn, "SELECT * FROM edits WHERE fact_id = ? ORDER BY id", fact_id)
        ),
        "events": list(fetch_events(conn, fact=fact_id)),
    }


def fetch_events(
    conn: sqlite3.Connection,
    after_seq: int = 0,
    since: str | None = None,
    kinds: Sequence[str] = (),
    fact: str | None = None,
    subject: str | None = None,
    state: str | None = None,
    last: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Events in order, the `last` so many of those that fit: `since` is ISO-8601 UTC, `fact` an id
    or its owner's; `subject` (a part of it, in any case) and `state` are those of the event's fact,
    as it stands now."""
    about = "fact_id IN (SELECT id FROM facts WHERE"
    tests = {
        "seq > ?": after_seq,
        "at >= ?": since,
        "kind IN (SELECT value FROM json_each(?))": json.dumps(list(kinds)) if kinds else None,
        "fact_id = ?": None if fact is None else _resolve_id(conn, fact),
        f"{about} instr(casefold(subject), casefold(?)))": subject,
        f"{about} state = ?)": state,
    }
    where, values = _where_clause(tests)
    sql = f"SELECT * FROM events{where} ORDER BY seq"
    if last is not None:
        sql, values = f"SELECT * FROM ({sql} DESC LIMIT ?) ORDER BY seq", [*values, last]
    yield from fetch_dicts(conn, sql, *values)


def find_answer_before(conn: sqlite3.Connection, fact_id: str, seq: int) -> str | None:
    """The answer that the newest event of a fact before event `seq` tells of, if any does."""
    row = conn.execute(
        "SELECT json_extract(data, '$.after') AS said FROM events"
        " WHERE fact_id = ? AND seq < ? AND said IS NOT NULL ORDER BY seq DESC LIMIT 1",
        (fact_id, seq),
    ).fetchone()
    return row[0] if row else None


def find_similar_ids(conn: sqlite3.Connection, name: str) -> list[str]:
    """Ids, the most alike first, that somebody may have meant by a name that no fact has: those
    that begin alike, ours or their owner's, and those of a subject of that name."""
    begins = "substr(?, 1, 3)"
    rows = conn.execute(
        "SELECT id, external_id, casefold(subject) = casefold(?) AS called FROM facts"
        f" WHERE called OR substr(id, 1, 3) = {begins} OR substr(external_id, 1, 3) = {begins}"
        " ORDER BY seq DESC LIMIT 500",
        (name, name, name),
    ).fetchall()
    ids = [i for row in rows for i in (row["id"], row["external_id"]) if i is not None]
    return get_close_matches(name, ids) or [row["id"] for row in rows if row["called"]]


def fetch_fact_page(
    conn: sqlite3.Connection, text: str | None, state: str | None, before: int | None, most: int
) -> list[dict[str, Any]]:
    """The newest facts first, at most so many, older than the one with the number `before`.

    `text` is a part of what a fact says or of an id of it, in any case.
    """
    said = "id || char(10) || coalesce(external_id, '') || char(10) || target || char(10)"
    tests = {
        f"instr(casefold({said} || replace(prompt, '{{}}', subject)), casefold(?))": text,
        "state = ?": state,
        "seq < ?": before,
    }
    where, values = _where_clause(tests)
    sql = f"SELECT {_LISTED_COLUMNS} FROM facts{where} ORDER BY seq DESC LIMIT ?"
    return list(fetch_dicts(conn, sql, *values, most))


def fetch_event_page(
    conn: sqlite3.Connection, asked: Mapping[str, Any], before: int | None, most: int
) -> list[dict[str, Any]]:
    """The newest events first, at most so many, older than the one with the number `before`.

    `asked` may hold: since (ISO-8601 UTC), kind, fact (an id or its owner's), subject (a part of
    it, in any case). Each event has `said`: subject, prompt and target of its fact, or None.
    """
    fact = asked.get("fact")
    tests = {
        "events.seq < ?": before,
        "at >= ?": asked.get("since"),
        "kind = ?": asked.get("kind"),
        "fact_id = ?": None if fact is None else _resolve_id(conn, fact),
        "instr(casefold(coalesce(subject, '')), casefold(?))": asked.get("subject"),
    }
    where, values = _where_clause(tests)
    rows = fetch_dicts(
        conn,
        "SELECT events.*, subject, prompt, target FROM events LEFT JOIN facts"
        f" ON facts.id = events.fact_id{where} ORDER BY events.seq DESC LIMIT ?",
        *values,
        most,
    )
    names = ("subject", "prompt", "target")
    return [
        {k: v for k, v in row.items() if k not in names}
        | {"said": {n: row[n] for n in names} if row["subject"] is not None else None}
        for row in rows
    ]


def fetch_event_kinds(conn: sqlite3.Connection) -> list[str]:
    """The kinds of events that there are."""
    return [row[0] for row in conn.execute("SELECT DISTINCT kind FROM events ORDER BY kind")]


def fetch_audits(conn: sqlite3.Connection, most: int) -> list[dict[str, Any]]:
    """The last audits, oldest first."""
    newest = fetch_dicts(conn, "SELECT * FROM audits ORDER BY id DESC LIMIT ?", most)
    return list(newest)[::-1]


def fetch_generations(conn: sqlite3.Connection, most: int) -> list[dict[str, Any]]:
    """The last generations of the weights, oldest first, each with how many `facts` it holds."""
    newest = fetch_dicts(
        conn,
        "SELECT id, parent, reason, figures, created_at, json_array_length(fact_ids) AS facts"
        " FROM generations ORDER BY id DESC LIMIT ?",
        most,
    )
    return list(newest)[::-1]


def fetch_facts_by_id(conn: sqlite3.Connection, ids: Collection[str]) -> list[dict[str, Any]]:
    """Those of the facts with these ids that are known, in the order of their arrival."""
    sql = f"SELECT {_LISTED_COLUMNS} FROM facts WHERE id IN (SELECT value FROM json_each(?))"
    return list(fetch_dicts(conn, f"{sql} ORDER BY seq", json.dumps(list(ids))))


def find_weights_facts(conn: sqlite3.Connection, prompt: str) -> list[dict[str, Any]]:
    """The facts in the weights whose prompt, or a paraphrase, is just this."""
    return list(
        fetch_dicts(
            conn,
            f"SELECT {_LISTED_COLUMNS} FROM facts WHERE state = ? AND (replace(prompt, '{{}}',"
            " subject) = ? OR EXISTS (SELECT 1 FROM json_each(record, '$.paraphrases')"
            " WHERE replace(value, '{}', subject) = ?)) ORDER BY seq",
            *(FactState.LIVE_WEIGHTS, prompt, prompt),
        )
    )


def _tensor_bytes(conn: sqlite3.Connection, table: str, fact_id: str) -> int | None:
    row = conn.execute(
        f"SELECT length(tensors) FROM {table} WHERE fact_id = ?", (fact_id,)
    ).fetchone()
    return int(row[0]) if row else None


def _resolve_id(conn: sqlite3.Connection, name: str) -> str:
    """The id behind a name; the name itself where no fact has it."""
    row = conn.execute(
        "SELECT id FROM facts WHERE id = ? OR external_id = ?"
        " ORDER BY id = ? DESC, state IN (?, ?, ?) DESC, seq DESC LIMIT 1",
        (name, name, name, *ACTIVE_STATES),
    ).fetchone()
    return str(row[0]) if row else name


def _where_clause(tests: dict[str, Any]) -> tuple[str, list[Any]]:
    asked = {test: value for test, value in tests.items() if value is not None}
    return (f" WHERE {' AND '.join(asked)}" if asked else ""), list(asked.values())


def fetch_dicts(conn: sqlite3.Connection, sql: str, *values: Any) -> Iterator[dict[str, Any]]:
    """Rows with their columns' names; what is kept as JSON is read."""
    for row in conn.execute(sql, values):
        yield {key: _decode_value(key, row[key]) for key in row.keys()}  # noqa: SIM118 (sqlite3.Row)


def _decode_value(key: str, value: Any) -> Any:
    if value is not None and key in ("record", "probe", "figures", "reasons", "data"):
        return json.loads(value)
    return bool(value) if key == "direct" else value
