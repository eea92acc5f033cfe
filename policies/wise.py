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
from memory.model.prefix_cache import PrefixCache
from memory.side.side_memory import Delta, RetrievalKeys, Shard, SideMemory, to_fact_number
from policies.divergence import DivergenceWatch, StepReadings, check_output_shift
from policies.edit_site import EditSite
from policies.edit_terms import Refusal
from policies.prompts import IGNORE_LABEL, SUBJECT_QUESTIONS, TokenRow, make_rows, pad_rows

SHARD_RANK = 4  # of a fact's ΔW: it has to say a few different tokens
DOWN_RATE = 0.1  # Adam's for A, in units of the size of its entries
ACTIVATION_RATIO = 0.15  # threshold over the least distance on the shard's own prompts
MAX_COSINE = 0.8  # cosine from which another question may ask the same as a fact's own
DONE_LOSS = 0.02  # loss at which training stops
EXTRA_STEPS = 2
ROWS_PER_PASS = 16  # rows, which are padded to the longest of them


def read_other_questions(
    model: EditableModel, side: SideMemory, fact: Fact, keys: RetrievalKeys
) -> Tensor:
    """Inputs (n, width) of the side layer where other questions about a fact's subject end, on
    which its shard must stay quiet; `keys` are the fact's own. What may ask the same, since its end
    key is too near, is not among them, nor what is too long for the model."""
    prompts = filter_fitting(
        model, [question.replace("{}", fact.subject) for question in SUBJECT_QUESTIONS]
    )
    inputs, outputs = read_prompt_ends(model, prompts, side.layer)
    near = side.compute_keys(side.layer, outputs).cpu() @ keys.end.T  # (questions, own)
    return inputs[near.amax(1).to(inputs.device) < MAX_COSINE]


def read_prompt_ends(
    model: EditableModel, prompts: Sequence[str], layer: int
) -> tuple[Tensor, Tensor]:
    """Input (n, width) and output (n, hidden) of a down projection where each prompt ends."""
    if not prompts:
        return torch.empty(0, model.weight(layer).shape[1]), torch.empty(0, model.hidden_size)
    encoded = [TokenRow(tuple(ids), len(ids), len(ids) - 1) for ids in map(model.encode, prompts)]
    batch = pad_rows(encoded, max(len(r.ids) for r in encoded), model.end_token or 0, model.device)
    caught: list[Tensor] = []

    def tap(inputs: Tensor, outputs: Tensor) -> None:
        at = torch.arange(len(batch.end_index), device=inputs.device)
        caught.extend((inputs[at, batch.end_index], outputs[at, batch.end_index]))
        raise _PassDone

    _run_taps(model, batch.ids, {layer: tap})
    return caught[0], caught[1]


def filter_fitting(model: EditableModel, prompts: Sequence[str]) -> list[str]:
    """The prompts that the model has positions for."""
    return [prompt for prompt in prompts if len(model.encode(prompt)) <= model.max_positions]


class _PassDone(Exception):
    """All that was to be read of a pass has been read."""


def _run_taps(model: EditableModel, ids: Tensor, taps: Mapping[int, Tap]) -> None:
    """A pass over ids (rows, tokens) for its taps alone: it ends where one of them raises _Read."""
    with suppress(_PassDone), torch.no_grad(), model.tap_layers(taps):
        model.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1)


class _ShardTraining:
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
        pairs = [(n, row) for n, fact in enumerate(facts) for row in make_rows(model, fact)]
        pairs.sort(key=lambda pair: pair[1].prompt_length)  # read beside their like
        rows = [row for _, row in pairs]
        self.row_owner = torch.tensor([n for n, _ in pairs], device=on)  # (rows,) whose row it is
        self.is_own_row = (
            self.row_owner == torch.arange(len(facts), device=on)[:, None]
        )  # (facts, rows)
        heads = [row.prompt[:-1] for row in rows]
        tails = [row.ids[row.prompt_length - 1 : -1] for row in rows]
        longest = max(map(len, tails))
        self.replay = PrefixCache(model, site.side_layer, len(rows), max(map(len, heads)), longest)
        for at in range(0, len(rows), ROWS_PER_PASS):
            part = slice(at, at + ROWS_PER_PASS)
            self.replay.fill_rows(at, heads[part], tails[part])
        self.columns = torch.arange(longest, device=on).repeat(len(rows), 1)
        self.labels = torch.full((len(rows), longest), IGNORE_LABEL, device=on)
        for n, row in enumerate(rows):
            target = torch.tensor(row.target)
            self.labels[n, : len(target)] = target
        self.is_target = self.labels != IGNORE_LABEL  # (rows, columns)
        # (facts, tokens) of the tokens that are given, whether one is the fact's
        self.is_own_token = self.is_own_row[:, self.is_target.nonzero()[:, 0]]
        self.end_inputs = self._read_end_inputs()  # (rows, width)
        # Inputs that must stay quiet: (n, width) for all, (facts, m, width) for each its own.
        self.quiet_inputs = outside.to(on)
        self.own_quiet_inputs = nn.utils.rnn.pad_sequence(
            [o.to(on) for o in others], batch_first=True
        )
        lengths = torch.tensor([[len(outside) + len(o)] for o in others], device=on)
        # (facts, n + m), whether there is one
        most = len(outside) + self.own_quiet_inputs.shape[1]
        self.is_quiet_input = torch.arange(most, device=on) < lengths

    def _read_end_inputs(self) -> Tensor:
        """Inputs (rows, width) where the prompts end: no ΔW changes these."""
        caught: list[Tensor] = []
        taps = {self.site.side_layer: lambda k, _y: caught.append(k[:, 0])}
        with torch.no_grad(), self.model.tap_layers(taps):
            self.replay.logits(self.columns[:, :1])
        return caught[0]

    def init_delta(self, fact: int, seed: int) -> Delta:
        """ΔW = 0 of a fact: B is nothing yet, and A k is near 0 outside and about of length 1 at
        its prompts' ends. For A's rows are random mixtures of what the inputs outside leave
        unexplained (by ridge regression) of the inputs at the ends."""
        ends = self.end_inputs[self.row_owner == fact]
        own = self.own_quiet_inputs[fact][self.is_quiet_input[fact, len(self.quiet_inputs) :]]
        quiet = torch.cat([self.quiet_inputs, own])
        gram = quiet @ quiet.T  # (n, n)
        gram.diagonal().add_(gram.trace() / quiet.shape[1])
        left = ends - torch.linalg.solve_ex(gram, quiet @ ends.T)[0].T @ quiet
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(SHARD_RANK, len(left), generator=generator).to(left.device) @ left
        down /= (ends @ down.T).norm(dim=1).mean()
        return Delta(left.new_zeros(self.model.hidden_size, SHARD_RANK), down)

    def evaluate_deltas(self, deltas: Delta) -> StepReadings:
        """What each ΔW comes to: WISE's loss, and what else is watched."""
        # Not by advanced indexing, which is slow to take back.
        of_rows = Delta(*(d.index_select(0, self.row_owner) for d in (deltas.up, deltas.down)))

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            return outputs + of_rows.apply_to(inputs.detach())  # routed from the prompt's end on

        with self.model.tap_layers({self.site.side_layer: tap}):
            logits = self.replay.logits(self.columns)
        picked, labels = logits[self.is_target].float(), self.labels[self.is_target]
        losses = F.cross_entropy(picked, labels, reduction="none")  # (tokens,)
        wrong = (self.is_own_token & (picked.argmax(-1) != labels)).sum(1)
        inside = (
            of_rows.apply_to(self.end_inputs[:, None])[:, 0].norm(dim=1) / self.scale
        )  # (rows,)
        moved = torch.where(self.is_own_row, inside, 0).amax(1)
        return StepReadings(
            _masked_mean(losses, self.is_own_token) + self._compute_margins(inside, deltas),
            wrong,
            moved,
        )

    def _compute_margins(self, inside: Tensor, deltas: Delta) -> Tensor:
        """Eq. 5 (facts,), with distances in units of the scale; inside: those of the rows."""
        near = _masked_mean(F.relu(self.site.beta - inside), self.is_own_row)
        hidden = (
            self.quiet_inputs @ deltas.down.flatten(0, 1).mT
        )  # (n, facts · rank), in one product
        every = hidden.unflatten(1, deltas.down.shape[:2]).transpose(0, 1) @ deltas.up.mT
        moved = torch.cat([every, deltas.apply_to(self.own_quiet_inputs)], dim=1)
        quiet = moved.norm(dim=2) / self.scale  # (facts, n + m)
        far = _masked_mean(F.relu(quiet - self.site.alpha), self.is_quiet_input)
        gap = F.relu(quiet[:, :, None] - inside + self.site.gamma)  # (facts, n + m, rows)
        return (
            near
            + far
            + _masked_mean(
                gap, self.is_quiet_input[:, :, None] & self.is_own_row[:, None], dims=(1, 2)
            )
        )

    def make_shard(self, fact: int, delta: Delta) -> Shard | Refusal:
        """A fact's shard, with the distance from which it may answer; or why it is out of range,
        as it may be since the last step."""
        distances = delta.apply_to(self.end_inputs[self.is_own_row[fact]]).norm(dim=1)
        if why := check_output_shift(float(distances.max()) / self.scale):
            return Refusal(why)
        return Shard(delta, max(ACTIVATION_RATIO * float(distances.min()), 1e-6))


def _masked_mean(values: Tensor, counted: Tensor, dims: tuple[int, ...] = (1,)) -> Tensor:
    """Means (facts,) of what is counted; 0 where nothing is."""
    return torch.where(counted, values, 0).sum(dims) / counted.sum(dims).clamp(min=1)


def learn_shards(
    model: EditableModel,
    site: EditSite,
    facts: Sequence[Fact],
    *,
    outside: Tensor,
    others: Sequence[Tensor],
    scale: float,
    steps: int,
    pulse: Callable[[int], None] = lambda _step: None,
) -> list[Shard | Refusal]:
    """A shard for each fact, trained; or why it has none, since it went out of range.

    On the weights as they are served: that is what the side memory is laid over.

    outside: inputs (n, width) on which all of them must stay quiet. others: for each fact such
    inputs (m, width) of its own. scale: the median ‖y‖ of the layer, the unit of the margins.
    Raises KeditError: a fact that cannot be read.
    """
    work = _ShardTraining(model, site, facts, outside, others, scale)
    begun = [work.init_delta(n, to_fact_number(fact.id)) for n, fact in enumerate(facts)]
    up = torch.stack([delta.up for delta in begun]).requires_grad_()
    down = torch.stack([delta.down for delta in begun])
    # Steps of B are in lengths of an output, and of A in the size of its fact's entries.
    size = down.square().mean((1, 2), keepdim=True).sqrt()
    part = (down / size).requires_grad_()
    groups = [
        {"params": [up], "lr": site.side_rate * scale / model.hidden_size**0.5},
        {"params": [part], "lr": DOWN_RATE},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    watch, left = DivergenceWatch(len(facts)), EXTRA_STEPS
    for step in range(1, steps + 1):
        seen = work.evaluate_deltas(Delta(up, part * size))
        optimiser.zero_grad()
        seen.losses.sum().backward()
        loss, right = watch.check_step(step, seen, (up, part))
        left -= right and loss < DONE_LOSS
        if left < 0 or not watch.active_facts:
            break
        optimiser.step()
        pulse(step)
    # Copies: a part would keep the whole in memory, long after the other facts have gone.
    made = zip(up.detach(), (part * size).detach(), strict=True)
    deltas = [Delta(*(each.clone() for each in both)) for both in made]
    return [watch.refusals.get(n) or work.make_shard(n, delta) for n, delta in enumerate(deltas)]


def compute_keys(
    model: EditableModel, side: SideMemory, facts: Sequence[Fact]
) -> dict[str, RetrievalKeys]:
    """Every fact's retrieval keys, by its id: read at its prompts, each beside its like."""
    rows = [(fact.id, row) for fact in facts for row in make_rows(model, fact)]
    order = sorted(range(len(rows)), key=lambda n: rows[n][1].prompt_length)
    found: dict[int, tuple[Tensor, Tensor]] = {}  # a row's two keys (hidden,), by its place
    for at in range(0, len(order), ROWS_PER_PASS):
        part = order[at : at + ROWS_PER_PASS]
        low, high = _read_keys(model, side, [rows[n][1] for n in part])
        found |= {n: (low[i], high[i]) for i, n in enumerate(part)}
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {fact.id: [] for fact in facts}
    for place, (fact_id, _) in enumerate(rows):
        pairs[fact_id].append(found[place])
    keys = {fact_id: zip(*some, strict=True) for fact_id, some in pairs.items()}
    return {n: RetrievalKeys(*(torch.stack(each) for each in both)) for n, both in keys.items()}


def _read_keys(
    model: EditableModel, side: SideMemory, rows: Sequence[TokenRow]
) -> tuple[Tensor, Tensor]:
    """Subject and end keys (rows, hidden) of some rows."""
    prompts = [replace(row, ids=row.prompt) for row in rows]
    batch = pad_rows(
        prompts, max(r.prompt_length for r in prompts), model.end_token or 0, model.device
    )
    n = torch.arange(len(prompts), device=model.device)
    caught: dict[int, Tensor] = {}

    def tap(layer: int, where: Tensor, _inputs: Tensor, outputs: Tensor) -> None:
        caught[layer] = side.compute_keys(layer, outputs[n, where]).cpu()
        if layer == side.layer:
            raise _PassDone

    low, high = side.gates.key_layer, side.layer
    taps = {low: partial(tap, low, batch.subject_index), high: partial(tap, high, batch.end_index)}
    _run_taps(model, batch.ids, taps)
    return caught[low], caught[high]
