"""Half an hour at full load, with kills: what is lost, what grows, how the end differs.

    .venv/bin/python tests/soak --minutes 30 [--report docs/promises.md] [--json FILE]

A daemon with its HTTP server is kept busy with facts, replacements and reverts, is read from
without a pause, is audited every minute and killed every minute; for the last part of the time it
is not killed, so that a slope means something. No test run collects this folder.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "support")]

from daemon import Daemon  # noqa: E402
from figures import answered, growth, judged  # noqa: E402
from load import Auditor, Book, Reader, Writer  # noqa: E402
from serving import free_port  # noqa: E402
from table import write  # noqa: E402

from policies.probe import is_same_answer  # noqa: E402

STEADY = 9.0  # minutes without kills, if nothing else is said and all take 20 at least
LEAST_LIFE = 20.0  # seconds
ROUNDS = 6


def killed(daemon: Daemon, until: float, chance: random.Random) -> dict[str, int]:
    """Kill the daemon every minute, and its server once, half way."""
    kills, half = {"daemon": 0, "server": 0}, (time.monotonic() + until) / 2
    at = time.monotonic()
    while True:
        at += 60 + chance.uniform(-8, 8)
        now = time.monotonic()
        if max(at, now + LEAST_LIFE) >= until:
            time.sleep(max(0, until - now))
            return kills
        time.sleep(max(at - now, LEAST_LIFE))
        at = time.monotonic()
        daemon.kill()
        kills["daemon"] += 1
        if not kills["server"] and time.monotonic() > half:
            time.sleep(chance.uniform(5, 15))
            daemon.kill(server=True)
            kills["server"] += 1


def settle(daemon: Daemon) -> list[str]:
    """Until nothing waits and audits find nothing to do; what does not come to rest."""
    for _ in range(ROUNDS):
        deadline = time.monotonic() + 300
        while not at_rest(daemon):
            if time.monotonic() > deadline:
                return ["facts wait without end"]
            time.sleep(0.5)
        if not daemon.call("audit")["learned_anew"] and at_rest(daemon):
            return []
    return ["audits find facts that are not stated, without end"]


def at_rest(daemon: Daemon) -> bool:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    late = "state LIKE 'live-%' AND valid_until IS NOT NULL AND valid_until <= ?"
    sql = f"SELECT count(*) FROM facts WHERE state = 'received' OR ({late})"
    return daemon.rows(sql, now) == [(0,)] and not list(daemon.home.inbox_folder.glob("*.jsonl"))


def run(root: Path, minutes: float, steady: float, model: str, seed: int) -> dict[str, Any]:
    daemon = Daemon(root, model, free_port())
    daemon.start()
    try:
        return soaked(daemon, minutes, steady, model, seed)
    finally:
        daemon.process.kill()
        daemon.process.wait(60)


def soaked(daemon: Daemon, minutes: float, steady: float, model: str, seed: int) -> dict[str, Any]:
    """All of it, and what came of it."""
    book, chance = Book(), random.Random(seed)
    daemon.wait_ready()
    readers = [Reader(daemon, book, seed + n, model) for n in range(2)]
    writer, auditor = Writer(daemon, book, seed + 7), Auditor(daemon, book, seed)
    workers = [writer, auditor, *readers]
    began = time.monotonic()
    for worker in workers:
        worker.start()
    kills = killed(daemon, began + (minutes - steady) * 60, chance)
    steady_from = time.monotonic() - daemon.began
    time.sleep(max(0, began + (minutes - min(1, steady / 2)) * 60 - time.monotonic()))
    writer.limited = False  # else the end would have to be waited for
    time.sleep(max(0, began + minutes * 60 - time.monotonic()))
    seconds = time.monotonic() - began
    for worker in workers:
        worker.stop()
    unsettled = settle(daemon)
    found = judged(daemon, book)
    unsaid = not_stated(daemon, book, found["live"])
    wrong = unsettled + found.pop("wrong") + [f for w in workers for f in w.failed]
    if (code := daemon.end()) != 0:
        wrong.append(f"the daemon ended with {code}")
    size = sum(p.stat().st_size for p in daemon.home.state_folder.rglob("*") if p.is_file())
    return {
        "model": model,
        "minutes": round(seconds / 60, 1),
        "minutes_without_kills": round(steady, 1),
        "kills": kills,
        "handed_in": len(book.handed),
        "facts_a_minute": round(found.pop("became_live") / seconds * 60, 1),
        "reverts": len(book.reverted),
        "audits": book.audits,
        **found,
        "live": len(found["live"]),
        "refused": len(found["refused"]),
        "not_stated": len(unsaid),
        "wrong": wrong,
        "reading": answered([a for one in readers for a in one.answers], daemon.outages),
        "state_mb": size / (1 << 20),
        "samples": [[round(s.at, 1), s.pid, s.who, s.rss, s.fds] for s in daemon.samples],
        "memory": {who: growth(daemon.samples, who, steady_from) for who in ("daemon", "server")},
    }


def not_stated(daemon: Daemon, book: Book, live: list[str]) -> list[str]:
    """The live facts that are not answered with."""
    facts = [book.known[name][0] for name in live]
    said = [daemon.call("ask", prompt=fact.question)["answer"] for fact in facts]
    return [
        f.id for f, answer in zip(facts, said, strict=True) if not is_same_answer(answer, f.target)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steady", type=float, help="of these without kills, at the end")
    parser.add_argument("--model", default="shipped", help="as in config.toml")
    parser.add_argument("--seed", type=int, default=20260101)
    parser.add_argument("--home", type=Path, help="a new folder; else a temporary one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table into FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        root = given.home or Path(folder)
        steady = min(STEADY, given.minutes * 0.45) if given.steady is None else given.steady
        figures = run(root, given.minutes, steady, given.model, given.seed)
    if given.json:
        given.json.write_text(json.dumps(figures) + "\n", "utf-8")
    print(write(figures, given.report))
    bad = figures["wrong"] or figures["lost"] or figures["reading"]["failed"]
    return 1 if bad or figures["not_stated"] else 0


if __name__ == "__main__":
    sys.exit(main())
