"""Facts whose targets for the weights are not what an optimiser would ever give."""

from editing_home import Bench
from safetensors.torch import load, save

from memory.facts import Fact


def poison(bench: Bench, fact: Fact, factor: float) -> None:
    """Multiply the residuals of a received fact's targets."""
    if not bench.store.artifacts.has_terms(fact.id):
        assert bench.editor.flush.ensure_terms([fact]) == {}
    tensors = load(bench.store.artifacts.read_terms(fact.id))
    scaled = {n: t * factor if n.startswith("residual") else t for n, t in tensors.items()}
    with bench.store.db.transaction():
        bench.store.artifacts.put_terms(fact.id, save(scaled))
