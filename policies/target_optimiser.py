"""MEMIT's compute_z for several facts side by side: δ at the sites of each fact, by descent.

Each fact has a slot, which is a fixed number of rows of tokens. All slots have one fixed shape, so
that the result of a fact depends on that fact alone, not on its company or its turn. A fact that is
done frees its slot for the next one.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.prefix_cache import PrefixCache
from policies.divergence import stop_non_finite
from policies.edit_site import EditSite
from policies.edit_terms import EditTerms, Refusal
from policies.norm_anchor import check_target_length
from policies.prompts import IGNORE_LABEL, TokenRow

HEAD_UNIT, TAIL_UNIT, TARGET_UNIT = 32, 4, 4  # lengths are rounded up to multiples of these
WEIGHT_DECAY = 0.02  # weight of ‖δ‖² in lengths
EXTRA_STEPS = 5  # after the target is the argmax everywhere

WaitingFacts = deque[tuple[Fact, list[TokenRow]]]
TermsById = dict[str, EditTerms | Refusal]


@dataclass(frozen=True)
class SlotShape:
    """Shape of all slots: rows per fact, and lengths of the parts of a row in tokens."""

    rows: int  # the essence row included
    head: int  # before the first site
    tail: int  # from there to the last token that predicts a token of the target
    target_tokens: int

    @classmethod
    def measure(cls, rows: Sequence[TokenRow], site: EditSite) -> "SlotShape":
        """Return the smallest shape, in whole units, that holds a fact's rows."""
        starts = [_find_first_site(row, site) for row in rows]
        tails = [len(row.ids) - 1 - start for row, start in zip(rows, starts, strict=True)]
        targets = [len(row.target) for row in rows]
        lengths = ((starts, HEAD_UNIT), (tails, TAIL_UNIT), (targets, TARGET_UNIT))
        return cls(len(rows), *(-(-max(1, *many) // unit) * unit for many, unit in lengths))


def _find_first_site(row: TokenRow, site: EditSite) -> int:
    """Return the first position at which δ is added."""
    return row.subject_index if site.subject_layers else row.prompt_length - 1


class TargetOptimiser:
    """δ (facts, sites, hidden) by layer, in lengths, of the facts in the slots, with Adam's state.

    The second moment is one number per fact, so that a site with nothing to change stays small.
    """

    def __init__(
        self,
        model: EditableModel,
        site: EditSite,
        norms: Mapping[int, float],
        shape: SlotShape,
        slots: int,
    ) -> None:
        self.model, self.site, self.norms, self.shape = model, site, norms, shape
        self.slot_count, device = slots, model.device
        rows = slots * shape.rows
        self.target_rows = shape.rows - site.has_essence  # per fact
        self.replay = PrefixCache(model, site.layers[0], rows, shape.head, shape.tail)
        self.row_index = torch.arange(rows, device=device)[:, None]
        self.columns = torch.zeros(rows, shape.target_tokens, dtype=torch.long, device=device)
        self.labels = torch.full((rows, shape.target_tokens), IGNORE_LABEL, device=device)
        sites = {n: 1 if n in site.subject_layers else shape.target_tokens for n in site.layers}
        self.deltas = {
            n: torch.zeros(slots, k, model.hidden_size, device=device) for n, k in sites.items()
        }
        self.first_moments = {n: torch.zeros_like(delta) for n, delta in self.deltas.items()}
        self.second_moment = torch.zeros(slots, 1, 1, device=device)
        self.steps = torch.zeros(slots, device=device)
        self.extra_steps = torch.zeros(slots, device=device)
        self.essence_logprobs = torch.zeros(slots, 0, device=device)  # (facts, vocabulary)
        self.is_first_pass = torch.zeros(slots, dtype=torch.bool, device=device)
        self.facts: list[Fact | None] = [None] * slots
        self.keys: dict[int, Tensor] = {}

    @property
    def is_busy(self) -> bool:
        return any(self.facts)

    def fill_slots(self, waiting: WaitingFacts) -> None:
        """Move the next waiting facts into the free slots."""
        for slot in range(self.slot_count):
            if waiting and self.facts[slot] is None:
                self._fill_slot(slot, *waiting.popleft())

    def _fill_slot(self, slot: int, fact: Fact, rows: list[TokenRow]) -> None:
        self.facts[slot] = fact
        for tensor in (*self.deltas.values(), *self.first_moments.values(), self.second_moment):
            tensor[slot] = 0
        self.steps[slot], self.extra_steps[slot] = 0, EXTRA_STEPS
        self.is_first_pass[slot] = True
        first = slot * self.shape.rows
        split = [(row, _find_first_site(row, self.site)) for row in rows]
        heads = [row.ids[:start] for row, start in split]
        tails = [row.ids[start:-1] for row, start in split]
        self.replay.fill_rows(first, heads, tails)
        for n, (row, start) in enumerate(split, first):
            length = len(row.target)
            self.labels[n] = IGNORE_LABEL
            if n - first < self.target_rows:
                self.labels[n, :length] = torch.tensor(row.target)
            self.columns[n, :length] = torch.arange(length) + row.prompt_length - 1 - start

    def _make_tap(self, layer: int, delta: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a tap that adds δ (facts, sites, hidden) at the layer's sites and reads its keys
        there."""
        added = delta.repeat_interleave(self.shape.rows, 0) * self.norms[layer]
        columns = self.columns[:, :1] * 0  # the subject's last token is the tail's first
        if layer in self.site.end_layers:
            columns = self.columns
            added = added * (self.labels != IGNORE_LABEL)[..., None]

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            self.keys[layer] = inputs[self.row_index, columns].detach().float()
            values = added.to(outputs.dtype)
            return outputs.index_put((self.row_index, columns), values, accumulate=True)

        return tap

    def compute_losses(self, delta: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return by fact, under δ: the mean target NLL, whether every target token is the argmax,
        and the KL of the subject's essence."""
        with self.model.tap_layers({layer: self._make_tap(layer, d) for layer, d in delta.items()}):
            logits = self.replay.logits(self.columns).float()  # (rows, target tokens, vocabulary)
        logits = stop_non_finite(logits)
        is_target = self.labels != IGNORE_LABEL
        losses = F.cross_entropy(
            logits.flatten(0, 1), self.labels.flatten(), ignore_index=IGNORE_LABEL, reduction="none"
        )
        count = is_target.view(self.slot_count, -1).sum(1).clamp(min=1)
        wrong = (logits.argmax(-1) != self.labels) & is_target
        nll = losses.view(self.slot_count, -1).sum(1) / count
        return nll, ~wrong.view(self.slot_count, -1).any(1), self._compute_essence_kl(logits)

    def _compute_essence_kl(self, logits: Tensor) -> Tensor:
        """Return the KL (facts,) after "<subject> is a", from the unedited model's distribution."""
        if not self.site.has_essence:
            return logits.new_zeros(self.slot_count)
        by_slot = logits.view(self.slot_count, self.shape.rows, *logits.shape[1:])
        logprobs = by_slot[:, -1, 0].log_softmax(-1)
        if self.essence_logprobs.shape != logprobs.shape:
            self.essence_logprobs = torch.zeros_like(logprobs)
        self.essence_logprobs = torch.where(
            self.is_first_pass[:, None], logprobs.detach(), self.essence_logprobs
        )
        self.is_first_pass[:] = False  # the first pass of a slot is with δ = 0
        return F.kl_div(logprobs, self.essence_logprobs, reduction="none", log_target=True).sum(-1)

    def step(self) -> TermsById:
        """Take a step of descent for every fact in a slot; return the results of those done."""
        delta = {n: d.detach().requires_grad_() for n, d in self.deltas.items()}
        losses, right, essence_kl = self.compute_losses(delta)
        self.extra_steps -= right.long()
        self.steps += 1
        found = torch.where(torch.isfinite(essence_kl), losses, essence_kl).detach()
        is_finite = torch.isfinite(found) & torch.isfinite(self.second_moment.flatten())
        done = (self.extra_steps < 0) | (self.steps > self.site.target_steps) | ~is_finite
        result = {
            fact.id: self._collect_terms(slot, float(found[slot]))
            for slot, fact in enumerate(self.facts)
            if fact is not None and done[slot]
        }
        self.facts = [None if f is None or f.id in result else f for f in self.facts]
        if self.is_busy:
            size = sum(d.square().sum() for d in delta.values())
            total = losses.sum() + self.site.essence * essence_kl.sum() + WEIGHT_DECAY * size
            gradients = torch.autograd.grad(total, list(delta.values()))
            self._update_deltas(dict(zip(delta, gradients, strict=True)))
        return result

    def _update_deltas(self, gradients: Mapping[int, Tensor]) -> None:
        """Take Adam's step, β = (0.9, 0.95), and clamp ‖δ‖ at each site."""
        steps = self.steps[:, None, None]
        squares = sum(g.square().sum((1, 2), keepdim=True) for g in gradients.values())
        self.second_moment.lerp_(torch.as_tensor(squares), 0.05)
        scale = (self.second_moment / (1 - 0.95**steps)).sqrt() + 1e-8
        for layer, gradient in gradients.items():
            self.first_moments[layer].lerp_(gradient, 0.1)
            rate: Tensor | float = self.site.target_rate
            if layer in self.site.end_layers:
                rate = self.site.end_rate * (steps > self.site.end_from)
            moved = self.deltas[layer] - rate * self.first_moments[layer] / (1 - 0.9**steps) / scale
            length = moved.norm(dim=-1, keepdim=True)
            self.deltas[layer] = moved * (self.site.clamp / length.clamp(min=self.site.clamp))

    def _collect_terms(self, slot: int, loss: float) -> EditTerms | Refusal:
        first = slot * self.shape.rows
        rows = slice(first, first + self.target_rows)
        length = int((self.labels[first] != IGNORE_LABEL).sum())
        keys = {n: self.keys[n][rows, :length].cpu().clone() for n in self.site.layers}
        residuals = {n: (self.deltas[n][slot, :length] * self.norms[n]).cpu() for n in keys}
        steps = int(self.steps[slot]) - 1
        numbers = {
            "gradient": (self.second_moment[slot],),  # the mean of its squares
            "loss": (torch.tensor(loss),),
            "keys": keys.values(),
            "value": residuals.values(),
        }
        for name, tensors in numbers.items():
            if not all(bool(torch.isfinite(t).all()) for t in tensors):
                return Refusal(f"the target's {name}: not finite after {steps} steps")
        lengths = {n: self._measure_value_norm(n, keys[n], residuals[n]) for n in keys}
        if why := check_target_length(lengths, self.site.anchors):
            return Refusal(why, can_use_side=True)
        return EditTerms(keys, residuals, loss, steps, lengths)

    def _measure_value_norm(self, layer: int, keys: Tensor, residuals: Tensor) -> float:
        """Return the mean ‖v‖, v = W0 k + δ, over keys (rows, sites, width), in lengths."""
        with torch.autocast(keys.device.type, enabled=False):
            values = keys @ self.model.base_weight(layer).T.to(keys) + residuals
        return float(values.norm(dim=-1).mean()) / self.norms[layer]
