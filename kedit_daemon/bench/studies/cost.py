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

from kedit_daemon.bench.studies.index import made_up, one_thread
from kedit_daemon.bench.studies.shared import after_text, nothing_left, spread
from kedit_daemon.bench.studies.study import Given, Study
from kedit_daemon.bench.table import aligned
from kedit_daemon.editing.live_model import empty_side
from kedit_daemon.shipped import read_ordinary_lines
from memory.side.side_memory import Delta, Keys, Match, Shard, SideMemory, fact_id_of, number_of
from policies.wise import retrieval_keys

KEYS = 100_000  # subject keys in the index
LENGTHS = (16, 64, 256)  # tokens of a prompt, about
PROMPTS = 16  # of a group and length, at most
TRIED = 100  # for that: some are routed, or name a subject across two lines
ROUNDS = 6  # of every prompt
STEPS = 8  # tokens decoded in each turn
UNNAMED = 0.01  # share of the facts that leave their subject unnamed, for the last group
FEWEST_WORDS = 2  # of a made-up subject: one word alone may be any text's
PARTS = ("prefill", "token")

Subjects = dict[str, tuple[Keys, str]]
"""A fact's keys and its subject, by its id."""

Open = Callable[[], AbstractContextManager[object]]


class Cost(Study):
    """Time of a pass with the side memory over that without, for prompts that it leaves alone."""

    def run(self, given: Given) -> dict[str, Any]:
        """A row for each group of prompts and each length."""
        chance = random.Random(given.seed)
        facts = facts_of(given, chance)
        side = filled(given, facts)
        rows = list[dict[str, Any]]()
        with _one_thread(), torch.no_grad():
            asked = _asked(given, side)
            for (group, tokens), prompts in given.track(list(asked.items()), "prompts"):
                rows.append({"group": group, "tokens": tokens, **_timed(side, prompts)})
            unnamed = chance.sample(sorted(facts), max(1, round(UNNAMED * len(facts))))
            for fact_id in unnamed:
                side.put(fact_id, 0, *facts[fact_id], unnamed=True, indexed=True)
            for tokens in given.track(LENGTHS, "unnamed"):
                prompts = _left_alone(side, asked.get(("text", tokens), []))
                rows.append({"group": "unnamed", "tokens": tokens, **_timed(side, prompts)})
        rows = [row for row in rows if row["prompts"]]
        if not rows:
            raise nothing_left("the side memory leaves no prompt alone")
        return {
            "keys": len(side.index),
            "lists": side.index.lists,
            "facts_live": len(facts),
            "unnamed": len(unnamed),
            "rows": rows,
        }

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """A row for each group and length, then what was in the side memory."""
        heads = ["prompts", "tokens", "asked"]
        rows = [[*heads, *(f"{part}{head}" for part in PARTS for head in (", ms", "", " again"))]]
        for row in result["rows"]:
            cells = [row["group"], str(row["tokens"]), str(row["prompts"])]
            for part in PARTS:
                found = row[part]
                cells += [f"{found['ms']:.2f}", *(_percent(found[n]) for n in ("cost", "again"))]
            rows.append(cells)
        yield from aligned(rows)
        yield ""
        lists = f"in {result['lists']} lists" if result["lists"] else "not in lists"
        yield f"{result['facts_live']} facts live beside the weights, {result['keys']} keys {lists}"
        yield f"unnamed: as text, while {result['unnamed']} of the facts go without their subject"
        yield "again: the same of two turns without the side memory, so what chance makes"

    def draw(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """What is added to a prompt's pass, and to a token's, against the prompt's length."""
        for axes, part in ((left, PARTS[0]), (right, PARTS[1])):
            for group in dict.fromkeys(row["group"] for row in result["rows"]):
                rows = [row for row in result["rows"] if row["group"] == group]
                across = [row["tokens"] for row in rows]
                axes.plot(across, [100 * r[part]["cost"] for r in rows], marker="o", label=group)
            axes.set(xlabel="tokens", xscale="log", ylabel="% more time", title=part)


def facts_of(given: Given, chance: random.Random) -> Subjects:
    """Those of the stream, and made-up ones up to KEYS keys: with keys around the real ones, and
    subjects of words of the real ones."""
    model, facts = given.loaded.model, [record.fact for record in given.records]
    if len(facts) < 2:  # one alone has no spread
        raise nothing_left("the stream has no two facts to make others like them")
    known = retrieval_keys(model, empty_side(given.loaded), facts)
    keys = [known[fact.id] for fact in facts]
    found = {fact.id: (own, fact.subject) for fact, own in zip(facts, keys, strict=True)}
    real = torch.stack([own.subject for own in keys])  # (facts, per, hidden)
    many = max(KEYS // real.shape[1] - len(facts), 0)
    made = made_up(real, many, torch.Generator().manual_seed(given.seed))
    words = [fact.subject.split() for fact in facts]
    pool = [word for some in words for word in some]
    pool = [word for word in pool if not word[:1].islower()] or pool  # "of the" is in many a text
    free = (n for n in map(fact_id_of, count()) if n not in known)
    for fact_id, subject in zip(free, made, strict=False):
        length = max(len(chance.choice(words)), FEWEST_WORDS)
        own = Keys(subject, chance.choice(keys).end)
        found[fact_id] = own, " ".join(chance.choices(pool, k=length))
    return found


def filled(given: Given, facts: Subjects) -> SideMemory:
    """A side memory with these facts in one shard, which always fires."""
    side = empty_side(given.loaded)
    side.shards[0] = always(side)
    side.index.sync({number_of(n): own.subject for n, (own, _) in facts.items()})
    for fact_id, (own, name) in facts.items():
        side.put(fact_id, 0, own, name, unnamed=False, indexed=True)
    return side


def always(side: SideMemory) -> Shard:
    """A shard that confirms whatever the keys find."""
    hidden, width = side.model.weight(side.layer).shape
    ones = torch.ones(1, max(hidden, width), device=side.model.device)
    return Shard(Delta(ones[:, :hidden].T, ones[:, :width]), 1e-9)


def _asked(given: Given, side: SideMemory) -> dict[tuple[str, int], list[Tensor]]:
    """Prompts (1, tokens) that are not routed, by group and length: ordinary text, neighbours that
    name no subject, and those that name one. A neighbour has ordinary text before it."""
    model = given.loaded.model
    near = [n.prompt for record in given.records for n in record.neighbours]
    by_name: dict[str, list[str]] = {"neighbours": [], "named": []}
    for prompt in near:
        by_name["named" if side.names.in_text(prompt) else "neighbours"].append(prompt)
    lines = [line for line in read_ordinary_lines() if not side.names.in_text(line)]
    found = dict[tuple[str, int], list[Tensor]]()
    for tokens in (n for n in LENGTHS if n < model.positions - STEPS):
        ends = {"text": [""] * TRIED, **{n: spread(some, TRIED) for n, some in by_name.items()}}
        for group, some in ends.items():
            rooms = [tokens - len(model.encode(end)) for end in some]
            prompts = [
                model.encode(after_text(model, lines, n, room, end))
                for n, (room, end) in enumerate(zip(rooms, some, strict=True))
            ]
            alone = _left_alone(side, [torch.tensor([ids], device=model.device) for ids in prompts])
            right = [p for p in alone if bool(_named(side, p)) == (group == "named")]
            found[group, tokens] = right[:PROMPTS]
    return found


def _named(side: SideMemory, ids: Tensor) -> set[str]:
    return side.names.in_text(side.model.decode(ids[0].tolist()))


def _left_alone(side: SideMemory, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Those of the prompts that are not routed."""
    result = []
    for ids in prompts:
        fired: list[Match | None] = []
        with side.overlay(fired):
            side.model.model(input_ids=ids, use_cache=False)
        if fired == [None]:
            result.append(ids)
    return result


def _timed(side: SideMemory, prompts: Sequence[Tensor]) -> dict[str, Any]:
    """The medians over all prompts and rounds: ms without the side memory, and the time that is
    added, as a share, with it and `again` without it."""
    ways: list[Open] = [nullcontext, lambda: side.overlay([]), nullcontext]
    spent = list[list[tuple[float, float]]]()  # of each turn: by way, seconds of both parts
    for number in range(ROUNDS):
        for place, ids in enumerate(prompts):
            turn = [(0.0, 0.0)] * len(ways)
            for n in range(len(ways)):
                way = (n + number + place) % len(ways)  # each comes first as often
                turn[way] = _spent(side, ids, ways[way])
            spent.append(turn)
    result: dict[str, Any] = {"prompts": len(prompts)}
    for n, part in enumerate(PARTS):
        if spent:
            ratios = [[turn[way][n] / turn[0][n] - 1 for turn in spent] for way in (1, 2)]
            milli = 1e3 * median(turn[0][n] for turn in spent)
            result[part] = {"ms": milli, "cost": median(ratios[0]), "again": median(ratios[1])}
    return result


def _spent(side: SideMemory, ids: Tensor, opened: Open) -> tuple[float, float]:
    """Seconds of a prompt's pass, which what opens and closes belongs to, and the median of the
    tokens decoded after it."""
    model, tokens = side.model.model, list[float]()
    began = time.thread_time()
    with opened():
        out = model(input_ids=ids, use_cache=True)
        prefill = time.thread_time() - began
        for _ in range(STEPS):
            step, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            began = time.thread_time()
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            tokens.append(time.thread_time() - began)
        began = time.thread_time()
    return prefill + time.thread_time() - began, median(tokens)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch and FAISS work on one thread within the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with one_thread():
            yield
    finally:
        torch.set_num_threads(threads)


def _percent(share: float) -> str:
    return f"{100 * share:+.2f} %"
