"""Facts as a router finds them: which words find them, and how it follows the home."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from engine_tools import make_store

from kedit_daemon.editing.relations import load_relation_index
from kedit_daemon.home import Home
from kedit_daemon.serve.router.routed_facts import RoutedFacts
from memory.db.follower import Follower
from memory.db.store import Store
from memory.facts import Fact, FactState
from policies.asking.asked_facts import AskedFacts

BOSS = Fact("Quillon Insurance", "The chief executive officer of {} is", "Maud Ferreira")
TOWER = Fact("Eiffel Tower", "The {} is in the city of", "Rome", aliases=("La dame de fer",))
ASKS_BOSS = "Who is the chief executive of Quillon Insurance?"


@dataclass
class Followed:
    """A home's store, and the facts that follow it."""

    store: Store
    facts: RoutedFacts

    def set_state(self, fact: Fact, state: FactState) -> None:
        with self.store.db.transaction():
            self.store.change_state(fact.id, state)

    def ask(self, question: str, history: str = "") -> list[Fact]:
        self.facts.sync()
        return [one.fact for one in self.facts.find_in_chat(question, history)]

    def go_on(self, text: str) -> list[Fact]:
        self.facts.sync()
        return [one.fact for one in self.facts.find_in_text(text)]


@pytest.fixture
def followed(tmp_path: Path) -> Iterator[Followed]:
    home = Home(tmp_path / "home")
    store = make_store(home, BOSS, TOWER)
    facts = RoutedFacts(Follower(home.database_file), AskedFacts(load_relation_index))
    yield Followed(store, facts)
    facts.close()
    store.close()


def test_what_is_asked_decides_and_not_the_name_alone(followed: Followed) -> None:
    assert followed.ask(ASKS_BOSS) == [BOSS]
    assert followed.ask("When was Quillon Insurance founded?") == []
    assert followed.ask("Who is the chief executive of Quillon?") == []
    assert followed.ask("Which city is la dame de fer in?") == [TOWER]


@pytest.mark.parametrize(
    "text",
    [
        BOSS.question,
        f"  {BOSS.question} \n",
        "The chief executive officer\nof Quillon Insurance is",
        f"Q: {ASKS_BOSS}\nA:",
        f"{ASKS_BOSS} Thanks!",
        "It insures ships. The chief executive officer of Quillon Insurance is",
    ],
)
def test_a_text_is_found_in_the_forms_that_the_own_server_knows(
    followed: Followed, text: str
) -> None:
    assert followed.go_on(text) == [BOSS]


def test_a_text_about_something_else_is_left_alone(followed: Followed) -> None:
    assert followed.go_on("Quillon Insurance was founded in") == []
    assert followed.go_on("The chief executive officer of Marrow Insurance is") == []
    assert followed.go_on("") == []


def test_facts_come_change_and_go_with_the_home(followed: Followed) -> None:
    lima = Fact("Peru", "The capital of {} is", "Cusco")
    assert followed.ask("What is the capital of Peru?") == []
    with followed.store.db.transaction():
        followed.store.receive_fact(lima, "test.jsonl", False)
    assert followed.ask("What is the capital of Peru?") == []  # it is not live yet
    followed.set_state(lima, FactState.LIVE_SIDE)
    assert followed.ask("What is the capital of Peru?") == [lima]
    renamed = replace(lima, aliases=("Land of the Incas",))
    with followed.store.db.transaction():
        followed.store.amend_fact(renamed, "test.jsonl", 1)
    assert followed.ask("What is the capital of the Land of the Incas?") == [renamed]
    followed.set_state(lima, FactState.LIVE_WEIGHTS)
    assert followed.ask("What is the capital of Peru?") == [renamed]
    followed.set_state(lima, FactState.EXPIRED)
    assert followed.ask("What is the capital of Peru?") == []
    assert followed.ask(ASKS_BOSS) == [BOSS]
    assert len(followed.facts) == 2


def test_a_damaged_record_is_one_fact_less(followed: Followed) -> None:
    followed.facts.sync()
    with followed.store.db.transaction():
        followed.store.db.execute_write("UPDATE facts SET record = '{' WHERE id = ?", BOSS.id)
        followed.store.db.write_event("fact_amended", BOSS.id)
    assert followed.ask(ASKS_BOSS) == []
    assert followed.ask("Which city is the Eiffel Tower in?") == [TOWER]
    assert followed.facts.problem is None


def test_a_database_that_cannot_be_read_leaves_the_facts_as_they_were(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert followed.ask(ASKS_BOSS) == [BOSS]
    followed.set_state(BOSS, FactState.REVERTED)

    def fail(_self: Follower) -> int:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as broken:
        broken.setattr(Follower, "newest_event", fail)
        assert followed.ask(ASKS_BOSS) == [BOSS]
        assert "disk I/O error" in str(followed.facts.problem)
    assert followed.ask(ASKS_BOSS) == []
    assert followed.facts.problem is None
