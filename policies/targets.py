"""What the edited layers shall give for a fact: MEMIT's targets, many facts side by side.

For every fact a δ is added to the down projection's output at its sites, at each edited layer, and
moved until the model says the target in all contexts (Meng et al. 2023, eq. 16, with every edited
layer optimised together, so that each has its own target). Keys are read in the same pass. All of
it happens on the unedited weights, in seats of one fixed shape, so that what comes out for a fact
depends on that fact alone, not on its company or its turn. A fact that is done gives its seat to
the next one.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.errors import KeditError
from memory.facts import Fact
from memory.model import EditableModel
from memory.replay import Replay
from policies.prompts import IGNORE, Row, rows_of
from policies.site import EditSite

SEATS = 16  # facts on their way at the same time
HEAD, TAIL, WANTED = 32, 4, 4  # lengths are rounded up to multiples of these
PULSE = 8  # steps after which the caller hears from the work, whether a fact is done or not
DECAY = 0.02  # weight of ‖δ‖² in lengths
EXTRA_STEPS = 5  # after the target is the argmax everywhere


@dataclass(frozen=True)
class Terms:
    """A fact's part in the solve, by layer: keys (rows, sites, width), residuals (sites, hidden).

    A residual is δ = v − W0 k; every context of the fact shares it.
    """

    keys: Mapping[int, Tensor]
    residuals: Mapping[int, Tensor]
    loss: float
    steps: int


@dataclass(frozen=True)
class Refused:
    """Why a fact got no targets."""

    reason: str


@dataclass(frozen=True)
class Shape:
    """Of all facts that share the seats: rows a fact, and lengths of a row's parts in tokens."""

    rows: int
    head: int  # before the first site
    tail: int  # from there to the last token that predicts one of the target
    wanted: int  # tokens of the target
    sites: int


def _up(length: int, unit: int) -> int:
    return -(-max(length, 1) // unit) * unit


def _shape(rows: Sequence[Row]) -> Shape:
    return Shape(
        rows=len(rows),
        head=_up(max(r.sites[0] for r in rows), HEAD),
        tail=_up(max(len(r.ids) - 1 - r.sites[0] for r in rows), TAIL),
        wanted=_up(max(len(r.ids) - r.prompt_length for r in rows), WANTED),
        sites=len(rows[0].sites),
    )


def _shaped(
    model: EditableModel, facts: Sequence[Fact], site: EditSite
) -> tuple[dict[Shape, deque[tuple[Fact, list[Row]]]], dict[str, Terms | Refused]]:
    """Facts by shape; and those the model cannot read."""
    shapes: dict[Shape, deque[tuple[Fact, list[Row]]]] = defaultdict(deque)
    refused: dict[str, Terms | Refused] = {}
    for fact in facts:
        try:
            rows = rows_of(model, fact, site.token)
        except KeditError as error:
            refused[fact.id] = Refused(str(error))
            continue
        # A tokenizer may split the target in two ways; one is enough.
        rows = [row for row in rows if len(row.sites) == len(rows[0].sites)]
        shapes[_shape(rows)].append((fact, rows))
    return shapes, refused


class _Seats:
    """Facts of one shape on their way: δ (layers, facts, sites, hidden) in lengths, and Adam's
    moments, with one second moment a fact: where a site has nothing to change, its δ stays small.
    """

    def __init__(
        self, model: EditableModel, site: EditSite, norms: Mapping[int, float], shape: Shape
    ) -> None:
        self.model, self.site, self.norms, self.shape = model, site, norms, shape
        rows, on = SEATS * shape.rows, model.device
        self.replay = Replay(model, min(site.layers), rows, shape.head, shape.tail)
        self.columns = torch.zeros(rows, shape.wanted, dtype=torch.long, device=on)
        self.labels = torch.full((rows, shape.wanted), IGNORE, device=on)
        size = (len(site.layers), SEATS, shape.sites, model.hidden)
        self.delta = torch.zeros(size, device=on)
        self.first = torch.zeros_like(self.delta)
        self.second = torch.zeros(1, SEATS, 1, 1, device=on)
        self.steps = torch.zeros(SEATS, device=on)
        self.extra = torch.zeros(SEATS, device=on)
        self.facts: list[Fact | None] = [None] * SEATS
        self.keys: dict[int, Tensor] = {}

    @property
    def busy(self) -> bool:
        return any(self.facts)

    def fill(self, waiting: deque[tuple[Fact, list[Row]]]) -> None:
        """Seat the next facts wherever there is room."""
        for seat in range(SEATS):
            if waiting and self.facts[seat] is None:
                self._seat(seat, *waiting.popleft())

    def _seat(self, seat: int, fact: Fact, rows: list[Row]) -> None:
        self.facts[seat] = fact
        self.delta[:, seat], self.first[:, seat], self.second[:, seat] = 0, 0, 0
        self.steps[seat], self.extra[seat] = 0, EXTRA_STEPS
        start = seat * self.shape.rows
        heads = [row.ids[: row.sites[0]] for row in rows]
        tails = [row.ids[row.sites[0] : -1] for row in rows]
        self.replay.fill(start, heads, tails)
        for n, row in enumerate(rows, start):
            target = torch.tensor(row.ids[row.prompt_length :])
            self.labels[n] = IGNORE
            self.labels[n, : len(target)] = target
            end = row.prompt_length - 1 - row.sites[0]
            self.columns[n] = 0
            self.columns[n, : len(target)] = torch.arange(end, end + len(target))

    def loss(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Mean target NLL per fact (facts,) under δ, and whether every target token is the argmax.

        The sites are the first columns of every tail; the keys are caught there.
        """
        sites, rows = self.shape.sites, self.shape.rows

        def tap(n: int, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
            def add(inputs: Tensor, outputs: Tensor) -> Tensor:
                self.keys[layer] = inputs[:, :sites].detach()
                moved = delta[n].repeat_interleave(rows, 0) * self.norms[layer]
                return torch.cat([outputs[:, :sites] + moved, outputs[:, sites:]], 1)

            return add

        with self.model.tap({layer: tap(n, layer) for n, layer in enumerate(self.site.layers)}):
            logits = self.replay.logits(self.columns).float()  # (rows, wanted, vocabulary)
        wanted = self.labels != IGNORE
        losses = F.cross_entropy(
            logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        count = wanted.view(SEATS, -1).sum(1).clamp(min=1)
        wrong = (logits.argmax(-1) != self.labels) & wanted
        return losses.view(SEATS, -1).sum(1) / count, ~wrong.view(SEATS, -1).any(1)

    def step(self) -> dict[str, Terms | Refused]:
        """One step of descent for every seated fact; what came out for those that are done."""
        delta = self.delta.detach().requires_grad_()
        losses, right = self.loss(delta)
        self.extra -= right.long()
        self.steps += 1
        over = (self.extra < 0) | ~torch.isfinite(losses.detach())
        over |= self.steps > self.site.target_steps
        result = {
            fact.id: self._terms(seat, float(losses[seat].detach()))
            for seat, fact in enumerate(self.facts)
            if fact is not None and over[seat]
        }
        self.facts = [None if f is None or f.id in result else f for f in self.facts]
        if self.busy:
            total = losses.sum() + DECAY * delta.square().sum()
            self._descend(*torch.autograd.grad(total, delta))
        return result

    def _descend(self, gradient: Tensor) -> None:
        turn = self.steps[None, :, None, None]
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient.square().sum((0, 2, 3), keepdim=True), 0.05)
        move = self.first / (1 - 0.9**turn) / ((self.second / (1 - 0.95**turn)).sqrt() + 1e-8)
        moved = self.delta - self.site.target_rate * move
        size = moved.norm(dim=-1, keepdim=True)
        self.delta = moved * (self.site.clamp / size.clamp(min=self.site.clamp))

    def _terms(self, seat: int, loss: float) -> Terms | Refused:
        at = slice(seat * self.shape.rows, (seat + 1) * self.shape.rows)
        keys = {layer: self.keys[layer][at].cpu().clone() for layer in self.site.layers}
        residuals = {
            layer: (self.delta[n, seat] * self.norms[layer]).cpu()
            for n, layer in enumerate(self.site.layers)
        }
        numbers = (torch.tensor(loss), *keys.values(), *residuals.values())
        if not all(bool(torch.isfinite(t).all()) for t in numbers):
            return Refused("the target's loss or value is not finite")
        return Terms(keys, residuals, loss, int(self.steps[seat]) - 1)


def compute_terms(
    model: EditableModel,
    site: EditSite,
    norms: Mapping[int, float],
    facts: Sequence[Fact],
    done: Callable[[dict[str, Terms | Refused]], None] = lambda _part: None,
) -> dict[str, Terms | Refused]:
    """Keys and residuals of each fact, by fact id; on the base weights whatever is active.

    `norms` gives the median ‖y‖ of each edited layer. `done(part)` is told of results as they
    come, at times of none, with the active weights back in place, and may raise to stop the work.
    A fact whose loss or δ is not finite is refused, the others are not.
    """
    shapes, result = _shaped(model, facts, site)
    done(result)
    for shape, waiting in shapes.items():
        seats = _Seats(model, site, norms, shape)
        while waiting or seats.busy:
            with model.at_base():
                part = _some_steps(seats, waiting)
            result |= part
            done(part)
    return result


def _some_steps(
    seats: _Seats, waiting: deque[tuple[Fact, list[Row]]]
) -> dict[str, Terms | Refused]:
    for _ in range(PULSE):
        seats.fill(waiting)
        if part := seats.step():
            return part
    return {}
