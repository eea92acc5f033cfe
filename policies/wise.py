"""The hot tier: facts learned into one shard of the side memory in seconds.

WISE (Wang et al. 2024): a shard is a delta for one down projection, trained so that the model says
the targets (eq. 2) while the activation distance d(a) = ‖ΔW a‖ stays large on the shard's facts and
small on everything else (margin loss, eq. 5). Where the published delta is as large as the weight,
under a random mask, here it is of low rank, ΔW = B A. Where the published loop runs the whole model
for each step, here everything below the side layer is computed once, and all facts of the shard are
learned together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.errors import KeditError
from memory.facts import Fact
from memory.model import EditableModel
from memory.replay import Replay
from memory.side import Delta, Keys, Shard, SideMemory
from policies.prompts import IGNORE, QUESTIONS, Row, pad, rows_of
from policies.site import EditSite

RANK = 8  # of a shard's ΔW, at most
DOWN_RATE = 0.1  # Adam's for A, in units of the size of its entries
ACTIVATION_RATIO = 0.2  # threshold over the least distance on the shard's own prompts
ALIKE = 0.8  # cosine from which another question may ask the same as a fact's own
DONE = 0.02  # loss at which training stops
EXTRA_STEPS = 2
READ_TOGETHER = 16  # rows, which are padded to the longest of them


def other_questions(
    model: EditableModel, side: SideMemory, facts: Sequence[Fact], keys: Mapping[str, Keys]
) -> Tensor:
    """Inputs (n, width) of the side layer where other questions about the facts' subjects end, on
    which a shard must stay quiet; `keys` are the facts' own, by id. What may ask the same as a
    fact, since its end key is too near, is not among them."""
    found = []
    for fact in facts:
        prompts = [question.replace("{}", fact.subject) for question in QUESTIONS]
        inputs, outputs = prompt_end(model, prompts, side.layer)
        near = side.key(side.layer, outputs).cpu() @ keys[fact.id].end.T  # (questions, own)
        found.append(inputs[near.amax(1).to(inputs.device) < ALIKE])
    return torch.cat(found)


@dataclass(frozen=True)
class Learned:
    """A trained shard."""

    shard: Shard
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
        model.model(input_ids=batch.ids, use_cache=False, logits_to_keep=1)  # nobody reads them
    return caught[0], caught[1]


class _Training:
    """One shard's training: everything that does not change from step to step, held here."""

    def __init__(
        self, model: EditableModel, site: EditSite, rows: list[Row], outside: Tensor, scale: float
    ) -> None:
        self.model, self.site, self.scale = model, site, scale
        rows = sorted(rows, key=lambda row: row.prompt_length)  # read beside their like
        heads = [row.prompt[:-1] for row in rows]
        tails = [row.ids[row.prompt_length - 1 : -1] for row in rows]
        longest = max(map(len, tails))
        self.replay = Replay(model, site.side_layer, len(rows), max(map(len, heads)), longest)
        for at in range(0, len(rows), READ_TOGETHER):
            part = slice(at, at + READ_TOGETHER)
            self.replay.fill(at, heads[part], tails[part])
        self.columns = torch.arange(longest, device=model.device).repeat(len(rows), 1)
        self.labels = torch.full((len(rows), longest), IGNORE, device=model.device)
        for n, row in enumerate(rows):
            target = torch.tensor(row.target)
            self.labels[n, : len(target)] = target
        self.outside = outside.to(model.device)  # (n, width) inputs that must stay quiet
        self.inside = self._ends()

    def _ends(self) -> Tensor:
        """Inputs (rows, width) where the prompts end: no ΔW changes these."""
        caught: list[Tensor] = []
        taps = {self.site.side_layer: lambda k, _y: caught.append(k[:, 0])}
        with torch.no_grad(), self.model.tap(taps):
            self.replay.logits(self.columns[:, :1])
        return caught[0]

    def begin(self, number: int, rank: int) -> Delta:
        """ΔW = 0 of shard `number`: B is nothing yet, and A k is near 0 outside and about of length
        1 at the prompts' ends. For A's rows are random mixtures of what the inputs outside leave
        unexplained (by ridge regression) of the inputs at the ends."""
        own, quiet = self.inside, self.outside
        gram = quiet @ quiet.T  # (n, n)
        gram.diagonal().add_(gram.trace() / quiet.shape[1])
        own = own - torch.linalg.solve(gram, quiet @ own.T).T @ quiet
        generator = torch.Generator().manual_seed(number)
        down = torch.randn(rank, len(own), generator=generator).to(own.device) @ own
        down /= (self.inside @ down.T).norm(dim=1).mean()
        return Delta(own.new_zeros(self.model.hidden, rank), down)

    def optimiser(self, delta: Delta) -> torch.optim.Adam:
        """Steps of B in lengths of an output, and of A in sizes of its entries."""
        up_rate = self.site.side_rate * self.scale / self.model.hidden**0.5
        down_rate = DOWN_RATE * float(delta.down.detach().square().mean().sqrt())
        groups = [
            {"params": [delta.up], "lr": up_rate},
            {"params": [delta.down], "lr": down_rate},
        ]
        return torch.optim.Adam(groups, betas=(0.9, 0.95))

    def loss(self, delta: Delta) -> tuple[Tensor, bool]:
        """WISE's loss for a ΔW, and whether every target token is the argmax."""

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            return outputs + delta.moved(inputs.detach())  # routed from the prompt's end on

        with self.model.tap({self.site.side_layer: tap}):
            logits = self.replay.logits(self.columns)
        chosen = self.labels != IGNORE
        picked, labels = logits[chosen].float(), self.labels[chosen]
        inside = delta.moved(self.inside).norm(dim=1) / self.scale  # (rows,)
        margin = F.relu(self.site.beta - inside).mean()
        if len(self.outside):
            quiet = delta.moved(self.outside).norm(dim=1) / self.scale  # (n,)
            margin = margin + F.relu(quiet - self.site.alpha).mean()
            gap = quiet[:, None] - inside[None, :] + self.site.gamma
            margin = margin + F.relu(gap).mean()
        return F.cross_entropy(picked, labels) + margin, bool((picked.argmax(-1) == labels).all())


def learn(
    model: EditableModel,
    site: EditSite,
    facts: Sequence[Fact],
    number: int,
    *,
    outside: Tensor,
    scale: float,
    steps: int,
    pulse: Callable[[int], None] = lambda _step: None,
) -> Learned:
    """Train shard `number` on its facts.

    On the weights as they are served: that is what the side memory is laid over.

    outside: inputs (n, width) on which the shard must stay quiet. scale: the median ‖y‖ of the
    layer, the unit of the margins. Raises KeditError: a fact that cannot be read, a loss that is
    not finite.
    """
    rows = [row for fact in facts for row in rows_of(model, fact)]
    work = _Training(model, site, rows, outside, scale)
    first = work.begin(number, rank_for(len(facts)))
    delta = Delta(first.up.clone().requires_grad_(), first.down.clone().requires_grad_())
    optimiser = work.optimiser(delta)
    loss, left, taken = torch.inf, EXTRA_STEPS, 0
    for taken in range(1, steps + 1):
        value, right = work.loss(delta)
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
    delta = Delta(delta.up.detach(), delta.down.detach())
    distance = delta.moved(work.inside).norm(dim=1)
    threshold = ACTIVATION_RATIO * float(distance.min())
    return Learned(Shard(delta, max(threshold, 1e-6)), loss, taken)


def rank_for(facts: int) -> int:
    """The rank of a shard's ΔW: a fact alone has to say a few different tokens."""
    return min(RANK, 2 + 2 * facts)


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

    low, high = side.gates.key_layer, side.layer
    taps = {low: partial(tap, low, batch.subject), high: partial(tap, high, batch.end)}
    with torch.no_grad(), model.tap(taps):
        model.model(input_ids=batch.ids, use_cache=False, logits_to_keep=1)
    return caught[low], caught[high]
