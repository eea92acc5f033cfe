from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from threading import Event
from typing import Any

import pytest
import torch
from editing_home import LOOSE, Bench, seat
from poison import poison

from kedit_daemon.config import Config, StabilityConfig
from kedit_daemon.editing import audit
from memory.db.queries import fetch_audits, open_readonly
from memory.errors import KeditError
from memory.model.evidence import Evidence
from policies.edit_site import make_default_site
from policies.health_limits import ALL_STATEMENTS_LIMITS, Limits, Thresholds

STEPS = {"steps": 300}
ONE, TWO, THREE, FOUR = (seat(n, c) for n, c in enumerate(("Oslo", "Lima", "Paris", "Cairo"), 1))
Make = Callable[..., Bench]


def list_audits(bench: Bench) -> list[dict[str, Any]]:
    with closing(open_readonly(bench.home.database_file)) as conn:
        return fetch_audits(conn, 5)


def states(bench: Bench) -> dict[str, str]:
    return {f.id: str(f.state) for f in bench.store.list_facts()}


def test_an_audit_writes_its_figures_and_an_event(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(seat(1, "Oslo"))
    at.settle()
    done = at.editor.audit()
    (kept,) = list_audits(at)
    assert kept["id"] == done["audit"]
    assert (kept["verdict"], kept["figures"]) == ("keep", done["figures"])
    assert done["acted"] == "nothing"
    figures = done["figures"]
    assert (figures["retention"], figures["weights_as_written"]) == (1.0, True)
    assert figures["chain_intact"] and figures["perplexity_ratio"] == pytest.approx(1)
    kinds = [kind for (kind,) in at.store.db.conn.execute("SELECT kind FROM events")]
    assert kinds[-1] == "audit"
    assert figures["traffic"] == {"asked": 0, "routed": 0, "least_margin": None}


def test_an_audit_tells_how_much_of_what_was_asked_the_side_memory_answered(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, TWO)
    at.settle()
    asked = (ONE.question, "The weather of today is", TWO.question)
    told = [at.editor.answer_prompt(prompt, 8, False, True)["fired"] for prompt in asked]
    margins = [fired["margin"] for (fired,) in (told[0], told[2])]
    foreseen = at.editor.audit(dry_run=True)["figures"]["traffic"]
    assert foreseen == {"asked": 3, "routed": 2, "least_margin": min(margins)}
    assert at.editor.audit()["figures"]["traffic"] == foreseen
    assert at.editor.audit()["figures"]["traffic"]["asked"] == 0


def test_an_audit_writes_its_evidence_and_what_each_part_cost(bench: Make) -> None:
    at = bench(side=STEPS)
    for n in (1, 2):
        at.receive(seat(n, "Oslo"), direct=True)
        at.settle()
    assert at.served.list_weights_facts()
    facts = len(at.served.list_weights_facts())
    done = at.editor.audit()
    (kept,) = list_audits(at)
    assert kept["figures"] == done["figures"]
    figures = done["figures"]
    evidence, edited = figures["evidence"], {str(n) for n in at.loaded.layers}
    assert set(evidence) == set(Evidence.__dataclass_fields__)
    for layer, norm in figures["update_norm"].items():
        assert evidence["update_per_root"][layer] == pytest.approx(norm / facts**0.5)
    assert set(evidence["spectral_ratio"]) == edited
    assert set(evidence["activation_norm"]) == {str(n) for n in range(at.loaded.model.layer_count)}
    costs = figures["costs"]
    parts = {"damage", "measure", "retention", "locality", "hash", "database", "chain", "evidence"}
    assert set(costs) == parts
    assert all(seconds > 0 for seconds in costs.values())
    assert 0.9 * done["seconds"] < sum(costs.values()) <= done["seconds"]


def test_an_audit_tells_to_how_many_bits_a_rounding_would_change_as_much(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, direct=True)
    at.settle()
    assert at.served.list_weights_facts()
    measured = at.editor.audit()["figures"]
    assert "rounding_bits" not in measured  # nobody has measured this model
    table = {8: measured["kl"] / 16, 6: measured["kl"], 4: 16 * measured["kl"]}
    at.served.site = replace(at.served.site, rounding_kl=table)
    done = at.editor.audit()
    assert done["figures"]["rounding_bits"] == 6.0
    assert list_audits(at)[-1]["figures"]["rounding_bits"] == 6.0


def make_limits(site: dict[str, float], **stability: float) -> Thresholds:
    config = Config(stability=StabilityConfig.model_validate(stability))
    return audit.make_thresholds(config, replace(make_default_site(4), **site))


def test_limits_are_the_configured_ones_else_the_models() -> None:
    found = make_limits({"perplexity_warn": 1.02, "norm_warn": 1.2}, norm_warn=1.25)
    assert found.perplexity == Limits(1.02, 1.10, 1.15)
    assert found.norm == Limits(1.25, 1.3, 1.6)
    assert found.confident == Limits(0.015, 0.025, 0.04)
    assert found.agreement == ALL_STATEMENTS_LIMITS


OLD = {"agreement_warn": 0.02, "agreement_consolidate": 0.03, "agreement_revert": 0.10}


def test_older_limits_keep_judging_all_statements() -> None:
    assert make_limits(OLD).confident is None
    assert make_limits(OLD).agreement == Limits(0.02, 0.03, 0.10)
    # Those of a configuration too, also where it sets one and left the others at their defaults.
    found = make_limits({}, agreement_consolidate=0.02)
    assert (found.confident, found.agreement) == (None, Limits(0.02, 0.02, 0.10))
    wide = make_limits({}, agreement_warn=0.25, agreement_consolidate=0.35, agreement_revert=0.5)
    assert (wide.confident, wide.agreement) == (None, Limits(0.25, 0.35, 0.5))


def test_configured_limits_for_confident_statements_replace_older_ones() -> None:
    found = make_limits(OLD, confident_revert=0.2)
    assert found.confident == Limits(0.015, 0.025, 0.2)
    assert found.agreement == Limits(0.02, 0.03, 0.10)  # where few statements are confident


def test_a_dry_run_shows_weights_that_hold_nan_as_they_are(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, direct=True)
    at.settle()
    layer = at.loaded.layers[0]
    with torch.no_grad():
        at.loaded.model.weight(layer)[0, 0] = float("nan")
    done = at.editor.audit(dry_run=True)
    assert (done["verdict"], done["would"], done["figures"]["finite"]) == (
        "revert",
        "revert",
        False,
    )
    assert not done["figures"]["weights_as_written"]
    assert done["figures"]["evidence"]["spectral_ratio"][str(layer)] == "nan"
    assert list_audits(at) == []


def tightened(at: Bench, **limits: float) -> None:
    """Other limits, as after an edit of config.toml."""
    stability = at.config.stability.model_copy(update=limits)
    at.config = at.config.model_copy(update={"stability": stability})
    at.restart()


def norm(at: Bench) -> float:
    return max(at.editor.generations.measure_health()[0].norm_ratio.values())


def test_an_audit_takes_out_who_is_to_blame_and_nobody_else(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, TWO, direct=True)
    at.settle()
    at.receive(THREE, FOUR, direct=True)
    assert at.editor.flush.ensure_terms([THREE]) == {}
    with at.editor.generations.try_candidate([f.id for f in (ONE, TWO, THREE)]):
        limit = 1.2 * norm(at)
    poison(at, FOUR, 200)
    flush = at.editor.flush
    flush.is_selective = False  # nobody has looked whether it holds
    at.settle()
    assert norm(at) > limit
    tightened(at, norm_warn=limit, norm_consolidate=limit, norm_revert=limit)
    done = at.editor.audit()
    acted = "quarantined 1 facts, moved 0 to the side memory"
    assert (done["verdict"], done["acted"], done["learned_anew"]) == ("revert", acted, [])
    assert done["figures"]["retention"] < 1  # it had spoilt what the others say
    assert states(at) == {
        **{f.id: "live-weights" for f in (ONE, TWO, THREE)},
        FOUR.id: "reverted",
    }
    assert norm(at) < limit
    assert [at.says(f.question) for f in (ONE, TWO, THREE)] == ["Oslo", "Lima", "Paris"]
    assert at.editor.audit()["verdict"] in ("keep", "warn")  # of replies beside the facts


def test_what_is_too_much_is_moved_beside_the_weights_and_the_daemon_keeps_calm(
    bench: Make,
) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, direct=True)
    at.settle()
    alone = norm(at)
    at.receive(TWO, direct=True)
    at.settle()
    both = norm(at)
    limit = (max(alone, 1.0) + both) / 2
    tightened(at, norm_warn=limit, norm_consolidate=limit, norm_revert=limit)
    foreseen = at.editor.audit(dry_run=True)
    assert (foreseen["verdict"], foreseen["would"]) == ("revert", "revert")
    assert norm(at) == both
    done = at.editor.audit()
    assert done["acted"] == "quarantined 0 facts, moved 1 to the side memory"
    at.settle()
    assert sorted(states(at).values()) == ["live-side", "live-weights"]
    assert [at.says(f.question) for f in (ONE, TWO)] == ["Oslo", "Lima"]
    tightened(at, norm_warn=1e-3, norm_consolidate=1e-3, norm_revert=1e-3)  # W0 itself is too large
    assert at.editor.audit()["acted"] == "nothing: the last action is too recent: 600 s to go"
    at.clock.pass_time(days=-3)  # set back: the act lies in the future now
    assert at.editor.audit()["acted"] == "nothing: the last action is too recent: 600 s to go"
    at.clock.pass_time(minutes=10)
    assert at.editor.audit()["acted"] == "nothing to revert"
    assert sorted(states(at).values()) == ["live-side", "live-weights"]


def test_consolidating_is_not_tried_again_before_it_has_been_clearly_well(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, direct=True)
    at.settle()
    tightened(at, norm_warn=1e-3, norm_consolidate=1e-3)
    assert at.editor.audit()["acted"] == "already the joint solve"
    at.clock.pass_time(hours=1)
    assert "not been clearly healthy" in at.editor.audit()["acted"]
    was = norm(at)
    tightened(at, norm_consolidate=1 + 1.05 * (was - 1))  # well, but not clearly
    assert at.editor.audit()["acted"] == "nothing"
    tightened(at, norm_consolidate=0.99 * was)
    assert "not been clearly healthy" in at.editor.audit()["acted"]
    tightened(at, norm_consolidate=1.05 + 10 * was)
    assert at.editor.audit()["acted"] == "nothing"
    tightened(at, norm_consolidate=0.99 * was)
    assert at.editor.audit()["acted"] == "already the joint solve"


def test_what_is_not_stated_any_more_is_learned_anew_and_asks_for_no_other_act(
    bench: Make,
) -> None:
    limits = {"retention_warn": 0.03, "retention_consolidate": 0.05, "retention_revert": 0.1}
    at = bench(side=STEPS, stability=LOOSE["stability"] | limits)
    at.receive(ONE, TWO)
    at.settle()
    at.served.side.shards[at.served.side.shard_ids[TWO.id]].delta.up.neg_()
    done = at.editor.audit()
    assert (done["verdict"], done["acted"]) == ("revert", "nothing")
    assert done["learned_anew"] == [TWO.id]
    at.settle()
    assert at.editor.audit()["verdict"] == "keep"


def test_limits_that_do_not_rise_are_refused(bench: Make) -> None:
    with pytest.raises(KeditError) as refused:
        bench(stability={"norm_warn": 9.0})  # above what the model's own limits go on with
    assert refused.value.exit_code == 78
    assert "norm" in str(refused.value)


def test_the_loop_is_alive_while_a_large_database_is_read(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, pulsed = bench(), Event()
    monkeypatch.setattr(audit, "PULSE_SECONDS", 0.01)
    monkeypatch.setattr(audit, "check_file", lambda *_, **__: pulsed.wait(20) or pytest.fail())
    at.editor.flush.pulse = pulsed.set
    assert at.editor.audit()["verdict"] == "keep"

    def stop() -> None:
        raise KeditError("the daemon is stopping", code="stopping")

    pulsed.clear()
    at.editor.flush.pulse = stop
    with pytest.raises(KeditError, match="stopping"):
        at.editor.audit()
    pulsed.set()


def test_an_audit_finds_a_damaged_index(bench: Make) -> None:
    at = bench()
    at.receive(seat(1))
    with at.store.db.transaction():
        # What the index says is no more what the table says.
        at.store.db.conn.execute("PRAGMA writable_schema=ON")
        at.store.db.conn.execute(
            "UPDATE sqlite_master SET sql = 'CREATE INDEX facts_state ON facts(slot)'"
            " WHERE name = 'facts_state'"
        )
    with pytest.raises(KeditError, match="damaged"):
        at.editor.audit()
