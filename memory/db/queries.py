"""Read-only queries for people and scripts.

They need only the database file and sqlite3, so that `status` is quick and works without a daemon.
"""

import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from memory.errors import KeditError, NoHome, Unreadable
from memory.facts import OPEN_STATES, FactState

_ONE_OF_FACTS = "fact_id IN (SELECT value FROM json_each(?))"
_LISTED_COLUMNS = (
    "id, external_id, seq, state, tier, generation, subject, prompt, target, reason, file_name,"
    " received_at, changed_at, valid_until, attempts, direct, before, after"
)


def open_readonly(path: Path, *, moves: bool = False) -> sqlite3.Connection:
    """Open a connection that cannot write, to a database that a daemon may be writing to. It
    belongs to the thread that made it or, with `moves`, to one thread at a time."""
    if not path.is_file():
        raise NoHome(f"there is no database {path}", hint="kedit-daemon init")
    uri = f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if _is_immutable(path) else ''}"
    conn = sqlite3.connect(uri, uri=True, check_same_thread=not moves)
    conn.row_factory = sqlite3.Row
    # SQLite folds the case of ASCII only.
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
    """Check that nobody can write to a database: on a read-only disk SQLite cannot make the file
    that it shares with a writer, and has to be opened without."""
    if not os.statvfs(path.parent).f_flag & os.ST_RDONLY:
        return False
    # A writer that mounted the disk otherwise has the shared file from its start on, when the log
    # may still be empty.
    log, shared = (path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm"))
    return not shared.exists() and (not log.exists() or not log.stat().st_size)


def fetch_facts(
    conn: sqlite3.Connection, state: str | None = None, subject: str | None = None
) -> list[dict[str, Any]]:
    """Return facts in the order of arrival; `subject` is a part of it, in any case."""
    tests = {"state = ?": state, "instr(casefold(subject), casefold(?))": subject}
    where, values = _where_clause(tests)
    sql = f"SELECT {_LISTED_COLUMNS} FROM facts{where} ORDER BY seq"
    return list(fetch_dicts(conn, sql, *values))


def fetch_fact_details(conn: sqlite3.Connection, name: str) -> list[dict[str, Any]]:
    """Return the fact of an id, or all facts of an external id that have not ended; where all
    have, the newest."""
    found = [fetch_fact_detail(conn, fact_id) for fact_id in _resolve_ids(conn, name)]
    return [fact for fact in found if fact is not None]


def fetch_fact_detail(conn: sqlite3.Connection, name: str) -> dict[str, Any] | None:
    """Return a fact by its id or external id, of several the newest, with its edits, events and
    sizes in bytes. What became of its questions in a chat is apart from its probe."""
    fact_id = _resolve_ids(conn, name)[0]
    row = next(fetch_dicts(conn, "SELECT * FROM facts WHERE id = ?", fact_id), None)
    if row is None:
        return None
    chat = (row["probe"] or {}).pop("chat", None)
    edits = fetch_dicts(conn, "SELECT * FROM edits WHERE fact_id = ? ORDER BY id", fact_id)
    return {
        **row,
        "chat": chat,
        "terms_bytes": _tensor_bytes(conn, "terms", fact_id),
        "side_bytes": _tensor_bytes(conn, "side_keys", fact_id),
        "edits": list(edits),
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
    """Yield events in order, only the `last` N of those that match. `since`: ISO-8601 in UTC;
    `fact`: an id or external id; `subject` (a part of it, in any case) and `state`: those of the
    event's fact as it is now."""
    about = "fact_id IN (SELECT id FROM facts WHERE"
    tests = {
        "seq > ?": after_seq,
        "at >= ?": since,
        "kind IN (SELECT value FROM json_each(?))": json.dumps(list(kinds)) if kinds else None,
        _ONE_OF_FACTS: None if fact is None else json.dumps(_resolve_ids(conn, fact)),
        f"{about} instr(casefold(subject), casefold(?)))": subject,
        f"{about} state = ?)": state,
    }
    where, values = _where_clause(tests)
    sql = f"SELECT * FROM events{where} ORDER BY seq"
    if last is not None:
        sql, values = f"SELECT * FROM ({sql} DESC LIMIT ?) ORDER BY seq", [*values, last]
    yield from fetch_dicts(conn, sql, *values)


def find_answer_before(conn: sqlite3.Connection, fact_id: str, seq: int) -> str | None:
    """Return the answer in the newest event of a fact before event `seq` that has one."""
    row = conn.execute(
        "SELECT json_extract(data, '$.after') AS answer FROM events"
        " WHERE fact_id = ? AND seq < ? AND answer IS NOT NULL ORDER BY seq DESC LIMIT 1",
        (fact_id, seq),
    ).fetchone()
    return row[0] if row else None


def find_similar_ids(conn: sqlite3.Connection, name: str) -> list[str]:
    """Return ids and external ids that may be meant by a name that no fact has, best first: those
    that begin like it, and those of facts with a subject of that name."""
    start = "substr(?, 1, 3)"
    rows = conn.execute(
        "SELECT id, external_id, casefold(subject) = casefold(?) AS called FROM facts"
        f" WHERE called OR substr(id, 1, 3) = {start} OR substr(external_id, 1, 3) = {start}"
        " ORDER BY seq DESC LIMIT 500",
        (name, name, name),
    ).fetchall()
    ids = [i for row in rows for i in (row["id"], row["external_id"]) if i is not None]
    return get_close_matches(name, ids) or [row["id"] for row in rows if row["called"]]


def fetch_fact_page(
    conn: sqlite3.Connection, text: str | None, state: str | None, before: int | None, limit: int
) -> list[dict[str, Any]]:
    """Return the newest facts first, at most `limit`, with a `seq` below `before`.

    `text` is a part of the prompt, the target or an id, in any case.
    """
    searched = "id || char(10) || coalesce(external_id, '') || char(10) || target || char(10)"
    tests = {
        f"instr(casefold({searched} || replace(prompt, '{{}}', subject)), casefold(?))": text,
        "state = ?": state,
        "seq < ?": before,
    }
    where, values = _where_clause(tests)
    sql = f"SELECT {_LISTED_COLUMNS} FROM facts{where} ORDER BY seq DESC LIMIT ?"
    return list(fetch_dicts(conn, sql, *values, limit))


def fetch_event_page(
    conn: sqlite3.Connection, asked: Mapping[str, Any], before: int | None, limit: int
) -> list[dict[str, Any]]:
    """Return the newest events first, at most `limit`, with a `seq` below `before`.

    `asked` may have: since (ISO-8601 in UTC), kind, fact (an id or external id), subject (a part
    of it, in any case). Each event has `said`: subject, prompt and target of its fact, or None.
    """
    fact = asked.get("fact")
    tests = {
        "events.seq < ?": before,
        "at >= ?": asked.get("since"),
        "kind = ?": asked.get("kind"),
        _ONE_OF_FACTS: None if fact is None else json.dumps(_resolve_ids(conn, fact)),
        "instr(casefold(coalesce(subject, '')), casefold(?))": asked.get("subject"),
    }
    where, values = _where_clause(tests)
    rows = fetch_dicts(
        conn,
        "SELECT events.*, subject, prompt, target FROM events LEFT JOIN facts"
        f" ON facts.id = events.fact_id{where} ORDER BY events.seq DESC LIMIT ?",
        *values,
        limit,
    )
    names = ("subject", "prompt", "target")
    return [
        {k: v for k, v in row.items() if k not in names}
        | {"said": {n: row[n] for n in names} if row["subject"] is not None else None}
        for row in rows
    ]


def fetch_event_kinds(conn: sqlite3.Connection) -> list[str]:
    """Return the kinds of events in the database."""
    return [row[0] for row in conn.execute("SELECT DISTINCT kind FROM events ORDER BY kind")]


def fetch_audits(conn: sqlite3.Connection, limit: int) -> list[dict[str, Any]]:
    """Return the last audits, oldest first."""
    newest = fetch_dicts(conn, "SELECT * FROM audits ORDER BY id DESC LIMIT ?", limit)
    return list(newest)[::-1]


def fetch_generations(conn: sqlite3.Connection, limit: int) -> list[dict[str, Any]]:
    """Return the last generations, oldest first, each with the count of its `facts`."""
    newest = fetch_dicts(
        conn,
        "SELECT id, weights_hash, parent, reason, figures, created_at,"
        " json_array_length(fact_ids) AS facts FROM generations ORDER BY id DESC LIMIT ?",
        limit,
    )
    return list(newest)[::-1]


def fetch_facts_by_id(conn: sqlite3.Connection, ids: Collection[str]) -> list[dict[str, Any]]:
    """Return the known facts among these ids, in the order of arrival."""
    sql = f"SELECT {_LISTED_COLUMNS} FROM facts WHERE id IN (SELECT value FROM json_each(?))"
    return list(fetch_dicts(conn, f"{sql} ORDER BY seq", json.dumps(list(ids))))


def find_weights_facts(conn: sqlite3.Connection, prompt: str) -> list[dict[str, Any]]:
    """Return the facts in the weights with just this prompt, a paraphrase of it, or a question."""
    listed = ("paraphrases", "questions")
    others = " OR ".join(
        f"EXISTS (SELECT 1 FROM json_each(record, '$.{name}')"
        " WHERE replace(value, '{}', subject) = ?)"
        for name in listed
    )
    sql = (
        f"SELECT {_LISTED_COLUMNS} FROM facts WHERE state = ?"
        f" AND (replace(prompt, '{{}}', subject) = ? OR {others}) ORDER BY seq"
    )
    return list(fetch_dicts(conn, sql, FactState.LIVE_WEIGHTS, prompt, *[prompt] * len(listed)))


def _tensor_bytes(conn: sqlite3.Connection, table: str, fact_id: str) -> int | None:
    sql = f"SELECT length(tensors) FROM {table} WHERE fact_id = ?"
    row = conn.execute(sql, (fact_id,)).fetchone()
    return int(row[0]) if row else None


def _resolve_ids(conn: sqlite3.Connection, name: str) -> list[str]:
    """Return the ids of the facts of a name, the newest first: the fact of this id, else those of
    this external id that have not ended, else the newest. The name itself when there is none."""
    rows = conn.execute(
        "SELECT id, state IN (?, ?, ?, ?) AS open FROM facts WHERE id = ? OR external_id = ?"
        " ORDER BY id = ? DESC, open DESC, seq DESC",
        (*OPEN_STATES, name, name, name),
    ).fetchall()
    if not rows or rows[0]["id"] == name:
        return [name]
    return [str(row["id"]) for row in rows if row["open"]] or [str(rows[0]["id"])]


def _where_clause(tests: dict[str, Any]) -> tuple[str, list[Any]]:
    asked = {test: value for test, value in tests.items() if value is not None}
    return (f" WHERE {' AND '.join(asked)}" if asked else ""), list(asked.values())


def fetch_dicts(conn: sqlite3.Connection, sql: str, *values: Any) -> Iterator[dict[str, Any]]:
    """Yield rows as dicts by column, with JSON columns parsed."""
    for row in conn.execute(sql, values):
        yield {key: _decode_value(key, row[key]) for key in row.keys()}  # noqa: SIM118 (sqlite3.Row)


def _decode_value(key: str, value: Any) -> Any:
    if value is not None and key in ("record", "probe", "figures", "reasons", "data"):
        return json.loads(value)
    return bool(value) if key == "direct" else value
