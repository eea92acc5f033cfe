"""Which prompts the side memory takes for questions about a fact.

Over the gate by keys and names alone, without what a shard's margin turns away as well; then as it
is served, with every fact learned into its shard.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit_daemon.bench.dataset import split_batches
from kedit_daemon.bench.method import MethodSetup
from kedit_daemon.bench.studies.prompts import (
    FACT_GROUPS,
    PROMPT_GROUPS,
    RoutedPrompt,
    build_groups,
)
from kedit_daemon.bench.studies.shared import to_percent
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.bench.tiers import Wise
from kedit_daemon.editing.live_model import make_empty_side
from kedit_daemon.system.sanitize import clean_text
from memory.model.generate import group_by_length
from memory.side.side_memory import RoutingMatch, SideMemory
from policies.wise import compute_keys

GATES = tuple(n / 20 for n in range(20))  # least cosines of an end key


class RoutingStudy(Study):
    """Recall, false routes and precision over the end gate."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Shares of the prompts of each group, by gate."""
        model, side = given.loaded_model.model, make_empty_side(given.loaded_model)
        facts = [record.fact for record in given.records]
        keys = compute_keys(model, side, facts)
        for fact in given.track(facts, "keys"):
            side.add_fact(fact.id, 0, keys[fact.id], fact.subject, unnamed=fact.omits_subject)
        asked = list(build_groups(given).items())
        groups = {name: find_nearest(side, group) for name, group in given.track(asked, "prompts")}
        rows = [{"gate": gate, **_score_gate(groups, gate)} for gate in GATES]
        gate = given.loaded_model.site.end_gate
        with learn_stream(given) as full:
            served = {n: find_fired(full, group) for n, group in given.track(asked, "served")}
            live = len(full.shard_ids)
        quiet = [one for name in PROMPT_GROUPS if name not in FACT_GROUPS for one in served[name]]
        alone = [one for one in quiet if one.found is None]
        return {
            "texts": given.texts_path and given.texts_path.name,
            "asked": {name: len(group) for name, group in groups.items()},
            "at_gate": {"gate": gate, **_score_gate(groups, gate)},
            "served": {"facts": live, **_score_gate(served, gate)},
            "unrouted": {"prompts": len(alone), "other": sum(one.moved for one in alone)},
            "rows": rows,
        }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """A row for each gate, then the one in use."""
        rows = [["gate", *map(_format_head, PROMPT_GROUPS), "precision"]]
        for row in [*result["rows"], result["at_gate"]]:
            rows.append(
                [
                    f"{row['gate']:.2f}",
                    *(format_share(row[n]) for n in (*PROMPT_GROUPS, "precision")),
                ]
            )
        served = result["served"]
        rows.append(["", *(format_share(served[n]) for n in (*PROMPT_GROUPS, "precision"))])
        *table, in_use, last = align_rows(rows)
        yield from table
        yield ""
        yield "in use, by keys and names:"
        yield in_use
        yield f"as served, {served['facts']} facts learned:"
        yield last
        yield "asked: " + ", ".join(f"{many} {name}" for name, many in result["asked"].items())
        if result["texts"]:
            yield f"text: lines of {clean_text(result['texts'])}"
        quiet = result["unrouted"]
        yield f"unrouted: {quiet['prompts']}, of which {quiet['other']} have other logits"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """Precision against recall, and the shares against the gate."""
        rows = result["rows"]
        for name in FACT_GROUPS:
            left.plot(
                [to_percent(row[name]) for row in rows],
                [to_percent(row["precision"]) for row in rows],
                marker=".",
                label=name,
            )
        for name in PROMPT_GROUPS:
            right.plot(
                [row["gate"] for row in rows],
                [to_percent(row[name]) for row in rows],
                marker=".",
                label=_format_head(name),
            )
        right.axvline(result["at_gate"]["gate"], color="grey", label="in use")
        left.set(xlabel="recall, %", ylabel="precision, %", title="Precision and recall")
        right.set(xlabel="end gate", ylabel="% routed", title="Routed by group")


def _format_head(group: str) -> str:
    return group if group in FACT_GROUPS else f"false: {group}"


def find_nearest(side: SideMemory, group: Sequence[RoutedPrompt]) -> list[RoutedPrompt]:
    """Every prompt with the fact whose end key is nearest, of those whose subject is in it."""
    encoded = [tuple(side.model.encode(one.prompt)) for one in group]
    result = list(group)
    for places in group_by_length(encoded):
        ids = torch.tensor([encoded[place] for place in places], device=side.model.device)
        caught: dict[int, Tensor] = {}

        def catch_outputs(
            _inputs: Tensor, outputs: Tensor, caught: dict[int, Tensor] = caught
        ) -> None:
            caught[len(caught)] = outputs  # the key layer's, then the side layer's

        taps = {side.gates.key_layer: catch_outputs, side.layer: catch_outputs}
        with torch.no_grad(), side.model.tap_layers(taps):
            side.model.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for row, place in enumerate(places):
            scores = side.score_candidates(
                side.find_candidates(encoded[place], caught[0][row]), caught[1][row, -1]
            )
            if scores:
                best = max(scores, key=lambda n: scores[n])
                one = group[place]
                result[place] = RoutedPrompt(one.prompt, one.fact_id, best, scores[best])
    return result


@contextmanager
def learn_stream(given: StudyInput) -> Iterator[SideMemory]:
    """A side memory that has learned the facts of the stream, as the daemon would."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        tier = Wise(MethodSetup(given.loaded_model, Path(folder), given.batch_size, given.seed))
        try:
            for batch in given.track(split_batches(given.records, given.batch_size), "learned"):
                tier.edit(batch)
            yield tier.live_model.side
        finally:
            tier.close()


def find_fired(side: SideMemory, group: Sequence[RoutedPrompt]) -> list[RoutedPrompt]:
    """Every prompt with the fact that fired, and whether the logits of one that no fact answers
    differ in a bit from those of the model alone. One at a time: so does nothing else decide about
    its bits."""
    result = []
    for one in group:
        ids = torch.tensor([side.model.encode(one.prompt)], device=side.model.device)
        fired: list[RoutingMatch | None] = []
        with torch.no_grad():
            with side.overlay_matches(fired):
                beside = side.model.hf_model(input_ids=ids, use_cache=False).logits
            if match := fired[0]:
                result.append(replace(one, found=match.fact_id, score=match.score))
                continue
            alone = side.model.hf_model(input_ids=ids, use_cache=False).logits
        result.append(replace(one, moved=not torch.equal(alone, beside)))
    return result


def _score_gate(
    groups: Mapping[str, Sequence[RoutedPrompt]], gate: float
) -> dict[str, float | None]:
    """Of prompts about a fact, the share that reaches it; of the others, that which reaches any;
    and of all that reach one, the share that reaches the right one."""
    reached = {name: [a for a in group if a.score >= gate] for name, group in groups.items()}
    right = {name: [a for a in some if a.found == a.fact_id] for name, some in reached.items()}
    result: dict[str, float | None] = {}
    for name, group in groups.items():
        counted = right[name] if name in FACT_GROUPS else reached[name]
        result[name] = len(counted) / len(group) if group else None
    fired = sum(map(len, reached.values()))
    result["precision"] = sum(len(right[name]) for name in FACT_GROUPS) / fired if fired else None
    return result
