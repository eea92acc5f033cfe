"""Where this model takes facts: the search for its site, on a pilot batch of facts.

Staged, so that little is tried at great cost: the target loss of every group of layers; the
quality of the best groups over a grid of λ and λ_n, each point only a solve; the best subject
layers together with each end layer; the clamp. The choice is by `Quality.score`, the harmonic mean
of reliability, generality and locality; what lies within one standard error of the best is as good,
and then the smaller norm ratio decides, since that is what facts to come have to share.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor

from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite
from policies.edit_terms import EditTerms, Refusal, pack_terms
from policies.memit_mass import WeightsTier
from policies.norm_anchor import compute_anchor
from policies.stability import Limits
from policies.targets import compute_terms

MAX_WINDOW = 3  # subject layers that are tried together, at most
MAX_WINDOW_STARTS, MAX_END_LAYERS = (
    8,
    6,
)  # of windows, and end layers, that are tried on a deep model
SCREEN_STEPS = 30  # steps of a target while groups of layers are compared
FINALISTS = 3  # groups of subject layers whose quality is measured, of different lowest layers
# λ as a share of a layer's width, since a fact's kᵀ C0⁻¹ k is of the width's order.
PRIOR_SHARES = (0.005, 0.05, 0.5)
RIDGES = (0.1, 1.0, 10.0)
END_PRIOR_FACTORS = (1.0, 10.0)  # λ of the end layer, in units of the subject layers'
END_RATE_FACTOR = 0.3  # Adam's in an end layer that helps, in units of the subject layers'
CLAMPS = (2.0, 4.0, 6.0)
SCREEN_CLAMP = 4.0
SCORE_SPREAD = 0.2  # of the score over one fact, where its shares are near 0.9: its standard error

StatisticsSource = Callable[[Collection[int]], Mapping[int, LayerStatistics]]
MeasureQuality = Callable[[Mapping[int, Tensor]], "EditQuality"]


@dataclass(frozen=True)
class EditQuality:
    """What an edit with all of the pilot's facts does; shares, and ‖W‖/‖W0‖, the largest."""

    reliability: float
    generality: float
    locality: float
    norm_ratio: float

    @property
    def score(self) -> float:
        """The harmonic mean of the shares; 0 where one of them is."""
        shares = (self.reliability, self.generality, self.locality)
        return 3 / sum(1 / share for share in shares) if all(shares) else 0.0

    def as_dict(self) -> dict[str, float]:
        """JSON-ready."""
        return asdict(self) | {"score": self.score}


@dataclass(frozen=True)
class Candidate:
    """A site that was tried, and what came of it; no quality where only the loss was measured."""

    stage: str
    site: EditSite
    loss: float | None  # mean over the pilot's facts, if finite
    reached_share: float  # share of the facts whose target was the argmax everywhere
    quality: EditQuality | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: what the stages vary, and the figures."""
        site, quality = self.site, self.quality
        result: dict[str, Any] = {
            "stage": self.stage,
            "subject_layers": list(site.subject_layers),
            "end_layers": list(site.end_layers),
            "clamp": site.clamp,
            "loss": self.loss,
            "reached": self.reached_share,
        }
        if quality is not None:
            result |= {"prior": site.prior, "end_prior": site.end_prior, "ridge": site.ridge}
            result |= quality.as_dict()
        return result


def list_windows(layers: int) -> list[tuple[int, ...]]:
    """Groups of consecutive subject layers in the lower two thirds."""
    top = max(1, round(layers * 2 / 3))
    starts = range(0, top, math.ceil(top / MAX_WINDOW_STARTS))
    found = [tuple(range(a, a + n)) for n in range(1, MAX_WINDOW + 1) for a in starts]
    return [group for group in found if group[-1] < top]


def list_end_layers(layers: int) -> list[int]:
    """Single layers above the lower third."""
    found = range(layers // 3, layers)
    return list(found[:: math.ceil(len(found) / MAX_END_LAYERS)])


def choose_candidate(candidates: Sequence[Candidate], facts: int) -> Candidate:
    """The one to choose after a pilot of so many facts; KeditError where none of them makes the
    model say anything."""
    scored = [(c.quality, c) for c in candidates if c.quality is not None]
    top = max((quality.score for quality, _ in scored), default=0.0)
    if not top:
        raise KeditError(
            "no site that was tried makes the model say the pilot facts, and say them again in "
            "other words, and leave its other answers alone",
            code="calibration",
            hint="give facts that the model can be expected to take with --pilot, or more of them",
        )
    near = [pair for pair in scored if pair[0].score >= top - SCORE_SPREAD / math.sqrt(facts)]
    return min(near, key=lambda pair: pair[0].norm_ratio)[1]


class SiteSearch:
    """The stages, in order. `found` keeps all that was tried; the model ends as it began."""

    def __init__(
        self,
        model: EditableModel,
        base: EditSite,
        facts: Sequence[Fact],
        examine: MeasureQuality,
        norms: Mapping[int, float],
        measured: StatisticsSource,
    ) -> None:
        """`base` gives what is not searched; `examine` the quality of weights changed by ΔW;
        `norms` the median ‖y‖ of all layers; `measured` the covariances of some."""
        self.model, self.base_site, self.facts, self.norms = model, base, tuple(facts), norms
        self._measure_quality, self._load_covariances = examine, measured
        self._report_progress: Callable[[str], None] = lambda _what: None
        self._statistics: Mapping[int, LayerStatistics] = {}
        self._packed_terms: dict[EditSite, dict[str, bytes]] = {}  # terms, by what they depend on
        self._target_lengths: dict[EditSite, list[Mapping[int, float]]] = {}  # of their targets
        self.candidates: list[Candidate] = []

    @property
    def max_units(self) -> int:
        """Pieces of work, at most."""
        ends = len(list_end_layers(self.model.layer_count))
        return len(list_windows(self.model.layer_count)) + 2 * ends + FINALISTS + 2 + len(CLAMPS)

    def run_stages(self, told: Callable[[str], None]) -> Candidate:
        """The candidate to choose; `told` hears of each of `units` pieces of work, at most."""
        self._report_progress, depth = told, self.model.layer_count
        groups = self._rank_sites([self._make_subject_site(group) for group in list_windows(depth)])
        ends = self._rank_sites([self._make_end_site(n) for n in list_end_layers(depth)])
        lowest = {site.layers[0]: site for site in reversed(groups)}  # the best group above each
        apart = [site for site in groups if lowest[site.layers[0]] is site]
        finalists = [*apart[:FINALISTS], *ends[:1]]
        self._load_statistics([self.base_site, *finalists])
        self._try_variants("start", self.base_site, [self.base_site])
        judged = [
            c
            for site in finalists
            for c in self._try_variants("quality", site, self._vary_priors(site))
        ]
        subjects = [c for c in judged if c.site.subject_layers and c.quality and c.quality.score]
        if subjects:
            self._try_combinations(self._choose_best(subjects).site)
        chosen = self._choose_best(self.candidates).site
        self._load_statistics([chosen])
        for clamp in CLAMPS:
            if clamp != chosen.clamp:
                site = replace(chosen, clamp=clamp)
                self._try_variants("clamp", site, [site])
        return self._choose_best(self.candidates)

    def solve_deltas(self, site: EditSite) -> dict[int, Tensor]:
        """ΔW of all the facts at a site whose quality was measured."""
        self._load_statistics([site])
        return WeightsTier(site, self._statistics).solve_deltas(
            self._packed_terms[_strip_solve_fields(site)]
        )

    def compute_anchors(self, site: EditSite) -> dict[int, float]:
        """The norm anchors of a site whose quality was measured, by layer."""
        lengths = self._target_lengths[_strip_solve_fields(site)]
        return {n: round(compute_anchor([one[n] for one in lengths]), 3) for n in site.layers}

    # The sites ----------------------------------------------------------------------------------

    def _make_subject_site(self, group: tuple[int, ...]) -> EditSite:
        return replace(self.base_site, subject_layers=group, end_layers=(), clamp=SCREEN_CLAMP)

    def _make_end_site(self, layer: int) -> EditSite:
        rate = self.base_site.target_rate
        end = replace(self.base_site, subject_layers=(), end_layers=(layer,), clamp=SCREEN_CLAMP)
        return replace(end, end_from=0, end_rate=rate)

    def _vary_priors(self, site: EditSite) -> Iterator[EditSite]:
        width = self.model.weight(site.layers[0]).shape[1]
        for share in PRIOR_SHARES:
            prior = float(f"{share * width:.1g}")
            for ridge in RIDGES:
                yield replace(site, prior=prior, end_prior=prior, ridge=ridge)

    def _try_combinations(self, subject: EditSite) -> None:
        """The subject layers, and each end layer above them that joins in half way."""
        above = [n for n in list_end_layers(self.model.layer_count) if n > subject.layers[-1]]
        sites = [replace(subject, end_layers=(n,)) for n in above]
        self._load_statistics(sites)
        for site in sites:
            helped = replace(
                site, end_from=site.target_steps // 2, end_rate=END_RATE_FACTOR * site.target_rate
            )
            priors = [factor * site.prior for factor in END_PRIOR_FACTORS]
            self._try_variants(
                "combination", helped, [replace(helped, end_prior=p) for p in priors]
            )

    def _choose_best(self, candidates: Sequence[Candidate]) -> Candidate:
        return choose_candidate(candidates, len(self.facts))

    def _load_statistics(self, sites: Sequence[EditSite]) -> None:
        """Have the covariances of the sites' layers, and of no other: they are large."""
        wanted = {n for site in sites for n in site.layers}
        missing = sorted(wanted - set(self._statistics))
        known = {**self._statistics, **(self._load_covariances(missing) if missing else {})}
        self._statistics = {n: known[n] for n in sorted(wanted)}

    # What comes of them -------------------------------------------------------------------------

    def _rank_sites(self, sites: Sequence[EditSite]) -> list[EditSite]:
        """The sites, best first: by the loss, then by the share of facts that are reached."""
        ranked: list[tuple[float, float, int]] = []
        for site in sites:
            quick = replace(site, target_steps=min(SCREEN_STEPS, site.target_steps))
            _, candidate = self._compute_terms("screening", quick)
            self.candidates.append(candidate)
            loss = math.inf if candidate.loss is None else candidate.loss
            ranked.append((loss, -candidate.reached_share, len(ranked)))
        return [sites[number] for *_, number in sorted(ranked)]

    def _compute_terms(self, stage: str, site: EditSite) -> tuple[dict[str, EditTerms], Candidate]:
        self._report_progress(f"{stage}: {format_layers(site)}")
        found = compute_terms(self.model, site, self.norms, self.facts)
        terms = {n: t for n, t in found.items() if not isinstance(t, Refusal)}
        reached = sum(t.steps < site.target_steps for t in terms.values()) / len(self.facts)
        loss = sum(t.loss for t in terms.values()) / len(terms) if terms else None
        return terms, Candidate(stage, site, loss, reached)

    def _try_variants(
        self, stage: str, site: EditSite, variants: Iterable[EditSite]
    ) -> list[Candidate]:
        """Solve for each variant of a site, all from the site's own terms, and measure it."""
        terms, candidate = self._compute_terms(stage, site)
        packed = self._packed_terms[_strip_solve_fields(site)] = {
            n: pack_terms(t) for n, t in terms.items()
        }
        self._target_lengths[_strip_solve_fields(site)] = [t.lengths for t in terms.values()]
        tried = []
        for variant in variants:
            try:
                deltas = WeightsTier(variant, self._statistics).solve_deltas(packed)
            except KeditError:  # a prior that is singular, or weights that are not finite
                continue
            quality = self._measure_quality(deltas)
            tried.append(replace(candidate, site=variant, quality=quality))
        self.candidates += tried
        return tried


def _strip_solve_fields(site: EditSite) -> EditSite:
    """The site without what only the solve reads."""
    return replace(site, prior=0.0, end_prior=0.0, ridge=0.0)


def format_layers(site: EditSite) -> str:
    """A site's layers, as people read them."""
    parts = (("subject", site.subject_layers), ("end", site.end_layers))
    return " + ".join(f"{name} {', '.join(map(str, layers))}" for name, layers in parts if layers)


# Limits -----------------------------------------------------------------------------------------

NORM_RANGE = (Limits(1.15, 1.3, 1.6), Limits(3.0, 5.0, 8.0))
"""The tightest and the widest limits of ‖W‖/‖W0‖: editors have collapsed near 2 and beyond 10."""
ACTIVATION_RANGE = (Limits(0.03, 0.05, 0.10), Limits(0.1, 0.2, 0.4))
"""The same of the change of the activation norms, as a share."""
VARIATION_FACTORS = (1.0, 2.0, 4.0)


def derive_activation_limits(variation: float) -> Limits:
    """One, two and four times what two halves of ordinary text differ by, within ACTIVATION."""
    return _clamp_limits([factor * variation for factor in VARIATION_FACTORS], *ACTIVATION_RANGE)


def derive_norm_limits(curve: Sequence[tuple[float, float]], activation: Limits) -> Limits:
    """The norm ratios at which an update, scaled up, has moved the activation norms by their
    limits, within NORM. `curve`: norm ratio and activation change, in rising order of scale."""
    wanted = (activation.warn, activation.consolidate, activation.revert)
    return _clamp_limits([_find_crossing(curve, change) for change in wanted], *NORM_RANGE)


def _find_crossing(curve: Sequence[tuple[float, float]], wanted: float) -> float:
    for (norm, change), (wider, more) in pairwise([(1.0, 0.0), *curve]):
        if more >= wanted:
            return norm + (wider - norm) * (wanted - change) / (more - change)
    return math.inf


def _clamp_limits(found: Sequence[float], least: Limits, most: Limits) -> Limits:
    bounds = zip(vars(least).values(), found, vars(most).values(), strict=True)
    return Limits(*(round(min(max(low, n), high), 3) for low, n, high in bounds))
