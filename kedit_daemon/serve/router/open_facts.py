"""Opening of a home's facts for a router. Imports torch, which the vectors of words need."""

from kedit_daemon.config import Config
from kedit_daemon.editing.relations import load_relation_index
from kedit_daemon.home import Home
from kedit_daemon.serve.router.routed_facts import RoutedFacts
from memory.db.follower import Follower
from memory.facts import LIVE_STATES, FactState
from policies.asking.asked_facts import AskedFacts


def open_facts(home: Home, config: Config) -> RoutedFacts:
    """Open the facts of a home. Those in the weights are left out where the daemon publishes its
    weights to a server: an engine has them then. Raises KeditError: there is no database."""
    is_published = config.publish.vllm is not None
    states = (FactState.LIVE_SIDE,) if is_published else LIVE_STATES
    facts = RoutedFacts(Follower(home.database_file), AskedFacts(load_relation_index), states)
    facts.sync()
    return facts
