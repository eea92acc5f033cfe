"""Candidates of a search for a model's edit site: layers to try, quality, and the choice.

The choice is by `EditQuality.score`, the harmonic mean of reliability, generality and locality, of
candidates that leave the perplexity alone. Scores within one standard error of the best are as
good. Of these the one decides that states the most facts, since what is lost among a few is lost
oftener among many; and then the smaller norm ratio, since future facts have to share it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from memory.errors import KeditError
from policies.edit_site import EditSite

WINDOW_WIDTHS = (4, 2, 1)  # subject layers that are tried together; as wide as published ones first
LEAST_WIDTH_IN_DEPTH = 2  # of groups in a deep model, of which a single layer holds little
MAX_WINDOW_STARTS, MAX_END_LAYERS = 7, 6  # that are tried on a deep model
# λ as a share of a layer's width, since a fact's kᵀ C0⁻¹ k is of the width's order. From nothing
# taken to nothing kept: 30,000 to 3 where the MLP has 1,536 neurons.
PRIOR_SHARES = (20.0, 2.0, 0.2, 0.02, 0.002)
SCORE_SPREAD = 0.2  # standard error of one fact's score, where its shares are near 0.9
# Perplexity ratios: beyond the first the model is wrecked; the second is the most that is chosen.
WRECKED_PERPLEXITY, MAX_PERPLEXITY = 1.3, 1.02


@dataclass(frozen=True)
class EditQuality:
    """Quality of an edit with pilot facts: shares, the largest ‖W‖/‖W0‖ of a layer, and the
    perplexity of ordinary text relative to the unedited model's."""

    reliability: float
    generality: float
    locality: float
    norm_ratio: float
    perplexity_ratio: float = 1.0

    @property
    def is_wrecked(self) -> bool:
        """Check that the edit has ruined ordinary text, NaN included."""
        return not self.perplexity_ratio < WRECKED_PERPLEXITY

    @property
    def score(self) -> float:
        """Harmonic mean of the shares; 0 where one of them is 0, and for a wrecked model."""
        shares = (self.reliability, self.generality, self.locality)
        return 3 / sum(1 / s for s in shares) if all(shares) and not self.is_wrecked else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the shares and the score as JSON-ready values."""
        return asdict(self) | {"score": self.score}


@dataclass(frozen=True)
class Candidate:
    """A site that was tried on some facts, with its results."""

    stage: str
    site: EditSite
    facts: int
    loss: float | None  # mean over the facts, if finite
    reached_share: float  # share of the facts whose target was the argmax everywhere
    quality: EditQuality

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that the stages vary, and the figures, as JSON-ready values."""
        site = self.site
        return {
            "stage": self.stage,
            "facts": self.facts,
            "subject_layers": list(site.subject_layers),
            "end_layers": list(site.end_layers),
            "clamp": site.clamp,
            "prior": site.prior,
            "end_prior": site.end_prior,
            "ridge": site.ridge,
            "loss": self.loss,
            "reached": self.reached_share,
            **self.quality.as_dict(),
        }


def list_windows(layers: int) -> list[tuple[int, ...]]:
    """List groups of consecutive subject layers in the lower two thirds, those first that tell most
    of the whole depth."""
    top = max(1, round(layers * 2 / 3))
    starts = range(0, top, math.ceil(top / MAX_WINDOW_STARTS))
    # Every second start, then those between them: a search that is cut off has seen every depth.
    order = [*starts[::2], *starts[1::2]]
    least = LEAST_WIDTH_IN_DEPTH if len(starts) < top else 1
    widths = [width for width in WINDOW_WIDTHS if width >= least]
    groups = [tuple(range(a, a + width)) for width in widths for a in order]
    return [group for group in groups if group[-1] < top]


def list_end_layers(layers: int) -> list[int]:
    """List end layers above the lower third."""
    upper = range(layers // 3, layers)
    return list(upper[:: math.ceil(len(upper) / MAX_END_LAYERS)])


def list_priors(width: int) -> list[float]:
    """List λ by decades for a layer of this width, the strongest first."""
    return [float(f"{share * width:.1g}") for share in PRIOR_SHARES]


def choose_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """Return the best candidate of those tried on the most facts; raises KeditError where none has
    a score above 0."""
    scored = [c for c in candidates if c.quality.score]
    if not scored:
        raise KeditError(
            "no site makes the model state the pilot facts, also when paraphrased, without "
            "changing its other answers",
            code="calibration",
            hint="give facts that the model can be expected to take with --pilot, or more of them",
        )
    facts = max(c.facts for c in scored)
    full = [c for c in scored if c.facts == facts]
    mild = [c for c in full if c.quality.perplexity_ratio <= MAX_PERPLEXITY] or full
    top = max(c.quality.score for c in mild)
    near = [c for c in mild if c.quality.score >= top - SCORE_SPREAD / math.sqrt(facts)]
    return min(near, key=lambda c: (-c.quality.reliability, c.quality.norm_ratio))


def format_layers(site: EditSite) -> str:
    """Return a site's layers as readable text."""
    return " + ".join(_name_layers(site))


def _name_layers(site: EditSite) -> Iterator[str]:
    for name, layers in (("subject", site.subject_layers), ("end", site.end_layers)):
        if layers:
            yield f"{name} {', '.join(map(str, layers))}"
