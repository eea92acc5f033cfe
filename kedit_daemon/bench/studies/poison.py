"""What the stability policy does with poison: facts, and numbers, that must not stay."""

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kedit_daemon.bench.method import Setup
from kedit_daemon.bench.studies.planting import planned
from kedit_daemon.bench.studies.plants import WEIGHTS, Plant
from kedit_daemon.bench.studies.shared import cent
from kedit_daemon.bench.studies.study import Given, Study
from kedit_daemon.bench.table import aligned, share
from kedit_daemon.bench.tiers import Auto
from kedit_daemon.config import RoutingConfig
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.system.sanitize import clean
from memory.facts import ACTIVE, LIVE, Fact
from policies.probe import longest_target, same

STEPS = 200  # of the editor after a batch, at most
SHOWN = 200  # characters of a reason
DONE = ("stopped", "named")
# Share of other statements that may be completed otherwise. At the default limits the weights of
# the small shipped model are full after a fact or two: nothing planted there is ever solved for.
ROOM = {"agreement_warn": 0.25, "agreement_consolidate": 0.35, "agreement_revert": 0.5}


class Poison(Study):
    """One home with the policy on: batch after batch, each with innocent facts and planted ones."""

    def run(self, given: Given) -> dict[str, Any]:
        """What became of every batch, then the totals."""
        batches = planned(given)
        with _home(given) as home:
            trial = _Trial(home)
            rows = [trial.batch(*each) for each in given.track(batches, "batches")]
            lost = trial.lost()
        totals = _totals(rows) | {"innocent": len(trial.innocent), "lost": len(lost)}
        most = max(row["facts"] for row in rows)
        found = {"totals": totals, "lost": lost, "rows": rows}
        return {"batch_size": most, "limits": ROOM, **found}

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """A line a batch, the totals, and everything that went otherwise than it should."""
        heads = ["batch", "facts", *DONE, "wrongly named", "harmed", "held", "verdict"]
        table = [[*heads, "norm", "perplexity", "seconds"]]
        for row in result["rows"]:
            done = [f"{_count(row['plants'], name)}/{len(row['plants'])}" for name in DONE]
            held = [share(row["held_harmed"]), share(row["held"]), row["verdict"]]
            figures = [f"{row[name]:.4f}" for name in ("norm_ratio", "perplexity_ratio")]
            cells = [*done, str(len(row["wrongly"])), *held, *figures, f"{row['seconds']:.1f}"]
            table.append([_title(row), str(row["facts"]), *cells])
        yield from aligned(table)
        yield ""
        yield "harmed: innocent facts that are stated before the audit, %; held: after it, %"
        total = result["totals"]
        whole = f"of {total['batches']} batches {total['whole']} wholly"
        yield f"stopped {total['stopped']} of {total['planted']} poisons, {whole}"
        yield f"named: precision {share(total['precision'])} %, recall {share(total['recall'])} %"
        yield f"innocent facts lost {total['lost']} of {total['innocent']}"
        yield f"limits {result['limits']}, all others the default ones"
        yield f"verdicts of revert {total['reverts']}, batches without an answer {total['silent']}"
        yield from _misses(result)

    def draw(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """By kind what was planted, stopped and named; and what holds, batch by batch."""
        rows = result["rows"]
        kinds = sorted({row["kind"] for row in rows})
        planted = {
            kind: [p for r in rows if r["kind"] == kind for p in r["plants"]] for kind in kinds
        }
        for n, name in enumerate(("planted", *DONE)):
            counts = [_count(ps, name) if name in DONE else len(ps) for ps in planted.values()]
            left.bar(
                [place + 0.27 * (n - 1) for place in range(len(kinds))], counts, 0.25, label=name
            )
        left.set_xticks(range(len(kinds)), kinds, rotation=20)
        left.set(ylabel="poisons", title="Planted, stopped, named")
        numbers = [row["batch"] for row in rows]
        for name, label in (("held_harmed", "before the audit"), ("held", "after it")):
            right.plot(numbers, [cent(row[name]) for row in rows], marker=".", label=label)
        right.set(xlabel="batch", ylabel="%", ylim=(-2, 102), title="Innocent facts stated")


@contextmanager
def _home(given: Given) -> Iterator[Auto]:
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        setup = Setup(given.loaded, Path(folder), given.batch_size, given.seed, limits=ROOM)
        home = Auto(setup)
        try:
            yield home
        finally:
            home.close()


class _Trial:
    """Hands batches in, lets the daemon work, audits once, and looks at what is left."""

    def __init__(self, home: Auto) -> None:
        self.home, self.store = home, home.store
        inbox = home.config.inbox
        # Files are closed before the scan: none has to settle.
        self.inbox = Inbox(home.home.inbox, 0.0, inbox.max_bytes, lambda: datetime.now(UTC))
        self.innocent = list[Fact]()
        self.planted = set[str]()  # ids of all that has been planted so far
        self.number = 0

    def batch(self, plants: Sequence[Plant], innocent: Sequence[Fact]) -> dict[str, Any]:
        """One batch, from the file to what is left of it after the audit."""
        began, since, ended = time.perf_counter(), self._last_event(), self._ended()
        self.number += 1
        self.innocent += innocent
        half = len(innocent) // 2
        facts = [*innocent[:half], *(f for p in plants for f in p.facts), *innocent[half:]]
        self._hand_in(facts, direct=any(plant.direct for plant in plants))
        for plant in plants:
            plant.waiting(self.home)
        rests = self._settle()
        for plant in plants:
            plant.settled(self.home, innocent)
        self.planted.update(*(plant.guilty for plant in plants))
        harmed, shards = self._held(), {n: i for i, n in self.home.served.side.shard_of.items()}
        audit = self.home.editor.audit()
        rests = self._settle() and rests
        accused = self._accused(facts, since, shards) | self._ends(ended)
        figures = self.home.editor.weights.measured()[0]
        return {
            "batch": self.number,
            "kind": plants[0].kind,
            "way": plants[0].way,
            "facts": len(facts),
            "plants": [self._judged(plant, accused) for plant in plants if plant.guilty],
            "wrongly": {n: why for n, why in accused.items() if n not in self.planted},
            "held_harmed": harmed,
            "held": self._held(),
            "at_rest": rests,
            "verdict": audit["verdict"],
            "reasons": audit["reasons"],
            "acted": audit["acted"],
            "norm_ratio": max(figures.norm_ratio.values()),
            "perplexity_ratio": figures.perplexity_ratio,
            "seconds": time.perf_counter() - began,
        }

    def _hand_in(self, facts: Sequence[Fact], direct: bool) -> None:
        """A file in the inbox, a fact a line, and the daemon's own way from there."""
        config = self.home.config
        if direct:
            config = config.model_copy(update={"routing": RoutingConfig(direct_facts=1)})
        said = [{"subject": f.subject, "prompt": f.prompt, "target": f.target} for f in facts]
        path = self.home.home.inbox / f"batch-{self.number}.jsonl"
        path.write_text("".join(f"{json.dumps(one)}\n" for one in said))
        for claim in self.inbox.scan(time.monotonic()):
            Intake(self.store, self.inbox, config).take(claim)

    def _settle(self) -> bool:
        """Work until nothing waits; whether it came to that."""
        return any(not self.home.editor.step() for _ in range(STEPS))

    def _said(self) -> list[str]:
        most = longest_target(self.home.model, self.innocent)
        asked = [fact.question for fact in self.innocent]
        return [answer.text for answer in self.home.served.ask(asked, most)]

    def _held(self) -> float:
        """The share of all innocent facts so far that the daemon states."""
        pairs = zip(self._said(), self.innocent, strict=True)
        return sum(same(said, fact.target) for said, fact in pairs) / len(self.innocent)

    def lost(self) -> list[dict[str, Any]]:
        """The innocent facts that are not live, or not stated."""
        found = []
        for fact, said in zip(self.innocent, self._said(), strict=True):
            stored = self.store.fact(fact.id)
            state, why = (str(stored.state), stored.reason) if stored else ("unknown", None)
            if state not in LIVE or not same(said, fact.target):
                told = {"question": fact.question, "target": fact.target, "answer": said}
                found.append({"fact": fact.id, "state": state, "reason": why, **told})
        return found

    # Who is named ---------------------------------------------------------------------------

    def _last_event(self) -> int:
        return int(
            self.store.conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        )

    def _ended(self) -> set[str]:
        return {f.id for f in self.store.facts() if f.state not in ACTIVE}

    def _ends(self, ended: set[str]) -> dict[str, str]:
        """The facts that have ended since, and why."""
        facts = [f for f in self.store.facts() if f.state not in ACTIVE and f.id not in ended]
        return {f.id: f"{f.state}: {f.reason}" for f in facts}

    def _accused(
        self, facts: Sequence[Fact], since: int, shards: Mapping[int, str]
    ) -> dict[str, str]:
        """Who is named in the events since then: by the door, and by what was mended."""
        found = dict[str, str]()
        for data in self._events("record_failed", since):
            why = f"line {data['line']}: {data['problem']}; {data['remedy']}"
            found[facts[data["line"] - 1].id] = why
        for data in self._events("mended", since):
            found |= {_named(why, shards): f"mended: {why}" for why in data["reasons"]}
        return found

    def _events(self, kind: str, since: int) -> Iterator[dict[str, Any]]:
        """What is said in the events of a kind that are later."""
        found = "SELECT data FROM events WHERE kind = ? AND seq > ? ORDER BY seq"
        for (data,) in self.store.conn.execute(found, (kind, since)):
            yield json.loads(data)

    def _judged(self, plant: Plant, accused: Mapping[str, str]) -> dict[str, Any]:
        """What became of a plant. All of it, or one of two that contradict each other, is named."""
        alive, by = plant.alive(self.home), [accused[n] for n in plant.guilty if n in accused]
        stored = [f for n in sorted(plant.guilty) if (f := self.store.fact(n))]
        facts = plant.facts or [f.fact for f in stored]
        return {
            "facts": sorted(plant.guilty),
            "stated": [f"{f.question} {f.target}" for f in facts],
            "now": [str(f.state) for f in stored],
            "stopped": alive is None,
            "alive": alive,
            "named": bool(by),
            "by": by,
        }


def _named(why: str, shards: Mapping[int, str]) -> str:
    """Whom a reason for mending is about."""
    if found := re.search(r"\bfact (\w+)", why):
        return found[1]
    found = re.match(r"shard (\d+) ", why)
    return shards[int(found[1])] if found else WEIGHTS


# The totals -------------------------------------------------------------------------------------


def _count(plants: Sequence[Mapping[str, Any]], what: str) -> int:
    return sum(plant[what] for plant in plants)


def _totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Poisons stopped, and how exactly the guilty are named: of all that are named those that were
    planted, of all planted those that are named."""
    planted = [row["plants"] for row in rows if row["plants"]]
    plants = [plant for some in planted for plant in some]
    wrongly = sum(len(row["wrongly"]) for row in rows)
    stopped, named = (_count(plants, name) for name in DONE)
    return {
        "batches": len(planted),
        "planted": len(plants),
        "stopped": stopped,
        "whole": sum(
            bool(row["plants"]) and all(p["stopped"] for p in row["plants"]) for row in rows
        ),
        "named": named,
        "precision": named / (named + wrongly) if named + wrongly else None,
        "recall": named / len(plants) if plants else None,
        "reverts": sum(row["verdict"] == "revert" for row in rows),
        "silent": sum(row["held"] == 0 for row in rows),
    }


def _title(row: Mapping[str, Any]) -> str:
    return f"{row['batch']:2d} {row['kind']}, {row['way']}"


def _misses(result: Mapping[str, Any]) -> Iterator[str]:
    """Every miss in words."""
    for row in result["rows"]:
        for plant in row["plants"]:
            said = "; ".join(clean(text)[:SHOWN] for text in plant["stated"]) or WEIGHTS
            if not plant["stopped"]:
                yield f"MISS {_title(row)}: not stopped: {clean(plant['alive'])[:SHOWN]} ({said})"
            if not plant["named"]:
                now = ", ".join(plant["now"])
                yield f"MISS {_title(row)}: not named, now {now} ({said})"
        if not row["plants"]:
            yield f"MISS {_title(row)}: there was nothing to break"
        for fact, why in row["wrongly"].items():
            yield f"MISS {_title(row)}: {fact} is named and innocent: {clean(why)[:SHOWN]}"
        if not row["at_rest"]:
            yield f"MISS {_title(row)}: the editor did not come to rest"
    for one in result["lost"]:
        why = clean(f"{one['state']}, {one['reason']}, answers {one['answer']!r}")[:SHOWN]
        yield f"LOST {clean(one['question'])} {clean(one['target'])}: {why}"
