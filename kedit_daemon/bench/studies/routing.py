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

from kedit_daemon.bench.dataset import batches
from kedit_daemon.bench.method import Setup
from kedit_daemon.bench.studies.prompts import ABOUT, GROUPS, Asked, groups_of
from kedit_daemon.bench.studies.shared import cent
from kedit_daemon.bench.studies.study import Given, Study
from kedit_daemon.bench.table import aligned, share
from kedit_daemon.bench.tiers import Wise
from kedit_daemon.editing.live_model import empty_side
from kedit_daemon.system.sanitize import clean
from memory.model.generate import equally_long
from memory.side.side_memory import Match, SideMemory
from policies.wise import retrieval_keys

GATES = tuple(n / 20 for n in range(20))  # least cosines of an end key


class Routing(Study):
    """Recall, false routes and precision over the end gate."""

    def run(self, given: Given) -> dict[str, Any]:
        """Shares of the prompts of each group, by gate."""
        model, side = given.loaded.model, empty_side(given.loaded)
        facts = [record.fact for record in given.records]
        keys = retrieval_keys(model, side, facts)
        for fact in given.track(facts, "keys"):
            side.put(fact.id, 0, keys[fact.id], fact.subject, unnamed=fact.unnamed)
        asked = list(groups_of(given).items())
        groups = {name: found(side, group) for name, group in given.track(asked, "prompts")}
        rows = [{"gate": gate, **_at(groups, gate)} for gate in GATES]
        gate = given.loaded.site.end_gate
        with learned(given) as full:
            served = {n: answered(full, group) for n, group in given.track(asked, "served")}
            live = len(full.shard_of)
        quiet = [one for name in GROUPS if name not in ABOUT for one in served[name]]
        alone = [one for one in quiet if one.found is None]
        return {
            "texts": given.texts and given.texts.name,
            "asked": {name: len(group) for name, group in groups.items()},
            "at_gate": {"gate": gate, **_at(groups, gate)},
            "served": {"facts": live, **_at(served, gate)},
            "unrouted": {"prompts": len(alone), "other": sum(one.moved for one in alone)},
            "rows": rows,
        }

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """A row for each gate, then the one in use."""
        rows = [["gate", *map(_head, GROUPS), "precision"]]
        for row in [*result["rows"], result["at_gate"]]:
            rows.append([f"{row['gate']:.2f}", *(share(row[n]) for n in (*GROUPS, "precision"))])
        served = result["served"]
        rows.append(["", *(share(served[n]) for n in (*GROUPS, "precision"))])
        *table, in_use, last = aligned(rows)
        yield from table
        yield ""
        yield "in use, by keys and names:"
        yield in_use
        yield f"as served, {served['facts']} facts learned:"
        yield last
        yield "asked: " + ", ".join(f"{many} {name}" for name, many in result["asked"].items())
        if result["texts"]:
            yield f"text: lines of {clean(result['texts'])}"
        quiet = result["unrouted"]
        yield f"unrouted: {quiet['prompts']}, of which {quiet['other']} have other logits"

    def draw(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """Precision against recall, and the shares against the gate."""
        rows = result["rows"]
        for name in ABOUT:
            left.plot(
                [cent(row[name]) for row in rows],
                [cent(row["precision"]) for row in rows],
                marker=".",
                label=name,
            )
        for name in GROUPS:
            right.plot(
                [row["gate"] for row in rows],
                [cent(row[name]) for row in rows],
                marker=".",
                label=_head(name),
            )
        right.axvline(result["at_gate"]["gate"], color="grey", label="in use")
        left.set(xlabel="recall, %", ylabel="precision, %", title="Precision and recall")
        right.set(xlabel="end gate", ylabel="% routed", title="Routed by group")


def _head(group: str) -> str:
    return group if group in ABOUT else f"false: {group}"


def found(side: SideMemory, group: Sequence[Asked]) -> list[Asked]:
    """Every prompt with the fact whose end key is nearest, of those whose subject is in it."""
    encoded = [tuple(side.model.encode(one.prompt)) for one in group]
    result = list(group)
    for places in equally_long(encoded):
        ids = torch.tensor([encoded[place] for place in places], device=side.model.device)
        caught: dict[int, Tensor] = {}

        def look(_inputs: Tensor, outputs: Tensor, caught: dict[int, Tensor] = caught) -> None:
            caught[len(caught)] = outputs  # the key layer's, then the side layer's

        taps = {side.gates.key_layer: look, side.layer: look}
        with torch.no_grad(), side.model.tap(taps):
            side.model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for row, place in enumerate(places):
            scores = side.asked(side.candidates(encoded[place], caught[0][row]), caught[1][row, -1])
            if scores:
                best = max(scores, key=lambda n: scores[n])
                one = group[place]
                result[place] = Asked(one.prompt, one.fact_id, best, scores[best])
    return result


@contextmanager
def learned(given: Given) -> Iterator[SideMemory]:
    """A side memory that has learned the facts of the stream, as the daemon would."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        tier = Wise(Setup(given.loaded, Path(folder), given.batch_size, given.seed))
        try:
            for batch in given.track(batches(given.records, given.batch_size), "learned"):
                tier.edit(batch)
            yield tier.served.side
        finally:
            tier.close()


def answered(side: SideMemory, group: Sequence[Asked]) -> list[Asked]:
    """Every prompt with the fact that fired, and whether the logits of one that no fact answers
    differ in a bit from those of the model alone. One at a time: so does nothing else decide about
    its bits."""
    result = []
    for one in group:
        ids = torch.tensor([side.model.encode(one.prompt)], device=side.model.device)
        fired: list[Match | None] = []
        with torch.no_grad():
            with side.overlay(fired):
                beside = side.model.model(input_ids=ids, use_cache=False).logits
            if match := fired[0]:
                result.append(replace(one, found=match.fact_id, score=match.score))
                continue
            alone = side.model.model(input_ids=ids, use_cache=False).logits
        result.append(replace(one, moved=not torch.equal(alone, beside)))
    return result


def _at(groups: Mapping[str, Sequence[Asked]], gate: float) -> dict[str, float | None]:
    """Of prompts about a fact, the share that reaches it; of the others, that which reaches any;
    and of all that reach one, the share that reaches the right one."""
    reached = {name: [a for a in group if a.score >= gate] for name, group in groups.items()}
    right = {name: [a for a in some if a.found == a.fact_id] for name, some in reached.items()}
    result: dict[str, float | None] = {}
    for name, group in groups.items():
        counted = right[name] if name in ABOUT else reached[name]
        result[name] = len(counted) / len(group) if group else None
    fired = sum(map(len, reached.values()))
    result["precision"] = sum(len(right[name]) for name in ABOUT) / fired if fired else None
    return result
