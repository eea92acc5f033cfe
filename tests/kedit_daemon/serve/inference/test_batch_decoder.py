from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from side_tools import FIRST, ONE, SECOND, TWO, delta_of, side_of
from tiny_models import ARCHITECTURES, save_model
from torch import Tensor

from kedit_daemon.serve.inference.batch_decoder import BatchDecoder
from memory.model.editable import EditableModel
from memory.side.row_overlay import RowOverlay
from memory.side.shards import RoutingMatch, Shard
from memory.side.side_memory import SideMemory

PROMPTS = [
    "Rome",
    "The seat of country 1 is",
    "It is",
    "The seat of country 22 is Oslo and that of country 3 is Lima. The seat of country 4 is",
    "The seat of country 2 is",
]


def alone(model: EditableModel, prompt: str, steps: int) -> tuple[list[int], Tensor]:
    """Greedy tokens and their logits (steps, vocabulary), without a cache and without company."""
    ids, rows = model.encode(prompt), list[Tensor]()
    for _ in range(steps):
        said = [int(row.argmax()) for row in rows]
        with torch.no_grad():
            out = model.hf_model(input_ids=torch.tensor([[*ids, *said]]), use_cache=False)
        rows.append(out.logits[0, -1])
    return [int(row.argmax()) for row in rows], torch.stack(rows)


def routed(side: SideMemory, prompt: str, steps: int) -> Tensor:
    """Logits (steps, vocabulary) of one row under an overlay that is held from first to last."""
    step, cache, rows = torch.tensor([side.model.encode(prompt)]), None, list[Tensor]()
    with torch.no_grad(), RowOverlay(side).follow_passes():
        for _ in range(steps):
            out = side.model.hf_model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1])
            step = rows[-1].argmax()[None, None]
    return torch.stack(rows)


class Run:
    """Drives a Decoding greedily, and keeps what every row said and saw."""

    def __init__(self, decoding: BatchDecoder) -> None:
        self.decoding = decoding
        self.running: list[str] = []
        self.said: dict[str, list[int]] = {}
        self.seen: dict[str, list[Tensor]] = {}

    def join(self, *prompts: str) -> list[RoutingMatch | None]:
        joined = self.decoding.prefill_rows([self.decoding.model.encode(p) for p in prompts])
        self.running += prompts
        self._take(prompts, joined.logits)
        return joined.matches

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            logits = self.decoding.decode_step([self.said[p][-1] for p in self.running])
            self._take(self.running, logits)

    def leave(self, *prompts: str) -> None:
        kept = [n for n, prompt in enumerate(self.running) if prompt not in prompts]
        self.decoding.keep_rows(kept)
        self.running = [self.running[n] for n in kept]

    def _take(self, prompts: list[str] | tuple[str, ...], logits: Tensor) -> None:
        for prompt, row in zip(prompts, logits, strict=True):
            self.said.setdefault(prompt, []).append(int(row.argmax()))
            self.seen.setdefault(prompt, []).append(row)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rows_that_join_and_leave_say_what_each_says_alone(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    run = Run(BatchDecoder(model, None))
    run.join(PROMPTS[1])
    run.step(2)
    run.join(PROMPTS[0], PROMPTS[3], PROMPTS[4])  # shorter, longer, and of other places
    run.step(2)
    run.leave(PROMPTS[3], PROMPTS[1])  # the widest goes, and its pads with it
    run.join(PROMPTS[2])
    run.step(3)
    assert [len(run.said[p]) for p in PROMPTS] == [6, 5, 4, 3, 6]
    for prompt, said in run.said.items():
        tokens, logits = alone(model, prompt, len(said))
        assert said == tokens
        assert (torch.stack(run.seen[prompt]) - logits).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2}),
        ("llama", {"num_key_value_heads": 1}),
    ],
)
def test_windows_and_shared_heads_are_kept(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = EditableModel.load(save_model(kind, tmp_path / kind, **more), torch.device("cpu"))
    run = Run(BatchDecoder(model, None))
    run.join(PROMPTS[1])
    run.step()
    run.join(PROMPTS[3])
    run.step(4)
    for prompt, said in run.said.items():
        logits = alone(model, prompt, len(said))[1]
        assert (torch.stack(run.seen[prompt]) - logits).abs().max() < 1e-4


def test_a_shard_is_laid_over_its_row_alone_whoever_joins_and_leaves(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND})
    held = {p: routed(side, p, 6) for p in (FIRST, SECOND)}
    run = Run(BatchDecoder(model, side))
    assert run.join(PROMPTS[0]) == [None]
    run.step()
    fired = run.join(SECOND, "Lima", "Oslo", FIRST)  # read in as two groups, and put in order
    assert [m and m.fact_id for m in fired] == [TWO, None, None, ONE]
    run.step()
    run.leave(PROMPTS[0], SECOND)
    run.step(2)
    for prompt, said in run.said.items():
        apart = held[prompt] if prompt in held else alone(model, prompt, len(said))[1]
        assert (torch.stack(run.seen[prompt]) - apart[: len(said)]).abs().max() < 1e-4
    plain = alone(model, FIRST, 4)[1]
    assert (plain - held[FIRST][:4]).abs().max() > 0.1


def test_a_running_row_keeps_its_shard_when_the_side_memory_changes(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    held = routed(side, FIRST, 4)
    run = Run(BatchDecoder(model, side))
    run.join(FIRST)
    side.remove_fact(ONE)
    side.shards[1] = Shard(delta_of(model, 9), 1e-3)
    run.step(3)
    assert (torch.stack(run.seen[FIRST]) - held).abs().max() < 1e-4
    assert Run(run.decoding).join(FIRST) == [None]


def test_without_a_side_memory_nothing_fires(model: EditableModel) -> None:
    assert Run(BatchDecoder(model, None)).join(FIRST) == [None]


def test_rows_that_leave_take_their_room_with_them(model: EditableModel) -> None:
    decoding = BatchDecoder(model, None)
    run = Run(decoding)
    run.join(*PROMPTS[:4])
    widest = max(len(model.encode(p)) for p in PROMPTS)
    assert (len(decoding), decoding.cache_width) == (4, widest)
    run.leave(PROMPTS[3])
    assert (len(decoding), decoding.cache_width) == (3, len(model.encode(PROMPTS[1])))
    run.step()
    assert decoding.cache_width == len(model.encode(PROMPTS[1])) + 1
    run.leave(*PROMPTS)
    assert (len(decoding), decoding.cache_width) == (0, 0)
    run = Run(decoding)
    run.join(PROMPTS[2])
    run.step(2)
    assert run.said[PROMPTS[2]] == alone(model, PROMPTS[2], 3)[0]


def test_equally_long_prompts_are_read_in_one_pass(model: EditableModel) -> None:
    shapes: list[tuple[int, ...]] = []
    prompts = [*(f"The seat of country {n} is" for n in range(1, 6)), "Rome"]
    with model.tap_layers({0: lambda k, _y: shapes.append(tuple(k.shape[:2]))}):
        Run(BatchDecoder(model, None)).join(*prompts)
    lengths = [len(model.encode(p)) for p in prompts]
    assert shapes == [(lengths.count(n), n) for n in dict.fromkeys(lengths)]


def test_a_join_that_fails_leaves_the_running_rows_as_they_were(model: EditableModel) -> None:
    run = Run(BatchDecoder(model, None))
    run.join(PROMPTS[1])
    with pytest.raises(IndexError):
        run.decoding.prefill_rows([[1 << 30], [1, 2]])
    run.step(3)
    assert run.said[PROMPTS[1]] == alone(model, PROMPTS[1], 4)[0]
