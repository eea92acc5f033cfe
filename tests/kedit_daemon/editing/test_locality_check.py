from collections.abc import Callable
from dataclasses import replace

import pytest
from editing_home import Bench, seat

from kedit_daemon.editing import locality_check

Make = Callable[..., Bench]


def test_nothing_is_asked_while_no_fact_is_in_the_weights(bench: Make) -> None:
    at = bench(side={"steps": 300})
    at.receive(seat(1, "Oslo"))
    at.settle()
    assert at.editor.auditor.locality.ask(0) is None
    assert at.editor.audit()["figures"]["locality"] is None


def test_an_audit_tells_what_the_edits_changed_beside_their_facts(bench: Make) -> None:
    at = bench()
    at.receive(*(seat(n, "Oslo") for n in range(1, 4)), direct=True)
    at.settle()
    asked = (locality_check.OTHERS_PER_FACT + locality_check.NEIGHBOURS_PER_FACT) * 3
    found = at.editor.auditor.locality.ask(0)
    assert found is not None and found.asked == asked
    at.loaded.model.set_deltas({})  # the unedited weights
    unedited = at.editor.auditor.locality.ask(0)
    assert unedited is not None and unedited.as_before == 1.0
    deltas = {n: d + 1.0 for n, d in at.served.active_deltas.items()}
    at.loaded.model.set_deltas(deltas)
    spoilt = at.editor.auditor.locality.ask(0)
    assert spoilt is not None and spoilt.as_before < 0.5
    told = at.editor.audit(dry_run=True)
    assert told["figures"]["locality"]["asked"] == asked
    assert any("about edited subjects and neighbours" in reason for reason in told["reasons"])


def test_the_facts_take_turns_and_neighbours_are_asked_too(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locality_check, "FACTS_ASKED", 1)
    at = bench()
    at.receive(seat(1, "Oslo"), replace(seat(2, "Lima"), neighbours=()), direct=True)
    at.settle()
    locality = at.editor.auditor.locality
    counts = [found.asked for turn in range(3) if (found := locality.ask(turn))]
    others = locality_check.OTHERS_PER_FACT
    assert sorted(counts[:2]) == [others, others + 1] and counts[2] == counts[0]
