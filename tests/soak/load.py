"""Full load: who hands facts in, replaces them and takes them out, and who reads meanwhile."""

import json
import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import httpx
from daemon import Daemon
from model_of_facts import Known
from process_tools import record

from memory.errors import KeditError
from memory.facts import Fact
from policies.probe import normalize_answer

FIRST = ("Alma", "Bruno", "Clara", "David", "Elena", "Frank", "Greta", "Henry")
LAST = ("Archer", "Baker", "Carter", "Dawson", "Fisher", "Gibson", "Harper", "Irving")
PROMPTS = ("The birthplace of {} is", "{} works in the city of")
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Delhi", "Tunis", "London", "Berlin", "Madrid")
SCOPES = [(f"{a} {b}", p) for a in FIRST for b in LAST for p in PROMPTS]
WAITING = 12  # facts that wait at any time: it is never idle
UNRELATED = "The capital of France is"


@dataclass
class Book:
    """What was handed in, in order, and taken out, and what was told to whom."""

    handed: list[str] = field(default_factory=list)
    known: dict[str, tuple[Fact, Known]] = field(default_factory=dict)
    reverted: set[str] = field(default_factory=set)  # acknowledged
    unsure: set[str] = field(default_factory=set)  # asked for when it was killed
    audits: int = 0


class Worker(threading.Thread):
    """Does something again and again until told to stop; it must not fail."""

    def __init__(self, daemon: Daemon, book: Book, seed: int) -> None:
        super().__init__(daemon=True)
        self.at, self.book, self.chance = daemon, book, random.Random(seed)
        self.stopping, self.failed = threading.Event(), list[str]()

    def run(self) -> None:
        try:
            while not self.stopping.is_set():
                self.turn()
        except BaseException as error:
            self.failed.append(repr(error))
            raise

    def turn(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        self.stopping.set()
        self.join(120)


class Writer(Worker):
    """Drops files of facts as fast as they are learned, and has facts taken out."""

    limited = True  # whether some facts are for a time only
    scopes = 24  # what is known is bounded: memory has no reason to grow

    def turn(self) -> None:
        time.sleep(0.05)
        sql = "SELECT count(*) FROM facts WHERE state = 'received'"
        waiting = self.at.rows(sql)
        files = [p for p in self.at.home.inbox_folder.iterdir() if p.suffix == ".jsonl"]
        if not waiting or len(files) > 1 or waiting[0][0] >= WAITING:
            return
        if self.book.handed and self.chance.random() < 0.25:
            self._take_out()
            return
        again = self.chance.random() < 0.05 and self.book.handed
        many = 10 if self.chance.random() < 0.03 else self.chance.randint(1, 4)
        self._drop([self._old() if again else self._new() for _ in range(many)])

    def _new(self) -> Fact:
        subject, prompt = self.chance.choice(SCOPES[: self.scopes])
        soon = datetime.now(UTC) + timedelta(seconds=self.chance.uniform(20, 120))
        limited = self.limited and self.chance.random() < 0.1
        until = soon.isoformat(timespec="milliseconds").replace("+00:00", "Z") if limited else None
        number = len(self.book.handed) + self.chance.randrange(1 << 40)
        city = self.chance.choice(CITIES)
        return Fact(subject, prompt, city, source=f"soak {number}", valid_until=until)

    def _old(self) -> Fact:
        return self.book.known[self.chance.choice(self.book.handed[-50:])][0]

    def _drop(self, facts: list[Fact]) -> None:
        for fact in facts:
            known = Known((fact.subject, fact.prompt), fact.target, fact.valid_until)
            self.book.known.setdefault(fact.id, (fact, known))
        more = [{"source": f.source, "valid_until": f.valid_until} for f in facts]
        lines = [json.dumps(record(f) | m) for f, m in zip(facts, more, strict=True)]
        name = f"{len(self.book.handed):08}.jsonl"
        staged = self.at.home.inbox_folder / f".{name}"
        staged.write_text("\n".join(lines), encoding="utf-8")
        staged.rename(staged.with_name(name))
        self.book.handed += [f.id for f in facts]

    def _take_out(self) -> None:
        live = self.at.rows("SELECT id FROM facts WHERE state LIKE 'live-%'")
        if not live:
            return
        name = self.chance.choice(live)[0]
        try:
            self.book.reverted |= set(self.at.call("revert", facts=[name])["reverted"])
        except KeditError as error:
            if error.code != "unknown-fact":  # it has ended meanwhile
                self.book.unsure.add(name)
        except (OSError, ValueError):
            self.book.unsure.add(name)


class Auditor(Worker):
    """Has the weights audited every minute."""

    def turn(self) -> None:
        if not self.stopping.wait(60):
            with suppress(KeditError, OSError, ValueError):
                self.at.call("audit")
                self.book.audits += 1


@dataclass(frozen=True)
class Answer:
    """When it was asked and told, and whether it was right; a failure has its reason."""

    asked: float
    told: float
    problem: str = ""
    routed: bool = False


class Reader(Worker):
    """Asks all the time, what is known and what is not."""

    def __init__(self, daemon: Daemon, book: Book, seed: int, name: str) -> None:
        super().__init__(daemon, book, seed)
        self.answers: list[Answer] = []
        self.model = name
        self.client = httpx.Client(base_url=f"{daemon.url}/v1", timeout=30)

    def turn(self) -> None:
        subject, prompt = self.chance.choice(SCOPES)
        question = prompt.replace("{}", subject) if self.chance.random() < 0.8 else UNRELATED
        asked = time.monotonic()
        self.answers.append(replace(self._ask(question), asked=asked, told=time.monotonic()))
        if self.answers[-1].problem:
            time.sleep(0.05)

    def _ask(self, question: str) -> Answer:
        given = {"model": self.model, "prompt": question, "max_tokens": 6, "temperature": 0}
        try:
            reply = self.client.post("/completions", json=given)
        except httpx.HTTPError as error:
            return Answer(0, 0, type(error).__name__)
        if not reply.is_success:
            return Answer(0, 0, f"status {reply.status_code}: {reply.text[:200]}")
        said, fired = reply.json()["choices"][0]["text"], reply.json()["kedit"]["facts"]
        wanted = [self.book.known[one["id"]][0].target for one in fired]
        wrong = [w for w in wanted if not normalize_answer(said).startswith(normalize_answer(w))]
        return Answer(0, 0, f"said {said!r}, not {wrong[0]!r}" if wrong else "", bool(fired))
