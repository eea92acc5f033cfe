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
from memory.facts import Fact, State
from memory.side.side_memory import Keys, Shard
from policies.probe import Probe, compare
from policies.targets import Refused
from policies.wise import fitting, learn, other_questions, prompt_end, retrieval_keys

OUTSIDE_LINES = 200
OUTSIDE_NEIGHBOURS = 4  # of each fact
LONG_TARGET = 16  # tokens; with one of 55 a batch of 16 facts of 1 or 2 took 9 times as long


class Hot:
    """Takes facts into the side memory."""

    def __init__(
        self, flush: Flush, batch_facts: int, steps: int, pulse: Callable[[], None]
    ) -> None:
        self.flush, self.served, self.store = flush, flush.served, flush.store
        self.batch_facts, self.steps, self.pulse = batch_facts, steps, pulse
        layer = self.served.site.side_layer
        lines = [" ".join(line.split()[:12]) for line in read_ordinary_lines()[:OUTSIDE_LINES]]
        with self.served.model.at_base():
            self._ordinary, _ = prompt_end(self.served.model, lines, layer)

    def take(self, waiting: Sequence[StoredFact], most: int | None = None) -> list[str]:
        """Learn as many of the waiting facts as are learned at once, or `most`; those now live.

        One that goes out of range while it is learned fails alone, as does one that is not said.
        Raises KeditError when one of them cannot be learned at all; nothing is changed then.
        """
        together = self._sensible(self._together(waiting, most or self.batch_facts))
        if not together:
            return []
        began = time.monotonic()
        keys = retrieval_keys(self.served.model, self.served.side, [f.fact for f in together])
        found = self._learn([f.fact for f in together], keys)
        seconds = (time.monotonic() - began) / len(together)
        shards = {n: one for n, one in found.items() if isinstance(one, Shard)}
        failed = {n: one.reason for n, one in found.items() if isinstance(one, Refused)}
        new = [f for f in together if f.id in shards]
        before = self.served.probe_before([f.fact for f in new])
        try:
            self._lay(new, shards, keys)
            after = self._probe(new)
            probes = {f.id: compare(f.fact, before[f.id], after[f.id]) for f in new}
            self._keep([f for f in new if probes[f.id].right], keys, before, probes, seconds)
        except BaseException:
            self._undo(new)
            raise
        wrong = {n: probe.answer for n, probe in probes.items() if not probe.right}
        failed |= {n: f"the side memory answered {answer!r}" for n, answer in wrong.items()}
        with self.store.transaction():
            for fact in (f for f in together if f.id in failed):
                self.flush.retry(fact, "side", failed[fact.id])
        self.served.forget_side()
        return [f.id for f in together if f.id not in failed]

    def _together(self, waiting: Sequence[StoredFact], most: int) -> list[StoredFact]:
        """The facts to learn at once. In company a long target would be waited for by all, since
        every row is as long as the longest; so it comes after the short ones, and alone."""
        short = (f for f in waiting if not self._long(f.fact))
        return list(islice(short, most)) or list(waiting[:1])

    def _sensible(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Those of the facts that are no nonsense; the others are rejected."""
        refused = self.served.nonsense([f.fact for f in facts])
        with self.store.transaction():
            for fact in (f for f in facts if f.id in refused):
                self.store.move(fact.id, State.REJECTED, reason=refused[fact.id].reason)
                self.store.add_edit(fact.id, "side", None, 0.0, "rejected", None)
        return [f for f in facts if f.id not in refused]

    def _long(self, fact: Fact) -> bool:
        return len(self.served.model.encode_target(fact.question, fact.target)) > LONG_TARGET

    def _learn(self, facts: Sequence[Fact], keys: Mapping[str, Keys]) -> dict[str, Shard | Refused]:
        """By fact id."""
        norm = self.served.loaded.statistics[self.served.site.side_layer].norm
        found = learn(
            self.served.model,
            self.served.site,
            facts,
            outside=self._ordinary,
            others=[self._others(fact, keys[fact.id]) for fact in facts],
            scale=norm,
            steps=self.steps,
            pulse=lambda _step: self.pulse(),
        )
        return dict(zip((fact.id for fact in facts), found, strict=True))

    def _others(self, fact: Fact, keys: Keys) -> Tensor:
        """Inputs on which the fact's shard must stay quiet: its neighbours, and other questions
        about its subject."""
        model, side = self.served.model, self.served.side
        prompts = [n.prompt for n in fact.neighbours[:OUTSIDE_NEIGHBOURS]]
        near, _ = prompt_end(model, fitting(model, prompts), side.layer)
        return torch.cat([near.to(model.device), other_questions(model, side, fact, keys)])

    def _probe(self, new: Sequence[StoredFact]) -> dict[str, list[str]]:
        """Answers by fact id, without the older facts whose place the new ones take."""
        self.served.side.hidden = {older.id for f in new for older in self.flush.older(f)}
        try:
            return self.served.probe_after([f.fact for f in new])
        finally:
            self.served.side.hidden = set()

    def _lay(
        self, new: Sequence[StoredFact], shards: Mapping[str, Shard], keys: Mapping[str, Keys]
    ) -> None:
        side = self.served.side
        first = max(side.shards, default=0) + 1
        for number, fact in enumerate(new, first):
            side.shards[number] = shards[fact.id]
            subject, unnamed = fact.fact.subject, fact.fact.unnamed
            side.put(fact.id, number, keys[fact.id], subject, unnamed=unnamed)

    def _undo(self, new: Sequence[StoredFact]) -> None:
        side, kept = self.served.side, self.store.side_facts()
        for fact in (f for f in new if f.id not in kept):
            side.drop(fact.id)
        for number in set(side.shards) - set(side.shard_of.values()):
            del side.shards[number]

    def _keep(
        self,
        right: Sequence[StoredFact],
        keys: Mapping[str, Keys],
        before: dict[str, list[str]],
        probes: dict[str, Probe],
        seconds: float,
    ) -> None:
        """Write down what is live now, and let what it takes the place of leave both tiers with
        it: a crash leaves either the older facts or these."""
        side = self.served.side
        numbers = {fact.id: side.shard_of[fact.id] for fact in right}
        shas = {n: save_shard(self.served.home.side, side.shards[n]) for n in numbers.values()}

        def write(_generation: int) -> None:
            for fact in right:
                number, probe = numbers[fact.id], probes[fact.id]
                self.store.put_shard(number, shas[number], 1, side.shards[number].threshold)
                self.flush.supersede(fact)
                self.store.put_side(fact.id, number, pack_keys(keys[fact.id]))
                self.store.move(
                    fact.id,
                    State.LIVE_SIDE,
                    tier="side",
                    before=before[fact.id][0],
                    after=probe.answer,
                    probe=probe.as_dict(),
                )
                self.store.add_edit(fact.id, "side", None, seconds, "live", probe.as_dict())

        gone = {older.id for fact in right for older in self.flush.older(fact)}
        self.flush.weights.leave(gone, "superseded facts taken out", write)


def cannot_learn(error: Exception) -> KeditError:
    """The reason to write down when a fact could not be learned."""
    if isinstance(error, KeditError):
        return error
    return KeditError(f"unexpected: {type(error).__name__}: {error}", code="unexpected")
