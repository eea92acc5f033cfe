"""What tests share that lay shards over a model: a side memory made by hand."""

from collections.abc import Callable

import torch
from torch import Tensor

from memory.model.editable import EditableModel
from memory.side.index import ORDINAL_BITS, KeyIndex
from memory.side.shards import Delta, RetrievalKeys, RoutingGates, Shard
from memory.side.side_memory import SideMemory

KEY, LAYER, RANK = 1, 2, 3
ONE, TWO = "000000000001", "ffffffffffff"
FIRST, SECOND = "The seat of country 11 is", "The seat of country 12 is"
PROMPTS = [FIRST, SECOND, "The seat of country 13 is"]


def read(model: EditableModel, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """The key layer's outputs (tokens, hidden); the side layer's input (width,) and output
    (hidden,) at the prompt's last token."""
    caught: dict[int, tuple[Tensor, Tensor]] = {}

    def tap(n: int) -> Callable[[Tensor, Tensor], None]:
        return lambda k, y: caught.update({n: (k[0], y[0])})

    with torch.no_grad(), model.tap_layers({n: tap(n) for n in (KEY, LAYER)}):
        model.hf_model(input_ids=torch.tensor([model.encode(prompt)]), use_cache=False)
    return caught[KEY][1], caught[LAYER][0][-1], caught[LAYER][1][-1]


def keys_of(side: SideMemory, prompt: str) -> RetrievalKeys:
    """Keys of a fact whose prompt ends with " is" after the subject."""
    at = len(side.model.encode(prompt.removesuffix(" is"))) - 1
    low, _, end = read(side.model, prompt)
    return RetrievalKeys(
        side.compute_keys(KEY, low[at : at + 1]), side.compute_keys(LAYER, end[None])
    )


def fact_numbers(index: KeyIndex) -> list[int]:
    """The fact numbers that an index holds."""
    ids, _ = index._store.read_all()
    return sorted({int(n) >> ORDINAL_BITS for n in ids})


def delta_of(model: EditableModel, seed: int) -> Delta:
    """A random ΔW, as large as one of full rank whose entries are of size 2."""
    random = torch.Generator().manual_seed(seed)
    hidden, width = model.weight(LAYER).shape
    up = torch.randn(hidden, RANK, generator=random)
    return Delta(up, torch.randn(RANK, width, generator=random) * 2 / RANK**0.5)


def side_of(
    model: EditableModel,
    prompts: dict[str, str],
    subject: float = 0.999,
    end: float = 0.999,
    threshold: float = 1e-3,
) -> SideMemory:
    """A side memory with one shard for every fact, found at just its prompt."""
    centres = {n: torch.linspace(-0.1, 0.1, model.hidden_size) * n for n in (KEY, LAYER)}
    side = SideMemory(model, RoutingGates(KEY, LAYER, subject, end, subject), centres)
    for n, (fact_id, prompt) in enumerate(prompts.items(), 1):
        side.shards[n] = Shard(delta_of(model, n), threshold)
        side.add_fact(fact_id, n, keys_of(side, prompt), (), unnamed=True)
    return side
