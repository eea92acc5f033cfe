"""The hot tier: facts learned into shards of the side memory in seconds.

WISE (Wang et al. 2024): a shard is a delta for one down projection, trained so that the model says
the targets (eq. 2) while the activation distance d(a) = ‖ΔW a‖ stays large on the shard's facts and
small on everything else (margin loss, eq. 5). The published delta is as large as the weight, under
a random mask, holds hundreds of facts, and needs TIES to merge shards. Here each fact has a shard
of its own, of low rank, ΔW = B A, so that a removed fact leaves nothing behind. The published loop
runs the whole model for each step. Here everything below the side layer is computed once, and facts
that come together are learned side by side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memory.facts import Fact, fill_subject
from memory.model.chat_layout import render_chat
from memory.model.editable import EditableModel
from memory.picture_marks import remove_marks
from memory.side.index import to_fact_number
from memory.side.shards import THRESHOLD_RATIO, Delta, RetrievalKeys, Shard
from memory.side.side_memory import SideMemory
from policies.divergence import DivergenceWatch, StepReadings, check_output_shift
from policies.edit_site import EditSite
from policies.edit_terms import Refusal
from policies.prompts import PICTURE_QUESTIONS, SUBJECT_QUESTIONS, TokenRow, make_rows, pad_rows
from policies.row_group import ROWS_PER_PASS, RowGroup, group_by_target

SHARD_RANK = 4  # of a fact's ΔW: it has to say a few different tokens
DOWN_RATE = 0.1  # Adam's for A, in units of the size of its entries
MAX_COSINE = 0.8  # cosine from which another question may ask the same as a fact's own
DONE_LOSS = 0.02  # loss at which training stops
# The same where facts are asked for in words, of the targets alone: these are said after some ten
# steps, and what is left are margins, which words do not need.
ASKED_DONE_LOSS = 0.02
ASKED_OTHER_QUESTIONS = 8  # then so many of the other questions are enough, too
EXTRA_STEPS = 2


def read_other_questions(
    model: EditableModel, side: SideMemory, fact: Fact, keys: RetrievalKeys
) -> Tensor:
    """Return inputs (n, width) of the side layer where other questions about a fact's subject end.

    The fact's shard must stay quiet on them. Left out are questions that may ask the same, since
    their end is too near to one of the fact's own keys, and those too long for the model.
    """
    chosen: tuple[str, ...] = SUBJECT_QUESTIONS
    if fact.picture is not None:
        chosen = (*PICTURE_QUESTIONS, remove_marks(fact.question))
    elif side.reader is not None:
        chosen = chosen[:: len(chosen) // ASKED_OTHER_QUESTIONS]
    questions = [fill_subject(question, fact.subject) for question in chosen]
    if fact.picture is not None and side.reader is not None:
        turns = [{"role": "user", "content": question} for question in questions]
        questions += [render_chat(model.tokenizer, [turn]) for turn in turns]
    inputs, outputs = read_prompt_ends(model, filter_fitting(model, questions), side.layer)
    near = side.compute_keys(side.layer, outputs).cpu() @ keys.end.T  # (questions, own)
    return inputs[near.amax(1).to(inputs.device) < MAX_COSINE]


def read_prompt_ends(
    model: EditableModel, prompts: Sequence[str], layer: int
) -> tuple[Tensor, Tensor]:
    """Return inputs (n, width) and outputs (n, hidden) of a down projection where prompts end."""
    if not prompts:
        return torch.empty(0, model.weight(layer).shape[1]), torch.empty(0, model.hidden_size)
    rows = [TokenRow(tuple(ids), len(ids), len(ids) - 1) for ids in map(model.encode, prompts)]
    batch = pad_rows(rows, max(len(r.ids) for r in rows), model.end_token or 0, model.device)
    return _read_layers(model, batch.ids, {layer: batch.end_index})[layer]


def filter_fitting(model: EditableModel, prompts: Sequence[str]) -> list[str]:
    """Return the prompts that are not too long for the model."""
    return [prompt for prompt in prompts if len(model.encode(prompt)) <= model.max_positions]


def _read_layers(
    model: EditableModel, ids: Tensor, columns: Mapping[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return inputs (rows, width) and outputs (rows, hidden) by layer, of ids (rows, tokens).

    columns: by layer the token to read of each row. The pass ends at the highest of these layers.
    """
    rows = torch.arange(len(ids), device=ids.device)
    caught: dict[int, tuple[Tensor, Tensor]] = {}

    def tap(layer: int, inputs: Tensor, outputs: Tensor) -> None:
        caught[layer] = inputs[rows, columns[layer]], outputs[rows, columns[layer]]

    taps = {layer: partial(tap, layer) for layer in columns}
    with model.tap_layers(taps):
        model.run_to_layer(ids, max(columns))
    return caught


class _ShardTraining:
    """Training of facts side by side, each on its own ΔW, along a first dimension (facts, ...).

    The loss of a fact does not depend on another fact's ΔW, so each step is what it would be alone.
    Only the number of steps is decided for all. A NaN stays in its fact: values are selected by
    `where`, not by a product with 0, which a NaN survives.
    """

    def __init__(
        self,
        model: EditableModel,
        site: EditSite,
        facts: Sequence[Fact],
        outside: Tensor,
        others: Sequence[Tensor],
        scale: float,
        asked: Sequence[Sequence[TokenRow]],
    ) -> None:
        self.model, self.site, self.scale, device = model, site, scale, model.device
        pairs = [(n, row) for n, fact in enumerate(facts) for row in make_rows(model, fact)]
        pairs += [(n, row) for n, rows in enumerate(asked) for row in rows]
        groups = group_by_target(pairs)
        self.groups = [RowGroup(model, site.side_layer, group, len(facts)) for group in groups]
        self.is_asked = [bool(rows) for rows in asked] or [False] * len(facts)
        self.row_owner = torch.cat([group.row_owner for group in self.groups])  # (rows,)
        self.is_own_row = torch.cat([group.is_own_row for group in self.groups], 1)  # (facts, rows)
        self.is_own_token = torch.cat([group.is_own_token for group in self.groups], 1)
        self.end_inputs = torch.cat([group.end_inputs for group in self.groups])  # (rows, width)
        # Irrelevant inputs: (n, width) common to all facts, (facts, m, width) of each fact alone.
        self.common_inputs = outside.to(device)
        self.own_inputs = nn.utils.rnn.pad_sequence([o.to(device) for o in others], True)
        lengths = torch.tensor([[len(outside) + len(o)] for o in others], device=device)
        places = torch.arange(len(outside) + self.own_inputs.shape[1], device=device)
        self.is_irrelevant = places < lengths  # (facts, n + m), False for pads

    def init_delta(self, fact: int, seed: int) -> Delta:
        """Return the first ΔW = B A of a fact, with B = 0.

        A k is near 0 on irrelevant inputs, and of a length of about 1 at the fact's prompt ends:
        the rows of A are random mixtures of the part of the end inputs that the irrelevant ones
        leave unexplained, by ridge regression.
        """
        ends = self.end_inputs[self.row_owner == fact]
        own = self.own_inputs[fact][self.is_irrelevant[fact, len(self.common_inputs) :]]
        irrelevant = torch.cat([self.common_inputs, own])
        gram = irrelevant @ irrelevant.T  # (n, n)
        gram.diagonal().add_(gram.trace() / irrelevant.shape[1])
        explained = torch.linalg.solve_ex(gram, irrelevant @ ends.T)[0].T @ irrelevant
        rest = ends - explained
        generator = torch.Generator().manual_seed(seed)
        down = torch.randn(SHARD_RANK, len(rest), generator=generator).to(rest.device) @ rest
        down /= (ends @ down.T).norm(dim=1).mean()
        return Delta(rest.new_zeros(self.model.hidden_size, SHARD_RANK), down)

    def evaluate_deltas(self, deltas: Delta) -> StepReadings:
        """Return WISE's loss under each ΔW, and the other readings."""
        parts = [group.evaluate_tokens(deltas) for group in self.groups]
        losses, is_wrong = (torch.cat(part) for part in zip(*parts, strict=True))  # (tokens,)
        wrong = (self.is_own_token & is_wrong).sum(1)
        of_rows = Delta(*(d.index_select(0, self.row_owner) for d in (deltas.up, deltas.down)))
        shifts = of_rows.apply_to(self.end_inputs[:, None])[:, 0]  # ΔW a (rows, hidden)
        distances = shifts.norm(dim=1) / self.scale
        largest = torch.where(self.is_own_row, distances, 0).amax(1)
        margins = self._compute_margin_losses(distances, deltas)
        of_targets = _masked_mean(losses, self.is_own_token)
        total = of_targets + margins
        left = of_targets if any(self.is_asked) else total
        return StepReadings(total, left, wrong, largest)

    def _compute_margin_losses(self, edited: Tensor, deltas: Delta) -> Tensor:
        """Return eq. 5 (facts,) with activation distances in units of the scale.

        edited: the distances (rows,) at the ends of the facts' own prompts.
        """
        edit_loss = _masked_mean(F.relu(self.site.beta - edited), self.is_own_row)
        hidden = self.common_inputs @ deltas.down.flatten(0, 1).mT  # (n, facts · rank), one product
        common = hidden.unflatten(1, deltas.down.shape[:2]).transpose(0, 1) @ deltas.up.mT
        shifts = torch.cat([common, deltas.apply_to(self.own_inputs)], dim=1)
        irrelevant = shifts.norm(dim=2) / self.scale  # (facts, n + m)
        irrelevant_loss = _masked_mean(F.relu(irrelevant - self.site.alpha), self.is_irrelevant)
        gaps = F.relu(irrelevant[:, :, None] - edited + self.site.gamma)  # (facts, n + m, rows)
        pairs = self.is_irrelevant[:, :, None] & self.is_own_row[:, None]
        return edit_loss + irrelevant_loss + _masked_mean(gaps, pairs, dims=(1, 2))

    def make_shard(self, fact: int, delta: Delta) -> Shard | Refusal:
        """Return a fact's shard with its routing threshold, or a refusal if the last step moved it
        out of range."""
        distances = delta.apply_to(self.end_inputs[self.is_own_row[fact]]).norm(dim=1)
        if why := check_output_shift(float(distances.max()) / self.scale):
            return Refusal(why)
        threshold = max(THRESHOLD_RATIO * float(distances.min()), 1e-6)
        return Shard(delta, threshold, is_asked=self.is_asked[fact])


def _masked_mean(values: Tensor, counted: Tensor, dims: tuple[int, ...] = (1,)) -> Tensor:
    """Return means (facts,) of the counted values; 0 where there are none."""
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
    asked: Sequence[Sequence[TokenRow]] = (),
    done_loss: float | None = None,
    pulse: Callable[[int], None] = lambda _step: None,
) -> list[Shard | Refusal]:
    """Train a shard for each fact; facts that go out of range are refused.

    Training is on the weights as they are served, which are those that the side memory overlays.

    outside: inputs (n, width) on which all shards must stay quiet. others: such inputs (m, width)
    of each fact alone. scale: the median ‖y‖ of the layer, the unit of the margins. asked: rows of
    each fact that are learned beside those of its prompts. done_loss: where training stops, if not
    at the usual loss.
    Raises KeditError for a fact that does not fit the model.
    """
    training = _ShardTraining(model, site, facts, outside, others, scale, asked)
    first = [training.init_delta(n, to_fact_number(fact.id)) for n, fact in enumerate(facts)]
    up = torch.stack([delta.up for delta in first]).requires_grad_()
    down = torch.stack([delta.down for delta in first])
    # Steps of B are in lengths of an output, and of A in the size of its fact's entries.
    size = down.square().mean((1, 2), keepdim=True).sqrt()
    unit_down = (down / size).requires_grad_()
    groups = [
        {"params": [up], "lr": site.side_rate * scale / model.hidden_size**0.5},
        {"params": [unit_down], "lr": DOWN_RATE},
    ]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    watch, extra_steps = DivergenceWatch(len(facts)), EXTRA_STEPS
    if done_loss is None:
        done_loss = ASKED_DONE_LOSS if any(asked) else DONE_LOSS
    for step in range(1, steps + 1):
        readings = training.evaluate_deltas(Delta(up, unit_down * size))
        optimiser.zero_grad()
        readings.losses.sum().backward()
        loss, right = watch.check_step(step, readings, (up, unit_down))
        extra_steps -= right and loss < done_loss
        if extra_steps < 0 or not watch.active_facts:
            break
        optimiser.step()
        pulse(step)
    # Copies: views would keep all facts' deltas in memory as long as one of them lives.
    factors = zip(up.detach(), (unit_down * size).detach(), strict=True)
    deltas = [Delta(up.clone(), down.clone()) for up, down in factors]
    return [watch.refusals.get(n) or training.make_shard(n, d) for n, d in enumerate(deltas)]


def compute_keys(
    model: EditableModel, side: SideMemory, facts: Sequence[Fact]
) -> dict[str, RetrievalKeys]:
    """Return every fact's retrieval keys at its prompts, by fact id. Raises Rejected for a picture
    that is not there."""
    rows = [(fact.id, row) for fact in facts for row in make_rows(model, fact)]
    by_length = sorted(range(len(rows)), key=lambda n: rows[n][1].prompt_length)
    keys: dict[int, tuple[Tensor, Tensor]] = {}  # subject and end key (hidden,), by row
    for first in range(0, len(by_length), ROWS_PER_PASS):
        part = by_length[first : first + ROWS_PER_PASS]
        subject, end = _read_keys(model, side, [rows[n][1] for n in part])
        keys |= {n: (subject[i], end[i]) for i, n in enumerate(part)}
    by_fact: dict[str, list[tuple[Tensor, Tensor]]] = {fact.id: [] for fact in facts}
    for n, (fact_id, _) in enumerate(rows):
        by_fact[fact_id].append(keys[n])
    found = {
        fact_id: RetrievalKeys(*(torch.stack(kind) for kind in zip(*pairs, strict=True)))
        for fact_id, pairs in by_fact.items()
    }
    shown = [(fact.id, fact.picture) for fact in facts if fact.picture is not None]
    keys_shown = {n: side.pictures.compute_keys(picture) for n, picture in shown}
    return found | {n: replace(found[n], subject=key) for n, key in keys_shown.items()}


def _read_keys(
    model: EditableModel, side: SideMemory, rows: Sequence[TokenRow]
) -> tuple[Tensor, Tensor]:
    """Return subject and end keys (rows, hidden) of some rows."""
    prompts = [replace(row, ids=row.prompt) for row in rows]
    longest = max(row.prompt_length for row in rows)
    batch = pad_rows(prompts, longest, model.end_token or 0, model.device)
    low, high = side.gates.key_layer, side.layer
    read = _read_layers(model, batch.ids, {low: batch.subject_index, high: batch.end_index})
    subject, end = (side.compute_keys(n, read[n][1]).cpu() for n in (low, high))
    return subject, end
