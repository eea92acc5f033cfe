from collections.abc import Callable

import pytest
import torch
from conftest import Bench, seat

from memory.errors import KeditError
from memory.evidence import Evidence

STEPS = {"steps": 300}
Make = Callable[..., Bench]


def states(bench: Bench) -> dict[str, str]:
    return {f.id: str(f.state) for f in bench.store.facts()}


def test_an_audit_writes_its_figures_and_an_event(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(seat(1, "Oslo"))
    at.settle()
    done = at.editor.audit()
    (kept,) = at.store.audits(5)
    assert (kept.id, kept.verdict, kept.figures) == (done["audit"], "keep", done["figures"])
    assert done["acted"] == "nothing"
    figures = done["figures"]
    assert (figures["retention"], figures["weights_as_written"]) == (1.0, True)
    assert figures["chain_intact"] and figures["perplexity_ratio"] == pytest.approx(1)
    kinds = [kind for (kind,) in at.store.conn.execute("SELECT kind FROM events")]
    assert kinds[-1] == "audit"


def test_an_audit_writes_its_evidence_and_what_each_part_cost(bench: Make) -> None:
    at = bench(side=STEPS)
    for n in (1, 2):
        at.receive(seat(n, "Oslo"), direct=True)
        at.settle()
    assert at.served.weights_facts()
    facts = len(at.served.weights_facts())
    done = at.editor.audit()
    (kept,) = at.store.audits(1)
    assert kept.figures == done["figures"]
    figures = done["figures"]
    evidence, edited = figures["evidence"], {str(n) for n in at.loaded.layers}
    assert set(evidence) == set(Evidence.__dataclass_fields__)
    for layer, norm in figures["update_norm"].items():
        assert evidence["update_per_root"][layer] == pytest.approx(norm / facts**0.5)
    assert set(evidence["spectral_ratio"]) == edited
    assert set(evidence["activation_norm"]) == {str(n) for n in range(at.loaded.model.layers)}
    costs = figures["costs"]
    assert set(costs) == {"measure", "retention", "hash", "chain", "evidence"}
    assert all(seconds > 0 for seconds in costs.values())
    assert 0.9 * done["seconds"] < sum(costs.values()) <= done["seconds"]


def test_an_audit_of_weights_that_hold_nan_is_written_down_too(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(seat(1, "Oslo"), direct=True)
    at.settle()
    layer = at.loaded.layers[0]
    at.editor.audit()
    with torch.no_grad():
        at.loaded.model.weight(layer)[0, 0] = float("nan")
    done = at.editor.audit()
    assert (done["verdict"], done["figures"]["finite"]) == ("revert", False)
    assert not done["figures"]["weights_as_written"]
    assert done["figures"]["evidence"]["spectral_ratio"][str(layer)] == "nan"


def test_an_audit_takes_a_harmful_batch_back(bench: Make) -> None:
    at = bench(side=STEPS)
    base, one = at.weights_hash(), seat(1, "Oslo")
    at.receive(one, direct=True)
    at.settle()
    stability = at.config.stability.model_copy(
        update={"norm_warn": 0.1, "norm_consolidate": 0.2, "norm_revert": 0.3}
    )
    at.config = at.config.model_copy(update={"stability": stability})
    at.restart()
    done = at.editor.audit()
    assert (done["verdict"], done["acted"]) == ("revert", "reverted 1 facts of generation 1")
    assert states(at) == {one.id: "reverted"}
    assert at.weights_hash() == base
    assert at.editor.audit()["acted"] == "nothing to revert"


def test_limits_that_do_not_rise_are_refused(bench: Make) -> None:
    with pytest.raises(KeditError) as refused:
        bench(stability={"norm_warn": 9.0})  # above what the model's own limits go on with
    assert refused.value.exit_code == 78
    assert "norm" in str(refused.value)
