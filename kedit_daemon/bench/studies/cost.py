"""What the side memory costs those who do not ask about its facts, with many facts in it.

The model's pass over a prompt, and over one token after it, is timed with the side memory laid
over and without it, in turns on one thread, in CPU time of that thread: what else the machine does
counts for less. It also moves all turns alike, so that the median of the ratios tells; the same
ratio of two turns without it tells how far to trust it. No shard is trained: what the keys route
is not a prompt of this study.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from statistics import median
from typing import Any

import torch
from torch import Tensor

from kedit_daemon.bench.studies.index import synthesize_keys, use_one_faiss_thread
from kedit_daemon.bench.studies.shared import make_no_facts_error, prepend_text, sample_evenly
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows
from kedit_daemon.editing.live_model import make_empty_side
from kedit_daemon.shipped import read_ordinary_lines
from memory.side.side_memory import (
    Delta,
    RetrievalKeys,
    RoutingMatch,
    Shard,
    SideMemory,
    to_fact_id,
    to_fact_number,
)
from policies.wise import compute_keys

KEY_COUNT = 100_000  # subject keys in the index
PROMPT_LENGTHS = (16, 64, 256)  # tokens of a prompt, about
MAX_PROMPTS = 16  # of a group and length, at most
MAX_CANDIDATES = 100  # for that: some are routed, or name a subject across two lines
ROUNDS = 6  # of every prompt
DECODED_TOKENS = 8  # tokens decoded in each turn
UNNAMED_SHARE = 0.01  # share of the facts that leave their subject unnamed, for the last group
MIN_WORDS = 2  # of a made-up subject: one word alone may be any text's
PARTS = ("prefill", "token")

Subjects = dict[str, tuple[RetrievalKeys, str]]
"""A fact's keys and its subject, by its id."""

OverlayOpener = Callable[[], AbstractContextManager[object]]


class CostStudy(Study):
    """Time of a pass with the side memory over that without, for prompts that it leaves alone."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """A row for each group of prompts and each length."""
        chance = random.Random(given.seed)
        facts = collect_subjects(given, chance)
        side = build_side_memory(given, facts)
        rows = list[dict[str, Any]]()
        with _use_one_thread(), torch.no_grad():
            asked = _collect_prompts(given, side)
            for (group, tokens), prompts in given.track(list(asked.items()), "prompts"):
                rows.append({"group": group, "tokens": tokens, **_time_prompts(side, prompts)})
            unnamed = chance.sample(sorted(facts), max(1, round(UNNAMED_SHARE * len(facts))))
            for fact_id in unnamed:
                side.add_fact(fact_id, 0, *facts[fact_id], unnamed=True, indexed=True)
            for tokens in given.track(PROMPT_LENGTHS, "unnamed"):
                prompts = _select_unrouted(side, asked.get(("text", tokens), []))
                rows.append({"group": "unnamed", "tokens": tokens, **_time_prompts(side, prompts)})
        rows = [row for row in rows if row["prompts"]]
        if not rows:
            raise make_no_facts_error("the side memory leaves no prompt alone")
        return {
            "keys": len(side.key_index),
            "lists": side.key_index.list_count,
            "facts_live": len(facts),
            "unnamed": len(unnamed),
            "rows": rows,
        }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """A row for each group and length, then what was in the side memory."""
        heads = ["prompts", "tokens", "asked"]
        rows = [[*heads, *(f"{part}{head}" for part in PARTS for head in (", ms", "", " again"))]]
        for row in result["rows"]:
            cells = [row["group"], str(row["tokens"]), str(row["prompts"])]
            for part in PARTS:
                found = row[part]
                cells += [
                    f"{found['ms']:.2f}",
                    *(_format_overhead(found[n]) for n in ("cost", "again")),
                ]
            rows.append(cells)
        yield from align_rows(rows)
        yield ""
        lists = f"in {result['lists']} lists" if result["lists"] else "not in lists"
        yield f"{result['facts_live']} facts live beside the weights, {result['keys']} keys {lists}"
        yield f"unnamed: as text, while {result['unnamed']} of the facts go without their subject"
        yield "again: the same of two turns without the side memory, so what chance makes"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """What is added to a prompt's pass, and to a token's, against the prompt's length."""
        for axes, part in ((left, PARTS[0]), (right, PARTS[1])):
            for group in dict.fromkeys(row["group"] for row in result["rows"]):
                rows = [row for row in result["rows"] if row["group"] == group]
                across = [row["tokens"] for row in rows]
                axes.plot(across, [100 * r[part]["cost"] for r in rows], marker="o", label=group)
            axes.set(xlabel="tokens", xscale="log", ylabel="% more time", title=part)


def collect_subjects(given: StudyInput, chance: random.Random) -> Subjects:
    """Those of the stream, and made-up ones up to KEYS keys: with keys around the real ones, and
    subjects of words of the real ones."""
    model, facts = given.loaded_model.model, [record.fact for record in given.records]
    if len(facts) < 2:  # one alone has no spread
        raise make_no_facts_error("the stream has no two facts to make others like them")
    known = compute_keys(model, make_empty_side(given.loaded_model), facts)
    keys = [known[fact.id] for fact in facts]
    found = {fact.id: (own, fact.subject) for fact, own in zip(facts, keys, strict=True)}
    real = torch.stack([own.subject for own in keys])  # (facts, per, hidden)
    many = max(KEY_COUNT // real.shape[1] - len(facts), 0)
    made = synthesize_keys(real, many, torch.Generator().manual_seed(given.seed))
    words = [fact.subject.split() for fact in facts]
    pool = [word for some in words for word in some]
    pool = [word for word in pool if not word[:1].islower()] or pool  # "of the" is in many a text
    free = (n for n in map(to_fact_id, count()) if n not in known)
    for fact_id, subject in zip(free, made, strict=False):
        length = max(len(chance.choice(words)), MIN_WORDS)
        own = RetrievalKeys(subject, chance.choice(keys).end)
        found[fact_id] = own, " ".join(chance.choices(pool, k=length))
    return found


def build_side_memory(given: StudyInput, facts: Subjects) -> SideMemory:
    """A side memory with these facts in one shard, which always fires."""
    side = make_empty_side(given.loaded_model)
    side.shards[0] = build_firing_shard(side)
    side.key_index.sync_keys({to_fact_number(n): own.subject for n, (own, _) in facts.items()})
    for fact_id, (own, name) in facts.items():
        side.add_fact(fact_id, 0, own, name, unnamed=False, indexed=True)
    return side


def build_firing_shard(side: SideMemory) -> Shard:
    """A shard that confirms whatever the keys find."""
    hidden, width = side.model.weight(side.layer).shape
    ones = torch.ones(1, max(hidden, width), device=side.model.device)
    return Shard(Delta(ones[:, :hidden].T, ones[:, :width]), 1e-9)


def _collect_prompts(given: StudyInput, side: SideMemory) -> dict[tuple[str, int], list[Tensor]]:
    """Prompts (1, tokens) that are not routed, by group and length: ordinary text, neighbours that
    name no subject, and those that name one. A neighbour has ordinary text before it."""
    model = given.loaded_model.model
    near = [n.prompt for record in given.records for n in record.neighbours]
    by_name: dict[str, list[str]] = {"neighbours": [], "named": []}
    for prompt in near:
        by_name["named" if side.subject_matcher.find_named_facts(prompt) else "neighbours"].append(
            prompt
        )
    lines = [
        line for line in read_ordinary_lines() if not side.subject_matcher.find_named_facts(line)
    ]
    found = dict[tuple[str, int], list[Tensor]]()
    for tokens in (n for n in PROMPT_LENGTHS if n < model.max_positions - DECODED_TOKENS):
        ends = {
            "text": [""] * MAX_CANDIDATES,
            **{n: sample_evenly(some, MAX_CANDIDATES) for n, some in by_name.items()},
        }
        for group, some in ends.items():
            rooms = [tokens - len(model.encode(end)) for end in some]
            prompts = [
                model.encode(prepend_text(model, lines, n, room, end))
                for n, (room, end) in enumerate(zip(rooms, some, strict=True))
            ]
            alone = _select_unrouted(
                side, [torch.tensor([ids], device=model.device) for ids in prompts]
            )
            right = [p for p in alone if bool(_find_named_facts(side, p)) == (group == "named")]
            found[group, tokens] = right[:MAX_PROMPTS]
    return found


def _find_named_facts(side: SideMemory, ids: Tensor) -> set[str]:
    return side.subject_matcher.find_named_facts(side.model.decode(ids[0].tolist()))


def _select_unrouted(side: SideMemory, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Those of the prompts that are not routed."""
    result = []
    for ids in prompts:
        fired: list[RoutingMatch | None] = []
        with side.overlay_matches(fired):
            side.model.hf_model(input_ids=ids, use_cache=False)
        if fired == [None]:
            result.append(ids)
    return result


def _time_prompts(side: SideMemory, prompts: Sequence[Tensor]) -> dict[str, Any]:
    """The medians over all prompts and rounds: ms without the side memory, and the time that is
    added, as a share, with it and `again` without it."""
    ways: list[OverlayOpener] = [nullcontext, lambda: side.overlay_matches([]), nullcontext]
    spent = list[list[tuple[float, float]]]()  # of each turn: by way, seconds of both parts
    for number in range(ROUNDS):
        for place, ids in enumerate(prompts):
            turn = [(0.0, 0.0)] * len(ways)
            for n in range(len(ways)):
                way = (n + number + place) % len(ways)  # each comes first as often
                turn[way] = _time_passes(side, ids, ways[way])
            spent.append(turn)
    result: dict[str, Any] = {"prompts": len(prompts)}
    for n, part in enumerate(PARTS):
        if spent:
            ratios = [[turn[way][n] / turn[0][n] - 1 for turn in spent] for way in (1, 2)]
            milli = 1e3 * median(turn[0][n] for turn in spent)
            result[part] = {"ms": milli, "cost": median(ratios[0]), "again": median(ratios[1])}
    return result


def _time_passes(side: SideMemory, ids: Tensor, opened: OverlayOpener) -> tuple[float, float]:
    """Seconds of a prompt's pass, which what opens and closes belongs to, and the median of the
    tokens decoded after it."""
    model, tokens = side.model.hf_model, list[float]()
    began = time.thread_time()
    with opened():
        out = model(input_ids=ids, use_cache=True)
        prefill = time.thread_time() - began
        for _ in range(DECODED_TOKENS):
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            began = time.thread_time()
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            tokens.append(time.thread_time() - began)
        began = time.thread_time()
    return prefill + time.thread_time() - began, median(tokens)


@contextmanager
def _use_one_thread() -> Iterator[None]:
    """Torch and FAISS work on one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with use_one_faiss_thread():
            yield
    finally:
        torch.set_num_threads(threads)


def _format_overhead(share: float) -> str:
    return f"{100 * share:+.2f} %"
