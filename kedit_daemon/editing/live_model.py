"""What is served: the active generation of the weights, and the side memory over it.

Everything here is derived from the store, and rebuilt from it when a file is missing or damaged.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.editing.tensor_files import load_delta, load_deltas, unpack_keys
from kedit_daemon.home import Home
from kedit_daemon.system.disk import is_disk_full
from kedit_daemon.system.orphans import find_leftovers, remove_leftovers
from memory.db import meta_keys
from memory.db.rows import GenerationRow
from memory.db.store import Store
from memory.errors import Damaged, KeditError, UnusableModel
from memory.facts import Fact, FactState
from memory.files import save_tensors
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers
from memory.model.statistics import LayerStatistics
from memory.side.index import KeyIndex
from memory.side.side_memory import RoutingMatch, Shard, SideMemory, to_fact_number
from policies.edit_site import EditSite
from policies.edit_terms import Refusal, unpack_terms
from policies.gibberish import find_gibberish
from policies.memit_mass import WeightsTier
from policies.probe import answer_probes

INDEX_SAVE_SHARE = 0.25  # share of the index that has changed when its file is written again
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """What was said to a prompt, and the fact of the side memory that fired, if one did."""

    text: str
    fired_match: RoutingMatch | None


def make_empty_side(loaded: LoadedModel) -> SideMemory:
    """A side memory for a model, with nothing in it."""
    return make_side_memory(loaded.model, loaded.site, loaded.statistics)


def make_side_memory(
    model: EditableModel, site: EditSite, statistics: Mapping[int, LayerStatistics]
) -> SideMemory:
    """The same, of a model that is only read from."""
    return SideMemory(model, site.gates, {n: one.output_mean for n, one in statistics.items()})


def check_base(known: str | None, found: str, name: str) -> None:
    """Refuse a home that belongs to another model, by the hashes of the unedited weights: deltas
    for another would be noise."""
    if known not in (None, found):
        raise UnusableModel(
            f"this home was made for another model than {name}",
            hint="set `model` in config.toml back, or make a new home with init",
        )


class LiveModel:
    """The model as people meet it: weights of one generation, side memory laid over."""

    def __init__(self, loaded: LoadedModel, store: Store, home: Home) -> None:
        self.loaded_model, self.store, self.home = loaded, store, home
        self.model, self.site = loaded.model, loaded.site
        self.weights_tier = WeightsTier(loaded.site, loaded.statistics)
        self.side = make_empty_side(loaded)
        self.active_deltas: dict[int, Tensor] = {}  # of the active generation
        self.model.keep_base(loaded.layers)  # now: later they may be damaged, edited or not
        with self.model.at_base():
            self.unedited_hash = self.model.weights_hash(loaded.layers)

    # Start --------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Bring the model to where the store says it is."""
        self.store.artifacts.check_active_generation()
        self._check_base()
        self._check_site()
        self.restore_weights()
        self._restore_side()
        self.prune_side()  # a crash may have come between a fact's end and that of its shard
        remove_leftovers(find_leftovers(self.home, self.store.db.conn))

    def restore_again(self) -> None:
        """The same after something was left in the middle. What is held goes first: the memory may
        not have room for two of it."""
        self.active_deltas, self.side = {}, make_empty_side(self.loaded_model)
        self.model.set_deltas({})
        self.restore()

    def _check_base(self) -> None:
        """A home belongs to one model, from its first start on."""
        known = self.store.db.get_meta(meta_keys.BASE_HASH)
        check_base(known, self.loaded_model.base_hash, self.loaded_model.name)
        if known is None:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.BASE_HASH, self.loaded_model.base_hash)

    def _check_site(self) -> None:
        """The facts' terms belong to the layers that were edited when they were computed."""
        terms = self.store.artifacts.find_any_terms()
        if terms is None:
            return
        stored, edited = sorted(unpack_terms(terms)[0]), list(self.site.layers)
        if stored != edited:
            raise KeditError(
                f"this home's facts were computed for the layers {stored}, and the model is edited"
                f" at {edited} now",
                code="site",
                hint="put the model's kedit.json back, or hand the facts in to a new home",
            )

    def restore_weights(self) -> None:
        """Lay the active generation over the unedited weights, from its file if that is whole."""
        row = self.store.artifacts.get_generation(self.store.artifacts.active_generation())
        try:
            self.active_deltas = load_deltas(self.home.generations_folder, row)
        except KeditError as error:
            log.warning("%s; solving generation %d again", error, row.id)
            self.active_deltas = self._rebuild_generation(row, str(error))
        self.model.set_deltas(self.active_deltas)

    def _rebuild_generation(self, row: GenerationRow, why: str) -> dict[int, Tensor]:
        """Solve a generation again from the stored terms, as a new one with the same facts."""
        try:
            deltas = self.solve(row.fact_ids)
        except KeditError as error:
            raise Damaged(f"{why}; what generation {row.id} is made from", str(error)) from error
        self.model.set_deltas(deltas)
        found = self.model.weights_hash(self.loaded_model.layers)
        sha = save_tensors(self.home.generations_folder, {str(n): d for n, d in deltas.items()})
        with self.store.db.transaction():
            self.store.db.write_event(
                "generation_rebuilt", generation=row.id, why=why, weights=found
            )
            number = self.store.artifacts.add_generation(
                sha, found, row.id, "rebuilt", row.fact_ids, row.figures
            )
            self.store.artifacts.activate_generation(number)
        return deltas

    def rebuild_side(self) -> None:
        """Build the side memory again from the store and the shards' files; if that fails, it is
        what it was."""
        before, self.side = self.side, make_empty_side(self.loaded_model)
        try:
            with self.store.db.transaction():
                # The file may hold what is wrong.
                self.store.db.set_meta(meta_keys.INDEX_SHA256, None)
            self._restore_side()
        except BaseException:
            self.side = before
            raise

    def _restore_side(self) -> None:
        live = {f.id: f.fact for f in self.store.list_facts((FactState.LIVE_SIDE,))}
        rows = [row for row in self.store.artifacts.read_side_keys() if row.fact_id in live]
        broken = self._restore_shards()
        whole = [row for row in rows if row.shard in self.side.shards]
        with self.store.db.transaction():
            for fact_id in live.keys() - {row.fact_id for row in whole}:
                self.store.artifacts.drop_side_keys(fact_id)
                why = "its shard or its keys were damaged"
                self.store.change_state(fact_id, FactState.RECEIVED, reason=why)
            for number in broken:
                self.store.artifacts.drop_shard(number)
        keys = {row.fact_id: unpack_keys(row.blob) for row in whole}
        self._restore_index({to_fact_number(n): k.subject for n, k in keys.items()})
        for row in whole:
            fact, own = live[row.fact_id], keys[row.fact_id]
            self.side.add_fact(
                fact.id, row.shard, own, fact.subject, unnamed=fact.omits_subject, indexed=True
            )

    def _restore_shards(self) -> set[int]:
        """Load the shards; the numbers of those whose file is missing or damaged."""
        broken = set()
        for row in self.store.artifacts.list_shards():
            try:
                delta = load_delta(self.home.side_folder, row.sha256, self.model.device)
                self.side.shards[row.id] = Shard(delta, row.threshold)
            except KeditError as error:
                log.warning("%s; its facts are learned again", error)
                broken.add(row.id)
        return broken

    def _restore_index(self, keys: Mapping[int, Tensor]) -> None:
        """Take the index file if it is whole, and bring it to the keys that the store has: a
        crash may have left it behind them."""
        sha = self.store.db.get_meta(meta_keys.INDEX_SHA256)
        if sha is not None:
            try:
                gpu = self.model.device.type == "cuda"
                self.side.key_index = KeyIndex.load(self.home.index_folder, sha, gpu=gpu)
            except KeditError as error:
                log.warning("%s; building the index again", error)
                with self.store.db.transaction():
                    self.store.db.set_meta(meta_keys.INDEX_SHA256, None)
        self.side.key_index.sync_keys(keys)
        self.save_index()

    def save_index(self) -> None:
        """Write the index file if the index has changed: a cache, which takes long to write when
        it is large. A crash before its sha256 is noted leaves the file from before in force, and
        so does a disk that is full: no edit fails for it."""
        if not self.side.key_index.changed_share:
            return
        try:
            sha = self.side.key_index.save(self.home.index_folder)
        except OSError as error:
            if not is_disk_full(error):
                raise
            log.warning("the index file is not written: %s", error)
            return
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.INDEX_SHA256, sha)
        for path in self.home.index_folder.iterdir():
            if path.stem != sha:
                path.unlink()

    def prune_side(self) -> None:
        """Drop from the side memory what the store has dropped: facts, and shards left empty."""
        for fact_id in set(self.side.shard_ids) - self.store.artifacts.list_side_fact_ids():
            self.side.remove_fact(fact_id)
        empty = set(self.side.shards) - set(self.side.shard_ids.values())
        rows = self.store.artifacts.list_shards() if empty else []
        with self.store.db.transaction():
            for number in empty:
                del self.side.shards[number]
                self.store.artifacts.drop_shard(number)
        kept = {row.sha256 for row in rows if row.id not in empty}
        for sha in {row.sha256 for row in rows if row.id in empty} - kept:
            (self.home.side_folder / f"{sha}.safetensors").unlink(missing_ok=True)
        if self.side.key_index.changed_share > INDEX_SAVE_SHARE:
            self.save_index()

    # Answers ------------------------------------------------------------------------------------

    def solve(self, fact_ids: Sequence[str]) -> dict[int, Tensor]:
        """ΔW by layer for a set of facts, from their stored terms alone."""
        return self.weights_tier.solve_deltas(
            {n: self.store.artifacts.read_terms(n) for n in fact_ids}
        )

    def list_weights_facts(self) -> list[str]:
        """The facts that the active generation holds, by id."""
        return list(
            self.store.artifacts.get_generation(self.store.artifacts.active_generation()).fact_ids
        )

    def answer_prompts(self, prompts: Sequence[str], max_tokens: int) -> list[Answer]:
        """Greedy answers of the edited model; unrouted rows are those of the weights, exactly."""
        fired: list[RoutingMatch | None] = [None] * len(prompts)

        @contextmanager
        def overlay(places: list[int]) -> Iterator[None]:
            found: list[RoutingMatch | None] = []
            with self.side.overlay_matches(found):
                yield
            for place, match in zip(places, found, strict=True):
                fired[place] = match

        texts = generate_answers(self.model, prompts, max_tokens, overlay)
        return [Answer(text, match) for text, match in zip(texts, fired, strict=True)]

    def answer_base(self, prompts: Sequence[str], max_tokens: int) -> list[str]:
        """Greedy answers of the model as it was before any edit."""
        with self.model.at_base():
            return generate_answers(self.model, prompts, max_tokens)

    def find_gibberish(self, facts: Sequence[Fact]) -> dict[str, Refusal]:
        """The facts whose targets read like nothing to the unedited model, by fact id."""
        with self.model.at_base():
            found = {fact.id: find_gibberish(self.model, fact) for fact in facts}
        return {n: Refusal(why) for n, why in found.items() if why}

    def probe_edited(self, facts: Sequence[Fact]) -> dict[str, list[str]]:
        """The edited model's answers to the facts' probe prompts, by fact id."""
        return answer_probes(self.model, facts, lambda _places: self.side.overlay_matches([]))

    def probe_unedited(self, facts: Sequence[Fact]) -> dict[str, list[str]]:
        """The unedited model's answers to the facts' probe prompts, by fact id."""
        with self.model.at_base():
            return answer_probes(self.model, facts)
