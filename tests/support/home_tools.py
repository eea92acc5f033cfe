"""What the tests of serving share: a home whose database is written by hand, and who follows it."""

from pathlib import Path

import torch
from editing_home import Clock, seat
from side_tools import delta_of, keys_of, side_of

from kedit_daemon.editing.tensor_files import pack_keys, save_shard
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.replica import Replica
from memory.db import meta_keys
from memory.db.follower import Follower
from memory.db.store import Store
from memory.facts import Fact, FactState
from memory.files import save_tensors
from memory.model.editable import EditableModel
from memory.side.shards import Shard

TOP = 3  # a layer above that of the side memory: the keys of its facts stay what they are
ROME, OSLO, LIMA = seat(1, "Rome"), seat(2, "Oslo"), seat(3, "Lima")


class Published:
    """A home as a daemon leaves it; shards and weights are random, and change what is said."""

    def __init__(self, root: Path, model: EditableModel) -> None:
        self.home, self.model = Home(root), model
        self.home.create_folders()
        self.seconds = 0.0  # of the clock that a replica looks at
        self.store = Store(self.home.database_file, Clock())

    def name_model(self, folder: Path) -> None:
        """As a daemon does at its first start."""
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.MODEL, str(folder))
            every = range(self.model.layer_count)
            self.store.db.set_meta(meta_keys.BASE_HASH, self.model.weights_hash(every))

    def learn(self, fact: Fact, shard: int, seed: int = 1, *, is_asked: bool = False) -> Path:
        """A fact goes live in the side memory; the path of its shard's file."""
        side = side_of(self.model, {})
        delta = delta_of(self.model, seed)
        sha = save_shard(self.home.side_folder, Shard(delta, 1e-3, is_asked))
        with self.store.db.transaction():
            known = self.store.find_fact(fact.id)
            if known is None:
                self.store.receive_fact(fact, "test.jsonl", False)
            self.store.artifacts.add_shard(shard, sha, 1, 1e-3)
            self.store.artifacts.put_side_keys(
                fact.id, shard, pack_keys(keys_of(side, fact.question))
            )
            self.store.change_state(fact.id, FactState.LIVE_SIDE, tier="side")
        return self.home.side_folder / f"{sha}.safetensors"

    def forget(self, fact: Fact, shard: int) -> None:
        """A fact leaves the side memory."""
        with self.store.db.transaction():
            self.store.artifacts.drop_side_keys(fact.id)
            self.store.artifacts.drop_shard(shard)
            self.store.change_state(fact.id, FactState.REVERTED)

    def generation(self, seed: int) -> int:
        """Other weights become active; their number."""
        random = torch.Generator().manual_seed(seed)
        weight = self.model.base_weight(TOP)
        delta = torch.randn(weight.shape, generator=random)
        sha = save_tensors(self.home.generations_folder, {str(TOP): delta})
        with self.store.db.transaction():
            number = self.store.artifacts.add_generation(sha, "", 0, "flush", (), {})
            self.store.artifacts.activate_generation(number)
        return number

    def file_of(self, generation: int) -> Path:
        return (
            self.home.generations_folder
            / f"{self.store.artifacts.get_generation(generation).sha256}.safetensors"
        )

    def replica(self, model: EditableModel) -> Replica:
        follower = Follower(self.home.database_file)
        return Replica(side_of(model, {}), follower, self.home, monotonic=lambda: self.seconds)
