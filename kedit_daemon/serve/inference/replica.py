"""A second copy of the model that follows the daemon's home, for those who only read.

It loads what the daemon has published, and never writes: what is missing or damaged there stays
as it was here, and is told.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from kedit_daemon.editing.live_model import check_base, side_for
from kedit_daemon.editing.model_loading import open_model
from kedit_daemon.editing.tensor_files import load_delta, load_deltas, unpack_keys
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.types import BASE, EDITED
from memory.db.follower import Follower, LiveRow
from memory.errors import KeditError
from memory.side.side_memory import Shard, SideMemory
from policies.edit_site import EditSite

LOOK_AGAIN_SECONDS = 5.0  # between two looks at what could not be followed: files are read whole
# What work with tensors may raise; RuntimeError: also torch's, when the device is full.
BROKEN = (KeditError, RuntimeError, MemoryError, ValueError)
log = logging.getLogger(__name__)


@contextmanager
def _reading() -> Iterator[None]:
    """A database that cannot be read is the error of the one reader for whom it is read."""
    try:
        yield
    except sqlite3.Error as error:
        raise KeditError(
            f"the database cannot be read: {error}", code="unreadable", hint="kedit-daemon doctor"
        ) from error


class Replica:
    """The model as it is served, of one thread at a time."""

    def __init__(
        self,
        side: SideMemory,
        follower: Follower,
        home: Home,
        site: EditSite | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`side` is empty, of a model with its own weights; `sync` brings both up to date.
        monotonic: seconds."""
        self.model, self.side, self.home = side.model, side, home
        self.generation = 0
        """The one that is served as edited."""
        self.problems: tuple[str, ...] = ()
        """What could not be followed, in words; nothing while all is well."""
        self.site = site
        self._follower, self._monotonic = follower, monotonic
        self._looked = 0.0  # when, while there are problems
        self._deltas: dict[int, Tensor] = {}  # of that generation
        self._laid = 0  # the one whose weights are in the model now
        self._rows: dict[str, LiveRow] = {}  # what the side memory holds

    @classmethod
    def load(cls, home: Home, name: str, device: str) -> "Replica":
        """The model by its configured name, with what the daemon has measured of it.

        Raises KeditError: no database, no such model, or not the one that the home is for.
        """
        follower = Follower(home.database)
        loaded = open_model(name, device, home.state)
        check_base(follower.meta("base_hash"), loaded.base_hash, name)
        site = loaded.site()
        statistics = loaded.statistics(site.layers, (site.key_layer, site.side_layer), iter)
        return cls(side_for(loaded.model, site, statistics), follower, home, site)

    def close(self) -> None:
        """Close the database."""
        self._follower.close()

    # Following ----------------------------------------------------------------------------------

    def sync(self) -> None:
        """See what the daemon has published since the last time; costs nothing when it has not.

        The side memory follows at once, but not without the weights that belong to it. Weights
        move with the next `use`. What could not be followed is tried again after
        LOOK_AGAIN_SECONDS, or with the next change.
        """
        problems: list[str] = []
        if self.problems and self._monotonic() - self._looked >= LOOK_AGAIN_SECONDS:
            self._follower.look_again()
        try:
            if not self._follower.changed():
                return
            with self._follower.moment():
                problems += self._follow_weights()
                if not problems:  # else a fact that moved into those weights would be in neither
                    problems += self._follow_side()
        except sqlite3.Error as error:
            self._follower.look_again()
            problems.append(f"the database cannot be read: {error}")
        except BaseException:
            self._follower.look_again()  # half followed is not seen
            raise
        self._looked = self._monotonic()
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        self.problems = tuple(problems)

    def _follow_weights(self) -> list[str]:
        """Take the active generation, if its file is whole; else why not."""
        number = self._follower.active_generation()
        if number == self.generation:
            return []
        try:
            self._deltas = self._deltas_of(number)
        except BROKEN as error:
            return [f"generation {number} is not served, {self.generation} still is: {error}"]
        self.generation = number
        return []

    def _follow_side(self) -> list[str]:
        """Take out what has left or has changed, then take in what is new; what of it cannot be."""
        rows = {row.fact_id: row for row in self._follower.live_rows()}
        for fact_id in [n for n, row in self._rows.items() if rows.get(n) != row]:
            del self._rows[fact_id]
            self.side.drop(fact_id)
        for shard in set(self.side.shards) - set(self.side.shard_of.values()):
            del self.side.shards[shard]
        problems = []
        for row in [row for n, row in rows.items() if n not in self._rows]:
            try:
                self._take_in(row)
            except BROKEN as error:
                problems.append(f"fact {row.fact_id} is not served: {error}")
        return problems

    def _take_in(self, row: LiveRow) -> None:
        fact, blob = self._follower.live(row.fact_id)
        if row.shard not in self.side.shards:
            delta = load_delta(self.home.side, row.file, self.model.device)
            self.side.shards[row.shard] = Shard(delta, row.threshold)
        keys = unpack_keys(blob)
        self.side.put(row.fact_id, row.shard, keys, fact.subject, unnamed=fact.unnamed)
        self._rows[row.fact_id] = row

    # Weights ------------------------------------------------------------------------------------

    @_reading()
    def number_of(self, which: str | int) -> int:
        """The generation that a reader asks for: EDITED, BASE, or a number.

        Raises KeditError: there is none with this number (code "model"), or the database cannot
        be read ("unreadable").
        """
        if which == EDITED:
            return self.generation
        if which == BASE:
            return 0
        if not isinstance(which, int) or not self._follower.known(which):
            raise KeditError(
                f"there is no generation {which!r}", code="model", hint="kedit-daemon status"
            )
        return which

    @_reading()
    def use(self, number: int) -> None:
        """Lay the weights of a generation. Raises KeditError: its file is missing or damaged, or
        the database cannot be read."""
        if number != self._laid:
            deltas = self._deltas_of(number)
            self._laid = -1  # if it ends half way, nothing is known of the weights
            self.model.set_deltas(deltas)
            self._laid = number

    def _deltas_of(self, number: int) -> dict[int, Tensor]:
        if number == self.generation:
            return self._deltas
        return load_deltas(self.home.generations, self._follower.generation(number))
