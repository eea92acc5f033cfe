"""Search for a model's edit site by successive halving (Jamieson and Talwalkar 2016).

Every group of subject layers and every end layer is tried on a few facts with short targets; the
best are tried again on more facts with several λ, and the best of these on all. A try costs one
optimisation of targets, and then only a solve for each λ. A group of layers whose edits wreck the
model is left at its first solve.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.statistics import LayerStatistics
from policies.calibration import (
    Candidate,
    EditQuality,
    choose_candidate,
    format_layers,
    list_end_layers,
    list_priors,
    list_windows,
)
from policies.edit_site import EditSite
from policies.edit_terms import EditTerms, Refusal, pack_terms
from policies.memit_mass import WeightsTier
from policies.norm_anchor import compute_anchor
from policies.targets import MAX_SLOTS, compute_terms

SCREEN_STEPS = 20  # of a target, while groups of layers are compared
RIDGES = (0.1, 1.0, 10.0)
END_PRIOR_FACTORS = (1.0, 10.0)  # λ of the end layer, in units of the subject layers'
END_RATE_FACTOR = 0.3  # Adam's in an end layer that helps, in units of the subject layers'
KEPT_ENDS = 2  # end layers that go on, and are tried together with the best subject layers
# Of the facts: where the subject layers reach so many targets, no end layer has to help.
ENOUGH_REACHED = 0.9
CLAMPS = (2.0, 4.0, 6.0)
SCREEN_CLAMP = 4.0
AT_CLAMP = 0.99  # of the clamp: a δ so long was held by it

StatisticsSource = Callable[[Collection[int]], Mapping[int, LayerStatistics]]
MeasureQuality = Callable[[Mapping[int, Tensor], int], EditQuality]
"""Measures the weights changed by ΔW on the first so many facts of the pilot."""


@dataclass(frozen=True)
class Rung:
    """Stage in which sites are compared on some facts. time_share: of the time for the search, at
    which it ends with the sites it has tried. kept: groups of subject layers that go on. climbs:
    several λ are tried."""

    name: str
    facts: int
    steps: int | None
    time_share: float
    kept: int
    climbs: bool = True


RUNGS = (
    Rung("screening", 4, SCREEN_STEPS, 0.5, 4, climbs=False),
    Rung("halving", 8, None, 0.75, 2),
)
FIRST_PRIOR = 2  # place of the λ that is tried first, the middle one


@dataclass
class SearchWork:
    """Work of a search, which is kept so that a later one can take it up."""

    candidates: list[Candidate] = field(default_factory=list)
    seconds: float = 0.0

    def find(self, stage: str, site: EditSite, facts: int) -> Candidate | None:
        """Find the result of a try."""
        pairs = (c for c in self.candidates if (c.stage, c.facts) == (stage, facts))
        return next((c for c in pairs if c.site == site), None)


class SiteSearch:
    """Stages of the search; `work.candidates` holds all that was tried. The model is left
    unchanged."""

    def __init__(
        self,
        model: EditableModel,
        base: EditSite,
        facts: Sequence[Fact],
        measure_quality: MeasureQuality,
        norms: Mapping[int, float],
        load_covariances: StatisticsSource,
        work: SearchWork,
        save_work: Callable[[SearchWork], None] = lambda _work: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """base: the site with the settings that are not searched. norms: the median ‖y‖ of all
        layers. work: of an earlier search with the same arguments, or empty; save_work: called
        with it after each try."""
        self.model, self.base_site, self.facts, self.norms = model, base, tuple(facts), norms
        self._measure_quality, self._load_covariances = measure_quality, load_covariances
        self.work, self._save_work, self._clock = work, save_work, clock
        self._report_progress: Callable[[str], None] = lambda _what: None
        self._statistics: Mapping[int, LayerStatistics] = {}
        # By the site without the settings of the solve, on which they do not depend.
        self._terms: dict[tuple[EditSite, int], dict[str, EditTerms]] = {}

    def run_stages(
        self, seconds: float, report_progress: Callable[[str], None] = lambda _what: None
    ) -> Candidate:
        """Return the best candidate; `report_progress` hears of each site that is tried.

        seconds: time for the search, earlier work included. The first site of a stage is tried
        in any case.
        """
        self._began, self._seconds = self._clock() - self.work.seconds, seconds
        self._report_progress, depth = report_progress, self.model.layer_count
        subjects = [self._make_subject_site(group) for group in list_windows(depth)]
        ends = [self._make_end_site(n) for n in list_end_layers(depth)]
        for rung in RUNGS:
            best = self._try_rung(rung, [*subjects, *ends])
            places = [self._restore_steps(c.site) for c in best if not c.quality.is_wrecked]
            subjects = [site for site in places if site.subject_layers][: rung.kept]
            ends = [site for site in places if not site.subject_layers][:KEPT_ENDS]
        last = Rung("final", len(self.facts), None, 1.0, 1)
        tried = self._try_rung(last, [*subjects, *ends[:1]])
        self._try_variants("start", self.base_site)
        best_subject = next((c for c in tried if c.site.subject_layers), None)
        if best_subject is not None and best_subject.reached_share < ENOUGH_REACHED:
            self._try_combinations(best_subject.site, ends)
        self._try_ridges(choose_candidate(self.work.candidates).site)
        self._try_clamps(choose_candidate(self.work.candidates).site)
        return choose_candidate(self.work.candidates)

    def solve_deltas(self, site: EditSite) -> dict[int, Tensor]:
        """Solve ΔW by layer of all pilot facts at a site."""
        terms = self._compute_terms(site, len(self.facts))
        return self._solve(site, {n: pack_terms(t) for n, t in terms.items()})

    def compute_anchors(self, site: EditSite) -> dict[int, float]:
        """Return the norm anchors by layer of a site."""
        lengths = [t.lengths for t in self._compute_terms(site, len(self.facts)).values()]
        return {n: round(compute_anchor([one[n] for one in lengths]), 3) for n in site.layers}

    # Stages -------------------------------------------------------------------------------------

    def _has_time(self, share: float = 1.0) -> bool:
        return self._clock() - self._began <= share * self._seconds

    def _try_rung(self, rung: Rung, sites: Sequence[EditSite]) -> list[Candidate]:
        """Try sites until the rung's time is over; return the best candidates, the best first."""
        facts, best = min(rung.facts, len(self.facts)), list[Candidate]()
        for site in sites:
            if best and not self._has_time(rung.time_share):
                break
            steps = min(rung.steps or site.target_steps, site.target_steps)
            tried = self._climb_priors(rung, replace(site, target_steps=steps), facts)
            best.append(max(tried, key=lambda c: c.quality.score))
        return sorted(best, key=lambda c: (-c.quality.score, c.loss or math.inf))

    def _climb_priors(self, rung: Rung, site: EditSite, facts: int) -> list[Candidate]:
        """Try λ by decades, from the one that an earlier stage has found: weaker as long as the
        score rises, or else stronger. A rung without it tries the first alone."""
        priors = list_priors(self.model.weight(site.layers[0]).shape[1])
        start = priors.index(site.prior) if site.prior in priors else FIRST_PRIOR

        def measure(place: int) -> Candidate:
            prior = priors[place]
            return self._measure(rung.name, replace(site, prior=prior, end_prior=prior), facts)

        tried = [measure(start)]
        weaker, stronger = range(start + 1, len(priors)), range(start - 1, -1, -1)
        for places in (weaker, stronger) if rung.climbs else ():
            if len(tried) > 2:  # weaker ones were better
                break
            for place in places:
                top = max(c.quality.score for c in tried)
                tried.append(measure(place))
                if not tried[-1].quality.score > top:
                    break
        return tried

    def _try_variants(self, stage: str, *variants: EditSite) -> None:
        """Try variants of a site on all facts while there is time."""
        for variant in variants:
            if self._has_time():
                self._measure(stage, variant, len(self.facts))

    def _try_combinations(self, subject: EditSite, ends: Sequence[EditSite]) -> None:
        """Try the subject layers with the best end layers above them, which join in half way."""
        start, rate = subject.target_steps // 2, END_RATE_FACTOR * subject.target_rate
        above = [s.end_layers for s in ends if s.end_layers[0] > subject.layers[-1]]
        for layers in above:
            both = replace(subject, end_layers=layers, end_from=start, end_rate=rate)
            variants = [replace(both, end_prior=f * subject.prior) for f in END_PRIOR_FACTORS]
            self._try_variants("combination", *variants)

    def _try_ridges(self, chosen: EditSite) -> None:
        self._try_variants("ridge", *(replace(chosen, ridge=ridge) for ridge in RIDGES))

    def _try_clamps(self, chosen: EditSite) -> None:
        """Try the clamps that would hold another δ than the chosen one."""
        terms = self._compute_terms(chosen, len(self.facts)).values()
        longest = max(
            float(residual.norm(dim=-1).max()) / self.norms[n]
            for t in terms
            for n, residual in t.residuals.items()
        )
        is_held = longest > AT_CLAMP * chosen.clamp
        for clamp in CLAMPS:
            if clamp < min(longest, chosen.clamp) or (is_held and clamp > chosen.clamp):
                self._try_variants("clamp", replace(chosen, clamp=clamp))

    # One try ------------------------------------------------------------------------------------

    def _make_subject_site(self, group: tuple[int, ...]) -> EditSite:
        site = replace(self.base_site, subject_layers=group, end_layers=(), clamp=SCREEN_CLAMP)
        return replace(site, ridge=RIDGES[0], prior=0.0, end_prior=0.0)

    def _make_end_site(self, layer: int) -> EditSite:
        end = replace(self.base_site, subject_layers=(), end_layers=(layer,), clamp=SCREEN_CLAMP)
        end = replace(end, ridge=RIDGES[0], prior=0.0, end_prior=0.0)
        return replace(end, end_from=0, end_rate=self.base_site.target_rate)

    def _restore_steps(self, site: EditSite) -> EditSite:
        return replace(site, target_steps=self.base_site.target_steps)

    def _measure(self, stage: str, site: EditSite, facts: int) -> Candidate:
        """Return the result of a try: known from earlier work, or measured now."""
        if (known := self.work.find(stage, site, facts)) is not None:
            return known
        self._report_progress(f"{stage}: {format_layers(site)}, λ {site.prior:g}")
        terms = self._compute_terms(site, facts)
        try:
            deltas = self._solve(site, {n: pack_terms(t) for n, t in terms.items()})
        except KeditError:  # a prior that is singular, or weights that are not finite
            quality = EditQuality(0.0, 0.0, 0.0, 1.0, math.inf)
        else:
            quality = self._measure_quality(deltas, facts)
        reached = sum(t.steps < site.target_steps for t in terms.values()) / facts
        loss = sum(t.loss for t in terms.values()) / len(terms) if terms else None
        candidate = Candidate(stage, site, facts, loss, reached, quality)
        self.work.candidates.append(candidate)
        self.work.seconds = self._clock() - self._began
        self._save_work(self.work)
        return candidate

    def _compute_terms(self, site: EditSite, facts: int) -> dict[str, EditTerms]:
        key = replace(site, prior=0.0, end_prior=0.0, ridge=0.0), facts
        if key not in self._terms:
            given = self.model, site, self.norms, self.facts[:facts]
            # Empty slots would take as long as full ones.
            found = compute_terms(*given, slots=min(facts, MAX_SLOTS))
            self._terms[key] = {n: t for n, t in found.items() if not isinstance(t, Refusal)}
        return self._terms[key]

    def _solve(self, site: EditSite, packed: Mapping[str, bytes]) -> dict[int, Tensor]:
        """Solve ΔW by layer; covariances of other layers are let go, since they are large."""
        known = {n: self._statistics[n] for n in site.layers if n in self._statistics}
        missing = sorted(set(site.layers) - set(known))
        self._statistics = {**known, **(self._load_covariances(missing) if missing else {})}
        return WeightsTier(site, self._statistics).solve_deltas(packed)
