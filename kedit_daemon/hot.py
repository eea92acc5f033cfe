"""The hot tier at work: waiting facts are learned into a shard, probed, and live."""

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
from policies.wise import learn, prompt_end, retrieval_keys

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
        self._near: dict[str, Tensor] = {}  # inputs (n, width) where a fact's neighbours end
        self._near_at: int | None = None  # the generation whose weights these were read on

    def take(self, waiting: Sequence[StoredFact]) -> list[str]:
        """Learn as many of the waiting facts as the open shard has room for; those now live.

        Raises KeditError when one of them cannot be learned at all; the others are untouched.
        """
        number, held = self._open_shard()
        new = list(waiting)[: self.shard_facts - len(held)]
        began = time.monotonic()
        ended = {f.id: {o.id for o in self.flush.older(f)} for f in new}
        gone = set[str]().union(*ended.values())  # what the new facts take the place of
        kept = [f for f in held if f.id not in gone]
        shard = self._learn(number, [*kept, *(f.fact for f in new)])
        keys = retrieval_keys(self.served.model, self.served.side, [f.fact for f in new])
        seconds = (time.monotonic() - began) / len(new)
        before = self.served.probe_before([f.fact for f in new])
        old = self.served.side.shards.get(number)
        self._lay(number, shard, new, keys)
        try:
            after = self._probe(new, gone)
            probes = {f.id: compare(f.fact, before[f.id], after[f.id]) for f in new}
            right = [f for f in new if probes[f.id].right]
            wrong = [f for f in new if not probes[f.id].right]
            if any(h.id in ended[f.id] for f in wrong for h in held):
                self._undo(number, new, old)  # the shard has unlearned a fact that lives on
                right = []
            else:
                self._keep(number, len(kept), right, keys, before, probes, seconds)
        except BaseException:
            self._undo(number, new, old)
            raise
        with self.store.transaction():
            for fact in wrong:
                answer = probes[fact.id].answer
                self.flush.retry(fact, "side", f"the side memory answered {answer!r}")
        self._relieve()
        self.served.forget_side()
        return [f.id for f in right]

    def _open_shard(self) -> tuple[int, list[Fact]]:
        """The newest shard and its facts, or a new one when that is full."""
        numbers = sorted(self.served.side.shards)
        if numbers:
            members = [n for n, shard in self.served.side.shard_of.items() if shard == numbers[-1]]
            if len(members) < self.shard_facts:
                found = [self.store.fact(n) for n in sorted(members)]
                return numbers[-1], [f.fact for f in found if f]
        return (numbers[-1] + 1 if numbers else 1), []

    def _learn(self, number: int, facts: list[Fact]) -> Shard:
        old = self.served.side.shards.get(number)
        norm = self.served.loaded.statistics[self.served.site.side_layer].norm
        learned = learn(
            self.served.model,
            self.served.site,
            facts,
            number,
            start=old.delta if old else None,
            outside=self._outside(facts),
            scale=norm,
            steps=self.steps,
            pulse=lambda _step: self.pulse(),
        )
        return learned.shard

    def _outside(self, facts: Sequence[Fact]) -> Tensor:
        """Inputs on which the shard must stay quiet: ordinary text, and the facts' neighbours.

        Those of the facts that the open shard holds are known from when these were taken.
        """
        model, generation = self.served.model, self.store.active_generation()
        known = self._near if generation == self._near_at else {}
        near = {f.id: f.neighbours[:OUTSIDE_NEIGHBOURS] for f in facts if f.id not in known}
        prompts = [n.prompt for group in near.values() for n in group]
        inputs, _ = prompt_end(model, prompts, self.served.site.side_layer)
        read = dict(zip(near, inputs.split([len(group) for group in near.values()]), strict=True))
        self._near = {f.id: (known | read)[f.id] for f in facts}
        self._near_at = generation
        return torch.cat(
            [t.to(self._ordinary.device) for t in (self._ordinary, *self._near.values())]
        )

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
            self.served.side.put(fact.id, number, keys[fact.id], fact.fact.name)

    def _undo(self, number: int, new: Sequence[StoredFact], old: Shard | None) -> None:
        for fact in new:
            self.served.side.drop(fact.id)
        if old is None:
            del self.served.side.shards[number]
        else:
            self.served.side.shards[number] = old

    def _keep(
        self,
        number: int,
        held: int,
        right: Sequence[StoredFact],
        keys: Mapping[str, Keys],
        before: dict[str, list[str]],
        probes: dict[str, Probe],
        seconds: float,
    ) -> None:
        shard = self.served.side.shards[number]
        sha = save_shard(self.served.home.side, shard)
        with self.store.transaction():
            self.store.put_shard(number, sha, held + len(right), shard.threshold)
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
