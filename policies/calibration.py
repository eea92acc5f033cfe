"""Search for a model's edit site, on a pilot batch of facts.

Staged, so that little is tried at great cost: the target loss of every group of layers; the
quality of the best groups over a grid of λ and λ_n, each point only a solve; the best subject
layers together with each end layer; the clamp. The choice is by `EditQuality.score`, the harmonic
mean of reliability, generality and locality. Scores within one standard error of the best are as
good, and then the smaller norm ratio decides, since future facts have to share it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from policies.targets import compute_terms

MAX_WINDOW = 3  # subject layers that are tried together
MAX_WINDOW_STARTS, MAX_END_LAYERS = 8, 6  # that are tried on a deep model
SCREEN_STEPS = 30  # of a target, while groups of layers are compared
FINALISTS = 3  # groups of subject layers whose quality is measured, of different lowest layers
# λ as a share of a layer's width, since a fact's kᵀ C0⁻¹ k is of the width's order.
PRIOR_SHARES = (0.005, 0.05, 0.5)
RIDGES = (0.1, 1.0, 10.0)
END_PRIOR_FACTORS = (1.0, 10.0)  # λ of the end layer, in units of the subject layers'
END_RATE_FACTOR = 0.3  # Adam's in an end layer that helps, in units of the subject layers'
CLAMPS = (2.0, 4.0, 6.0)
SCREEN_CLAMP = 4.0
SCORE_SPREAD = 0.2  # standard error of one fact's score, where its shares are near 0.9

StatisticsSource = Callable[[Collection[int]], Mapping[int, LayerStatistics]]
MeasureQuality = Callable[[Mapping[int, Tensor]], "EditQuality"]


@dataclass(frozen=True)
class EditQuality:
    """Quality of an edit with all pilot facts: shares, and the largest ‖W‖/‖W0‖ of a layer."""

    reliability: float
    generality: float
    locality: float
    norm_ratio: float

    @property
    def score(self) -> float:
        """Harmonic mean of the shares; 0 where one of them is 0."""
        shares = (self.reliability, self.generality, self.locality)
        return 3 / sum(1 / share for share in shares) if all(shares) else 0.0

    def as_dict(self) -> dict[str, float]:
        """Return the shares and the score as JSON-ready values."""
        return asdict(self) | {"score": self.score}


@dataclass(frozen=True)
class Candidate:
    """A site that was tried, with its results; no quality where only the loss was measured."""

    stage: str
    site: EditSite
    loss: float | None  # mean over the pilot's facts, if finite
    reached_share: float  # share of the facts whose target was the argmax everywhere
    quality: EditQuality | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the settings that the stages vary, and the figures, as JSON-ready values."""
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
    """List groups of consecutive subject layers in the lower two thirds."""
    top = max(1, round(layers * 2 / 3))
    starts = range(0, top, math.ceil(top / MAX_WINDOW_STARTS))
    groups = [tuple(range(a, a + n)) for n in range(1, MAX_WINDOW + 1) for a in starts]
    return [group for group in groups if group[-1] < top]


def list_end_layers(layers: int) -> list[int]:
    """List end layers above the lower third."""
    upper = range(layers // 3, layers)
    return list(upper[:: math.ceil(len(upper) / MAX_END_LAYERS)])


def choose_candidate(candidates: Sequence[Candidate], facts: int) -> Candidate:
    """Return the best candidate after a pilot of this number of facts; raises KeditError where none
    has a score above 0."""
    scored = [(c.quality, c) for c in candidates if c.quality is not None]
    top = max((quality.score for quality, _ in scored), default=0.0)
    if not top:
        raise KeditError(
            "no site makes the model state the pilot facts, also when paraphrased, without "
            "changing its other answers",
            code="calibration",
            hint="give facts that the model can be expected to take with --pilot, or more of them",
        )
    near = [pair for pair in scored if pair[0].score >= top - SCORE_SPREAD / math.sqrt(facts)]
    return min(near, key=lambda pair: pair[0].norm_ratio)[1]


class SiteSearch:
    """Stages of the search; `candidates` holds all that was tried. The model is left unchanged."""

    def __init__(
        self,
        model: EditableModel,
        base: EditSite,
        facts: Sequence[Fact],
        measure_quality: MeasureQuality,
        norms: Mapping[int, float],
        load_covariances: StatisticsSource,
    ) -> None:
        """base: the site with the settings that are not searched. measure_quality: of the weights
        changed by ΔW. norms: the median ‖y‖ of all layers."""
        self.model, self.base_site, self.facts, self.norms = model, base, tuple(facts), norms
        self._measure_quality, self._load_covariances = measure_quality, load_covariances
        self._report_progress: Callable[[str], None] = lambda _what: None
        self._statistics: Mapping[int, LayerStatistics] = {}
        # By the site without the settings of the solve, on which they do not depend.
        self._packed_terms: dict[EditSite, dict[str, bytes]] = {}
        self._target_lengths: dict[EditSite, list[Mapping[int, float]]] = {}
        self.candidates: list[Candidate] = []

    @property
    def max_units(self) -> int:
        """Largest number of units of work."""
        ends = len(list_end_layers(self.model.layer_count))
        return len(list_windows(self.model.layer_count)) + 2 * ends + FINALISTS + 2 + len(CLAMPS)

    def run_stages(self, report_progress: Callable[[str], None]) -> Candidate:
        """Return the best candidate; `report_progress` hears of each unit of work."""
        self._report_progress, depth = report_progress, self.model.layer_count
        groups = self._rank_sites([self._make_subject_site(group) for group in list_windows(depth)])
        ends = self._rank_sites([self._make_end_site(n) for n in list_end_layers(depth)])
        lowest = {site.layers[0]: site for site in reversed(groups)}  # the best group above each
        apart = [site for site in groups if lowest[site.layers[0]] is site]
        finalists = [*apart[:FINALISTS], *ends[:1]]
        self._load_statistics([self.base_site, *finalists])
        self._try_variants("start", self.base_site, [self.base_site])
        judged: list[Candidate] = []
        for site in finalists:
            judged += self._try_variants("quality", site, self._vary_priors(site))
        subjects = [c for c in judged if c.site.subject_layers and c.quality and c.quality.score]
        if subjects:
            self._try_combinations(choose_candidate(subjects, len(self.facts)).site)
        chosen = choose_candidate(self.candidates, len(self.facts)).site
        self._load_statistics([chosen])
        for site in (replace(chosen, clamp=clamp) for clamp in CLAMPS):
            if site != chosen:
                self._try_variants("clamp", site, [site])
        return choose_candidate(self.candidates, len(self.facts))

    def solve_deltas(self, site: EditSite) -> dict[int, Tensor]:
        """Solve ΔW by layer of all pilot facts, at a site whose quality was measured."""
        self._load_statistics([site])
        packed = self._packed_terms[_strip_solve_fields(site)]
        return WeightsTier(site, self._statistics).solve_deltas(packed)

    def compute_anchors(self, site: EditSite) -> dict[int, float]:
        """Return the norm anchors by layer of a site whose quality was measured."""
        lengths = self._target_lengths[_strip_solve_fields(site)]
        return {n: round(compute_anchor([one[n] for one in lengths]), 3) for n in site.layers}

    def _make_subject_site(self, group: tuple[int, ...]) -> EditSite:
        return replace(self.base_site, subject_layers=group, end_layers=(), clamp=SCREEN_CLAMP)

    def _make_end_site(self, layer: int) -> EditSite:
        end = replace(self.base_site, subject_layers=(), end_layers=(layer,), clamp=SCREEN_CLAMP)
        return replace(end, end_from=0, end_rate=self.base_site.target_rate)

    def _vary_priors(self, site: EditSite) -> Iterator[EditSite]:
        width = self.model.weight(site.layers[0]).shape[1]
        for share in PRIOR_SHARES:
            prior = float(f"{share * width:.1g}")
            for ridge in RIDGES:
                yield replace(site, prior=prior, end_prior=prior, ridge=ridge)

    def _try_combinations(self, subject: EditSite) -> None:
        """Try the subject layers with each end layer above them, which joins in half way."""
        above = [n for n in list_end_layers(self.model.layer_count) if n > subject.layers[-1]]
        sites = [replace(subject, end_layers=(n,)) for n in above]
        self._load_statistics(sites)
        start, rate = subject.target_steps // 2, END_RATE_FACTOR * subject.target_rate
        for site in sites:
            both = replace(site, end_from=start, end_rate=rate)
            variants = [replace(both, end_prior=f * site.prior) for f in END_PRIOR_FACTORS]
            self._try_variants("combination", both, variants)

    def _load_statistics(self, sites: Sequence[EditSite]) -> None:
        """Hold the covariances of the sites' layers, and of no other: they are large."""
        wanted = {n for site in sites for n in site.layers}
        missing = sorted(wanted - set(self._statistics))
        known = {**self._statistics, **(self._load_covariances(missing) if missing else {})}
        self._statistics = {n: known[n] for n in sorted(wanted)}

    def _rank_sites(self, sites: Sequence[EditSite]) -> list[EditSite]:
        """Sort sites, best first, by the loss and then by the share of facts that are reached."""
        ranked: list[tuple[float, float, int]] = []
        for n, site in enumerate(sites):
            quick = replace(site, target_steps=min(SCREEN_STEPS, site.target_steps))
            _, candidate = self._compute_terms("screening", quick)
            self.candidates.append(candidate)
            loss = math.inf if candidate.loss is None else candidate.loss
            ranked.append((loss, -candidate.reached_share, n))
        return [sites[n] for *_, n in sorted(ranked)]

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
        stripped, packed = _strip_solve_fields(site), {n: pack_terms(t) for n, t in terms.items()}
        self._packed_terms[stripped] = packed
        self._target_lengths[stripped] = [t.lengths for t in terms.values()]
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
    """Return the site without the fields that only the solve reads."""
    return replace(site, prior=0.0, end_prior=0.0, ridge=0.0)


def format_layers(site: EditSite) -> str:
    """Return a site's layers as readable text."""
    parts = (("subject", site.subject_layers), ("end", site.end_layers))
    return " + ".join(f"{name} {', '.join(map(str, layers))}" for name, layers in parts if layers)
