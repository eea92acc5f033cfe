"""The hot tier at work: waiting facts are learned into shards of their own, probed, and live.

A shard is never opened again: what is live stays as it was probed, and one fact more costs no more
when there are many. A fact that goes takes its shard with it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor

from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.tensor_files import pack_keys, save_shard
from kedit_daemon.shipped import read_ordinary_lines
from memory.db.rows import StoredFact
from memory.errors import KeditError
from memory.facts import Fact, FactState
from memory.side.side_memory import RetrievalKeys, Shard
from policies.edit_terms import Refusal
from policies.probe import Probe, compare_answers
from policies.wise import (
    compute_keys,
    filter_fitting,
    learn_shards,
    read_other_questions,
    read_prompt_ends,
)

OUTSIDE_LINES = 200
OUTSIDE_NEIGHBOURS = 4  # of each fact
LONG_TARGET_TOKENS = 16  # tokens; with one of 55 a batch of 16 facts of 1 or 2 took 9 times as long


class SideLearner:
    """Takes facts into the side memory."""

    def __init__(
        self,
        flush: Flush,
        batch_facts: int,
        steps: int,
        pulse: Callable[[], None],
        outside_lines: int = OUTSIDE_LINES,
    ) -> None:
        self.flush, self.live_model, self.store = flush, flush.live_model, flush.store
        self.batch_facts, self.steps, self.pulse = batch_facts, steps, pulse
        layer = self.live_model.site.side_layer
        lines = [" ".join(line.split()[:12]) for line in read_ordinary_lines()[:outside_lines]]
        with self.live_model.model.at_base():
            self._ordinary_inputs, _ = read_prompt_ends(self.live_model.model, lines, layer)

    def learn_batch(self, waiting: Sequence[StoredFact], most: int | None = None) -> list[str]:
        """Learn as many of the waiting facts as are learned at once, or `most`; those now live.

        One that goes out of range while it is learned fails alone, as does one that is not said.
        Raises KeditError when one of them cannot be learned at all; nothing is changed then.
        """
        together = self._reject_gibberish(self._select_batch(waiting, most or self.batch_facts))
        if not together:
            return []
        began = time.monotonic()
        keys = compute_keys(self.live_model.model, self.live_model.side, [f.fact for f in together])
        found = self._train_shards([f.fact for f in together], keys)
        seconds = (time.monotonic() - began) / len(together)
        shards = {n: one for n, one in found.items() if isinstance(one, Shard)}
        failed = {n: one.reason for n, one in found.items() if isinstance(one, Refusal)}
        new = [f for f in together if f.id in shards]
        before = self.live_model.probe_unedited([f.fact for f in new])
        try:
            self._insert_shards(new, shards, keys)
            after = self._probe_new(new)
            probes = {f.id: compare_answers(f.fact, before[f.id], after[f.id]) for f in new}
            self._save_learned(
                [f for f in new if probes[f.id].right], keys, before, probes, seconds
            )
        except BaseException:
            self._remove_unsaved(new)
            raise
        wrong = {n: probe.answer for n, probe in probes.items() if not probe.right}
        failed |= {n: f"the side memory answered {answer!r}" for n, answer in wrong.items()}
        with self.store.db.transaction():
            for fact in (f for f in together if f.id in failed):
                self.flush.record_failed_attempt(fact, "side", failed[fact.id])
        self.live_model.prune_side()
        return [f.id for f in together if f.id not in failed]

    def _select_batch(self, waiting: Sequence[StoredFact], most: int) -> list[StoredFact]:
        """The facts to learn at once. In company a long target would be waited for by all, since
        every row is as long as the longest; so it comes after the short ones, and alone."""
        short = (f for f in waiting if not self._has_long_target(f.fact))
        return list(islice(short, most)) or list(waiting[:1])

    def _reject_gibberish(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Those of the facts that are no nonsense; the others are rejected."""
        refused = self.live_model.find_gibberish([f.fact for f in facts])
        with self.store.db.transaction():
            for fact in (f for f in facts if f.id in refused):
                self.store.change_state(fact.id, FactState.REJECTED, reason=refused[fact.id].reason)
                self.store.add_edit(fact.id, "side", None, 0.0, "rejected", None)
        return [f for f in facts if f.id not in refused]

    def _has_long_target(self, fact: Fact) -> bool:
        return (
            len(self.live_model.model.encode_target(fact.question, fact.target))
            > LONG_TARGET_TOKENS
        )

    def _train_shards(
        self, facts: Sequence[Fact], keys: Mapping[str, RetrievalKeys]
    ) -> dict[str, Shard | Refusal]:
        """By fact id."""
        norm = self.live_model.loaded_model.statistics[self.live_model.site.side_layer].median_norm
        found = learn_shards(
            self.live_model.model,
            self.live_model.site,
            facts,
            outside=self._ordinary_inputs,
            others=[self._collect_quiet_inputs(fact, keys[fact.id]) for fact in facts],
            scale=norm,
            steps=self.steps,
            pulse=lambda _step: self.pulse(),
        )
        return dict(zip((fact.id for fact in facts), found, strict=True))

    def _collect_quiet_inputs(self, fact: Fact, keys: RetrievalKeys) -> Tensor:
        """Inputs on which the fact's shard must stay quiet: its neighbours, and other questions
        about its subject."""
        model, side = self.live_model.model, self.live_model.side
        prompts = [n.prompt for n in fact.neighbours[:OUTSIDE_NEIGHBOURS]]
        near, _ = read_prompt_ends(model, filter_fitting(model, prompts), side.layer)
        return torch.cat([near.to(model.device), read_other_questions(model, side, fact, keys)])

    def _probe_new(self, new: Sequence[StoredFact]) -> dict[str, list[str]]:
        """Answers by fact id, without the older facts whose place the new ones take."""
        self.live_model.side.hidden_facts = {
            older.id for f in new for older in self.flush.find_superseded(f)
        }
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
        first = max(side.shards, default=0) + 1
        for number, fact in enumerate(new, first):
            side.shards[number] = shards[fact.id]
            subject, unnamed = fact.fact.subject, fact.fact.omits_subject
            side.add_fact(fact.id, number, keys[fact.id], subject, unnamed=unnamed)

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
        before: dict[str, list[str]],
        probes: dict[str, Probe],
        seconds: float,
    ) -> None:
        """Write down what is live now, and let what it takes the place of leave both tiers with
        it: a crash leaves either the older facts or these."""
        side = self.live_model.side
        numbers = {fact.id: side.shard_ids[fact.id] for fact in right}
        shas = {
            n: save_shard(self.live_model.home.side_folder, side.shards[n])
            for n in numbers.values()
        }

        def write(_generation: int) -> None:
            for fact in right:
                number, probe = numbers[fact.id], probes[fact.id]
                self.store.artifacts.add_shard(
                    number, shas[number], 1, side.shards[number].threshold
                )
                self.flush.end_superseded(fact)
                self.store.artifacts.put_side_keys(fact.id, number, pack_keys(keys[fact.id]))
                self.store.change_state(
                    fact.id,
                    FactState.LIVE_SIDE,
                    tier="side",
                    before=before[fact.id][0],
                    after=probe.answer,
                    probe=probe.as_dict(),
                )
                self.store.add_edit(fact.id, "side", None, seconds, "live", probe.as_dict())

        gone = {older.id for fact in right for older in self.flush.find_superseded(fact)}
        self.flush.generations.solve_without(gone, "superseded facts taken out", write)


def describe_failure(error: Exception) -> str:
    """Return the reason to record for a fact that could not be learned."""
    if isinstance(error, KeditError):
        return str(error)
    return f"unexpected: {type(error).__name__}: {error}"
