"""Calibration: edit a pilot of facts, and derive the site and the limits from the effect."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_daemon.editing.limit_measurement import LIMIT_RULES, measure_limits
from kedit_daemon.editing.model_loading import OpenedModel
from kedit_daemon.home import Home, open_database
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import KeditError
from memory.facts import Fact, FactState
from memory.model.editable import EditableModel
from memory.model.scoring import PromptAnswer, score_answers
from memory.side.side_memory import SideMemory
from policies.calibration import SCORE_SPREAD, EditQuality, SiteSearch
from policies.edit_site import EditSite
from policies.end_gate import fit_end_gate
from policies.probe import MAX_NEIGHBOURS
from policies.prompts import MAX_PARAPHRASES, TokenRow, make_rows

MAX_PROMPT_TOKENS = 200  # tokens of a wording or near prompt; longer ones are left out
ROWS_PER_PASS = 8  # whose logits are all held at once
RULES = {
    "anchors": "by layer the mean length of the pilot's targets, without the longest 5 %",
    "choice": "the harmonic mean of reliability, generality and locality; within its standard"
    f" error of the best, {SCORE_SPREAD} / √facts, the smallest norm ratio",
    "end_gate": "the cosine that at most a share false_routes of the pairs of a pilot's fact and a"
    " piece of ordinary text reach",
    **LIMIT_RULES,
}

ReportProgress = Callable[[str], None]
StartProgress = Callable[[int], ReportProgress]
"""Called with the number of units of work; returns what to call at the start of each."""


@dataclass(frozen=True)
class Pilot:
    """Facts to edit, and prompts to ask then, which no edit has seen."""

    facts: tuple[Fact, ...]
    held_out: tuple[tuple[int, str, str], ...]  # place of the fact, prompt and target
    near: tuple[str, ...]  # prompts whose answers must stay


@dataclass(frozen=True)
class Calibration:
    """The chosen site and the evidence for it."""

    site: EditSite
    evidence: dict[str, Any]


def refuse_if_in_use(home: Home) -> None:
    """Raise KeditError if terms are stored: they belong to the layers they were computed for."""
    if not home.database_file.is_file():
        return
    with open_database(home) as conn:
        stored = conn.execute("SELECT count(*) FROM terms").fetchone()[0]
        count = "SELECT count(*) FROM facts WHERE state = ?"
        live = conn.execute(count, (FactState.LIVE_WEIGHTS,)).fetchone()[0]
    if stored or live:
        raise KeditError(
            f"{home.root} is in use: facts in the weights {live}, stored terms {stored}, which"
            " belong to the layers that are edited now",
            code="in-use",
            hint="calibrate a new home: kedit-daemon --home DIR init (terms outlive a revert,"
            " since older generations need them)",
        )


def read_pilot(path: Path, limits: FileLimits) -> list[Fact]:
    """Read the facts of a file in any accepted form, one for each question; skip broken records."""
    parsed = parse_file(path.read_bytes(), path.name, None, limits)
    if not parsed.facts:
        first = parsed.problems[0]
        raise KeditError(f"{path}:{first.line}: {first.problem}", code="pilot", hint=first.remedy)
    return list({fact.slot: fact for _, fact in parsed.facts}.values())


def make_pilot(model: EditableModel, facts: Sequence[Fact], count: int) -> Pilot:
    """Make a pilot of at most `count` facts. Without paraphrases, the question after other words is
    held out; without neighbours, the questions of facts that are not edited are near."""
    usable = [fact for fact in facts if _is_readable(model, fact)]
    edited, others = usable[:count], usable[count : 2 * count]
    if not any(fact.neighbours for fact in edited) and not others:
        kept = len(edited) - len(edited) // 3
        edited, others = edited[:kept], edited[kept:]
    near = [n.prompt for fact in edited for n in fact.neighbours[:MAX_NEIGHBOURS]]
    near = list(dict.fromkeys(near)) or [fact.question for fact in others]
    asked = {fact.question for fact in edited}
    near = [p for p in near if p not in asked and len(model.encode(p)) <= MAX_PROMPT_TOKENS]
    held_out = _select_held_out(model, edited)
    if not near or not held_out:
        raise KeditError(
            "the pilot has too few facts that this model can read",
            code="pilot",
            hint="give at least three, or facts with neighbours, with --pilot",
        )
    facts_only = tuple(replace(fact, paraphrases=()) for fact in edited)
    return Pilot(facts_only, tuple(held_out), tuple(near))


def _select_held_out(model: EditableModel, facts: Sequence[Fact]) -> list[tuple[int, str, str]]:
    placed = list(enumerate(facts))
    held_out = [
        (n, p, fact.target) for n, fact in placed for p in fact.filled_paraphrases[:MAX_PARAPHRASES]
    ]
    if not held_out:
        lines = [" ".join(line.split()[:8]).rstrip(".") for line in read_ordinary_lines()]
        pairs = zip(lines, placed, strict=False)
        held_out = [(n, f"{line}. {fact.question}", fact.target) for line, (n, fact) in pairs]
    return [one for one in held_out if len(model.encode(one[1])) <= MAX_PROMPT_TOKENS]


def _is_readable(model: EditableModel, fact: Fact) -> bool:
    try:
        make_rows(model, replace(fact, paraphrases=()))
    except KeditError:
        return False
    return True


class PilotExaminer:
    """Scores an edit on the pilot. An answer is right if every token of the target is the
    likeliest; a near prompt is unchanged if its likeliest next token is that of the base."""

    def __init__(self, model: EditableModel, pilot: Pilot) -> None:
        self.model = model
        self._fact_rows = [self._encode_row(fact.question, fact.target) for fact in pilot.facts]
        self._held_out_rows = [self._encode_row(prompt, end) for _, prompt, end in pilot.held_out]
        self._near_rows = [PromptAnswer(tuple(model.encode(prompt)), (0,)) for prompt in pilot.near]
        self._near_before = self._predict_next(self._near_rows)

    def __call__(self, deltas: Mapping[int, Tensor]) -> EditQuality:
        """Measure the quality of the unedited weights plus ΔW; the model ends unedited."""
        model = self.model
        model.set_deltas(dict(deltas))
        try:
            pairs = zip(self._predict_next(self._near_rows), self._near_before, strict=True)
            same = [now == before for now, before in pairs]
            ratios = [float(model.weight(n).norm() / model.base_weight(n).norm()) for n in deltas]
            return EditQuality(
                reliability=self._score_rows(self._fact_rows),
                generality=self._score_rows(self._held_out_rows),
                locality=sum(same) / len(same),
                norm_ratio=max(ratios, default=1.0),
            )
        finally:
            model.set_deltas({})

    def _encode_row(self, prompt: str, target: str) -> PromptAnswer:
        answer = self.model.encode_target(prompt, target)
        return PromptAnswer(tuple(self.model.encode(prompt)), tuple(answer))

    def _score_rows(self, rows: Sequence[PromptAnswer]) -> float:
        scores = score_answers(self.model, rows, rows_per_pass=ROWS_PER_PASS)
        return sum(all(score.token_hits) for score in scores) / len(rows)

    def _predict_next(self, rows: Sequence[PromptAnswer]) -> list[tuple[int, ...]]:
        """Return the likeliest next token of each prompt."""
        scores = score_answers(self.model, rows, rows_per_pass=ROWS_PER_PASS)
        return [score.tokens for score in scores]


def calibrate(
    opened: OpenedModel, pilot: Pilot, false_routes: float, watch: StartProgress
) -> Calibration:
    """Search for the site of an unedited model, and derive its limits and its end gate.

    `false_routes`: the share of unrelated text that may pass the end gate.
    """
    began, model = time.monotonic(), opened.model
    statistics = opened.resolve_statistics((), range(model.layer_count), iter)
    norms = {n: s.median_norm for n, s in statistics.items()}
    search = SiteSearch(
        model,
        replace(opened.resolve_site(), anchors={}),  # they belong to other targets
        pilot.facts,
        PilotExaminer(model, pilot),
        norms,
        lambda layers: opened.resolve_statistics(layers, (), iter),
    )
    report = watch(search.max_units + 1)
    chosen = search.run_stages(report)
    report("limits")
    site, figures = measure_limits(model, chosen.site, search.solve_deltas(chosen.site))
    side = SideMemory(model, site.gates, {n: s.output_mean for n, s in statistics.items()})
    asked = [(n, prompt) for n, prompt, _ in pilot.held_out]
    gate = fit_end_gate(side, pilot.facts, asked, read_ordinary_lines(), false_routes)
    site = replace(site, anchors=search.compute_anchors(chosen.site), end_gate=gate.gate)
    evidence = {
        "made_by": "kedit-daemon calibrate",
        "weights": opened.base_hash,
        "pilot": {name: len(part) for name, part in vars(pilot).items()},
        "rules": RULES,
        "chosen": chosen.as_dict(),
        "candidates": [candidate.as_dict() for candidate in search.candidates],
        **figures,
        "end_gate": gate.as_dict(),
        "clean_norms": _measure_clean_norms(model, site, pilot.facts),
        "seconds": round(time.monotonic() - began, 1),
    }
    return Calibration(site, evidence)


def _measure_clean_norms(
    model: EditableModel, site: EditSite, facts: Sequence[Fact]
) -> dict[int, float]:
    """Measure the median ‖y‖ of the unedited model by layer, at the tokens that are edited."""
    norms: dict[int, list[Tensor]] = {n: [] for n in site.layers}
    for row in (row for fact in facts for row in make_rows(model, fact)):

        def keep(n: int, _inputs: Tensor, outputs: Tensor, row: TokenRow = row) -> None:
            tokens = slice(row.prompt_length - 1, len(row.ids) - 1)
            if n in site.subject_layers:
                tokens = slice(row.subject_index, row.subject_index + 1)
            norms[n].append(outputs[0, tokens].norm(dim=-1).cpu())

        taps = {n: partial(keep, n) for n in site.layers}
        with torch.no_grad(), model.tap_layers(taps):
            model.hf_model(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False)
    return {n: float(torch.cat(parts).median()) for n, parts in norms.items()}
