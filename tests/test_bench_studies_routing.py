from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from study_tools import given

from kedit_daemon.bench.plot import picture
from kedit_daemon.bench.studies import routing
from kedit_daemon.bench.studies.routing import Asked
from kedit_daemon.loading import Loaded
from kedit_daemon.serving import empty_side
from memory.side import Match


def test_prompts_of_each_group_are_routed_by_keys_and_names(
    load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(routing, "TEXTS", 20)
    study, work = routing.Routing(), given(load("llama"), 6, 100)
    result = study.run(work)
    assert result["asked"] == {"prompts": 6, "paraphrases": 6, "neighbours": 12, "text": 20}
    first, last = result["rows"][0], result["rows"][-1]
    # At any gate a fact's own prompt has a cosine of 1, and nothing else names its subject.
    assert [row["prompts"] for row in result["rows"]] == [1.0] * len(routing.GATES)
    assert first["paraphrases"] >= last["paraphrases"]
    assert {row[name] for row in result["rows"] for name in ("neighbours", "text")} == {0.0}
    assert {row["precision"] for row in result["rows"]} == {1.0}
    assert result["unrouted"] == {"prompts": 32, "other": 0}
    assert result["at_gate"]["gate"] == work.loaded.site.end_gate
    lines = list(study.lines(result))
    assert [line.split()[0] for line in lines[1:3]] == ["0.00", "0.05"]
    assert lines[-2].startswith("asked: 6 prompts, 6 paraphrases")
    assert lines[-1] == "unrouted: 32, of which 0 have other logits"
    pytest.importorskip("matplotlib")
    with picture(tmp_path / "out.png") as (left, right):
        study.draw(result, left, right)
    assert len(left.lines) == 2 and len(right.lines) == 5


def test_logits_that_a_bit_has_moved_are_counted(
    load: Callable[[str], Loaded], monkeypatch: pytest.MonkeyPatch
) -> None:
    side = empty_side(load("llama"))
    asked = ["The seat of country 30 is", "The seat of country 31 is"]
    assert routing.unrouted(side, asked) == {"prompts": 2, "other": 0}
    overlay, model = side.overlay, side.model

    @contextmanager
    def leaking(fired: list[Match | None]) -> Iterator[None]:
        with overlay(fired), model.tap({0: lambda _k, y: y * (1 + 1e-6)}):
            yield

    monkeypatch.setattr(side, "overlay", leaking)
    assert routing.unrouted(side, asked) == {"prompts": 2, "other": 2}


def test_the_wrong_fact_is_no_recall_and_takes_from_precision() -> None:
    groups = {
        "prompts": [Asked("a", "1", "1", 0.9), Asked("b", "2", "1", 0.6)],
        "paraphrases": [Asked("c", "1", "1", 0.5), Asked("d", "2")],
        "neighbours": [Asked("e", None, "2", 0.7), *[Asked("f", None)] * 3],
        "text": [],
    }
    at = routing._at(groups, 0.5)
    assert at == {
        "prompts": 0.5,
        "paraphrases": 0.5,
        "neighbours": 0.25,
        "text": None,
        "precision": 0.5,
    }
    assert routing._at(groups, 0.65)["precision"] == 0.5
    assert routing._at(groups, 0.95)["precision"] is None
