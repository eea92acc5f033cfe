"""Reference MEMIT as published (Meng et al. 2023), fact by fact, for the fast path to match.

Every step runs the whole model, every solve is dense and in float64, and each fact's update is
added to the weights that earlier facts left. It shares no code with the fast path.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.stacking import StackingMethod
from kedit_daemon.bench.scoring import compute_target_losses
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.prompts import TokenRow, find_subject_end, pad_rows

PREFIX_STARTS = ("The", "Therefore", "Because", "I", "You")
PREFIX_TOKENS, PREFIX_CHOICES = 10, 5
STEPS = 25
STRIDES = 2.0  # Adam could reach the longest δ from 0 about this often within STEPS
DECAY, KL, DONE_LOSS = 0.5, 0.0625, 0.05
RIDGE_FLOOR = 1e-3  # of E[k²], on C0's diagonal: its least eigenvalues are noise


def solve_dense_update(
    covariance: Tensor, prior: float, ridge: float, keys: Tensor, residuals: Tensor
) -> Tensor:
    """Return Rᵀ K (λ C0 + λ_n I + Kᵀ K)⁻¹ (hidden, width) from K (n, width), R (n, hidden).

    `ridge` is λ_n in units of the mean of C0's diagonal.
    """
    c0, k, r = covariance.double().cpu(), keys.double().cpu(), residuals.double().cpu()
    floor = ridge * c0.diagonal().mean() * torch.eye(len(c0), dtype=torch.float64)
    update: Tensor = torch.linalg.solve(prior * c0 + floor + k.T @ k, k.T @ r).T
    return update


def sample_prefixes(model: EditableModel, seed: int) -> list[str]:
    """Sample a continuation of each of PREFIX_STARTS from the model's likeliest tokens."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = []
    for start in PREFIX_STARTS:
        ids = model.encode(start)
        for _ in range(PREFIX_TOKENS):
            with torch.no_grad():
                out = model.hf_model(input_ids=torch.tensor([ids], device=model.device))
            likely = out.logits[0, -1].float().cpu().topk(PREFIX_CHOICES)
            pick = torch.multinomial(likely.values.softmax(0), 1, generator=generator)
            ids = [*ids, int(likely.indices[pick])]
        prefixes.append(" ".join(model.decode(ids).split()) + ". ")
    return prefixes


@dataclass(frozen=True)
class ContextBatch:
    """A fact in several contexts, the bare prompt first: ids (rows, tokens), each row's site."""

    rows: list[TokenRow]
    ids: Tensor
    sites: Tensor


class ReferenceMemit(StackingMethod):
    """Sequential MEMIT. As published, targets have no end-of-text token.

    Edits the layers of the subject's last token; of the prompt's, if the site has none of these.
    """

    needs_single_facts = True

    def __init__(self, setup: MethodSetup) -> None:
        """Raise KeditError if the last edited layer is the model's last."""
        super().__init__(setup)
        site = self.loaded_model.site
        self.layers, self.prior = site.subject_layers, site.prior
        if not self.layers:
            self.layers, self.prior = site.end_layers, site.end_prior
        self.layers = self.choose_layers(self.layers)
        self.last_layer = self.layers[-1]
        if self.last_layer == self.model.layer_count - 1:
            raise KeditError(
                f"this method cannot edit layer {self.last_layer}, the model's last",
                code="unsupported",
                hint="choose another method, or other layers in the model's kedit.json",
            )
        self.contexts = ["", *sample_prefixes(self.model, setup.seed)]
        self.start_layers(self.layers)

    def choose_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """Choose those of the site's layers that are edited: all."""
        return layers

    def edit(self, facts: Sequence[Fact]) -> None:
        """Edit fact by fact; one with numbers that are not finite leaves the weights alone."""
        for fact in facts:
            kept = dict(self.deltas)
            batch = self.build_context_batch([text + fact.question for text in self.contexts], fact)
            with self.stopwatch.time_part("targets"):
                target = self.compute_target(fact, batch)
            with self.stopwatch.time_part("solve"):
                is_updated = target is not None and self.update_layers(batch, target)
            if not is_updated:
                self.not_edited += 1
                self.replace_deltas(kept)

    def build_context_batch(
        self, texts: Sequence[str], fact: Fact, stated: bool = True
    ) -> ContextBatch:
        """Build one row a text, followed by the fact's target if `stated`."""
        rows = []
        for text in texts:
            prompt = self.model.encode(text)
            target = self.model.encode_target(text, fact.target, fact.join) if stated else []
            subject = find_subject_end(self.model, text, fact.subject)
            end = len(prompt) - 1 if subject is None else min(subject, len(prompt) - 1)
            rows.append(TokenRow((*prompt, *target), len(prompt), end))
        width = max(len(row.ids) for row in rows)
        batch = pad_rows(rows, width, self.model.end_token or 0, self.model.device)
        sites = batch.subject_index if self.loaded_model.site.subject_layers else batch.end_index
        return ContextBatch(rows, batch.ids, sites)

    # Target -------------------------------------------------------------------------------------

    def compute_target(self, fact: Fact, batch: ContextBatch) -> Tensor | None:
        """Compute z (hidden,) at the last edited layer's output, by Adam on δ through the model."""
        essence = self.build_context_batch([f"{fact.subject} is a"], fact, stated=False)
        start = self.read_residual(batch)
        statistics = self.loaded_model.statistics[self.last_layer]
        max_norm = self.loaded_model.site.clamp * statistics.median_norm
        delta = torch.zeros_like(start).requires_grad_()
        rate = STRIDES * max_norm / STEPS / len(start) ** 0.5
        optimiser = torch.optim.Adam([delta], lr=rate)
        with torch.no_grad():
            unmoved = self._compute_logits(essence, torch.zeros_like(start))[0, -1]
        for _ in range(STEPS):
            loss = compute_target_losses(self._compute_logits(batch, delta), batch.rows).mean()
            loss = loss + DECAY * delta.norm() / start.norm() ** 2
            moved = self._compute_logits(essence, delta)[0, -1]
            loss = loss + KL * F.kl_div(
                moved.log_softmax(0), unmoved.log_softmax(0), log_target=True, reduction="sum"
            )
            if not torch.isfinite(loss):
                return None
            if float(loss.detach()) < DONE_LOSS:
                break
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                delta *= max_norm / delta.norm().clamp(min=max_norm)
        return start + delta.detach()

    def _compute_logits(self, batch: ContextBatch, delta: Tensor) -> Tensor:
        """Compute logits (rows, tokens, vocabulary) with δ added at every row's site."""
        rows = torch.arange(len(batch.ids), device=self.model.device)

        def add_delta(_inputs: Tensor, outputs: Tensor) -> Tensor:
            added = torch.zeros_like(outputs)
            added[rows, batch.sites] = delta.to(added)
            return outputs + added

        with self.model.tap_layers({self.last_layer: add_delta}):
            out = self.model.hf_model(input_ids=batch.ids, use_cache=False)
        logits: Tensor = out.logits
        return logits.float()

    def read_residual(self, batch: ContextBatch) -> Tensor:
        """Read the residual stream (hidden,) after the last edited layer, at the bare site."""
        with torch.no_grad():
            out = self.model.hf_model(
                input_ids=batch.ids[:1], use_cache=False, output_hidden_states=True
            )
        stream: Tensor = out.hidden_states[self.last_layer + 1][0, batch.sites[0]]
        return stream

    # Solve --------------------------------------------------------------------------------------

    def update_layers(self, batch: ContextBatch, target: Tensor) -> bool:
        """Spread the remaining distance to the target in equal shares over the layers to come.

        Return False, with some layers updated, if a solution is not finite.
        """
        for n, layer in enumerate(self.layers):
            key = self.average_keys(self.read_keys(layer, batch))
            share = (target - self.read_residual(batch)) / (len(self.layers) - n)
            covariance = self.loaded_model.statistics[layer].covariance
            ridge = self.prior * RIDGE_FLOOR
            update = solve_dense_update(covariance, self.prior, ridge, key[None], share[None])
            if not torch.isfinite(update).all():
                return False
            self.add_updates({layer: update})
        return True

    def read_keys(self, layer: int, batch: ContextBatch) -> Tensor:
        """Read the keys (contexts, width) at the sites, the bare prompt's first."""
        caught: list[Tensor] = []

        def catch_inputs(inputs: Tensor, _outputs: Tensor) -> None:
            rows = torch.arange(len(batch.sites), device=inputs.device)
            caught.append(inputs[rows, batch.sites])

        with torch.no_grad(), self.model.tap_layers({layer: catch_inputs}):
            self.model.hf_model(input_ids=batch.ids, use_cache=False)
        return caught[0]

    def average_keys(self, keys: Tensor) -> Tensor:
        """Average the bare prompt's key with the mean key of the other contexts: (width,)."""
        return (keys[0] + keys[1:].mean(0)) / 2
