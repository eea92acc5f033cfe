"""What the edited layers shall give for a fact: MEMIT's targets, many facts side by side.

For every fact a δ is added to the down projection's output at its sites, in each edited layer, and
moved until the model says the target in all contexts (Meng et al. 2023, eq. 16, with every edited
layer optimised together, so that each has its own target). In a subject layer the site is the
subject's last token; in an end layer, every token that predicts one of the target, since a residual
at the prompt's end alone reaches the later ones only through attention. Keys are read in the same
pass, an end layer's thus under the subject layers' δ. All of it happens on the unedited weights,
in seats of one fixed shape, so that what comes out for a fact depends on that fact alone, not on
its company or its turn. A fact that is done gives its seat to the next one.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.errors import KeditError, OutOfMemory
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.prefix_cache import PrefixCache
from memory.oom import as_out_of_memory
from policies.edit_site import EditSite
from policies.norm_anchor import check_target_length
from policies.prompts import IGNORE_LABEL, TokenRow, make_essence_row, make_rows

MAX_SEATS = 12  # facts on their way at the same time, while there is memory for them
HEAD_UNIT, TAIL_UNIT, TARGET_UNIT = 32, 4, 4  # lengths are rounded up to multiples of these
MAX_TARGET_TOKENS = (
    64  # tokens of a target: one of 190 took minutes, as every seat is as long as the longest
)
PULSE_STEPS = 8  # steps after which the caller hears from the work, whether a fact is done or not
LENGTH_DECAY = 0.02  # weight of ‖δ‖² in lengths
EXTRA_STEPS = 5  # after the target is the argmax everywhere
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EditTerms:
    """A fact's part in the solve, by layer: keys (rows, sites, width), residuals (sites, hidden).

    A residual is δ = v − W0 k; every context of the fact shares it. lengths: by layer the mean
    ‖v‖, in units of the layer's median ‖y‖.
    """

    keys: Mapping[int, Tensor]
    residuals: Mapping[int, Tensor]
    loss: float
    steps: int
    lengths: Mapping[int, float]


@dataclass(frozen=True)
class Refusal:
    """Why a fact got no targets or no shard, and whether the side memory may take it after all."""

    reason: str
    can_use_side: bool = False


@dataclass(frozen=True)
class SeatShape:
    """Of all facts that share the seats: rows a fact, and lengths of a row's parts in tokens."""

    rows: int  # the essence's included
    head: int  # before the first site
    tail: int  # from there to the last token that predicts one of the target
    target_tokens: int  # tokens of the target


def _round_up(length: int, unit: int) -> int:
    return -(-max(length, 1) // unit) * unit


def _find_start(row: TokenRow, site: EditSite) -> int:
    """The first position that is changed."""
    return row.subject_index if site.subject_layers else row.prompt_length - 1


def _measure_shape(rows: Sequence[TokenRow], site: EditSite) -> SeatShape:
    return SeatShape(
        rows=len(rows),
        head=_round_up(max(_find_start(r, site) for r in rows), HEAD_UNIT),
        tail=_round_up(max(len(r.ids) - 1 - _find_start(r, site) for r in rows), TAIL_UNIT),
        target_tokens=_round_up(max(len(r.target) for r in rows), TARGET_UNIT),
    )


WaitingRows = deque[tuple[Fact, list[TokenRow]]]


def _group_by_shape(
    model: EditableModel, facts: Sequence[Fact], site: EditSite
) -> tuple[dict[SeatShape, WaitingRows], dict[str, EditTerms | Refusal]]:
    """Facts by shape; and those that the model cannot read, or whose target is too long."""
    shapes: dict[SeatShape, WaitingRows] = defaultdict(deque)
    refused: dict[str, EditTerms | Refusal] = {}
    for fact in facts:
        try:
            rows = make_rows(model, fact)
        except KeditError as error:
            refused[fact.id] = Refusal(str(error))
            continue
        # A tokenizer may split the target in two ways; one is enough.
        rows = [row for row in rows if len(row.target) == len(rows[0].target)]
        if (many := len(rows[0].target)) > MAX_TARGET_TOKENS:
            why = f"the target has {many} tokens, and the weights take at most {MAX_TARGET_TOKENS}"
            refused[fact.id] = Refusal(why, can_use_side=True)
            continue
        if site.has_essence:
            rows.append(make_essence_row(model, fact))
        shapes[_measure_shape(rows, site)].append((fact, rows))
    return shapes, refused


class _TargetOptimiser:
    """Facts of one shape on their way: by layer δ (facts, sites, hidden) in lengths, and Adam's
    first moment; one second moment a fact, so that a site with nothing to change stays small.
    """

    def __init__(
        self,
        model: EditableModel,
        site: EditSite,
        norms: Mapping[int, float],
        shape: SeatShape,
        seats: int,
    ) -> None:
        self.model, self.site, self.norms, self.shape = model, site, norms, shape
        self.seat_count = seats
        rows, on = seats * shape.rows, model.device
        self.target_rows = shape.rows - site.has_essence  # rows a fact with its target
        self.replay = PrefixCache(model, site.layers[0], rows, shape.head, shape.tail)
        self.row_index = torch.arange(rows, device=on)[:, None]
        self.columns = torch.zeros(rows, shape.target_tokens, dtype=torch.long, device=on)
        self.labels = torch.full((rows, shape.target_tokens), IGNORE_LABEL, device=on)
        sites = {n: 1 if n in site.subject_layers else shape.target_tokens for n in site.layers}
        self.deltas = {
            n: torch.zeros(seats, k, model.hidden_size, device=on) for n, k in sites.items()
        }
        self.first_moments = {n: torch.zeros_like(delta) for n, delta in self.deltas.items()}
        self.second_moment = torch.zeros(seats, 1, 1, device=on)
        self.steps = torch.zeros(seats, device=on)
        self.extra_steps = torch.zeros(seats, device=on)
        self.essence_logprobs = torch.zeros(
            seats, 0, device=on
        )  # log-probabilities (facts, vocabulary)
        self.is_first_pass = torch.zeros(seats, dtype=torch.bool, device=on)
        self.facts: list[Fact | None] = [None] * seats
        self.keys: dict[int, Tensor] = {}

    @property
    def is_busy(self) -> bool:
        return any(self.facts)

    def seat_facts(self, waiting: WaitingRows) -> None:
        """Seat the next facts wherever there is room."""
        for seat in range(self.seat_count):
            if waiting and self.facts[seat] is None:
                self._seat_fact(seat, *waiting.popleft())

    def _seat_fact(self, seat: int, fact: Fact, rows: list[TokenRow]) -> None:
        self.facts[seat] = fact
        for tensor in (*self.deltas.values(), *self.first_moments.values(), self.second_moment):
            tensor[seat] = 0
        self.steps[seat], self.extra_steps[seat] = 0, EXTRA_STEPS
        first = seat * self.shape.rows
        starts = [_find_start(row, self.site) for row in rows]
        heads = [row.ids[:start] for row, start in zip(rows, starts, strict=True)]
        tails = [row.ids[start:-1] for row, start in zip(rows, starts, strict=True)]
        self.is_first_pass[seat] = True
        self.replay.fill_rows(first, heads, tails)
        for n, row, start in zip(range(first, first + len(rows)), rows, starts, strict=True):
            many = len(row.target)
            self.labels[n] = IGNORE_LABEL
            if n - first < self.target_rows:
                self.labels[n, :many] = torch.tensor(row.target)
            self.columns[n, :many] = torch.arange(many) + row.prompt_length - 1 - start

    def _make_tap(self, layer: int, delta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Add δ (facts, sites, hidden) at the layer's sites, and catch the keys there."""
        moved = delta.repeat_interleave(self.shape.rows, 0) * self.norms[layer]
        columns = self.columns[:, :1] * 0  # the subject's end opens the tail
        if layer in self.site.end_layers:
            columns = self.columns
            moved = moved * (self.labels != IGNORE_LABEL)[..., None]

        def add(inputs: Tensor, outputs: Tensor) -> Tensor:
            self.keys[layer] = inputs[self.row_index, columns].detach().float()
            there = moved.to(outputs.dtype)
            return outputs.index_put((self.row_index, columns), there, accumulate=True)

        return add

    def compute_loss(self, delta: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """By fact, under δ: mean target NLL, whether every target token is the argmax, and how
        far the subject's essence has drifted."""
        with self.model.tap_layers({layer: self._make_tap(layer, d) for layer, d in delta.items()}):
            logits = self.replay.logits(self.columns).float()  # (rows, wanted, vocabulary)
        wanted = self.labels != IGNORE_LABEL
        losses = F.cross_entropy(
            logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORE_LABEL, reduction="none"
        )
        count = wanted.view(self.seat_count, -1).sum(1).clamp(min=1)
        wrong = (logits.argmax(-1) != self.labels) & wanted
        nll = losses.view(self.seat_count, -1).sum(1) / count
        return nll, ~wrong.view(self.seat_count, -1).any(1), self._measure_drift(logits)

    def _measure_drift(self, logits: Tensor) -> Tensor:
        """KL (facts,) of what follows the subject's essence, from what the clean model says."""
        if not self.site.has_essence:
            return logits.new_zeros(self.seat_count)
        now = logits.view(self.seat_count, self.shape.rows, *logits.shape[1:])[
            :, -1, 0
        ].log_softmax(-1)
        if self.essence_logprobs.shape != now.shape:
            self.essence_logprobs = torch.zeros_like(now)
        self.essence_logprobs = torch.where(
            self.is_first_pass[:, None], now.detach(), self.essence_logprobs
        )
        self.is_first_pass[:] = False  # a seat's first pass is with δ = 0
        return F.kl_div(now, self.essence_logprobs, reduction="none", log_target=True).sum(-1)

    def step(self) -> dict[str, EditTerms | Refusal]:
        """One step of descent for every seated fact; what came out for those that are done."""
        delta = {n: d.detach().requires_grad_() for n, d in self.deltas.items()}
        losses, right, drift = self.compute_loss(delta)
        self.extra_steps -= right.long()
        self.steps += 1
        over = (self.extra_steps < 0) | ~torch.isfinite(losses.detach())
        over |= (self.steps > self.site.target_steps) | ~torch.isfinite(
            self.second_moment.flatten()
        )
        result = {
            fact.id: self._collect_terms(seat, float(losses[seat].detach()))
            for seat, fact in enumerate(self.facts)
            if fact is not None and over[seat]
        }
        self.facts = [None if f is None or f.id in result else f for f in self.facts]
        if self.is_busy:
            size = sum(d.square().sum() for d in delta.values())
            total = losses.sum() + self.site.essence * drift.sum() + LENGTH_DECAY * size
            gradients = torch.autograd.grad(total, list(delta.values()))
            self._update_deltas(dict(zip(delta, gradients, strict=True)))
        return result

    def _update_deltas(self, gradients: Mapping[int, Tensor]) -> None:
        turn = self.steps[:, None, None]
        size = sum(g.square().sum((1, 2), keepdim=True) for g in gradients.values())
        self.second_moment.lerp_(torch.as_tensor(size), 0.05)
        unit = (self.second_moment / (1 - 0.95**turn)).sqrt() + 1e-8
        for layer, gradient in gradients.items():
            self.first_moments[layer].lerp_(gradient, 0.1)
            rate: Tensor | float = self.site.target_rate
            if layer in self.site.end_layers:
                rate = self.site.end_rate * (turn > self.site.end_from)
            moved = self.deltas[layer] - rate * self.first_moments[layer] / (1 - 0.9**turn) / unit
            length = moved.norm(dim=-1, keepdim=True)
            self.deltas[layer] = moved * (self.site.clamp / length.clamp(min=self.site.clamp))

    def _collect_terms(self, seat: int, loss: float) -> EditTerms | Refusal:
        at = slice(seat * self.shape.rows, seat * self.shape.rows + self.target_rows)
        many = int((self.labels[at.start] != IGNORE_LABEL).sum())
        keys = {n: self.keys[n][at, :many].cpu().clone() for n in self.site.layers}
        residuals = {n: (self.deltas[n][seat, :many] * self.norms[n]).cpu() for n in keys}
        numbers = {
            "gradient": (self.second_moment[seat],),  # what is left of its squares
            "loss": (torch.tensor(loss),),
            "keys": keys.values(),
            "value": residuals.values(),
        }
        for name, tensors in numbers.items():
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                return Refusal(
                    f"the target's {name}: not finite after {self.steps[seat] - 1:g} steps"
                )
        lengths = {n: self._measure_length(n, keys[n], residuals[n]) for n in keys}
        if why := check_target_length(lengths, self.site.anchors):
            return Refusal(why, can_use_side=True)
        return EditTerms(keys, residuals, loss, int(self.steps[seat]) - 1, lengths)

    def _measure_length(self, layer: int, keys: Tensor, residuals: Tensor) -> float:
        """The mean ‖v‖, v = W0 k + δ, of keys (rows, sites, width), in lengths."""
        with torch.autocast(keys.device.type, enabled=False):
            values = keys @ self.model.base_weight(layer).T.to(keys) + residuals
        return float(values.norm(dim=-1).mean()) / self.norms[layer]


def compute_terms(
    model: EditableModel,
    site: EditSite,
    norms: Mapping[int, float],
    facts: Sequence[Fact],
    done: Callable[[dict[str, EditTerms | Refusal]], None] = lambda _part: None,
) -> dict[str, EditTerms | Refusal]:
    """Keys and residuals of each fact, by fact id; on the base weights whatever is active.

    `norms` gives the median ‖y‖ of each edited layer. `done(part)` is told of results as they
    come, at times of none, with the active weights back in place, and may raise to stop the work.
    A fact whose loss, gradient or δ is not finite, or whose target is far beyond the site's
    anchors, is refused, the others are not. Raises OutOfMemory where there is
    no memory for one fact alone.
    """
    shapes, result = _group_by_shape(model, facts, site)
    done(dict(result))
    for shape, waiting in shapes.items():
        for part in _compute_in_seats(model, site, norms, shape, waiting):
            result |= part
            done(part)
    return result


def _compute_in_seats(
    model: EditableModel,
    site: EditSite,
    norms: Mapping[int, float],
    shape: SeatShape,
    waiting: WaitingRows,
) -> Iterator[dict[str, EditTerms | Refusal]]:
    """What comes out for facts of one shape, in parts. Where memory runs out, those that are not
    done begin anew in half the seats."""
    left = {fact.id: (fact, rows) for fact, rows in waiting}
    seats = MAX_SEATS
    while left:
        try:
            with as_out_of_memory():
                for part in _run_pulses(
                    _TargetOptimiser(model, site, norms, shape, seats), deque(left.values())
                ):
                    left = {n: one for n, one in left.items() if n not in part}
                    yield part
        except OutOfMemory as error:
            if seats == 1:
                raise
            seats //= 2
            log.warning("targets are computed for %d facts at once: %s", seats, error)


def _run_pulses(
    seats: _TargetOptimiser, waiting: WaitingRows
) -> Iterator[dict[str, EditTerms | Refusal]]:
    while waiting or seats.is_busy:
        with seats.model.at_base(), seats.model.low_precision():
            part = _run_steps(seats, waiting)
        yield part


def _run_steps(seats: _TargetOptimiser, waiting: WaitingRows) -> dict[str, EditTerms | Refusal]:
    for _ in range(PULSE_STEPS):
        seats.seat_facts(waiting)
        if part := seats.step():
            return part
    return {}
