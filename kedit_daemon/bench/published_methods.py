"""Published methods on the bench: the targets are the daemon's, the solve is each one's own."""

from collections.abc import Sequence

from kedit_daemon.bench.method import Method, MethodSetup
from kedit_daemon.bench.solver_presets import PRESETS, PresetStream
from memory.errors import Unsolvable
from memory.facts import Fact
from policies.edit_terms import EditTerms, pack_terms
from policies.targets import compute_terms


class _PresetMethod(Method):
    """Batch after batch into the weights, with nobody to look whether it does them good."""

    preset: str

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.preset_stream = PresetStream(
            PRESETS[self.preset], self.loaded_model.site, self.loaded_model.statistics
        )
        self.norms = {n: layer.median_norm for n, layer in self.loaded_model.statistics.items()}
        self._stored_bytes = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Targets on the unedited weights, then one more solve; a solve that fails is left out."""
        with self.stopwatch.time_part("targets"):
            found = compute_terms(self.model, self.loaded_model.site, self.norms, facts)
        batch = [terms for terms in found.values() if isinstance(terms, EditTerms)]
        try:
            with self.stopwatch.time_part("solve"):
                self.model.set_deltas(self.preset_stream.add(batch))
        except Unsolvable:
            batch = []
        self.not_edited += len(facts) - len(batch)
        self._stored_bytes += sum(len(pack_terms(terms)) for terms in batch)

    def count_stored_bytes(self) -> int:
        """Keys and residuals of the edited facts."""
        return self._stored_bytes


class Memit(_PresetMethod):
    """Prior alone, stacked."""

    preset = "memit"


class Encore(_PresetMethod):
    """Past keys in the prior, stacked."""

    preset = "encore"


class AlphaEdit(_PresetMethod):
    """In the null space of ordinary keys, stacked."""

    preset = "alphaedit"


class Emmet(_PresetMethod):
    """Residuals met exactly, stacked."""

    preset = "emmet"
