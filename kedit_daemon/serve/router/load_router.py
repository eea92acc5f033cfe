"""Loading of what a router needs of a home. Imports torch, for the vectors of words."""

from pathlib import Path

from kedit_daemon.config import Config
from kedit_daemon.editing.relations import load_relation_index
from kedit_daemon.home import Home
from kedit_daemon.serve.router.adapter_answers import AdapterAnswers
from kedit_daemon.serve.router.fact_adapters import open_adapters
from kedit_daemon.serve.router.routed_facts import RoutedFacts
from kedit_daemon.serve.router.router_api import RouterApi
from memory.db.follower import Follower
from memory.errors import Unreadable
from policies.asking.asked_facts import AskedFacts


def load_router(router: RouterApi, home: Home, config: Config, now: float) -> None:
    """Load a home's facts into a router, which answers from then on. now: in seconds since 1970.
    Raises KeditError: the database is missing or cannot be read, or no adapters can be made."""
    if (folder := config.serve.adapters) is not None:
        adapters = open_adapters(home, Path(folder).expanduser(), now)
        router.adapters = AdapterAnswers(adapters)
    facts = RoutedFacts(Follower(home.database_file), AskedFacts(load_relation_index))
    facts.sync()
    if facts.problem is not None:
        facts.close()
        raise Unreadable(facts.problem, hint="kedit-daemon doctor")
    router.facts = facts
