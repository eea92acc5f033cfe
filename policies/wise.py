"""The hot tier: facts learned into shards of the side memory in seconds.

WISE (Wang et al. 2024): a shard is a delta for one down projection, trained so that the model says
the targets (eq. 2) while the activation distance d(a) = ‖ΔW a‖ stays large on the shard's facts and
small on everything else (margin loss, eq. 5). Where the published delta is as large as the weight,
under a random mask, and holds hundreds of facts, here each fact has its own, of low rank, ΔW = B A:
what is taken out of the side memory leaves nothing behind. Where the published loop runs the whole
model for each step, here everything below the side layer is computed once, and the facts that come
together are learned side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memory.facts import Fact
from memory.model.editable import EditableModel, Tap
from memory.model.prefix_cache import Replay
from memory.side.side_memory import Delta, Keys, Shard, SideMemory, number_of
from policies.divergence import Seen, Watch, too_far
from policies.edit_site import EditSite
from policies.prompts import IGNORE, QUESTIONS, Row, pad, rows_of
from policies.targets import Refused

RANK = 4  # of a fact's ΔW: it has to say a few different tokens
DOWN_RATE = 0.1  # Adam's for A, in units of the size of its entries
ACTIVATION_RATIO = 0.15  # threshold over the least distance on the shard's own prompts
ALIKE = 0.8  # cosine from which another question may ask the same as a fact's own
DONE = 0.02  # loss at which training stops
EXTRA_STEPS = 2
READ_TOGETHER = 16  # rows, which are padded to the longest of them


def other_questions(model: EditableModel, side: SideMemory, fact: Fact, keys: Keys) -> Tensor:
    """Inputs (n, width) of the side layer where other questions about a fact's subject end, on
    which its shard must stay quiet; `keys` are the fact's own. What may ask the same, since its end
    key is too near, is not among them, nor what is too long for the model."""
    prompts = fitting(model, [question.replace("{}", fact.subject) for question in QUESTIONS])
    inputs, outputs = prompt_end(model, prompts, side.layer)
    near = side.key(side.layer, outputs).cpu() @ keys.end.T  # (questions, own)
    return inputs[near.amax(1).to(inputs.device) < ALIKE]


def prompt_end(model: EditableModel, prompts: Sequence[str], layer: int) -> tuple[Tensor, Tensor]:
    """Input (n, width) and output (n, hidden) of a down projection where each prompt ends."""
    if not prompts:
        return torch.empty(0, model.weight(layer).shape[1]), torch.empty(0, model.hidden)
    encoded = [Row(tuple(ids), len(ids), len(ids) - 1) for ids in map(model.encode, prompts)]
    batch = pad(encoded, max(len(r.ids) for r in encoded), model.end or 0, model.device)
    caught: list[Tensor] = []

    def tap(inputs: Tensor, outputs: Tensor) -> None:
        at = torch.arange(len(batch.end), device=inputs.device)
        caught.extend((inputs[at, batch.end], outputs[at, batch.end]))
        raise _Read

    _read(model, batch.ids, {layer: tap})
    return caught[0], caught[1]


def fitting(model: EditableModel, prompts: Sequence[str]) -> list[str]:
    """The prompts that the model has positions for."""
    return [prompt for prompt in prompts if len(model.encode(prompt)) <= model.positions]


class _Read(Exception):
    """All that was to be read of a pass has been read."""


def _read(model: EditableModel, ids: Tensor, taps: Mapping[int, Tap]) -> None:
    """A pass over ids (rows, tokens) for its taps alone: it ends where one of them raises _Read."""
    with suppress(_Read), torch.no_grad(), model.tap(taps):
        model.model(input_ids=ids, use_cache=False, logits_to_keep=1)


class _Training:
    """The training of some facts, each on its own ΔW: what does not change from step to step.

    Nothing of a fact's loss hangs on another fact's ΔW: so each step is what it would be alone, and
    all are taken in the time of a few. Only how many there are is decided for all. What is no
    number stays in its fact: nothing is picked from the others by a product with 0, which a NaN
    outlives. Where deltas lie side by side, they do so along a first dimension (facts, ...).
    """

    def __init__(
        self,
        model: EditableModel,
        site: EditSite,
        facts: Sequence[Fact],
        outside: Tensor,
        others: Sequence[Tensor],
        scale: float,
    ) -> None:
        self.model, self.site, self.scale, on = model, site, scale, model.device
        pairs = [(n, row) for n, fact in enumerate(facts) for row in rows_of(model, fact)]
        pairs.sort(key=lambda pair: pair[1].prompt_length)  # read beside their like
        rows = [row for _, row in pairs]
        self.owner = torch.tensor([n for n, _ in pairs], device=on)  # (rows,) whose row it is
        self.own = self.owner == torch.arange(len(facts), device=on)[:, None]  # (facts, rows)
        heads = [row.prompt[:-1] for row in rows]
        tails = [row.ids[row.prompt_length - 1 : -1] for row in rows]
        longest = max(map(len, tails))
        self.replay = Replay(model, site.side_layer, len(rows), max(map(len, heads)), longest)
        for at in range(0, len(rows), READ_TOGETHER):
            part = slice(at, at + READ_TOGETHER)
            self.replay.fill(at, heads[part], tails[part])
        self.columns = torch.arange(longest, device=on).repeat(len(rows), 1)
        self.labels = torch.full((len(rows), longest), IGNORE, device=on)
        for n, row in enumerate(rows):
            target = torch.tensor(row.target)
            self.labels[n, : len(target)] = target
        self.given = self.labels != IGNORE  # (rows, columns)
        # (facts, tokens) of the tokens that are given, whether one is the fact's
        self.told = self.own[:, self.given.nonzero()[:, 0]]
        self.inside = self._ends()  # (rows, width)
        # Inputs that must stay quiet: (n, width) for all, (facts, m, width) for each its own.
        self.outside = outside.to(on)
        self.others = nn.utils.rnn.pad_sequence([o.to(on) for o in others], batch_first=True)
        lengths = torch.tensor([[len(outside) + len(o)] for o in others], device=on)
        # (facts, n + m), whether there is one
        most = len(outside) + self.others.shape[1]
        self.real = torch.arange(most, device=on) < lengths

    def _ends(self) -> Tensor:
        """Inputs (rows, width) where the prompts end: no ΔW changes these."""
        caught: list[Tensor] = []
        taps = {self.site.side_layer: lambda k, _y: caught.append(k[:, 0])}
        with torch.no_grad(), self.model.tap(taps):
            self.replay.logits(self.columns[:, :1])
        return caught[0]

    def begin(self, fact: int, seed: int) -> Delta:
        """ΔW = 0 of a fact: B is nothing yet, and A k is near 0 outside and about of length 1 at
        its prompts' ends. For A's rows are random mixtures of what the inputs outside leave
        unexplained (by ridge regression) of the inputs at the ends."""
        ends = self.inside[self.owner == fact]
        own = self.others[fact][self.real[fact, len(self.outside) :]]
        quiet = torch.cat([self.outside, own])
        gram = quiet @ quiet.T  # (n, n)
        gram.diagonal().add_(gram.trace() / quiet.shape[1])
        left = ends - torch.linalg.solve_ex(gram, quiet @ ends.T)[0].T @ quiet
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(RANK, len(left), generator=generator).to(left.device) @ left
        down /= (ends @ down.T).norm(dim=1).mean()
        return Delta(left.new_zeros(self.model.hidden, RANK), down)

    def try_out(self, deltas: Delta) -> Seen:
        """What each ΔW comes to: WISE's loss, and what else is watched."""
        # Not by advanced indexing, which is slow to take back.
        of_rows = Delta(*(d.index_select(0, self.owner) for d in (deltas.up, deltas.down)))

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            return outputs + of_rows.moved(inputs.detach())  # routed from the prompt's end on

        with self.model.tap({self.site.side_layer: tap}):
            logits = self.replay.logits(self.columns)
        picked, labels = logits[self.given].float(), self.labels[self.given]
        losses = F.cross_entropy(picked, labels, reduction="none")  # (tokens,)
        wrong = (self.told & (picked.argmax(-1) != labels)).sum(1)
        inside = of_rows.moved(self.inside[:, None])[:, 0].norm(dim=1) / self.scale  # (rows,)
        moved = torch.where(self.own, inside, 0).amax(1)
        return Seen(_mean(losses, self.told) + self._margins(inside, deltas), wrong, moved)

    def _margins(self, inside: Tensor, deltas: Delta) -> Tensor:
        """Eq. 5 (facts,), with distances in units of the scale; inside: those of the rows."""
        near = _mean(F.relu(self.site.beta - inside), self.own)
        hidden = self.outside @ deltas.down.flatten(0, 1).mT  # (n, facts · rank), in one product
        every = hidden.unflatten(1, deltas.down.shape[:2]).transpose(0, 1) @ deltas.up.mT
        moved = torch.cat([every, deltas.moved(self.others)], dim=1)
        quiet = moved.norm(dim=2) / self.scale  # (facts, n + m)
        far = _mean(F.relu(quiet - self.site.alpha), self.real)
        gap = F.relu(quiet[:, :, None] - inside + self.site.gamma)  # (facts, n + m, rows)
        return near + far + _mean(gap, self.real[:, :, None] & self.own[:, None], dims=(1, 2))

    def shard(self, fact: int, delta: Delta) -> Shard | Refused:
        """A fact's shard, with the distance from which it may answer; or why it is out of range,
        as it may be since the last step."""
        distances = delta.moved(self.inside[self.own[fact]]).norm(dim=1)
        if why := too_far(float(distances.max()) / self.scale):
            return Refused(why)
        return Shard(delta, max(ACTIVATION_RATIO * float(distances.min()), 1e-6))


def _mean(values: Tensor, counted: Tensor, dims: tuple[int, ...] = (1,)) -> Tensor:
    """Means (facts,) of what is counted; 0 where nothing is."""
    return torch.where(counted, values, 0).sum(dims) / counted.sum(dims).clamp(min=1)


def learn(
    model: EditableModel,
    site: EditSite,
    facts: Sequence[Fact],
    *,
    outside: Tensor,
    others: Sequence[Tensor],
    scale: float,
    steps: int,
    pulse: Callable[[int], None] = lambda _step: None,
) -> list[Shard | Refused]:
    """A shard for each fact, trained; or why it has none, since it went out of range.

    On the weights as they are served: that is what the side memory is laid over.

    outside: inputs (n, width) on which all of them must stay quiet. others: for each fact such
    inputs (m, width) of its own. scale: the median ‖y‖ of the layer, the unit of the margins.
    Raises KeditError: a fact that cannot be read.
    """
    work = _Training(model, site, facts, outside, others, scale)
    begun = [work.begin(n, number_of(fact.id)) for n, fact in enumerate(facts)]
    up = torch.stack([delta.up for delta in begun]).requires_grad_()
    down = torch.stack([delta.down for delta in begun])
    # Steps of B are in lengths of an output, and of A in the size of its fact's entries.
    size = down.square().mean((1, 2), keepdim=True).sqrt()
    part = (down / size).requires_grad_()
    groups = [
        {"params": [up], "lr": site.side_rate * scale / model.hidden**0.5},
        {"params": [part], "lr": DOWN_RATE},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    watch, left = Watch(len(facts)), EXTRA_STEPS
    for step in range(1, steps + 1):
        seen = work.try_out(Delta(up, part * size))
        optimiser.zero_grad()
        seen.losses.sum().backward()
        loss, right = watch.see(step, seen, (up, part))
        left -= right and loss < DONE
        if left < 0 or not watch.going:
            break
        optimiser.step()
        pulse(step)
    # Copies: a part would keep the whole in memory, long after the other facts have gone.
    made = zip(up.detach(), (part * size).detach(), strict=True)
    deltas = [Delta(*(each.clone() for each in both)) for both in made]
    return [watch.refused.get(n) or work.shard(n, delta) for n, delta in enumerate(deltas)]


def retrieval_keys(
    model: EditableModel, side: SideMemory, facts: Sequence[Fact]
) -> dict[str, Keys]:
    """Every fact's retrieval keys, by its id: read at its prompts, each beside its like."""
    rows = [(fact.id, row) for fact in facts for row in rows_of(model, fact)]
    order = sorted(range(len(rows)), key=lambda n: rows[n][1].prompt_length)
    found: dict[int, tuple[Tensor, Tensor]] = {}  # a row's two keys (hidden,), by its place
    for at in range(0, len(order), READ_TOGETHER):
        part = order[at : at + READ_TOGETHER]
        low, high = _keys(model, side, [rows[n][1] for n in part])
        found |= {n: (low[i], high[i]) for i, n in enumerate(part)}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {fact.id: [] for fact in facts}
    for place, (fact_id, _) in enumerate(rows):
        pairs[fact_id].append(found[place])
    keys = {fact_id: zip(*some, strict=True) for fact_id, some in pairs.items()}
    return {n: Keys(*(torch.stack(each) for each in both)) for n, both in keys.items()}


def _keys(model: EditableModel, side: SideMemory, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Subject and end keys (rows, hidden) of some rows."""
    prompts = [replace(row, ids=row.prompt) for row in rows]
    batch = pad(prompts, max(r.prompt_length for r in prompts), model.end or 0, model.device)
    n = torch.arange(len(prompts), device=model.device)
    caught: dict[int, Tensor] = {}

    def tap(layer: int, where: Tensor, _inputs: Tensor, outputs: Tensor) -> None:
        caught[layer] = side.key(layer, outputs[n, where]).cpu()
        if layer == side.layer:
            raise _Read

    low, high = side.gates.key_layer, side.layer
    taps = {low: partial(tap, low, batch.subject), high: partial(tap, high, batch.end)}
    _read(model, batch.ids, taps)
    return caught[low], caught[high]
