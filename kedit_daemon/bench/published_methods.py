"""Published methods on the bench: the targets are the daemon's, the solve is each one's own."""

from collections.abc import Sequence

from kedit_daemon.bench.method import Method, Setup
from kedit_daemon.bench.solver_presets import PRESETS, Stream
from memory.errors import KeditError
from memory.facts import Fact
from policies.memit_mass import pack
from policies.solver import UNSOLVED
from policies.targets import Terms, compute_terms


class _Published(Method):
    """Batch after batch into the weights, with nobody to look whether it does them good."""

    preset: str

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.stream = Stream(PRESETS[self.preset], self.loaded.site, self.loaded.statistics)
        self.norms = {n: layer.norm for n, layer in self.loaded.statistics.items()}
        self._kept = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Targets on the unedited weights, then one more solve; a solve that fails is left out."""
        with self.watch.part("targets"):
            found = compute_terms(self.model, self.loaded.site, self.norms, facts)
        batch = [terms for terms in found.values() if isinstance(terms, Terms)]
        try:
            with self.watch.part("solve"):
                self.model.set_deltas(self.stream.add(batch))
        except KeditError as error:
            if error.code not in UNSOLVED:
                raise
            batch = []
        self.not_edited += len(facts) - len(batch)
        self._kept += sum(len(pack(terms)) for terms in batch)

    def stored_bytes(self) -> int:
        """Keys and residuals of the edited facts."""
        return self._kept


class Memit(_Published):
    """Prior alone, stacked."""

    preset = "memit"


class Encore(_Published):
    """Past keys in the prior, stacked."""

    preset = "encore"


class AlphaEdit(_Published):
    """In the null space of ordinary keys, stacked."""

    preset = "alphaedit"


class Emmet(_Published):
    """Residuals met exactly, stacked."""

    preset = "emmet"
