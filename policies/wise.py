"""The hot tier: facts learned into one shard of the side memory in seconds.

WISE (Wang et al. 2024): a shard is a delta for one down projection, confined to a random subspace
by a mask, trained so that the model says the targets (eq. 2) while the activation distance
d(a) = ‖ΔW a‖ stays large on the shard's facts and small on everything else (margin loss, eq. 5).
Where the published loop runs the whole model for each step, here everything below the side layer
is computed once, and all facts of the shard are learned together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.errors import KeditError
from memory.facts import Fact
from memory.model import EditableModel
from memory.replay import Replay
from memory.side import Keys, Shard, SideMemory
from policies.prompts import IGNORE, Row, pad, rows_of
from policies.site import EditSite

MASK_SHARE = 0.2  # ρ: share of ΔW's entries a shard may use
ACTIVATION_RATIO = 0.7  # threshold over the least distance on the shard's own prompts
DONE = 0.02  # loss at which training stops
EXTRA_STEPS = 2


@dataclass(frozen=True)
class Learned:
    """A trained shard, and every fact's retrieval keys."""

    shard: Shard
    keys: dict[str, Keys]
    loss: float
    steps: int


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

    with torch.no_grad(), model.tap({layer: tap}):
        model.model(input_ids=batch.ids, use_cache=False)
    return caught[0], caught[1]


def mask_for(shard: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """The shard's random subspace, (hidden, width) of bool; it follows from the shard's number."""
    generator = torch.Generator().manual_seed(shard)
    return (torch.rand(tuple(shape), generator=generator) < MASK_SHARE).to(device)


class _Training:
    """One shard's training: everything that does not change from step to step, held here."""

    def __init__(
        self, model: EditableModel, site: EditSite, rows: list[Row], outside: Tensor, scale: float
    ) -> None:
        self.model, self.site, self.scale = model, site, scale
        heads = [row.prompt[:-1] for row in rows]
        tails = [row.ids[row.prompt_length - 1 : -1] for row in rows]
        longest = max(map(len, tails))
        self.replay = Replay(model, site.side_layer, len(rows), max(map(len, heads)), longest)
        self.replay.fill(0, heads, tails)
        self.columns = torch.arange(longest, device=model.device).repeat(len(rows), 1)
        self.labels = torch.full((len(rows), longest), IGNORE, device=model.device)
        for n, row in enumerate(rows):
            target = torch.tensor(row.target)
            self.labels[n, : len(target)] = target
        self.outside = outside.to(model.device)  # (n, width) inputs that must stay quiet
        self.inside = torch.empty(0)  # (rows, width) inputs at the prompts' ends

    def loss(self, delta: Tensor) -> tuple[Tensor, bool]:
        """WISE's loss for ΔW (hidden, width), and whether every target token is the argmax."""

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            self.inside = inputs[:, 0].detach()
            return outputs + inputs.detach() @ delta.T  # routed from the prompt's end on

        with self.model.tap({self.site.side_layer: tap}):
            logits = self.replay.logits(self.columns)
        chosen = self.labels != IGNORE
        picked, labels = logits[chosen].float(), self.labels[chosen]
        inside = (self.inside @ delta.T).norm(dim=1) / self.scale  # (rows,)
        margin = F.relu(self.site.beta - inside).mean()
        if len(self.outside):
            quiet = (self.outside @ delta.T).norm(dim=1) / self.scale  # (n,)
            margin = margin + F.relu(quiet - self.site.alpha).mean()
            gap = quiet[:, None] - inside[None, :] + self.site.gamma
            margin = margin + F.relu(gap).mean()
        return F.cross_entropy(picked, labels) + margin, bool((picked.argmax(-1) == labels).all())


def learn(
    model: EditableModel,
    side: SideMemory,
    site: EditSite,
    facts: Sequence[Fact],
    number: int,
    *,
    start: Tensor | None,
    outside: Tensor,
    scale: float,
    steps: int,
    pulse: Callable[[int], None] = lambda _step: None,
) -> Learned:
    """Train shard `number` on all its facts, from ΔW `start` or from nothing.

    On the weights as they are served: that is what the side memory is laid over.

    outside: inputs (n, width) on which the shard must stay quiet. scale: the median ‖y‖ of the
    layer, the unit of the margins. Raises KeditError: a fact that cannot be read, a loss that is
    not finite.
    """
    rows = {fact.id: rows_of(model, fact) for fact in facts}
    flat = [row for group in rows.values() for row in group]
    work = _Training(model, site, flat, outside, scale)
    weight = model.base_weight(site.side_layer)
    mask = mask_for(number, weight.shape, model.device)
    initial = torch.zeros_like(weight) if start is None else start.to(model.device)
    free = initial.clone().requires_grad_()
    unit = float(weight.square().mean().sqrt())
    optimiser = torch.optim.Adam([free], lr=site.side_rate * unit, betas=(0.9, 0.95))
    loss, left, taken = torch.inf, EXTRA_STEPS, 0
    for taken in range(1, steps + 1):
        value, right = work.loss(free * mask)
        optimiser.zero_grad()
        value.backward()
        loss = float(value.detach())
        if not loss < torch.inf or loss != loss:
            raise KeditError("the side memory's loss is not finite", code="non-finite")
        left -= right and loss < DONE
        if left < 0:
            break
        optimiser.step()
        pulse(taken)
    delta = (free * mask).detach()
    distance = (work.inside @ delta.T).norm(dim=1)
    threshold = ACTIVATION_RATIO * float(distance.min())
    keys = {fact.id: keys_of(model, side, rows[fact.id]) for fact in facts}
    return Learned(Shard(delta, max(threshold, 1e-6)), keys, loss, taken)


def keys_of(model: EditableModel, side: SideMemory, rows: Sequence[Row]) -> Keys:
    """A fact's retrieval keys, read at the prompts of its rows."""
    prompts = [replace(row, ids=row.prompt) for row in rows]
    batch = pad(prompts, max(r.prompt_length for r in prompts), model.end or 0, model.device)
    n = torch.arange(len(prompts), device=model.device)
    caught: dict[int, Tensor] = {}

    def tap(layer: int, where: Tensor, _inputs: Tensor, outputs: Tensor) -> None:
        caught[layer] = side.key(layer, outputs[n, where]).cpu()

    low, high = side.gates.key_layer, side.layer
    taps = {low: partial(tap, low, batch.subject), high: partial(tap, high, batch.end)}
    with torch.no_grad(), model.tap(taps):
        model.model(input_ids=batch.ids, use_cache=False)
    return Keys(caught[low], caught[high])
