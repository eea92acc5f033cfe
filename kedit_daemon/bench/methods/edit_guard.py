"""The daemon's guard around an editor that has none: limits known before, numbers watched during,
the edit taken back after."""

import math
from collections.abc import Sequence

from torch import Tensor

from kedit_daemon.bench.methods.stacking import StackingMethod
from kedit_daemon.bench.scoring import check_stated
from memory.facts import Fact
from memory.model.canary import Canary
from policies.health_limits import Action, Thresholds, judge_health

OLDEST_FACTS = 20  # accepted facts that are asked again, as an audit does


class EditGuard:
    """An editor whose edits stay only while they break no limit.

    An edit is taken back from the verdict on that the daemon would consolidate: weights to which
    updates are added cannot be solved anew.
    """

    def __init__(self, editor: StackingMethod, thresholds: Thresholds, canary: Canary) -> None:
        self.editor, self.thresholds, self.canary = editor, thresholds, canary
        self.accepted: list[Fact] = []

    def edit(self, facts: Sequence[Fact]) -> str | None:
        """Edit a batch. Return the reason if it was taken back."""
        kept, failed = self.editor.deltas, self.editor.not_edited
        self.editor.edit(facts)
        if self.editor.not_edited > failed:
            reason: str | None = "the update is not finite"
        else:
            reason = (
                self._find_bad_number() or self._find_unstated(facts) or self._find_broken_limit()
            )
        if reason is None:
            newest = {fact.slot for fact in facts}
            self.accepted = [fact for fact in self.accepted if fact.slot not in newest]
            self.accepted += facts
        else:
            self.editor.replace_deltas(kept)
        return reason

    def _find_bad_number(self) -> str | None:
        """Check what costs no pass: the gradient, and every edited matrix."""
        gradient = self.editor.last_gradient
        if gradient is not None and not math.isfinite(gradient):
            return "the gradient is not finite"
        is_finite = all(is_whole(delta) for delta in self.editor.deltas.values())
        return None if is_finite else "a weight is not finite"

    def _find_unstated(self, facts: Sequence[Fact]) -> str | None:
        count = check_stated(self.editor.model, facts).count(False)
        return f"{count} of {len(facts)} facts are not stated" if count else None

    def _find_broken_limit(self) -> str | None:
        health = self.canary.measure_health(self.editor.edited_layers)
        verdict = judge_health(health, self.thresholds, retention=self._measure_retention())
        return "; ".join(verdict.reasons) if verdict.action >= Action.CONSOLIDATE else None

    def _measure_retention(self) -> float:
        """Measure which share of the oldest facts the model still states."""
        oldest = self.accepted[:OLDEST_FACTS]
        held = check_stated(self.editor.model, oldest)
        return sum(held) / len(held) if held else 1.0


def is_whole(tensor: Tensor) -> bool:
    """Check that a tensor has neither a NaN nor an infinity."""
    return bool(tensor.isfinite().all())
