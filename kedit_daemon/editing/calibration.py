"""Calibration: edit a pilot of facts, and derive the site and the limits from the effect."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from kedit_daemon.editing.limit_measurement import LIMIT_RULES, measure_limits
from kedit_daemon.editing.model_loading import OpenedModel
from kedit_daemon.editing.pilot import Pilot, PilotExaminer
from kedit_daemon.home import Home, open_database
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import KeditError
from memory.facts import Fact, FactState
from memory.files import write_atomic
from memory.model.editable import EditableModel
from memory.model.statistics import LayerStatistics
from memory.side.side_memory import SideMemory
from policies.calibration import MAX_PERPLEXITY, SCORE_SPREAD
from policies.edit_site import EditSite
from policies.end_gate import fit_end_gate
from policies.prompts import TokenRow, make_rows
from policies.site_search import SearchWork, SiteSearch, StatisticsSource

# Covariances of all layers together, up to which they are measured in one pass and held.
MAX_COVARIANCE_BYTES = 1 << 30
SEARCH_SHARE = 0.65  # of the time after the statistics; the limits and the end gate take the rest
WORK_FILE = "search.json"
RULES = {
    "anchors": "by layer the mean length of the pilot's targets, without the longest 5 %",
    "choice": "the harmonic mean of reliability, generality and locality, where the perplexity"
    f" ratio is at most {MAX_PERPLEXITY}; within its standard error of the best,"
    f" {SCORE_SPREAD} / √facts, the largest reliability, and then the smallest norm ratio",
    "end_gate": "the cosine that at most a share false_routes of the pairs of a pilot's fact and a"
    " piece of ordinary text reach",
    **LIMIT_RULES,
}
log = logging.getLogger(__name__)

ReportProgress = Callable[[str], None]


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


def calibrate(
    opened: OpenedModel,
    pilot: Pilot,
    false_routes: float,
    seconds: float,
    work_folder: Path,
    report: ReportProgress,
) -> Calibration:
    """Search for the site of an unedited model, and derive its limits and its end gate.

    false_routes: the share of unrelated text that may pass the end gate. seconds: for all of it,
    of which the search leaves some for what comes after it. work_folder: keeps the work, so that a
    calibration that was cut off is taken up; it is gone at the end. report: hears of each step.
    """
    began, model = time.monotonic(), opened.model
    report("statistics of all layers")
    statistics, covariances = _measure_statistics(replace(opened, cache_folder=work_folder))
    norms = {n: s.median_norm for n, s in statistics.items()}
    base = replace(opened.resolve_site(), anchors={})  # they belong to other targets
    key = _hash_arguments(opened.base_hash, pilot, base)
    search = SiteSearch(
        model,
        base,
        pilot.facts,
        PilotExaminer(model, pilot),
        norms,
        covariances,
        _load_work(work_folder / WORK_FILE, key),
        partial(_save_work, work_folder / WORK_FILE, key),
    )
    left = seconds - (time.monotonic() - began)
    chosen = search.run_stages(SEARCH_SHARE * left, report)
    report("limits")
    site, figures = measure_limits(model, chosen.site, search.solve_deltas(chosen.site))
    report("end gate")
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
        "candidates": [candidate.as_dict() for candidate in search.work.candidates],
        **figures,
        "end_gate": gate.as_dict(),
        "clean_norms": _measure_clean_norms(model, site, pilot.facts),
        "seconds": round(time.monotonic() - began, 1),
    }
    opened.keep_statistics(
        {**statistics, **covariances(site.layers)}, site.layers, (site.key_layer, site.side_layer)
    )
    shutil.rmtree(work_folder)
    return Calibration(site, evidence)


def _measure_statistics(
    opened: OpenedModel,
) -> tuple[dict[int, LayerStatistics], StatisticsSource]:
    """Return the statistics of all layers, and a source of their covariances: all of them are
    measured in one pass, unless they are too large to be held together."""
    layers = range(opened.model.layer_count)
    size = sum(4 * opened.model.weight(n).shape[1] ** 2 for n in layers)
    if size <= MAX_COVARIANCE_BYTES:
        statistics = opened.resolve_statistics(layers, (), iter)
        # A search solves many times with one covariance: it is unpacked once.
        return statistics, lambda wanted: {
            n: replace(statistics[n], key_covariance=statistics[n].covariance) for n in wanted
        }
    narrow = opened.resolve_statistics((), layers, iter)
    return narrow, lambda wanted: opened.resolve_statistics(wanted, (), iter)


def _hash_arguments(base_hash: str, pilot: Pilot, base: EditSite) -> str:
    """Compute the sha256 of everything that the results of a search depend on."""
    facts = [[fact.question, fact.subject, fact.target] for fact in pilot.facts]
    content = [base_hash, facts, pilot.held_out, pilot.near, asdict(base)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _load_work(path: Path, key: str) -> SearchWork:
    """Load the work of an earlier search with the same arguments; else return an empty one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] == key:
            text = json.dumps(content["work"])
            return TypeAdapter(SearchWork).validate_json(text)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        log.warning("%s is damaged: %s. Searching from the start.", path, error)
    return SearchWork()


def _save_work(path: Path, key: str, work: SearchWork) -> None:
    write_atomic(path, json.dumps({"key": key, "work": asdict(work)}).encode())


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
