"""What a soak has shown, as figures: slopes, outages, and the end held against the model."""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from statistics import median
from typing import Any

import numpy as np
from daemon import Daemon, Sample
from load import Answer, Book
from model_of_facts import REFUSED, Known, Reader

from memory.db import queries
from memory.db.event_log import read_head, verify_chain

MB = 1 << 20
WARM = 20.0  # seconds of a life that say nothing of growth yet
# Where it is long: memory grows in steps until the largest batch has been met.
WARM_STEADY = 240.0
AGES = (25.0, 50.0)  # at which lives are compared


def slope(points: Sequence[tuple[float, float, int]]) -> float | None:
    """Least squares over (minutes, value, group), each group with a level of its own."""
    x, y = (np.array([p[n] for p in points], dtype=float) for n in (0, 1))
    groups = np.array([p[2] for p in points])
    for group in set(groups.tolist()):
        of = groups == group
        x[of] -= x[of].mean()
        y[of] -= y[of].mean()
    return float((x @ y) / (x @ x)) if len(points) > 3 and x @ x > 0 else None


def growth(samples: Sequence[Sample], who: str, steady_from: float) -> dict[str, Any]:
    """Of one process's memory in MB/minute, and its file descriptors."""
    own = [s for s in samples if s.who == who]
    short = [s for s in own if s.at < steady_from and s.age >= WARM]
    last = own[-1].pid if own else 0
    aged = [s for s in own if s.at < steady_from and AGES[0] <= s.age <= AGES[1]]
    long = [s for s in own if s.pid == last and s.at >= steady_from and s.age >= WARM_STEADY]
    fds, quarter = [s.fds for s in long], max(1, len(long) // 4)
    return {
        "samples": len(own),
        "lives": len({s.pid for s in own}),
        "highest_mb": max((s.rss for s in own), default=0) / MB,
        "within_lives": slope([(s.age / 60, s.rss / MB, s.pid) for s in short]),
        "across_lives": slope([(s.at / 60, s.rss / MB, 0) for s in aged]),
        "without_kills": slope([(s.at / 60, s.rss / MB, 0) for s in long]),
        "fds_highest": max((s.fds for s in own), default=0),
        "fds_growth": median(fds[-quarter:]) - median(fds[:quarter]) if fds else None,
        "fds_growth_across_lives": slope([(s.at / 60, s.fds, 0) for s in aged]),
    }


def answered(answers: Sequence[Answer], outages: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How it was read: failures count where nothing had been killed."""
    failed = [a for a in answers if a.problem]
    excused = [a for a in failed if any(a.told >= b and a.asked <= e for b, e in outages)]
    bad = [a for a in failed if a not in excused or a.problem.startswith("said")]
    seconds = sorted(a.told - a.asked for a in answers if not a.problem)
    return {
        "answers": len(seconds),
        "from_side_memory": sum(a.routed for a in answers),
        "seconds_p50": median(seconds) if seconds else None,
        "seconds_p99": seconds[len(seconds) * 99 // 100] if seconds else None,
        "failed_while_killed": len(excused),
        "failed": len(bad),
        "failures": [a.problem for a in bad[:5]],
        "outage_seconds": [round(e - b, 1) for b, e in outages],
    }


def judged(daemon: Daemon, book: Book) -> dict[str, Any]:
    """The log and the end, held against the model of what must be; what is wrong, in words."""
    reader, wrong = Reader(), list[str]()
    sql = "SELECT kind, fact_id, at, data FROM events ORDER BY seq"
    events = [(k, n, at, json.loads(data)) for k, n, at, data in daemon.rows(sql)]
    reader.handed = {n: Known(k.scope, k.target, k.until) for n, (_, k) in book.known.items()}
    taken = ("fact_received", "fact_revived", "fact_duplicate", "fact_amended")
    order = [name for kind, name, _, said in events if kind in taken and "to" not in said]
    try:
        for kind, name, at, said in events:
            if kind == "fact_reverted":
                why = str(said["reason"])
                asked = name in book.reverted | book.unsure and why == "reverted by hand"
                assert asked or why.startswith("quarantined"), f"{name}: {why}"
                reader.facts.revert([name])
            reader.read(kind, name, at, said)
        reader.compare(dict(daemon.rows("SELECT id, state FROM facts")))
    except AssertionError as error:
        wrong.append(f"the log: {error}")
    if order != book.handed:
        wrong.append("the facts were not taken in once each, in the order of the files")
    done = {n for kind, n, _, _ in events if kind == "fact_reverted"}
    if book.reverted - done:
        wrong.append(f"{len(book.reverted - done)} reverts that were acknowledged are not there")
    with closing(queries.open_readonly(daemon.home.database_file)) as connection:
        chain = verify_chain(connection, read_head(daemon.home.head_file))
    if not chain.intact:
        wrong.append(f"the chain: {chain.problem}")
    counts = Counter(one.standing.name.lower() for one in reader.facts.known.values())
    return {
        "wrong": wrong,
        "standing": dict(counts),
        "lost": len(set(book.handed) - set(order)),
        "live": [n for n in reader.facts.active()],
        "refused": [n for n, one in reader.facts.known.items() if one.standing is REFUSED],
        "became_live": sum(k == "fact_live-side" for k, *_ in events),
        "events": len(events),
        "kinds": dict(Counter(k for k, *_ in events)),
    }
