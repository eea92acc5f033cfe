"""Opening of a home's model for clients. Imports torch: only a process that answers needs it."""

from pathlib import Path

from kedit_daemon.config import Config
from kedit_daemon.editing.audit import make_thresholds
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.engine import BatchEngine
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.replica import Replica


def open_reader(home: Home, config: Config) -> Reader:
    """Open a reader on a home, with an engine that follows what the daemon publishes there.

    Raises KeditError: no database, no such model, or not the one that the home is for.
    """
    replica = Replica.load(home, config.model, config.device, config.dtype)
    replica.sync()  # the first answer after "ready" comes at once, and is edited
    engine = BatchEngine(replica, config.serve.most_rows, config.serve.waiting_limit)
    limits = None if replica.site is None else make_thresholds(config, replica.site)
    return Reader(Path(config.model).name, engine.model, engine, limits)
