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

from kedit_daemon.editing.live_model import check_base, make_side_memory
from kedit_daemon.editing.model_loading import open_model
from kedit_daemon.editing.tensor_files import load_delta, load_deltas, unpack_keys
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.types import BASE, EDITED
from memory.db import meta_keys
from memory.db.follower import Follower, LiveSideRow
from memory.errors import KeditError, Unreadable
from memory.side.side_memory import Shard, SideMemory
from policies.edit_site import EditSite

RETRY_SECONDS = 5.0  # between two looks at what could not be followed: files are read whole
# What work with tensors may raise; RuntimeError: also torch's, when the device is full.
MODEL_ERRORS = (KeditError, RuntimeError, MemoryError, ValueError)
log = logging.getLogger(__name__)


@contextmanager
def _reading_database() -> Iterator[None]:
    """A database that cannot be read is the error of the one reader for whom it is read."""
    try:
        yield
    except sqlite3.Error as error:
        raise Unreadable(
            f"the database cannot be read: {error}", hint="kedit-daemon doctor"
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
        self._checked_at = 0.0  # when, while there are problems
        self._deltas: dict[int, Tensor] = {}  # of that generation
        self._loaded_generation = 0  # the one whose weights are in the model now
        self._side_rows: dict[str, LiveSideRow] = {}  # what the side memory holds

    @classmethod
    def load(cls, home: Home, name: str, device: str) -> "Replica":
        """The model by its configured name, with what the daemon has measured of it.

        Raises KeditError: no database, no such model, or not the one that the home is for.
        """
        follower = Follower(home.database_file)
        loaded = open_model(name, device, home.state_folder)
        check_base(follower.db.get_meta(meta_keys.BASE_HASH), loaded.base_hash, name)
        site = loaded.resolve_site()
        statistics = loaded.resolve_statistics(site.layers, (site.key_layer, site.side_layer), iter)
        return cls(make_side_memory(loaded.model, site, statistics), follower, home, site)

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
        if self.problems and self._monotonic() - self._checked_at >= RETRY_SECONDS:
            self._follower.forget_version()
        try:
            if not self._follower.has_changed():
                return
            with self._follower.read_snapshot():
                problems += self._follow_weights()
                if not problems:  # else a fact that moved into those weights would be in neither
                    problems += self._follow_side()
        except sqlite3.Error as error:
            self._follower.forget_version()
            problems.append(f"the database cannot be read: {error}")
        except BaseException:
            self._follower.forget_version()  # half followed is not seen
            raise
        self._checked_at = self._monotonic()
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        self.problems = tuple(problems)

    def _follow_weights(self) -> list[str]:
        """Take the active generation, if its file is whole; else why not."""
        number = self._follower.artifacts.active_generation()
        if number == self.generation:
            return []
        try:
            self._deltas = self._get_deltas(number)
        except MODEL_ERRORS as error:
            return [f"generation {number} is not served, {self.generation} still is: {error}"]
        self.generation = number
        return []

    def _follow_side(self) -> list[str]:
        """Take out what has left or has changed, then take in what is new; what of it cannot be."""
        rows = {row.fact_id: row for row in self._follower.list_live_rows()}
        for fact_id in [n for n, row in self._side_rows.items() if rows.get(n) != row]:
            del self._side_rows[fact_id]
            self.side.remove_fact(fact_id)
        for shard in set(self.side.shards) - set(self.side.shard_ids.values()):
            del self.side.shards[shard]
        problems = []
        for row in [row for n, row in rows.items() if n not in self._side_rows]:
            try:
                self._add_fact(row)
            except MODEL_ERRORS as error:
                problems.append(f"fact {row.fact_id} is not served: {error}")
        return problems

    def _add_fact(self, row: LiveSideRow) -> None:
        fact, blob = self._follower.read_live_fact(row.fact_id)
        if row.shard_id not in self.side.shards:
            delta = load_delta(self.home.side_folder, row.file_sha256, self.model.device)
            self.side.shards[row.shard_id] = Shard(delta, row.threshold)
        keys = unpack_keys(blob)
        self.side.add_fact(
            row.fact_id, row.shard_id, keys, fact.subject, unnamed=fact.omits_subject
        )
        self._side_rows[row.fact_id] = row

    # Weights ------------------------------------------------------------------------------------

    @_reading_database()
    def resolve_generation(self, which: str | int) -> int:
        """The generation that a reader asks for: EDITED, BASE, or a number.

        Raises KeditError: there is none with this number (code "model"), or the database cannot
        be read ("unreadable").
        """
        if which == EDITED:
            return self.generation
        if which == BASE:
            return 0
        if not isinstance(which, int) or not self._follower.has_generation(which):
            raise KeditError(
                f"there is no generation {which!r}", code="model", hint="kedit-daemon status"
            )
        return which

    @_reading_database()
    def set_generation(self, number: int) -> None:
        """Lay the weights of a generation. Raises KeditError: its file is missing or damaged, or
        the database cannot be read."""
        if number != self._loaded_generation:
            deltas = self._get_deltas(number)
            self._loaded_generation = -1  # if it ends half way, nothing is known of the weights
            self.model.set_deltas(deltas)
            self._loaded_generation = number

    def _get_deltas(self, number: int) -> dict[int, Tensor]:
        if number == self.generation:
            return self._deltas
        return load_deltas(
            self.home.generations_folder, self._follower.artifacts.get_generation(number)
        )
