"""Whatever people do in whatever order, and whenever it crashes, the facts are as they must be.

Random walks past all that can happen to facts, held after each step against model_of_facts.py.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from editing_home import LOOSE, Bench, Clock, seat
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from model_of_facts import WAITING, Known, Reader
from process_tools import record
from promise_table import Tally
from tiny_models import CITIES

from kedit_daemon.config import Config
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from memory.db.event_log import verify_chain
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState
from policies.probe import is_same_answer

SETTINGS = {"side": {"steps": 30}, "routing": {"flush_facts": 3, "direct_facts": 2}}
SUBJECTS, TARGETS = 3, 2  # few: what happens to a fact is to meet what happened to it before
JUMPS = {"seconds": 10, "hour": 3_601, "days": 200_000, "back": -3_600, "long ago": -40_000_000}
ROUNDS = 6  # audits until all that was disturbed has been learned again, or given up
FEW_REFUSED = 0.1  # of all facts: random models learn well, and what is refused proves nothing


class CrashError(BaseException):
    """The process is gone."""


class Ticking(Store):
    """A store in which the process can end before and after each transaction."""

    tick: Callable[[], None] = staticmethod(lambda: None)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        self.tick()
        with super().transaction():
            yield
        self.tick()


class Hard(Bench):
    """A home whose process may end at any step of an edit, and comes back."""

    fuse: int | None = None  # steps until it does

    def open(self) -> None:
        self.store = Ticking(self.home.database_file, self.clock)
        self.store.tick = self._pulse
        self.served = LiveModel(self.loaded, self.store, self.home)
        self.served.restore()
        self.editor = Editor(self.served, self.config, self._pulse)
        self.inbox = Inbox(self.home.inbox_folder, 0.0, 100_000, self.clock)
        self.intake = Intake(self.store, self.inbox, self.config)
        for claim in self.inbox.pending_claims():
            self.intake.take_file(claim)

    def _pulse(self) -> None:
        super()._pulse()
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse <= 0:
                raise CrashError

    def look(self) -> None:
        """Take what lies in the inbox."""
        for claim in self.inbox.claim_files(float(self.pulses)):
            self.intake.take_file(claim)

    def walk(self, steps: int) -> None:
        """Some pieces of the work that waits."""
        for _ in range(steps):
            if not self.editor.step():
                return

    def states(self) -> dict[str, str]:
        return {f.id: str(f.state) for f in self.store.list_facts()}

    def events(self, after: int) -> list[tuple[Any, ...]]:
        sql = "SELECT seq, kind, fact_id, at, data FROM events WHERE seq > ? ORDER BY seq"
        return self.store.db.conn.execute(sql, (after,)).fetchall()


class Machine(RuleBasedStateMachine):
    """What people, time and bad luck do to one home."""

    make: Callable[[], Hard]
    tally: Tally
    fates: list[bool]  # of all facts that had to be learned, whether they were refused

    def __init__(self) -> None:
        super().__init__()
        self.at, self.reader = self.make(), Reader()
        self.facts = self.reader.facts
        self.handed = self.seen = 0
        self.texts: dict[str, Fact] = {}

    fuses = st.none() | st.integers(1, 12) | st.integers(30, 55)  # learning is 30 of them
    picks = st.tuples(st.integers(0, SUBJECTS - 1), st.integers(0, TARGETS - 1))

    @initialize(chosen=st.lists(picks, min_size=1, max_size=3))
    def begin(self, chosen: list[tuple[int, int]]) -> None:
        self.hand_in(chosen)
        self.work()

    @rule(
        chosen=st.lists(picks, min_size=1, max_size=3),
        hours=st.sampled_from([0, 0, 1, -1]),
        fuse=fuses,
    )
    def hand_in(
        self, chosen: list[tuple[int, int]], hours: int = 0, fuse: int | None = None
    ) -> None:
        """New facts, facts that are there, and others in their place, in one file."""
        until = self.at.clock() + timedelta(hours=hours)
        spelled = until.isoformat().replace("+00:00", "Z") if hours else None
        facts = [seat(n, CITIES[n + city], valid_until=spelled) for n, city in chosen]
        for fact in facts:
            scope = (fact.subject, fact.prompt)
            self.reader.handed[fact.id] = Known(scope, fact.target, spelled and _moment(until))
            self.texts[fact.id] = fact
        self.handed += len(facts)
        lines = [json.dumps(record(f) | {"valid_until": f.valid_until}) for f in facts]
        (self.at.home.inbox_folder / f"{self.handed}.jsonl").write_text("\n".join(lines), "utf-8")
        self._do(self.at.look, fuse)
        self.at.look()
        self._read()
        assert self.reader.taken == self.handed, "a file was taken twice, or not at all"

    @rule(steps=st.integers(1, 6), fuse=fuses)
    def work(self, steps: int = 6, fuse: int | None = None) -> None:
        """Some pieces of what waits."""
        self._do(lambda: self.at.walk(steps), fuse)
        self._read()

    @rule(fuse=fuses)
    def flush(self, fuse: int | None = None) -> None:
        self._do(lambda: self.at.editor.run_flush(False), fuse)
        self._read()

    @rule(fuse=fuses)
    def consolidate(self, fuse: int | None = None) -> None:
        self._do(lambda: self.at.editor.consolidate(False), fuse)
        self._read()

    @rule(fuse=fuses)
    def audit(self, fuse: int | None = None) -> None:
        self._do(lambda: self.at.editor.audit(), fuse)
        self._read()

    @rule(places=st.lists(st.integers(0, 20), min_size=1, max_size=2), fuse=fuses)
    def revert(self, places: list[int], fuse: int | None = None) -> None:
        """Any of the facts there ever were; one that has ended already is refused."""
        known = list(self.facts.known)
        names = sorted({known[place % len(known)] for place in places if known})
        if not names or set(names) - set(self.facts.active()):
            with pytest.raises(KeditError):
                self.at.editor.revert(names or ["nobody"], None, False)
            return
        crashed = self._do(lambda: self.at.editor.revert(names, None, False), fuse)
        if not crashed or self.at.states()[names[0]] == FactState.REVERTED:
            self.facts.revert(names)
        self._read()

    @rule(back=st.integers(0, 6), fuse=fuses)
    def go_back(self, back: int, fuse: int | None = None) -> None:
        number = max(0, self.at.store.artifacts.active_generation() - back)
        then = self.at.store.artifacts.get_generation(number).fact_ids
        now = self.at.served.list_weights_facts()
        before = self.at.states()
        crashed = self._do(lambda: self.at.editor.revert([], number, False), fuse)
        if not crashed or self.at.states() != before:
            self.facts.go_back(then, now)
        self._read()

    @rule(fuse=fuses)
    def expire(self, fuse: int | None = None) -> None:
        now = _moment(self.at.clock())
        if not self._do(lambda: self.at.editor.expire_facts(), fuse):
            assert self.at.states().keys() >= self.facts.due(now)
            self._read()
            assert not self.facts.due(now)
        self._read()

    @rule(jump=st.sampled_from(sorted(JUMPS)))
    def clock_jumps(self, jump: str) -> None:
        self.at.clock.pass_time(seconds=JUMPS[jump])

    @rule(fuse=fuses)
    def restart(self, fuse: int | None = None) -> None:
        self._do(self.at.restart, fuse)
        self._read()

    @invariant()
    def holds(self) -> None:
        """What must be so at any moment."""
        store, served = self.at.store, self.at.served
        self.reader.compare(self.at.states())
        assert verify_chain(store.db.conn, None).intact
        row = store.artifacts.get_generation(store.artifacts.active_generation())
        written = row.weights_hash if row.sha256 else served.unedited_hash
        assert self.at.weights_hash() == written, "the weights are not those of the ledger"
        beside = {f.id for f in store.list_facts((FactState.LIVE_SIDE,))}
        assert set(served.side.shard_ids) == store.artifacts.list_side_fact_ids() == beside
        within = {f.id for f in store.list_facts((FactState.LIVE_WEIGHTS,))}
        assert within == set(row.fact_ids), "the weights hold others than they should"

    def teardown(self) -> None:
        """Left in peace, it ends as it must, and answers so, after a start too."""
        try:
            self._settle()
            self._check_end()
        finally:
            self.at.store.close()
            self.at.loaded.model.set_deltas({})

    def _settle(self) -> None:
        for _ in range(ROUNDS):
            self.at.editor.expire_facts()
            self.at.settle()
            if not self.at.editor.audit()["learned_anew"]:
                break
        else:
            raise AssertionError("audits find facts that are not stated, without end")
        self._read()
        self.holds()

    def _check_end(self) -> None:
        at, known = self.at, self.facts.known
        assert WAITING not in {one.standing for one in known.values()}
        assert not self.facts.due(_moment(at.clock()))
        live = {self.texts[n].question: known[n].target for n in self.facts.active()}
        asked = sorted({fact.question for fact in self.texts.values()})
        said = {question: at.says(question) for question in asked}
        wrong = {q: said[q] for q, target in live.items() if not is_same_answer(said[q], target)}
        assert not wrong, f"not as it was told: {wrong}, but {live}"
        if not live:
            assert at.weights_hash() == at.served.unedited_hash
            assert said == dict(zip(asked, at.served.answer_base(asked, 12), strict=True))
        for fact in at.store.list_facts((FactState.REJECTED, FactState.FAILED)):
            assert fact.reason, "refused without a reason"
        kept = [f for f in at.store.list_facts() if "valid_until" not in (f.reason or "")]
        self.fates += [f.state in (FactState.REJECTED, FactState.FAILED) for f in kept]
        at.loaded.model.set_deltas(at.served.solve(sorted(at.served.list_weights_facts())))
        anew = at.weights_hash()
        at.restart()
        assert at.weights_hash() == anew, "the weights are not the solve of their facts"
        assert {question: at.says(question) for question in asked} == said

    def _do(self, act: Callable[[], Any], fuse: int | None) -> bool:
        """Let something happen; whether it ended in a crash."""
        self.at.fuse, crashed = fuse, False
        try:
            act()
        except CrashError:
            self.at.fuse, crashed = None, True
            self.at.restart()
        self.at.fuse = None
        self.tally.tried(kills=crashed)
        return crashed

    def _read(self) -> None:
        """Hold what the log has to say since the last time against the rules."""
        for seq, kind, name, at, data in self.at.events(self.seen):
            self.seen = seq
            self.reader.read(kind, name, at, json.loads(data))


def _moment(at: Any) -> str:
    return str(at.isoformat(timespec="milliseconds")).replace("+00:00", "Z")


@pytest.fixture
def machine(tmp_path: Path, load: Callable[[str], LoadedModel], tally: Tally) -> type[Machine]:
    """Machines on homes of their own; the model is loaded once, and is unedited before each."""
    loaded, made = load("llama"), iter(range(100_000))
    config = Config.model_validate(LOOSE | SETTINGS)

    class Mounted(Machine):
        fates: ClassVar[list[bool]] = []

        def make(self) -> Hard:
            return Hard(tmp_path / str(next(made)), loaded, Clock(), config)

    Mounted.tally = tally
    return Mounted


@pytest.mark.timeout(7200)
def test_any_walk(machine: type[Machine], whole: bool, tally: Tally) -> None:
    phases = (Phase.generate, Phase.shrink) if whole else (Phase.generate,)
    wanted = settings(
        max_examples=100 if whole else 6,
        stateful_step_count=12,
        derandomize=True,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=wanted)
    assert sum(machine.fates) <= FEW_REFUSED * len(machine.fates)
    assert len(machine.fates) > wanted.max_examples, "hardly a fact was ever learned"


def ended(at: Machine) -> None:
    """Hold it after the last step of a walk, and at its end."""
    at.holds()
    at.teardown()


def test_replaced_in_the_weights_taken_out_and_restarted(machine: type[Machine]) -> None:
    at = machine()
    at.hand_in([(0, 0), (1, 0)])
    at.work()
    at.hand_in([(0, 1)])
    at.hand_in([(0, 1)])
    at.work()
    at.holds()
    at.restart()
    at.holds()
    at.revert([1])
    ended(at)


def test_expired_in_the_weights_and_beside_them(machine: type[Machine]) -> None:
    at = machine()
    at.hand_in([(0, 0), (1, 0)], hours=1)
    at.work()
    at.hand_in([(2, 0)], hours=1)
    at.work()
    at.clock_jumps("hour")
    at.clock_jumps("seconds")
    at.expire()
    ended(at)


def test_learned_again_beside_the_weights_and_gone_back_into_them(machine: type[Machine]) -> None:
    at = machine()
    at.hand_in([(0, 0), (1, 0)])
    at.work()
    at.revert([1])
    at.hand_in([(1, 0)])
    at.work()
    at.go_back(1)
    ended(at)


LEARNING = SETTINGS["side"]["steps"]


def test_a_crash_at_any_step_of_a_replacement(machine: type[Machine], whole: bool) -> None:
    """Of what takes the place of a fact in the weights, from where it has been learned on."""
    for fuse in range(LEARNING, LEARNING + 20, 1 if whole else 5):
        at = machine()
        at.hand_in([(0, 0), (1, 0)])
        at.work()
        at.hand_in([(0, 1)])
        at.work(1, fuse)
        ended(at)
