"""What must hold of facts, whatever happens to them: plain Python, without a model or a database.

Two things are the daemon's to say: when a fact is learned, and that one cannot be. Everything
else follows from what people hand in and take out (docs/concepts.md). `Facts` are these rules;
`Reader` holds the daemon's log against them, event by event.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

Scope = tuple[str, str]  # subject and prompt: one fact stands there


class Standing(StrEnum):
    """What has become of a fact; the words are the states that it may be in."""

    WAITING = "received"
    LIVE = "live-side live-weights"
    SUPERSEDED = "superseded"
    REVERTED = "reverted"
    EXPIRED = "expired"
    REFUSED = "rejected failed"

    @classmethod
    def of(cls, state: str) -> "Standing":
        return next(one for one in cls if state in one.split())


WAITING, LIVE, SUPERSEDED, REVERTED, EXPIRED, REFUSED = Standing
ACTIVE = (WAITING, LIVE)


@dataclass
class Known:
    scope: Scope
    target: str
    until: str | None = None  # moments as the log spells them: they sort as text
    standing: Standing = WAITING


class Facts:
    """All facts by id, the newest last."""

    def __init__(self) -> None:
        self.known: dict[str, Known] = {}

    def active(self, scope: Scope | None = None) -> list[str]:
        found = [n for n, one in self.known.items() if one.standing in ACTIVE]
        return [n for n in found if scope in (None, self.known[n].scope)]

    def hand_in(self, name: str, fact: Known, now: str) -> None:
        """A fact that had none of its kind, or whose like has ended: it is the newest now."""
        assert name not in self.active(), f"{name} was taken twice"
        self.known.pop(name, None)
        self.known[name] = fact
        fact.standing = REFUSED if fact.until is not None and fact.until <= now else WAITING
        if fact.standing is WAITING:  # whoever waits in its place has waited in vain
            for older in self._older(name, WAITING):
                self.known[older].standing = SUPERSEDED

    def hand_in_again(self, name: str, fact: Known) -> None:
        """A fact that is there: its last deadline holds, and whoever waits in its place gives
        way."""
        self.known[name].until = fact.until
        for other in self.active(fact.scope):
            if other != name and self.known[other].standing is WAITING:
                self.known[other].standing = SUPERSEDED

    def learned(self, name: str) -> None:
        """It is live: in its place nothing older is."""
        assert self.known[name].standing in ACTIVE, f"{name} is live after its end"
        for older in self._older(name, *ACTIVE):
            self.known[older].standing = SUPERSEDED
        self.known[name].standing = LIVE

    def give_way(self, name: str) -> None:
        """It is said to be superseded: by a newer fact that is live, if it was live itself."""
        fact = self.known[name]
        newer = [n for n in self.active(fact.scope) if name in self._older(n, *ACTIVE)]
        assert newer, f"{name} is superseded by nothing"
        if fact.standing is LIVE:
            self.learned(newer[-1])
        fact.standing = SUPERSEDED

    def set_back(self, name: str) -> None:
        """It has to be learned again."""
        assert self.known[name].standing is LIVE, f"{name} waits after its end"
        self.known[name].standing = WAITING

    def refuse(self, name: str) -> None:
        assert self.known[name].standing is WAITING, f"{name} was not waiting, and is refused"
        self.known[name].standing = REFUSED

    def revert(self, names: Iterable[str]) -> None:
        for name in names:
            assert name in self.active(), f"{name} has ended and is reverted"
            self.known[name].standing = REVERTED

    def go_back(self, then: Iterable[str], now: Iterable[str]) -> None:
        """The weights hold what they held `then`: what came since goes, what has ended lives."""
        back = set(then) - set(now)
        scopes = {self.known[n].scope for n in back}
        rivals = [n for n in self.active() if self.known[n].scope in scopes]
        for name in {*now, *rivals} - set(then):
            self.known[name].standing = REVERTED
        for name in back:
            self.known[name].standing = LIVE

    def expire(self, name: str, now: str) -> None:
        until = self.known[name].until
        assert name in self.active() and until is not None and until <= now, f"{name}: too early"
        self.known[name].standing = EXPIRED

    def due(self, now: str) -> set[str]:
        """Those whose time is over."""
        return {n for n in self.active() if (u := self.known[n].until) is not None and u <= now}

    def _older(self, name: str, *standings: Standing) -> list[str]:
        scope, older = self.known[name].scope, list(self.known)[: list(self.known).index(name)]
        return [
            n for n in older if self.known[n].scope == scope and self.known[n].standing in standings
        ]


# From which states a fact may go where; by `go_back` also from the ends into the weights.
MOVES = {
    "received": "live-side live-weights superseded reverted expired rejected failed",
    "live-side": "received live-weights superseded reverted expired",
    "live-weights": "received superseded reverted expired",
}


@dataclass
class Reader:
    """Follows the log. What was handed in and taken out is known from those who did it."""

    facts: Facts = field(default_factory=Facts)
    handed: dict[str, Known] = field(default_factory=dict)  # by id, as it was handed in last
    taken: int = 0  # records that were taken in, or found to be there
    state: dict[str, str] = field(default_factory=dict)  # as the log has it

    def read(self, kind: str, name: str | None, at: str, said: Mapping[str, Any]) -> None:
        """One event. `revert` and `go_back` are told to `facts` before their events are read."""
        if name is None or not kind.startswith("fact_"):
            return
        if kind in ("fact_duplicate", "fact_amended"):
            assert name in self.facts.active(), f"{name} has ended, and is no duplicate"
            self.facts.hand_in_again(name, self.handed[name])
            self.taken += 1
        elif kind == "fact_revived" or "fact" in said:
            assert (kind == "fact_revived") == (name in self.facts.known), f"{kind}: {name}"
            given = self.handed[name]
            now = Known(given.scope, given.target, given.until)
            self.facts.hand_in(name, now, at)
            self.taken += 1
            self.state[name] = "received"
        else:
            self._move(name, said["from"], said["to"], at)

    def _move(self, name: str, before: str, after: str, at: str) -> None:
        assert self.state[name] == before, f"{name} was {self.state[name]}, not {before}"
        self.state[name] = after
        now, facts = Standing.of(after), self.facts
        if facts.known[name].standing is not now:
            acts = {WAITING: facts.set_back, LIVE: facts.learned, SUPERSEDED: facts.give_way}
            acts |= {REFUSED: facts.refuse, EXPIRED: lambda n: facts.expire(n, at)}
            assert now in acts, f"{name} is {after}, and nobody wanted that"
            acts[now](name)
        back = before not in MOVES and after == "live-weights"
        assert back or after in MOVES[before].split(), f"{name} went from {before} to {after}"

    def compare(self, states: Mapping[str, str]) -> None:
        """Every fact is there once, where it must be; in each scope one lives at most."""
        assert states == self.state
        found = {n: Standing.of(state) for n, state in states.items()}
        assert found == {n: one.standing for n, one in self.facts.known.items()}
        live = [self.facts.known[n].scope for n, one in found.items() if one is LIVE]
        assert len(live) == len(set(live)), "two facts live in one scope"
