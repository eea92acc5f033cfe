"""The side memory at work: learn waiting facts into shards of their own, probe them, go live.

A shard is never trained on: what is live stays as it was probed, and the cost of another fact does
not grow with their number. A fact that is not answered in a chat gets another shard, once. A fact
that ends takes its shard with it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from kedit_daemon.editing.fact_lifecycle import Lifecycle
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel, add_side_fact
from kedit_daemon.editing.relations import load_relation_index
from kedit_daemon.editing.tensor_files import pack_keys, save_shard
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.errors import BadPicture, Rejected
from memory.facts import Fact, FactState, fill_subject
from memory.side.prompt_forms import strip_labels
from memory.side.shards import RetrievalKeys, Shard
from policies.asking.asked_rows import choose_questions, make_asked_rows
from policies.edit_terms import Refusal
from policies.probe import Probe, compare_answers
from policies.prompts import CONTEXTS, MAX_PARAPHRASES, TokenRow
from policies.wise import (
    compute_keys,
    filter_fitting,
    learn_shards,
    read_other_questions,
    read_prompt_ends,
)

OUTSIDE_LINES = 200  # of ordinary text, on which every shard must stay quiet
OUTSIDE_NEIGHBOURS = 4  # of each fact
AGAIN_DONE_LOSS = 0.01  # of the targets alone, where questions were not answered at the usual loss
LONG_TARGET_TOKENS = 16  # with one target of 55, a batch of 16 facts of 1 or 2 took 9 times as long


class SideLearner:
    """Learns facts into the side memory."""

    def __init__(
        self,
        live_model: LiveModel,
        store: Store,
        lifecycle: Lifecycle,
        generations: Generations,
        batch_facts: int,
        steps: int,
        pulse: Callable[[], None],
        outside_lines: int = OUTSIDE_LINES,
    ) -> None:
        """`batch_facts`: learned together at most. `steps`: of gradient descent."""
        self.live_model, self.model, self.store = live_model, live_model.model, store
        self.lifecycle, self.generations = lifecycle, generations
        self.batch_facts, self.steps, self.pulse = batch_facts, steps, pulse
        # Facts in the weights, by id, that could not be learned for chats: they are not tried
        # again in this process.
        self._silent_in_chats: set[str] = set()
        self._ordinary_inputs = live_model.loaded_model.opened.resolve_ordinary_inputs(
            live_model.site.side_layer, outside_lines
        )

    def learn_batch(self, waiting: Sequence[StoredFact], max_facts: int | None = None) -> list[str]:
        """Learn the first waiting facts, at most `batch_facts` or `max_facts`. Return the ids of
        those that are live now.

        A fact whose training diverges fails alone, as does one that is not answered then. Raises
        KeditError if one of them cannot be learned at all; nothing has changed then.
        """
        selected = self._select_batch(waiting, max_facts or self.batch_facts)
        batch = self._reject_gibberish(selected)
        if not batch:
            return []
        began = time.monotonic()
        worded = [self._add_wordings(f.fact) for f in batch]
        keys = compute_keys(self.model, self.live_model.side, worded)
        trained = self._train_shards(worded, keys)
        seconds = (time.monotonic() - began) / len(batch)
        failed = {n: one.reason for n, one in trained.items() if isinstance(one, Refusal)}
        shards = {n: one for n, one in trained.items() if isinstance(one, Shard)}
        new = [f for f in batch if f.id in shards]
        before = self.live_model.probe_unedited([f.fact for f in new])
        try:
            self._insert_shards(new, shards, keys)
            after = self._probe_new(new)
            probes = {f.id: compare_answers(f.fact, before[f.id], after[f.id]) for f in new}
            right = [f for f in new if probes[f.id].right]
            self._save_learned(right, keys, before, probes, seconds)
        except BaseException:
            self._remove_unsaved(new)
            raise
        wrong = {n: probe.answer for n, probe in probes.items() if not probe.right}
        failed |= {n: f"the side memory answered {answer!r}" for n, answer in wrong.items()}
        with self.store.db.transaction():
            for fact in (f for f in batch if f.id in failed):
                self.record_failure(fact, failed[fact.id])
        self.live_model.prune_side()
        return [f.id for f in batch if f.id not in failed]

    def train_again(self, fact: Fact, failed: Sequence[str]) -> Shard | Refusal:
        """Train another shard for a fact, also for questions that it was not answered for, and to
        a lower loss."""
        worded = self._add_wordings(fact)
        keys = compute_keys(self.model, self.live_model.side, [worded])
        return self._train_shards([worded], keys, failed)[fact.id]

    def take_unasked(self) -> list[StoredFact]:
        """Take facts of the weights that nobody can ask for in a chat, since they have no shard."""
        if self.live_model.side.reader is None:
            return []
        in_weights = set(self.live_model.list_weights_facts())
        kept = self.store.artifacts.list_side_fact_ids() | self._silent_in_chats
        unasked = sorted(in_weights - kept)[: self.batch_facts]
        found = [self.store.find_fact(fact_id) for fact_id in unasked]
        return [f for f in found if f is not None and f.state is FactState.LIVE_WEIGHTS]

    def record_failure(self, fact: StoredFact, reason: str) -> None:
        """Record that a fact could not be learned."""
        if fact.state is FactState.LIVE_WEIGHTS:
            self._silent_in_chats.add(fact.id)
        self.lifecycle.record_failed_attempt(fact, "side", reason)

    def _select_batch(self, waiting: Sequence[StoredFact], max_facts: int) -> list[StoredFact]:
        """Select the facts to learn together. Every row is as long as the longest, so a long
        target would make all wait: it comes after the short ones, and alone."""
        short = (f for f in waiting if not self._has_long_target(f.fact))
        return list(islice(short, max_facts)) or list(waiting[:1])

    def _has_long_target(self, fact: Fact) -> bool:
        target = self.model.encode_target(fact.question, fact.target, fact.join)
        return len(target) > LONG_TARGET_TOKENS

    def _reject_gibberish(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Reject the facts whose targets are gibberish, and return the others."""
        new = [f.fact for f in facts if f.state is FactState.RECEIVED]
        refused = self._find_unseen(new)
        seen = [fact for fact in new if fact.id not in refused]
        refused |= self.live_model.find_gibberish(seen)
        with self.store.db.transaction():
            for fact in (f for f in facts if f.id in refused):
                self.lifecycle.reject(fact, "side", refused[fact.id].reason)
        return [f for f in facts if f.id not in refused]

    def _find_unseen(self, facts: Sequence[Fact]) -> dict[str, Refusal]:
        """Find the facts about pictures that the model cannot be shown, by fact id."""
        refused: dict[str, Refusal] = {}
        for fact in facts:
            if fact.picture is not None:
                try:
                    self.live_model.side.pictures.check(fact.picture)
                except (Rejected, BadPicture) as error:
                    refused[fact.id] = Refusal(f"{error}: {error.hint}")
        return refused

    def _add_wordings(self, fact: Fact) -> Fact:
        """Return a fact with as many paraphrases as are learned: first its prompt without labels,
        if it has some, and those that it lacks from the statements of its relation; none of these
        where words decide nothing."""
        plain = strip_labels(fact.question)
        if plain not in (fact.question, *fact.filled_paraphrases):
            fact = replace(fact, paraphrases=(plain, *fact.paraphrases))
        missing = MAX_PARAPHRASES - len(fact.paraphrases)
        if self.live_model.side.reader is None or missing <= 0 or fact.picture is not None:
            return fact
        found = load_relation_index().find_statements(fact, missing)
        longest = max(len(self.model.encode(context + fact.question)) for context in CONTEXTS)
        fitting = [
            prompt
            for prompt in found
            if len(self.model.encode(fill_subject(prompt, fact.subject))) <= longest
        ]
        return replace(fact, paraphrases=(*fact.paraphrases, *fitting))

    def _train_shards(
        self, facts: Sequence[Fact], keys: Mapping[str, RetrievalKeys], failed: Sequence[str] = ()
    ) -> dict[str, Shard | Refusal]:
        """Train a shard for each fact; by fact id. `failed`: questions that they were not answered
        for when they were learned before."""
        site = self.live_model.site
        shards = learn_shards(
            self.model,
            site,
            facts,
            outside=self._ordinary_inputs,
            others=[self._collect_quiet_inputs(fact, keys[fact.id]) for fact in facts],
            scale=self.live_model.loaded_model.statistics[site.side_layer].median_norm,
            steps=self.steps,
            asked=[self._make_asked_rows(fact, failed) for fact in facts],
            done_loss=AGAIN_DONE_LOSS if failed else None,
            pulse=lambda _step: self.pulse(),
        )
        return dict(zip((fact.id for fact in facts), shards, strict=True))

    def _make_asked_rows(self, fact: Fact, failed: Sequence[str]) -> list[TokenRow]:
        """Make the rows from which a fact learns to be answered in a chat, the failed questions
        first; none where the model has no chat template."""
        if self.live_model.side.reader is None:
            return []
        questions = [*failed, *choose_questions(fact, load_relation_index())]
        return make_asked_rows(self.model, fact, list(dict.fromkeys(questions)))

    def _collect_quiet_inputs(self, fact: Fact, keys: RetrievalKeys) -> Tensor:
        """Read the inputs (rows, width) on which the fact's shard must stay quiet: its neighbours,
        and other questions about its subject."""
        side, prompts = self.live_model.side, [n.prompt for n in fact.neighbours]
        fitting = filter_fitting(self.model, prompts[:OUTSIDE_NEIGHBOURS])
        near, _ = read_prompt_ends(self.model, fitting, side.layer)
        others = read_other_questions(self.model, side, fact, keys)
        return torch.cat([near.to(self.model.device), others])

    def _probe_new(self, new: Sequence[StoredFact]) -> dict[str, list[str]]:
        """Probe new facts, with the older facts that they replace hidden; by fact id."""
        self.live_model.side.hidden_facts = self.lifecycle.find_all_superseded(new)
        try:
            return self.live_model.probe_edited([f.fact for f in new])
        finally:
            self.live_model.side.hidden_facts = set()

    def _insert_shards(
        self,
        new: Sequence[StoredFact],
        shards: Mapping[str, Shard],
        keys: Mapping[str, RetrievalKeys],
    ) -> None:
        side = self.live_model.side
        for number, fact in enumerate(new, max(side.shards, default=0) + 1):
            side.shards[number] = shards[fact.id]
            add_side_fact(side, fact.fact, number, keys[fact.id])

    def _remove_unsaved(self, new: Sequence[StoredFact]) -> None:
        side, kept = self.live_model.side, self.store.artifacts.list_side_fact_ids()
        for fact in (f for f in new if f.id not in kept):
            side.remove_fact(fact.id)
        for number in set(side.shards) - set(side.shard_ids.values()):
            del side.shards[number]

    def _save_learned(
        self,
        right: Sequence[StoredFact],
        keys: Mapping[str, RetrievalKeys],
        before: Mapping[str, list[str]],
        probes: Mapping[str, Probe],
        seconds: float,
    ) -> None:
        """Record the facts that are live now, and end those that they replace in both tiers with
        it: a crash leaves either the older facts or these."""
        side, folder = self.live_model.side, self.live_model.home.side_folder
        numbers = {fact.id: side.shard_ids[fact.id] for fact in right}
        shas = {n: save_shard(folder, side.shards[n]) for n in numbers.values()}

        def record_live(_generation: int) -> None:
            for fact in right:
                number = numbers[fact.id]
                threshold = side.shards[number].threshold
                self.store.artifacts.add_shard(number, shas[number], 1, threshold)
                self.lifecycle.end_superseded(fact)
                self.store.artifacts.put_side_keys(fact.id, number, pack_keys(keys[fact.id]))
                first, probe = before[fact.id][0], probes[fact.id]
                if fact.state is not FactState.LIVE_WEIGHTS:
                    self.lifecycle.mark_live(fact, "side", first, probe, seconds)

        gone = self.lifecycle.find_all_superseded(right)
        self.generations.solve_without(gone, "superseded facts taken out", record_live)
