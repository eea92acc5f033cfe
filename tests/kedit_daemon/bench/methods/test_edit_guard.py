from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editing_home import seat

from kedit_daemon.bench.methods.daemon_tiers import build_config
from kedit_daemon.bench.methods.edit_guard import EditGuard
from kedit_daemon.bench.methods.fine_tuning import FineTuning
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.editing.audit import make_thresholds
from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import Fact
from policies.health_limits import Limits, Thresholds

FACTS = [seat(1, "Oslo"), seat(2, "Lima")]
NONE = Limits(1e30, 1e30, 1e30)


class Breaker(FineTuning):
    """An editor whose update is as large as it is told, and has nothing to do with the fact."""

    size = 0.0

    def edit(self, facts: Sequence[Fact]) -> None:
        self.add_updates({n: torch.full_like(d, self.size) for n, d in self.deltas.items()})


@pytest.fixture
def editor(load: Callable[[str], LoadedModel], tmp_path: Path) -> Breaker:
    return Breaker(MethodSetup(load("llama"), tmp_path, batch_size=1, seed=0))


@pytest.fixture
def limits(editor: Breaker) -> Thresholds:
    """Limits of the norm alone, for a model that has learned the facts."""
    for _ in range(4):
        FineTuning.edit(editor, FACTS)
    own = make_thresholds(build_config(editor.setup), editor.loaded_model.site)
    free = dict.fromkeys(("perplexity", "activation", "agreement", "retention"), NONE)
    (layer,) = editor.layers
    ratio = float(editor.model.weight(layer).norm() / editor.model.base_weight(layer).norm())
    norm = Limits(*[1.0001 * ratio] * 3)  # near to where it is
    return replace(own, norm=norm, confident=None, **free)


def weights_hash(editor: Breaker) -> str:
    return editor.model.weights_hash(range(editor.model.layer_count))


def test_an_edit_within_the_limits_stays(editor: Breaker, limits: Thresholds) -> None:
    guard, before = EditGuard(editor, limits, editor.loaded_model.canary), weights_hash(editor)
    editor.size = 1e-6
    assert guard.edit(FACTS[:1]) is None
    assert guard.accepted == FACTS[:1]
    assert weights_hash(editor) != before


@pytest.mark.parametrize(
    ("size", "reason"),
    [(2e-3, "norm of layer"), (float("nan"), "a weight is not finite"), (1e38, "not stated")],
)
def test_an_edit_that_breaks_a_limit_is_taken_back_bit_for_bit(
    editor: Breaker, limits: Thresholds, size: float, reason: str
) -> None:
    guard = EditGuard(editor, limits, editor.loaded_model.canary)
    editor.size = 1e-6
    guard.edit(FACTS[:1])
    before, editor.size = weights_hash(editor), size
    assert reason in (guard.edit(FACTS[1:]) or "")
    assert weights_hash(editor) == before
    assert guard.accepted == FACTS[:1]


def test_a_gradient_that_is_not_finite_is_enough(editor: Breaker, limits: Thresholds) -> None:
    guard, before = EditGuard(editor, limits, editor.loaded_model.canary), weights_hash(editor)
    editor.size, editor.last_gradient = 1e-6, float("inf")
    assert guard.edit(FACTS[:1]) == "the gradient is not finite"
    assert weights_hash(editor) == before


def test_a_fact_that_is_not_stated_is_not_kept(editor: Breaker, limits: Thresholds) -> None:
    editor.size = 1e-9
    assert (
        EditGuard(editor, limits, editor.loaded_model.canary).edit([seat(3, "Cairo")])
        == "1 of 1 facts are not stated"
    )


def test_forgetting_of_the_oldest_facts_is_a_limit(editor: Breaker, limits: Thresholds) -> None:
    class Forgetful(FineTuning):
        """An editor that learns well, and each fact from the unedited weights."""

        def edit(self, facts: Sequence[Fact]) -> None:
            self.start_layers(self.layers)
            for _ in range(4):
                super().edit(facts)

    wide = replace(limits, norm=NONE, retention=Limits(0.1, 0.2, 0.3))
    guard = EditGuard(Forgetful(editor.setup), wide, editor.loaded_model.canary)
    assert guard.edit([seat(1, "Oslo")]) is None
    assert guard.edit([seat(2, "Lima")]) == "of the oldest facts 0.000 are still stated"
