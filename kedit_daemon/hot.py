"""The hot tier at work: waiting facts are learned into a shard of their own, probed, and live.

A shard is never opened again: what is live in it stays as it was probed, and one fact more costs no
more when there are many.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kedit_daemon.flush import Flush
from kedit_daemon.loading import ordinary_text
from kedit_daemon.serving import pack_keys, save_shard
from memory.errors import KeditError
from memory.facts import Fact, State
from memory.rows import StoredFact
from memory.side import Keys, Shard
from policies.probe import Probe, compare
from policies.wise import learn, other_questions, prompt_end, retrieval_keys

OUTSIDE_LINES = 200
OUTSIDE_NEIGHBOURS = 4  # of each fact


class Hot:
    """Takes facts into the side memory."""

    def __init__(
        self, flush: Flush, shard_facts: int, steps: int, pulse: Callable[[], None]
    ) -> None:
        self.flush, self.served, self.store = flush, flush.served, flush.store
        self.shard_facts, self.steps, self.pulse = shard_facts, steps, pulse
        layer = self.served.site.side_layer
        lines = [" ".join(line.split()[:12]) for line in ordinary_text()[:OUTSIDE_LINES]]
        with self.served.model.at_base():
            self._ordinary, _ = prompt_end(self.served.model, lines, layer)

    def take(self, waiting: Sequence[StoredFact]) -> list[str]:
        """Learn as many of the waiting facts as fit into a shard; those now live.

        Raises KeditError when one of them cannot be learned at all; nothing is changed then.
        """
        new, number = list(waiting)[: self.shard_facts], max(self.served.side.shards, default=0) + 1
        began = time.monotonic()
        gone = {older.id for f in new for older in self.flush.older(f)}  # whose place they take
        keys = retrieval_keys(self.served.model, self.served.side, [f.fact for f in new])
        shard = self._learn(number, [f.fact for f in new], keys)
        seconds = (time.monotonic() - began) / len(new)
        before = self.served.probe_before([f.fact for f in new])
        self._lay(number, shard, new, keys)
        try:
            after = self._probe(new, gone)
            probes = {f.id: compare(f.fact, before[f.id], after[f.id]) for f in new}
            right = [f for f in new if probes[f.id].right]
            wrong = [f for f in new if not probes[f.id].right]
            if right:
                self._keep(number, right, keys, before, probes, seconds)
            else:
                self._undo(number, new)
        except BaseException:
            self._undo(number, new)
            raise
        with self.store.transaction():
            for fact in wrong:
                answer = probes[fact.id].answer
                self.flush.retry(fact, "side", f"the side memory answered {answer!r}")
        self._relieve()
        self.served.forget_side()
        return [f.id for f in right]

    def _learn(self, number: int, facts: list[Fact], keys: Mapping[str, Keys]) -> Shard:
        norm = self.served.loaded.statistics[self.served.site.side_layer].norm
        learned = learn(
            self.served.model,
            self.served.site,
            facts,
            number,
            outside=self._outside(facts, keys),
            scale=norm,
            steps=self.steps,
            pulse=lambda _step: self.pulse(),
        )
        return learned.shard

    def _outside(self, facts: Sequence[Fact], keys: Mapping[str, Keys]) -> Tensor:
        """Inputs on which the shard must stay quiet: ordinary text, the facts' neighbours, and
        other questions about their subjects."""
        model, side = self.served.model, self.served.side
        prompts = [n.prompt for f in facts for n in f.neighbours[:OUTSIDE_NEIGHBOURS]]
        near, _ = prompt_end(model, prompts, side.layer)
        others = other_questions(model, side, facts, keys)
        return torch.cat([part.to(model.device) for part in (self._ordinary, near, others)])

    def _probe(self, new: Sequence[StoredFact], gone: set[str]) -> dict[str, list[str]]:
        self.served.side.hidden = gone
        try:
            return self.served.probe_after([f.fact for f in new])
        finally:
            self.served.side.hidden = set()

    def _lay(
        self, number: int, shard: Shard, new: Sequence[StoredFact], keys: Mapping[str, Keys]
    ) -> None:
        self.served.side.shards[number] = shard
        for fact in new:
            subject, unnamed = fact.fact.subject, fact.fact.unnamed
            self.served.side.put(fact.id, number, keys[fact.id], subject, unnamed=unnamed)

    def _undo(self, number: int, new: Sequence[StoredFact]) -> None:
        for fact in new:
            self.served.side.drop(fact.id)
        del self.served.side.shards[number]

    def _keep(
        self,
        number: int,
        right: Sequence[StoredFact],
        keys: Mapping[str, Keys],
        before: dict[str, list[str]],
        probes: dict[str, Probe],
        seconds: float,
    ) -> None:
        shard = self.served.side.shards[number]
        sha = save_shard(self.served.home.side, shard)
        with self.store.transaction():
            self.store.put_shard(number, sha, len(right), shard.threshold)
            for fact in right:
                probe = probes[fact.id]
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

    def _relieve(self) -> None:
        """Solve the weights without the facts that newer ones have just superseded."""
        held = self.served.weights_facts()
        ids = [n for n in held if (f := self.store.fact(n)) and f.state is State.LIVE_WEIGHTS]
        if len(ids) < len(held):
            self.flush.weights.settle(ids, "superseded facts taken out")


def cannot_learn(error: Exception) -> KeditError:
    """The reason to write down when a fact could not be learned."""
    if isinstance(error, KeditError):
        return error
    return KeditError(f"unexpected: {type(error).__name__}: {error}", code="unexpected")
