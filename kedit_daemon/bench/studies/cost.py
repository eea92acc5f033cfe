"""Cost of a side memory with many facts, for prompts that do not ask about them.

The model's pass over a prompt, and over one token after it, is timed with and without the side
memory, in turns on one thread, in CPU time of that thread, which other load affects less. Such load
also affects all turns alike, hence the median of the ratios; the same ratio of two turns without
the side memory shows its noise. No shard is trained: routed prompts are not part of this study.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kedit_daemon.bench.studies.index_scaling import synthesize_keys, use_one_faiss_thread
from kedit_daemon.bench.studies.shared import make_no_facts_error, prepend_text, sample_evenly
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows
from kedit_daemon.editing.live_model import make_empty_side
from kedit_daemon.shipped import read_ordinary_lines
from memory.side.index import to_fact_id, to_fact_number
from memory.side.row_overlay import RowOverlay
from memory.side.shards import Delta, RetrievalKeys, Shard
from memory.side.side_memory import SideMemory
from policies.wise import compute_keys

UNNAMED_SHARE = 0.01  # share of the facts that do not name their subject, for the last group
MIN_WORDS = 2  # of a synthetic subject: one word alone may be in any text
PARTS = ("prefill", "token")

Subjects = dict[str, tuple[RetrievalKeys, str]]
"""A fact's keys and its subject, by its id."""

OverlayOpener = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class CostStudy(Study):
    """Time of a pass with the side memory over that without, for prompts that are not routed."""

    key_count: int = 100_000  # subject keys in the index
    prompt_lengths: Sequence[int] = (16, 64, 256)  # tokens, about
    max_prompts: int = 16  # of a group and length
    max_candidates: int = 100  # for these: some are routed, or name a subject across two lines
    rounds: int = 6  # of every prompt
    decoded_tokens: int = 8  # in each turn

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure a row for each group of prompts and each length."""
        rng = random.Random(given.seed)
        facts = collect_subjects(given, rng, self.key_count)
        side = build_side_memory(given, facts)
        rows = list[dict[str, Any]]()
        with _use_one_thread(), torch.no_grad():
            asked = self.collect_prompts(given, side)
            for (group, tokens), prompts in given.track(list(asked.items()), "prompts"):
                rows.append({"group": group, "tokens": tokens, **self.time_prompts(side, prompts)})
            unnamed = rng.sample(sorted(facts), max(1, round(UNNAMED_SHARE * len(facts))))
            for fact_id in unnamed:
                own, name = facts[fact_id]
                side.add_fact(fact_id, 0, own, (name,), unnamed=True, indexed=True)
            for tokens in given.track(self.prompt_lengths, "unnamed"):
                prompts = _select_unrouted(side, asked.get(("text", tokens), []))
                times = self.time_prompts(side, prompts)
                rows.append({"group": "unnamed", "tokens": tokens, **times})
        rows = [row for row in rows if row["prompts"]]
        if not rows:
            raise make_no_facts_error("the side memory routes every prompt")
        return {
            "keys": len(side.key_index),
            "lists": side.key_index.list_count,
            "facts_live": len(facts),
            "unnamed": len(unnamed),
            "rows": rows,
        }

    def collect_prompts(
        self, given: StudyInput, side: SideMemory
    ) -> dict[tuple[str, int], list[Tensor]]:
        """Collect unrouted prompts (1, tokens) by group and length.

        Groups: ordinary text, neighbours that name no subject, and those that name one, both after
        ordinary text.
        """
        model, matcher = given.loaded_model.model, side.subject_matcher
        endings: dict[str, list[str]] = {"text": [], "neighbours": [], "named": []}
        for prompt in (n.prompt for record in given.records for n in record.neighbours):
            endings["named" if matcher.find_named_facts(prompt) else "neighbours"].append(prompt)
        endings = {name: sample_evenly(some, self.max_candidates) for name, some in endings.items()}
        endings["text"] = [""] * self.max_candidates
        lines = [line for line in read_ordinary_lines() if not matcher.find_named_facts(line)]
        limit = model.max_positions - self.decoded_tokens
        prompts = dict[tuple[str, int], list[Tensor]]()
        for tokens in (n for n in self.prompt_lengths if n < limit):
            for group, ends in endings.items():
                lengths = [tokens - len(model.encode(end)) for end in ends]
                encoded = [
                    model.encode(prepend_text(model, lines, n, length, end))
                    for n, (length, end) in enumerate(zip(lengths, ends, strict=True))
                ]
                rows = [torch.tensor([ids], device=model.device) for ids in encoded]
                unrouted = _select_unrouted(side, rows)
                named = group == "named"
                right = [ids for ids in unrouted if bool(_find_named_facts(side, ids)) == named]
                prompts[group, tokens] = right[: self.max_prompts]
        return prompts

    def time_prompts(self, side: SideMemory, prompts: Sequence[Tensor]) -> dict[str, Any]:
        """Time the prompts, and take medians over all prompts and rounds.

        ms: without the side memory. cost: share of time added with it. again: the same of a second
        turn without it.
        """
        ways: list[OverlayOpener] = [
            nullcontext,
            lambda: RowOverlay(side).follow_passes(),
            nullcontext,
        ]
        turns = list[list[tuple[float, float]]]()  # of each turn: by way, seconds of both parts
        for number in range(self.rounds):
            for place, ids in enumerate(prompts):
                turn = [(0.0, 0.0)] * len(ways)
                for n in range(len(ways)):
                    way = (n + number + place) % len(ways)  # each comes first equally often
                    turn[way] = _time_passes(side, ids, ways[way], self.decoded_tokens)
                turns.append(turn)
        result: dict[str, Any] = {"prompts": len(prompts)}
        for n, part in enumerate(PARTS if turns else ()):
            cost, again = (median(turn[w][n] / turn[0][n] - 1 for turn in turns) for w in (1, 2))
            milliseconds = 1e3 * median(turn[0][n] for turn in turns)
            result[part] = {"ms": milliseconds, "cost": cost, "again": again}
        return result

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        heads = ["prompts", "tokens", "asked"]
        rows = [[*heads, *(f"{part}{head}" for part in PARTS for head in (", ms", "", " again"))]]
        for row in result["rows"]:
            cells = [row["group"], str(row["tokens"]), str(row["prompts"])]
            for times in (row[part] for part in PARTS):
                overheads = (f"{100 * times[n]:+.2f} %" for n in ("cost", "again"))
                cells += [f"{times['ms']:.2f}", *overheads]
            rows.append(cells)
        yield from align_rows(rows)
        yield ""
        lists = f"in {result['lists']} lists" if result["lists"] else "not in lists"
        yield f"{result['facts_live']} facts live beside the weights, {result['keys']} keys {lists}"
        yield f"unnamed: as text, while {result['unnamed']} of the facts go without their subject"
        yield "again: the same of two turns without the side memory, so what chance makes"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        for axes, part in zip((left, right), PARTS, strict=True):
            for group in dict.fromkeys(row["group"] for row in result["rows"]):
                rows = [row for row in result["rows"] if row["group"] == group]
                across = [row["tokens"] for row in rows]
                axes.plot(across, [100 * r[part]["cost"] for r in rows], marker="o", label=group)
            axes.set(xlabel="tokens", xscale="log", ylabel="% more time", title=part)


def collect_subjects(given: StudyInput, rng: random.Random, key_count: int) -> Subjects:
    """Collect the stream's subjects, and synthesize more up to `key_count` keys.

    Synthetic keys lie around the real ones; synthetic subjects combine words of the real ones.
    """
    model, facts = given.loaded_model.model, [record.fact for record in given.records]
    if len(facts) < 2:  # a single one has no spread
        raise make_no_facts_error("the stream has no two facts to make others like them")
    known = compute_keys(model, make_empty_side(given.loaded_model), facts)
    keys = [known[fact.id] for fact in facts]
    subjects = {fact.id: (own, fact.subject) for fact, own in zip(facts, keys, strict=True)}
    real = torch.stack([own.subject for own in keys])  # (facts, per, hidden)
    missing = max(key_count // real.shape[1] - len(facts), 0)
    synthetic = synthesize_keys(real, missing, torch.Generator().manual_seed(given.seed))
    words = [fact.subject.split() for fact in facts]
    pool = [word for subject in words for word in subject]
    pool = [word for word in pool if not word[:1].islower()] or pool  # many texts have "of the"
    free_ids = (n for n in map(to_fact_id, count()) if n not in known)
    for fact_id, subject in zip(free_ids, synthetic, strict=False):
        length = max(len(rng.choice(words)), MIN_WORDS)
        own = RetrievalKeys(subject, rng.choice(keys).end)
        subjects[fact_id] = own, " ".join(rng.choices(pool, k=length))
    return subjects


def build_side_memory(given: StudyInput, facts: Subjects) -> SideMemory:
    """Build a side memory with these facts in one shard, which always fires."""
    side = make_empty_side(given.loaded_model)
    side.shards[0] = build_firing_shard(side)
    side.key_index.sync_keys({to_fact_number(n): own.subject for n, (own, _) in facts.items()})
    for fact_id, (own, name) in facts.items():
        side.add_fact(fact_id, 0, own, (name,), unnamed=False, indexed=True)
    return side


def build_firing_shard(side: SideMemory) -> Shard:
    """Build a shard that confirms every match of the keys."""
    hidden, width = side.model.weight(side.layer).shape
    ones = torch.ones(1, max(hidden, width), device=side.model.device)
    return Shard(Delta(ones[:, :hidden].T, ones[:, :width]), 1e-9)


def _find_named_facts(side: SideMemory, ids: Tensor) -> set[str]:
    return side.subject_matcher.find_named_facts(side.model.decode(ids[0].tolist()))


def _select_unrouted(side: SideMemory, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Select the prompts that are not routed."""
    unrouted = []
    for ids in prompts:
        rows = RowOverlay(side)
        with rows.follow_passes():
            side.model.hf_model(input_ids=ids, use_cache=False)
        if rows.matches == [None]:
            unrouted.append(ids)
    return unrouted


def _time_passes(
    side: SideMemory, ids: Tensor, open_overlay: OverlayOpener, decoded_tokens: int
) -> tuple[float, float]:
    """Time a prompt's pass, with opening and closing the overlay, and the median token after it."""
    model, seconds = side.model.hf_model, list[float]()
    began = time.thread_time()
    with open_overlay():
        out = model(input_ids=ids, use_cache=True)
        prefill = time.thread_time() - began
        for _ in range(decoded_tokens):
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            began = time.thread_time()
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            seconds.append(time.thread_time() - began)
        began = time.thread_time()
    return prefill + time.thread_time() - began, median(seconds)


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Run Torch and FAISS on one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with use_one_faiss_thread():
            yield
    finally:
        torch.set_num_threads(threads)
