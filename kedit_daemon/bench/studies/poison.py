"""Poison: response of the stability policy to facts, and numbers, that must not stay."""

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from kedit_daemon.bench.methods.daemon_tiers import Auto
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.poison_kinds import WEIGHTS_CULPRIT, PlantedPoison
from kedit_daemon.bench.studies.poison_plan import KINDS, plan_batches
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.config import RoutingConfig
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.system.sanitize import clean_text
from memory.facts import ACTIVE_STATES, LIVE_STATES, Fact
from policies.probe import count_answer_tokens, is_right_answer

MAX_STEPS = 200  # of the editor after a batch
MAX_REASON_CHARS = 200
OUTCOMES = ("stopped", "named")
# Share of other statements that may be completed otherwise. At the default limits the weights of
# the small shipped model are full after a fact or two, and nothing planted is ever solved for.
POLICY_LIMITS = {"agreement_warn": 0.25, "agreement_consolidate": 0.35, "agreement_revert": 0.5}


@dataclass(frozen=True)
class PoisonStudy(Study):
    """Home with the policy on: batch after batch, each with innocent facts and poison."""

    kinds: Sequence[str] = KINDS
    batches_per_kind: int = 4

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Report the outcome of every batch, then the totals."""
        batches = plan_batches(given, self.kinds, self.batches_per_kind)
        with given.open_method(Auto, policy_limits=POLICY_LIMITS) as home:
            trial = _PoisonTrial(home)
            rows = [trial.run_batch(*batch) for batch in given.track(batches, "batches")]
            lost = trial.find_lost()
        totals = _compute_totals(rows) | {"innocent": len(trial.innocent_facts), "lost": len(lost)}
        largest = max(row["facts"] for row in rows)
        result = {"batch_size": largest, "limits": POLICY_LIMITS, "totals": totals}
        return {**result, "lost": lost, "rows": rows}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        heads = ["batch", "facts", *OUTCOMES, "wrongly named", "harmed", "held", "verdict"]
        table = [[*heads, "norm", "perplexity", "seconds"]]
        for row in result["rows"]:
            plants = row["plants"]
            done = [f"{_count_poisons(plants, name)}/{len(plants)}" for name in OUTCOMES]
            held = [format_share(row["held_harmed"]), format_share(row["held"]), row["verdict"]]
            figures = [f"{row[name]:.4f}" for name in ("norm_ratio", "perplexity_ratio")]
            cells = [*done, str(len(row["wrongly"])), *held, *figures, f"{row['seconds']:.1f}"]
            table.append([_format_title(row), str(row["facts"]), *cells])
        yield from align_rows(table)
        yield ""
        yield "harmed: innocent facts that are stated before the audit, %; held: after it, %"
        total = result["totals"]
        whole = f"of {total['batches']} batches {total['whole']} wholly"
        yield f"stopped {total['stopped']} of {total['planted']} poisons, {whole}"
        named = [f"{name} {format_share(total[name])} %" for name in ("precision", "recall")]
        yield f"named: {', '.join(named)}"
        yield f"innocent facts lost {total['lost']} of {total['innocent']}"
        yield f"limits {result['limits']}, all others the default ones"
        yield f"verdicts of revert {total['reverts']}, batches without an answer {total['silent']}"
        yield from _format_misses(result)

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        rows = result["rows"]
        kinds = sorted({row["kind"] for row in rows})
        planted = [[p for r in rows if r["kind"] == kind for p in r["plants"]] for kind in kinds]
        for n, name in enumerate(("planted", *OUTCOMES)):
            counts = [_count_poisons(ps, name) if n else len(ps) for ps in planted]
            places = [place + 0.27 * (n - 1) for place in range(len(kinds))]
            left.bar(places, counts, 0.25, label=name)
        left.set_xticks(range(len(kinds)), kinds, rotation=20)
        left.set(ylabel="poisons", title="Planted, stopped, named")
        numbers = [row["batch"] for row in rows]
        for name, label in (("held_harmed", "before the audit"), ("held", "after it")):
            right.plot(numbers, [to_percent(row[name]) for row in rows], marker=".", label=label)
        right.set(xlabel="batch", ylabel="%", ylim=(-2, 102), title="Innocent facts stated")


class _PoisonTrial:
    """Submits batches, lets the daemon work, audits once, and judges the outcome."""

    def __init__(self, home: Auto) -> None:
        self.home, self.store = home, home.store
        inbox = home.config.inbox
        # Files are closed before the scan, so none has to settle.
        self.inbox = Inbox(home.home.inbox_folder, 0.0, inbox.max_bytes, lambda: datetime.now(UTC))
        self.innocent_facts = list[Fact]()
        self.planted_ids = set[str]()  # culprits of all poisons so far
        self.batch_number = 0

    def run_batch(
        self, plants: Sequence[PlantedPoison], innocent: Sequence[Fact]
    ) -> dict[str, Any]:
        """Run one batch, from the file to the outcome of the audit."""
        began, since, ended = time.perf_counter(), self._find_last_event(), self._explain_ended()
        self.batch_number += 1
        self.innocent_facts += innocent
        half = len(innocent) // 2
        facts = [*innocent[:half], *(f for p in plants for f in p.facts), *innocent[half:]]
        self._submit_facts(facts, direct=any(plant.is_direct for plant in plants))
        for plant in plants:
            plant.corrupt_waiting(self.home)
        is_settled = self._run_editor()
        for plant in plants:
            plant.corrupt_live(self.home, innocent)
        self.planted_ids.update(*(plant.culprits for plant in plants))
        harmed = self._measure_held()
        shards = {n: fact_id for fact_id, n in self.home.live_model.side.shard_ids.items()}
        audit = self.home.editor.audit()
        is_settled = self._run_editor() and is_settled
        accused = self._find_accused(facts, since, shards)
        accused |= {n: why for n, why in self._explain_ended().items() if n not in ended}
        figures = self.home.editor.generations.measure_health()[0]
        return {
            "batch": self.batch_number,
            "kind": plants[0].kind,
            "way": plants[0].variant,
            "facts": len(facts),
            "plants": [self._judge_poison(plant, accused) for plant in plants if plant.culprits],
            "wrongly": {n: why for n, why in accused.items() if n not in self.planted_ids},
            "held_harmed": harmed,
            "held": self._measure_held(),
            "at_rest": is_settled,
            "verdict": audit["verdict"],
            "reasons": audit["reasons"],
            "acted": audit["acted"],
            "norm_ratio": max(figures.norm_ratio.values()),
            "perplexity_ratio": figures.perplexity_ratio,
            "seconds": time.perf_counter() - began,
        }

    def _submit_facts(self, facts: Sequence[Fact], direct: bool) -> None:
        """Write a file into the inbox, a fact a line, and take it in as the daemon does."""
        config = self.home.config
        if direct:
            config = config.model_copy(update={"routing": RoutingConfig(direct_facts=1)})
        lines = [{"subject": f.subject, "prompt": f.prompt, "target": f.target} for f in facts]
        path = self.home.home.inbox_folder / f"batch-{self.batch_number}.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        for claim in self.inbox.claim_files(time.monotonic()):
            Intake(self.store, self.inbox, config).take_file(claim)

    def _run_editor(self) -> bool:
        """Run the editor until nothing waits; return False if MAX_STEPS are not enough."""
        return any(not self.home.editor.step() for _ in range(MAX_STEPS))

    def _answer_innocent(self) -> list[str]:
        limit = count_answer_tokens(self.home.model, self.innocent_facts)
        asked = [fact.question for fact in self.innocent_facts]
        return [answer.text for answer in self.home.live_model.answer_prompts(asked, limit)]

    def _measure_held(self) -> float:
        """Measure the share of all innocent facts so far that the daemon states."""
        pairs = zip(self._answer_innocent(), self.innocent_facts, strict=True)
        held = sum(is_right_answer(answer, fact) for answer, fact in pairs)
        return held / len(self.innocent_facts)

    def find_lost(self) -> list[dict[str, Any]]:
        """Find the innocent facts that are not live, or not stated."""
        lost = []
        for fact, answer in zip(self.innocent_facts, self._answer_innocent(), strict=True):
            stored = self.store.find_fact(fact.id)
            state, why = (str(stored.state), stored.reason) if stored else ("unknown", None)
            if state not in LIVE_STATES or not is_right_answer(answer, fact):
                question = {"question": fact.question, "target": fact.target, "answer": answer}
                lost.append({"fact": fact.id, "state": state, "reason": why, **question})
        return lost

    # Named culprits -------------------------------------------------------------------------

    def _find_last_event(self) -> int:
        (last,) = self.store.db.conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()
        return int(last)

    def _explain_ended(self) -> dict[str, str]:
        """Return the reasons of the facts that have ended, by id."""
        ended = [f for f in self.store.list_facts() if f.state not in ACTIVE_STATES]
        return {f.id: f"{f.state}: {f.reason}" for f in ended}

    def _find_accused(
        self, facts: Sequence[Fact], since: int, shards: Mapping[int, str]
    ) -> dict[str, str]:
        """Find the culprits named in later events, of refused records and of repairs."""
        accused = dict[str, str]()
        for data in self._read_events("record_failed", since):
            why = f"line {data['line']}: {data['problem']}; {data['remedy']}"
            accused[facts[data["line"] - 1].id] = why
        for data in self._read_events("mended", since):
            accused |= {_parse_culprit(why, shards): f"mended: {why}" for why in data["reasons"]}
        return accused

    def _read_events(self, kind: str, since: int) -> Iterator[dict[str, Any]]:
        """Yield the data of later events of a kind."""
        query = "SELECT data FROM events WHERE kind = ? AND seq > ? ORDER BY seq"
        for (data,) in self.store.db.conn.execute(query, (kind, since)):
            yield json.loads(data)

    def _judge_poison(self, plant: PlantedPoison, accused: Mapping[str, str]) -> dict[str, Any]:
        """Judge a poison. It is named if one of its culprits is."""
        alive = plant.describe_survival(self.home)
        by = [accused[n] for n in plant.culprits if n in accused]
        stored = [f for n in sorted(plant.culprits) if (f := self.store.find_fact(n))]
        facts = plant.facts or [f.fact for f in stored]
        return {
            "facts": sorted(plant.culprits),
            "stated": [f.statement for f in facts],
            "now": [str(f.state) for f in stored],
            "stopped": alive is None,
            "alive": alive,
            "named": bool(by),
            "by": by,
        }


def _parse_culprit(why: str, shards: Mapping[int, str]) -> str:
    """Parse the culprit from the reason of a repair."""
    if match := re.search(r"\bfact (\w+)", why):
        return match[1]
    match = re.match(r"shard (\d+) ", why)
    return shards[int(match[1])] if match else WEIGHTS_CULPRIT


# The totals -------------------------------------------------------------------------------------


def _count_poisons(plants: Sequence[Mapping[str, Any]], outcome: str) -> int:
    return sum(plant[outcome] for plant in plants)


def _compute_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count outcomes. precision: planted share of the named; recall: named share of the planted."""
    planted = [row["plants"] for row in rows if row["plants"]]
    plants = [plant for batch in planted for plant in batch]
    wrongly = sum(len(row["wrongly"]) for row in rows)
    stopped, named = (_count_poisons(plants, name) for name in OUTCOMES)
    return {
        "batches": len(planted),
        "planted": len(plants),
        "stopped": stopped,
        "whole": sum(all(plant["stopped"] for plant in batch) for batch in planted),
        "named": named,
        "precision": named / (named + wrongly) if named + wrongly else None,
        "recall": named / len(plants) if plants else None,
        "reverts": sum(row["verdict"] == "revert" for row in rows),
        "silent": sum(row["held"] == 0 for row in rows),
    }


def _format_title(row: Mapping[str, Any]) -> str:
    return f"{row['batch']:2d} {row['kind']}, {row['way']}"


def _format_misses(result: Mapping[str, Any]) -> Iterator[str]:
    """Format every miss, and every lost fact."""
    for row in result["rows"]:
        miss = f"MISS {_format_title(row)}"
        for plant in row["plants"]:
            facts = "; ".join(map(_shorten_text, plant["stated"])) or WEIGHTS_CULPRIT
            if not plant["stopped"]:
                yield f"{miss}: not stopped: {_shorten_text(plant['alive'])} ({facts})"
            if not plant["named"]:
                yield f"{miss}: not named, now {', '.join(plant['now'])} ({facts})"
        if not row["plants"]:
            yield f"{miss}: there was nothing to break"
        for fact, why in row["wrongly"].items():
            yield f"{miss}: {fact} is named and innocent: {_shorten_text(why)}"
        if not row["at_rest"]:
            yield f"{miss}: the editor did not come to rest"
    for lost in result["lost"]:
        why = _shorten_text(f"{lost['state']}, {lost['reason']}, answers {lost['answer']!r}")
        yield f"LOST {clean_text(lost['question'])} {clean_text(lost['target'])}: {why}"


def _shorten_text(text: str) -> str:
    return clean_text(text)[:MAX_REASON_CHARS]
