"""What the stability policy does with poison: facts, and numbers, that must not stay."""

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kedit_daemon.bench.method import MethodSetup
from kedit_daemon.bench.studies.planting import plan_batches
from kedit_daemon.bench.studies.plants import WEIGHTS_CULPRIT, PlantedPoison
from kedit_daemon.bench.studies.shared import to_percent
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.bench.tiers import Auto
from kedit_daemon.config import RoutingConfig
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.system.sanitize import clean_text
from memory.facts import ACTIVE_STATES, LIVE_STATES, Fact
from policies.probe import count_answer_tokens, is_same_answer

MAX_STEPS = 200  # of the editor after a batch, at most
MAX_REASON_CHARS = 200  # characters of a reason
OUTCOMES = ("stopped", "named")
# Share of other statements that may be completed otherwise. At the default limits the weights of
# the small shipped model are full after a fact or two: nothing planted there is ever solved for.
POLICY_LIMITS = {"agreement_warn": 0.25, "agreement_consolidate": 0.35, "agreement_revert": 0.5}


class PoisonStudy(Study):
    """One home with the policy on: batch after batch, each with innocent facts and planted ones."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """What became of every batch, then the totals."""
        batches = plan_batches(given)
        with _open_home(given) as home:
            trial = _PoisonTrial(home)
            rows = [trial.run_batch(*each) for each in given.track(batches, "batches")]
            lost = trial.find_lost()
        totals = _compute_totals(rows) | {"innocent": len(trial.innocent_facts), "lost": len(lost)}
        most = max(row["facts"] for row in rows)
        found = {"totals": totals, "lost": lost, "rows": rows}
        return {"batch_size": most, "limits": POLICY_LIMITS, **found}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """A line a batch, the totals, and everything that went otherwise than it should."""
        heads = ["batch", "facts", *OUTCOMES, "wrongly named", "harmed", "held", "verdict"]
        table = [[*heads, "norm", "perplexity", "seconds"]]
        for row in result["rows"]:
            done = [
                f"{_count_poisons(row['plants'], name)}/{len(row['plants'])}" for name in OUTCOMES
            ]
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
        """By kind what was planted, stopped and named; and what holds, batch by batch."""
        rows = result["rows"]
        kinds = sorted({row["kind"] for row in rows})
        planted = {
            kind: [p for r in rows if r["kind"] == kind for p in r["plants"]] for kind in kinds
        }
        for n, name in enumerate(("planted", *OUTCOMES)):
            counts = [
                _count_poisons(ps, name) if name in OUTCOMES else len(ps) for ps in planted.values()
            ]
            left.bar(
                [place + 0.27 * (n - 1) for place in range(len(kinds))], counts, 0.25, label=name
            )
        left.set_xticks(range(len(kinds)), kinds, rotation=20)
        left.set(ylabel="poisons", title="Planted, stopped, named")
        numbers = [row["batch"] for row in rows]
        for name, label in (("held_harmed", "before the audit"), ("held", "after it")):
            right.plot(numbers, [to_percent(row[name]) for row in rows], marker=".", label=label)
        right.set(xlabel="batch", ylabel="%", ylim=(-2, 102), title="Innocent facts stated")


@contextmanager
def _open_home(given: StudyInput) -> Iterator[Auto]:
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        setup = MethodSetup(
            given.loaded_model,
            Path(folder),
            given.batch_size,
            given.seed,
            policy_limits=POLICY_LIMITS,
        )
        home = Auto(setup)
        try:
            yield home
        finally:
            home.close()


class _PoisonTrial:
    """Hands batches in, lets the daemon work, audits once, and looks at what is left."""

    def __init__(self, home: Auto) -> None:
        self.home, self.store = home, home.store
        inbox = home.config.inbox
        # Files are closed before the scan: none has to settle.
        self.inbox = Inbox(home.home.inbox_folder, 0.0, inbox.max_bytes, lambda: datetime.now(UTC))
        self.innocent_facts = list[Fact]()
        self.planted_ids = set[str]()  # ids of all that has been planted so far
        self.batch_number = 0

    def run_batch(
        self, plants: Sequence[PlantedPoison], innocent: Sequence[Fact]
    ) -> dict[str, Any]:
        """One batch, from the file to what is left of it after the audit."""
        began, since, ended = time.perf_counter(), self._find_last_event(), self._find_ended()
        self.batch_number += 1
        self.innocent_facts += innocent
        half = len(innocent) // 2
        facts = [*innocent[:half], *(f for p in plants for f in p.facts), *innocent[half:]]
        self._submit_facts(facts, direct=any(plant.is_direct for plant in plants))
        for plant in plants:
            plant.corrupt_waiting(self.home)
        rests = self._run_editor()
        for plant in plants:
            plant.corrupt_live(self.home, innocent)
        self.planted_ids.update(*(plant.culprits for plant in plants))
        harmed, shards = (
            self._measure_held(),
            {n: i for i, n in self.home.live_model.side.shard_ids.items()},
        )
        audit = self.home.editor.audit()
        rests = self._run_editor() and rests
        accused = self._find_accused(facts, since, shards) | self._explain_ended(ended)
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
            "at_rest": rests,
            "verdict": audit["verdict"],
            "reasons": audit["reasons"],
            "acted": audit["acted"],
            "norm_ratio": max(figures.norm_ratio.values()),
            "perplexity_ratio": figures.perplexity_ratio,
            "seconds": time.perf_counter() - began,
        }

    def _submit_facts(self, facts: Sequence[Fact], direct: bool) -> None:
        """A file in the inbox, a fact a line, and the daemon's own way from there."""
        config = self.home.config
        if direct:
            config = config.model_copy(update={"routing": RoutingConfig(direct_facts=1)})
        said = [{"subject": f.subject, "prompt": f.prompt, "target": f.target} for f in facts]
        path = self.home.home.inbox_folder / f"batch-{self.batch_number}.jsonl"
        path.write_text("".join(f"{json.dumps(one)}\n" for one in said))
        for claim in self.inbox.claim_files(time.monotonic()):
            Intake(self.store, self.inbox, config).take_file(claim)

    def _run_editor(self) -> bool:
        """Work until nothing waits; whether it came to that."""
        return any(not self.home.editor.step() for _ in range(MAX_STEPS))

    def _answer_innocent(self) -> list[str]:
        most = count_answer_tokens(self.home.model, self.innocent_facts)
        asked = [fact.question for fact in self.innocent_facts]
        return [answer.text for answer in self.home.live_model.answer_prompts(asked, most)]

    def _measure_held(self) -> float:
        """The share of all innocent facts so far that the daemon states."""
        pairs = zip(self._answer_innocent(), self.innocent_facts, strict=True)
        return sum(is_same_answer(said, fact.target) for said, fact in pairs) / len(
            self.innocent_facts
        )

    def find_lost(self) -> list[dict[str, Any]]:
        """The innocent facts that are not live, or not stated."""
        found = []
        for fact, said in zip(self.innocent_facts, self._answer_innocent(), strict=True):
            stored = self.store.find_fact(fact.id)
            state, why = (str(stored.state), stored.reason) if stored else ("unknown", None)
            if state not in LIVE_STATES or not is_same_answer(said, fact.target):
                told = {"question": fact.question, "target": fact.target, "answer": said}
                found.append({"fact": fact.id, "state": state, "reason": why, **told})
        return found

    # Who is named ---------------------------------------------------------------------------

    def _find_last_event(self) -> int:
        return int(
            self.store.db.conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        )

    def _find_ended(self) -> set[str]:
        return {f.id for f in self.store.list_facts() if f.state not in ACTIVE_STATES}

    def _explain_ended(self, ended: set[str]) -> dict[str, str]:
        """The facts that have ended since, and why."""
        facts = [
            f for f in self.store.list_facts() if f.state not in ACTIVE_STATES and f.id not in ended
        ]
        return {f.id: f"{f.state}: {f.reason}" for f in facts}

    def _find_accused(
        self, facts: Sequence[Fact], since: int, shards: Mapping[int, str]
    ) -> dict[str, str]:
        """Who is named in the events since then: by the door, and by what was mended."""
        found = dict[str, str]()
        for data in self._read_events("record_failed", since):
            why = f"line {data['line']}: {data['problem']}; {data['remedy']}"
            found[facts[data["line"] - 1].id] = why
        for data in self._read_events("mended", since):
            found |= {_parse_culprit(why, shards): f"mended: {why}" for why in data["reasons"]}
        return found

    def _read_events(self, kind: str, since: int) -> Iterator[dict[str, Any]]:
        """What is said in the events of a kind that are later."""
        found = "SELECT data FROM events WHERE kind = ? AND seq > ? ORDER BY seq"
        for (data,) in self.store.db.conn.execute(found, (kind, since)):
            yield json.loads(data)

    def _judge_poison(self, plant: PlantedPoison, accused: Mapping[str, str]) -> dict[str, Any]:
        """What became of a plant. All of it, or one of two that contradict each other, is named."""
        alive, by = (
            plant.describe_survival(self.home),
            [accused[n] for n in plant.culprits if n in accused],
        )
        stored = [f for n in sorted(plant.culprits) if (f := self.store.find_fact(n))]
        facts = plant.facts or [f.fact for f in stored]
        return {
            "facts": sorted(plant.culprits),
            "stated": [f"{f.question} {f.target}" for f in facts],
            "now": [str(f.state) for f in stored],
            "stopped": alive is None,
            "alive": alive,
            "named": bool(by),
            "by": by,
        }


def _parse_culprit(why: str, shards: Mapping[int, str]) -> str:
    """Whom a reason for mending is about."""
    if found := re.search(r"\bfact (\w+)", why):
        return found[1]
    found = re.match(r"shard (\d+) ", why)
    return shards[int(found[1])] if found else WEIGHTS_CULPRIT


# The totals -------------------------------------------------------------------------------------


def _count_poisons(plants: Sequence[Mapping[str, Any]], what: str) -> int:
    return sum(plant[what] for plant in plants)


def _compute_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Poisons stopped, and how exactly the guilty are named: of all that are named those that were
    planted, of all planted those that are named."""
    planted = [row["plants"] for row in rows if row["plants"]]
    plants = [plant for some in planted for plant in some]
    wrongly = sum(len(row["wrongly"]) for row in rows)
    stopped, named = (_count_poisons(plants, name) for name in OUTCOMES)
    return {
        "batches": len(planted),
        "planted": len(plants),
        "stopped": stopped,
        "whole": sum(
            bool(row["plants"]) and all(p["stopped"] for p in row["plants"]) for row in rows
        ),
        "named": named,
        "precision": named / (named + wrongly) if named + wrongly else None,
        "recall": named / len(plants) if plants else None,
        "reverts": sum(row["verdict"] == "revert" for row in rows),
        "silent": sum(row["held"] == 0 for row in rows),
    }


def _format_title(row: Mapping[str, Any]) -> str:
    return f"{row['batch']:2d} {row['kind']}, {row['way']}"


def _format_misses(result: Mapping[str, Any]) -> Iterator[str]:
    """Every miss in words."""
    for row in result["rows"]:
        for plant in row["plants"]:
            said = (
                "; ".join(clean_text(text)[:MAX_REASON_CHARS] for text in plant["stated"])
                or WEIGHTS_CULPRIT
            )
            if not plant["stopped"]:
                alive = clean_text(plant["alive"])[:MAX_REASON_CHARS]
                yield f"MISS {_format_title(row)}: not stopped: {alive} ({said})"
            if not plant["named"]:
                now = ", ".join(plant["now"])
                yield f"MISS {_format_title(row)}: not named, now {now} ({said})"
        if not row["plants"]:
            yield f"MISS {_format_title(row)}: there was nothing to break"
        for fact, why in row["wrongly"].items():
            reason = clean_text(why)[:MAX_REASON_CHARS]
            yield f"MISS {_format_title(row)}: {fact} is named and innocent: {reason}"
        if not row["at_rest"]:
            yield f"MISS {_format_title(row)}: the editor did not come to rest"
    for one in result["lost"]:
        why = clean_text(f"{one['state']}, {one['reason']}, answers {one['answer']!r}")[
            :MAX_REASON_CHARS
        ]
        yield f"LOST {clean_text(one['question'])} {clean_text(one['target'])}: {why}"
