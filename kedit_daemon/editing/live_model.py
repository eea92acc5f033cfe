"""The live model: the active generation of the weights, and the side memory over it.

Everything here is derived from the store, and rebuilt from it when a file is missing or damaged.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.editing.relations import make_reader
from kedit_daemon.editing.tensor_files import load_deltas, load_shard, unpack_keys
from kedit_daemon.home import Home
from kedit_daemon.system.disk import is_disk_full
from kedit_daemon.system.orphans import find_leftovers, remove_leftovers
from memory.db import meta_keys
from memory.db.rows import GenerationRow
from memory.db.store import Store
from memory.errors import Damaged, KeditError, UnusableModel
from memory.facts import LIVE_STATES, Fact, FactState
from memory.files import save_tensors
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers
from memory.model.statistics import LayerStatistics
from memory.picture_files import read_kept
from memory.side.index import KeyIndex, to_fact_number
from memory.side.prompt_forms import choose_form
from memory.side.row_overlay import RowOverlay
from memory.side.shards import RetrievalKeys, RoutingMatch
from memory.side.side_memory import SideMemory
from policies.edit_site import EditSite
from policies.edit_terms import Refusal, unpack_terms
from policies.gibberish import find_gibberish
from policies.memit_mass import WeightsTier
from policies.probe import answer_probes, count_answer_tokens

INDEX_SAVE_SHARE = 0.25  # share of the index that has changed when its file is written again
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answer:
    """The answer to a prompt, and the facts of the side memory that fired, in their order."""

    text: str
    matches: tuple[RoutingMatch, ...] = ()

    @property
    def fired_match(self) -> RoutingMatch | None:
        """The fact that fired first, if one did."""
        return self.matches[0] if self.matches else None


def make_empty_side(loaded: LoadedModel) -> SideMemory:
    """Make an empty side memory for a loaded model."""
    return make_side_memory(loaded.model, loaded.site, loaded.statistics)


def make_side_memory(
    model: EditableModel, site: EditSite, statistics: Mapping[int, LayerStatistics]
) -> SideMemory:
    """Make an empty side memory. `statistics`: by layer, of those that are only read."""
    centres = {n: one.output_mean for n, one in statistics.items()}
    return SideMemory(model, site.gates, centres, make_reader(model))


def add_side_fact(
    side: SideMemory, fact: Fact, shard: int, keys: RetrievalKeys, *, indexed: bool = False
) -> None:
    """Add a fact to a side memory that holds its shard. `indexed`: its keys are in the index."""
    unnamed, target = fact.omits_subject, fact.target
    side.add_fact(fact.id, shard, keys, fact.names, unnamed=unnamed, target=target, indexed=indexed)
    if side.reader is not None:
        side.reader.add_fact(fact)


def check_base(known: str | None, found: str, name: str) -> None:
    """Raise UnusableModel if a home belongs to another model, by the hashes of the unedited
    weights: deltas for another would be noise."""
    if known not in (None, found):
        raise UnusableModel(
            f"this home was made for another model than {name}",
            hint="set `model` and `dtype` in config.toml back, or make a new home with init",
        )


class LiveModel:
    """The model as it is served: the weights of one generation, with the side memory over them.

    All of it is derived from the store.
    """

    def __init__(self, loaded: LoadedModel, store: Store, home: Home) -> None:
        self.loaded_model, self.store, self.home = loaded, store, home
        self.model, self.site = loaded.model, loaded.site
        self.weights_tier = WeightsTier(loaded.site, loaded.statistics)
        if self.model.pictures is not None:
            self.model.pictures.find_file = partial(read_kept, home.pictures_folder)
        self.side = make_empty_side(loaded)
        self.active_deltas: dict[int, Tensor] = {}  # of the active generation
        self.model.keep_base(loaded.layers)  # now: later they may be damaged, edited or not
        with self.model.at_base():
            self.unedited_hash = self.model.weights_hash(loaded.layers)

    # Start --------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Restore the weights and the side memory from the store and its files."""
        self.store.artifacts.check_active_generation()
        self._check_base()
        self._check_site()
        self.restore_weights()
        self._restore_side()
        self.prune_side()  # a crash may have come between a fact's end and that of its shard
        remove_leftovers(find_leftovers(self.home, self.store.db.conn))

    def restore_again(self) -> None:
        """Restore after a change was left unfinished. What is held is freed first: memory may not
        be enough for two of it."""
        self.active_deltas, self.side = {}, make_empty_side(self.loaded_model)
        self.model.set_deltas({})
        self.restore()

    def _check_base(self) -> None:
        """Check that the home belongs to this model; its first start decides."""
        known = self.store.db.get_meta(meta_keys.BASE_HASH)
        check_base(known, self.loaded_model.base_hash, self.loaded_model.name)
        if known is None:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.BASE_HASH, self.loaded_model.base_hash)

    def _check_site(self) -> None:
        """Raise KeditError if stored terms were computed for other layers than are edited now."""
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
        """Load the active generation, and solve it again if its file is missing or damaged."""
        row = self.store.artifacts.get_generation(self.store.artifacts.active_generation())
        try:
            self.active_deltas = load_deltas(self.home.generations_folder, row)
        except KeditError as error:
            log.warning("%s. Solving generation %d again.", error, row.id)
            self.active_deltas = self._rebuild_generation(row, str(error))
        self.model.set_deltas(self.active_deltas)

    def _rebuild_generation(self, row: GenerationRow, why: str) -> dict[int, Tensor]:
        """Solve a generation again from the stored terms; it becomes a new one."""
        try:
            deltas = self.solve(row.fact_ids)
        except KeditError as error:
            raise Damaged(f"{why}; what generation {row.id} is made from", str(error)) from error
        self.model.set_deltas(deltas)
        weights = self.model.weights_hash(self.loaded_model.layers)
        sha = save_tensors(self.home.generations_folder, {str(n): d for n, d in deltas.items()})
        with self.store.db.transaction():
            self.store.db.write_event(
                "generation_rebuilt", generation=row.id, why=why, weights=weights
            )
            number = self.store.artifacts.add_generation(
                sha, weights, row.id, "rebuilt", row.fact_ids, row.figures
            )
            self.store.artifacts.activate_generation(number)
        return deltas

    def rebuild_side(self) -> None:
        """Rebuild the side memory from the store and the shards' files. It stays unchanged if that
        fails."""
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
        live = {f.id: f for f in self.store.list_facts(LIVE_STATES)}
        rows = [row for row in self.store.artifacts.read_side_keys() if row.fact_id in live]
        broken = self._restore_shards()
        whole = [row for row in rows if row.shard in self.side.shards]
        with self.store.db.transaction():
            for fact_id in live.keys() - {row.fact_id for row in whole}:
                self.store.artifacts.drop_side_keys(fact_id)
                if live[fact_id].state is FactState.LIVE_SIDE:
                    why = "its shard or its keys were damaged"
                    self.store.change_state(fact_id, FactState.RECEIVED, reason=why)
            for number in broken:
                self.store.artifacts.drop_shard(number)
        keys = {row.fact_id: unpack_keys(row.blob) for row in whole}
        self._restore_index({to_fact_number(n): k.subject for n, k in keys.items()})
        for row in whole:
            add_side_fact(
                self.side, live[row.fact_id].fact, row.shard, keys[row.fact_id], indexed=True
            )

    def _restore_shards(self) -> set[int]:
        """Load the shards. Return the numbers of those whose file is missing or damaged."""
        broken = set()
        for row in self.store.artifacts.list_shards():
            try:
                self.side.shards[row.id] = load_shard(
                    self.home.side_folder, row.sha256, row.threshold, self.model.device
                )
            except KeditError as error:
                log.warning("%s. Learning its facts again.", error)
                broken.add(row.id)
        return broken

    def _restore_index(self, keys: Mapping[int, Tensor]) -> None:
        """Load the index file if it is whole, and sync it with the keys in the store: a crash may
        have left it behind them."""
        sha = self.store.db.get_meta(meta_keys.INDEX_SHA256)
        if sha is not None:
            try:
                gpu = self.model.device.type == "cuda"
                self.side.key_index = KeyIndex.load(self.home.index_folder, sha, gpu=gpu)
            except KeditError as error:
                log.warning("%s. Building the index again.", error)
                with self.store.db.transaction():
                    self.store.db.set_meta(meta_keys.INDEX_SHA256, None)
        self.side.key_index.sync_keys(keys)
        self.save_index()

    def save_index(self) -> None:
        """Write the index file if the index has changed. It is a cache, which takes long to write
        when it is large. A crash before its sha256 is stored leaves the older file in use, and so
        does a full disk: no edit fails for it."""
        if not self.side.key_index.changed_share:
            return
        try:
            sha = self.side.key_index.save(self.home.index_folder)
        except OSError as error:
            if not is_disk_full(error):
                raise
            log.warning("Cannot write the index file: %s", error)
            return
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.INDEX_SHA256, sha)
        for path in self.home.index_folder.iterdir():
            if path.stem != sha:
                path.unlink()

    def prune_side(self) -> None:
        """Drop the facts that the store has dropped, and shards without facts."""
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
        """Solve for ΔW by layer for a set of facts, from their stored terms alone."""
        artifacts = self.store.artifacts

        def read_gone(fact_id: str) -> bytes | None:
            with suppress(KeditError):  # lost or damaged: a fact that leaves needs none
                return artifacts.read_terms(fact_id)
            return None

        terms = {n: artifacts.read_terms(n) for n in fact_ids}
        return self.weights_tier.solve_deltas(terms, read_gone)

    def list_weights_facts(self) -> list[str]:
        """List the facts of the active generation, by id."""
        artifacts = self.store.artifacts
        return list(artifacts.get_generation(artifacts.active_generation()).fact_ids)

    def answer_prompts(
        self, prompts: Sequence[str], max_tokens: int, *, whole: bool = False
    ) -> list[Answer]:
        """Answer greedily by the edited model; without a match the output is the weights' own,
        bit for bit. `whole`: replies in a chat, to their end."""
        fired: list[tuple[RoutingMatch, ...]] = [()] * len(prompts)

        @contextmanager
        def overlay(places: list[int]) -> Iterator[None]:
            rows = RowOverlay(self.side)
            with rows.follow_passes():
                yield
            for place, row in zip(places, rows.rows, strict=True):
                fired[place] = row.matches

        given = [choose_form(self.side, prompt) for prompt in prompts]
        texts = generate_answers(self.model, given, max_tokens, overlay, whole=whole)
        return [Answer(text, matches) for text, matches in zip(texts, fired, strict=True)]

    def answer_questions(self, facts: Sequence[Fact]) -> list[Answer]:
        """Answer the facts' questions, with tokens enough for the longest target."""
        if not facts:
            return []
        most = count_answer_tokens(self.model, facts)
        return self.answer_prompts([fact.question for fact in facts], most)

    def answer_base(
        self, prompts: Sequence[str], max_tokens: int, *, whole: bool = False
    ) -> list[str]:
        """Answer greedily by the unedited model."""
        with self.model.at_base():
            return generate_answers(self.model, prompts, max_tokens, whole=whole)

    def find_gibberish(self, facts: Sequence[Fact]) -> dict[str, Refusal]:
        """Find the facts whose targets are gibberish to the unedited model, by fact id."""
        with self.model.at_base():
            found = {fact.id: find_gibberish(self.model, fact) for fact in facts}
        return {n: Refusal(why) for n, why in found.items() if why}

    def probe_edited(self, facts: Sequence[Fact]) -> dict[str, list[str]]:
        """Answer the facts' probe prompts by the edited model; by fact id."""
        return answer_probes(
            self.model, facts, lambda _places: RowOverlay(self.side).follow_passes()
        )

    def probe_unedited(self, facts: Sequence[Fact]) -> dict[str, list[str]]:
        """Answer the facts' probe prompts by the unedited model; by fact id."""
        with self.model.at_base():
            return answer_probes(self.model, facts)
