"""MEMIT, ENCORE, AlphaEdit and EMMET: the daemon's targets, with the solve of each method."""

from collections.abc import Sequence

from kedit_daemon.bench.methods.method import Method, MethodSetup
from kedit_daemon.bench.methods.solver_presets import PRESETS, PresetStream
from memory.errors import Unsolvable
from memory.facts import Fact
from policies.edit_terms import EditTerms, pack_terms
from policies.targets import compute_terms


class _PresetMethod(Method):
    """Stacks batch after batch onto the weights, without audits."""

    preset: str

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        site, statistics = self.loaded_model.site, self.loaded_model.statistics
        self.preset_stream = PresetStream(PRESETS[self.preset], site, statistics)
        self.norms = {n: layer.median_norm for n, layer in statistics.items()}
        self._stored_bytes = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Compute targets on the unedited weights, then solve; skip a batch whose solve fails."""
        with self.stopwatch.time_part("targets"):
            terms_by_id = compute_terms(self.model, self.loaded_model.site, self.norms, facts)
        batch = [terms for terms in terms_by_id.values() if isinstance(terms, EditTerms)]
        try:
            with self.stopwatch.time_part("solve"):
                self.model.set_deltas(self.preset_stream.add(batch))
        except Unsolvable:
            batch = []
        self.not_edited += len(facts) - len(batch)
        self._stored_bytes += sum(len(pack_terms(terms)) for terms in batch)

    def count_stored_bytes(self) -> int:
        return self._stored_bytes


class Memit(_PresetMethod):
    """MEMIT: prior alone, stacked."""

    preset = "memit"


class Encore(_PresetMethod):
    """ENCORE: past keys in the prior, stacked."""

    preset = "encore"


class AlphaEdit(_PresetMethod):
    """AlphaEdit: in the null space of ordinary keys, stacked."""

    preset = "alphaedit"


class Emmet(_PresetMethod):
    """EMMET: residuals met exactly, stacked."""

    preset = "emmet"
