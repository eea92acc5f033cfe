from collections.abc import Callable

import pytest
from conftest import Bench, seat

from memory.errors import KeditError

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
