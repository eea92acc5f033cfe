"""Accuracy of the side memory's routing: recall, false routes and precision by group of prompts.

First by keys and names alone, over the end gate and without the shards' margins; then as served,
with every fact learned into its shard.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kedit_daemon.bench.dataset import split_batches
from kedit_daemon.bench.methods.daemon_tiers import Wise
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.routing_prompts import (
    FACT_GROUPS,
    PROMPT_GROUPS,
    RoutedPrompt,
    build_groups,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.editing.live_model import make_empty_side
from kedit_daemon.system.sanitize import clean_text
from memory.model.generate import group_by_length
from memory.side.row_overlay import RowOverlay
from memory.side.side_memory import SideMemory
from policies.wise import compute_keys

GATES = tuple(n / 20 for n in range(20))  # least cosines of an end key


@dataclass(frozen=True)
class RoutingStudy(Study):
    """Recall, false routes and precision over the end gate."""

    max_texts: int = 10_000
    prefix_tokens: int = 200

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure the routed share of each group's prompts, by gate."""
        model, side = given.loaded_model.model, make_empty_side(given.loaded_model)
        facts = [record.fact for record in given.records]
        keys = compute_keys(model, side, facts)
        for fact in given.track(facts, "keys"):
            side.add_fact(fact.id, 0, keys[fact.id], fact.names, unnamed=fact.omits_subject)
        asked = list(build_groups(given, self.max_texts, self.prefix_tokens).items())
        groups = {name: find_nearest(side, group) for name, group in given.track(asked, "prompts")}
        rows = [{"gate": gate, **_score_gate(groups, gate)} for gate in GATES]
        gate = given.loaded_model.site.end_gate
        with learn_stream(given) as full:
            served = {n: find_fired(full, group) for n, group in given.track(asked, "served")}
            live = len(full.shard_ids)
        others = [one for name in PROMPT_GROUPS if name not in FACT_GROUPS for one in served[name]]
        unrouted = [one for one in others if one.found is None]
        return {
            "texts": given.texts_path and given.texts_path.name,
            "asked": {name: len(group) for name, group in groups.items()},
            "at_gate": {"gate": gate, **_score_gate(groups, gate)},
            "served": {"facts": live, **_score_gate(served, gate)},
            "unrouted": {"prompts": len(unrouted), "other": sum(one.moved for one in unrouted)},
            "rows": rows,
        }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        rows, served = [["gate", *map(_format_head, PROMPT_GROUPS), "precision"]], result["served"]
        for row in (*result["rows"], result["at_gate"], served):
            gate = "" if row is served else f"{row['gate']:.2f}"
            rows.append([gate, *(format_share(row[n]) for n in (*PROMPT_GROUPS, "precision"))])
        *table, in_use, last = align_rows(rows)
        yield from table
        yield ""
        yield "in use, by keys and names:"
        yield in_use
        yield f"as served, {served['facts']} facts learned:"
        yield last
        yield "asked: " + ", ".join(f"{count} {name}" for name, count in result["asked"].items())
        if result["texts"]:
            yield f"text: lines of {clean_text(result['texts'])}"
        unrouted = result["unrouted"]
        yield f"unrouted: {unrouted['prompts']}, of which {unrouted['other']} have other logits"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        rows = result["rows"]
        gates, precision = [r["gate"] for r in rows], [to_percent(r["precision"]) for r in rows]
        for name in PROMPT_GROUPS:
            shares = [to_percent(row[name]) for row in rows]
            right.plot(gates, shares, marker=".", label=_format_head(name))
            if name in FACT_GROUPS:
                left.plot(shares, precision, marker=".", label=name)
        right.axvline(result["at_gate"]["gate"], color="grey", label="in use")
        left.set(xlabel="recall, %", ylabel="precision, %", title="Precision and recall")
        right.set(xlabel="end gate", ylabel="% routed", title="Routed by group")


def _format_head(group: str) -> str:
    return group if group in FACT_GROUPS else f"false: {group}"


def find_nearest(side: SideMemory, group: Sequence[RoutedPrompt]) -> list[RoutedPrompt]:
    """Route each prompt to the fact with the nearest end key, of those whose subject is in it."""
    encoded = [tuple(side.model.encode(one.prompt)) for one in group]
    result = list(group)
    for places in group_by_length(encoded):
        ids = torch.tensor([encoded[place] for place in places], device=side.model.device)
        caught: dict[int, Tensor] = {}

        def catch_outputs(_in: Tensor, out: Tensor, caught: dict[int, Tensor] = caught) -> None:
            caught[len(caught)] = out  # the key layer's, then the side layer's

        taps = {side.gates.key_layer: catch_outputs, side.layer: catch_outputs}
        with torch.no_grad(), side.model.tap_layers(taps):
            side.model.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for row, place in enumerate(places):
            candidates = side.find_candidates(encoded[place], caught[0][row])
            scores = side.score_candidates(candidates, caught[1][row, -1])
            if scores:
                best = max(scores, key=lambda n: scores[n])
                result[place] = replace(group[place], found=best, score=scores[best])
    return result


@contextmanager
def learn_stream(given: StudyInput) -> Iterator[SideMemory]:
    """Yield a side memory that has learned the facts of the stream, as in the daemon."""
    with given.open_method(Wise) as tier:
        for batch in given.track(split_batches(given.records, given.batch_size), "learned"):
            tier.edit(batch)
        yield tier.live_model.side


def find_fired(side: SideMemory, group: Sequence[RoutedPrompt]) -> list[RoutedPrompt]:
    """Route each prompt to the fact that fires; mark those unrouted whose logits changed in a bit.

    Prompts run one at a time, so that nothing else decides about their bits.
    """
    result = []
    for one in group:
        ids = torch.tensor([side.model.encode(one.prompt)], device=side.model.device)
        rows = RowOverlay(side)
        with torch.no_grad():
            with rows.follow_passes():
                overlaid = side.model.hf_model(input_ids=ids, use_cache=False).logits
            if match := rows.matches[0]:
                result.append(replace(one, found=match.fact_id, score=match.score))
                continue
            alone = side.model.hf_model(input_ids=ids, use_cache=False).logits
        result.append(replace(one, moved=not torch.equal(alone, overlaid)))
    return result


def _score_gate(
    groups: Mapping[str, Sequence[RoutedPrompt]], gate: float
) -> dict[str, float | None]:
    """Compute routed shares: of prompts about a fact, to that fact; of other prompts, to any fact.

    precision: of all routed prompts, the share routed to the right fact.
    """
    reached = {name: [a for a in group if a.score >= gate] for name, group in groups.items()}
    right = {n: [a for a in group if a.found == a.fact_id] for n, group in reached.items()}
    result: dict[str, float | None] = {}
    for name, group in groups.items():
        counted = right[name] if name in FACT_GROUPS else reached[name]
        result[name] = len(counted) / len(group) if group else None
    fired = sum(map(len, reached.values()))
    result["precision"] = sum(len(right[name]) for name in FACT_GROUPS) / fired if fired else None
    return result
