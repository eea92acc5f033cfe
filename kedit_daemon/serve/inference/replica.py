"""A second copy of the model that follows the daemon's home, for answers to clients.

It loads what the daemon has published, and never writes. A file that is missing or damaged leaves
the replica as it was, and is reported as a problem.
"""

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor

from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.live_model import add_side_fact, check_base, make_side_memory
from kedit_daemon.editing.model_loading import open_model
from kedit_daemon.editing.tensor_files import load_deltas, load_shard, unpack_keys
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.types import BASE, EDITED
from memory.db import meta_keys
from memory.db.follower import Follower, LiveSideRow
from memory.errors import KeditError, Unreadable
from memory.picture_files import read_kept
from memory.side.side_memory import SideMemory
from policies.edit_site import EditSite

RETRY_SECONDS = 5.0  # between two tries of a failed sync, which reads whole files
# Errors of work with tensors; RuntimeError: also torch's, when the device is full.
MODEL_ERRORS = (KeditError, RuntimeError, MemoryError, ValueError)
log = logging.getLogger(__name__)


@contextmanager
def _reading_database() -> Iterator[None]:
    """Turn an error of the database into a KeditError of the one request that needs it."""
    try:
        yield
    except sqlite3.Error as error:
        message = f"the database cannot be read: {error}"
        raise Unreadable(message, hint="kedit-daemon doctor") from error


class Replica:
    """The model as it is served; used by one thread at a time."""

    def __init__(
        self,
        side: SideMemory,
        follower: Follower,
        home: Home,
        site: EditSite | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`side` is an empty side memory of the replica's own model; `sync` fills both."""
        self.model, self.side, self.home = side.model, side, home
        if self.model.pictures is not None:
            self.model.pictures.find_file = partial(read_kept, home.pictures_folder)
        self.generation = 0
        """The generation that is served as edited."""
        self.problems: tuple[str, ...] = ()
        """Messages about changes of the home that could not be followed."""
        self.site = site
        self._follower, self._monotonic = follower, monotonic
        self._checked_at = 0.0  # timestamp of the last sync that found a change
        self._deltas: dict[int, Tensor] = {}  # of `generation`, by layer
        self._loaded_generation = 0  # whose weights are in the model
        self._side_rows: dict[str, LiveSideRow] = {}  # in the side memory, by fact id

    @classmethod
    def load(cls, home: Home, name: str, device: str, dtype: str = "float32") -> "Replica":
        """Load the model by its configured name, with what the daemon has measured of it.

        Raises KeditError: no database, no such model, or not the one that the home is for.
        """
        follower = Follower(home.database_file)
        loaded = open_model(name, device, home.state_folder, GgufCache(home.models_folder), dtype)
        check_base(follower.db.get_meta(meta_keys.BASE_HASH), loaded.base_hash, name)
        site = loaded.resolve_site()
        loaded.model.widen_layers(site.layers)
        statistics = loaded.resolve_statistics(site.layers, (site.key_layer, site.side_layer), iter)
        return cls(make_side_memory(loaded.model, site, statistics), follower, home, site)

    def close(self) -> None:
        """Close the database."""
        self._follower.close()

    # Following ----------------------------------------------------------------------------------

    def sync(self) -> None:
        """Follow what the daemon has published since the last call; cheap if that is nothing.

        The side memory follows at once, but not without the weights that belong to it. The
        model's weights change with the next `set_generation`. A change that could not be followed
        is tried again after RETRY_SECONDS, or with the next change.
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
            self._follower.forget_version()  # a change that was followed in part is tried again
            raise
        self._checked_at = self._monotonic()
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        self.problems = tuple(problems)

    def _follow_weights(self) -> list[str]:
        """Take over the active generation; return the problem if its file is not whole."""
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
        """Remove the facts that left or changed, add new ones; return the problems."""
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
            self.side.shards[row.shard_id] = load_shard(
                self.home.side_folder, row.file_sha256, row.threshold, self.model.device
            )
        add_side_fact(self.side, fact, row.shard_id, unpack_keys(blob))
        self._side_rows[row.fact_id] = row

    # Weights ------------------------------------------------------------------------------------

    @_reading_database()
    def resolve_generation(self, variant: str | int) -> int:
        """Return the number of the generation that a request asks for: EDITED, BASE, or a number.

        Raises KeditError: no generation has this number (code "model"), or the database cannot
        be read ("unreadable").
        """
        if variant == EDITED:
            return self.generation
        if variant == BASE:
            return 0
        if not isinstance(variant, int) or not self._follower.has_generation(variant):
            message = f"there is no generation {variant!r}"
            raise KeditError(message, code="model", hint="kedit-daemon status")
        return variant

    @_reading_database()
    def set_generation(self, number: int) -> None:
        """Set the weights of a generation. Raises KeditError: its file is missing or damaged, or
        the database cannot be read."""
        if number != self._loaded_generation:
            deltas = self._get_deltas(number)
            self._loaded_generation = -1  # unknown, if the next line fails
            self.model.set_deltas(deltas)
            self._loaded_generation = number

    def _get_deltas(self, number: int) -> dict[int, Tensor]:
        if number == self.generation:
            return self._deltas
        row = self._follower.artifacts.get_generation(number)
        return load_deltas(self.home.generations_folder, row)
