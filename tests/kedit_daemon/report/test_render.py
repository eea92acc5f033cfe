from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest

from kedit_daemon.home import Home
from kedit_daemon.report.render import (
    format_bytes,
    format_duration,
    format_figures,
    format_time,
    list_audit_figures,
    render_fact_detail,
    render_facts,
    render_failed_file,
    render_status,
)
from kedit_daemon.report.status import gather_status

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
HOSTILE = "\x1b[2J\x07\u202eevil\n"


def plain(lines: Iterable[str]) -> list[str]:
    return [click.unstyle(line) for line in lines]


def situation(tmp_path: Path, **changed: Any) -> dict[str, Any]:
    return gather_status(Home(tmp_path / "h"), NOW, {}, "kedit-daemon") | {"warnings": []} | changed


def row(**changed: Any) -> dict[str, Any]:
    return {
        "id": "0123456789ab",
        "external_id": None,
        "state": "live-side",
        "tier": "side",
        "generation": 0,
        "subject": "Lake Eyre",
        "prompt": "The country that {} lies in is",
        "target": "Australia",
        "reason": None,
        "file_name": "a.jsonl",
        "received_at": "2026-03-01T10:00:00.000Z",
        "changed_at": "2026-03-01T10:00:01.000Z",
        "valid_until": None,
        "attempts": 1,
        "before": "Egypt",
        "after": "Australia",
        "probe": {"answers": True, "score": 0.51234},
        "chat": None,
        "record": {
            "paraphrases": ["{} is found in"],
            "neighbours": [{"prompt": "Lake Geneva lies in", "answer": "Switzerland"}],
            "source": "atlas",
            "tags": ["lakes"],
        },
        "terms_bytes": None,
        "side_bytes": 4096,
        "edits": [
            {
                "at": "2026-03-01T10:00:01.000Z",
                "tier": "side",
                "outcome": "ok",
                "seconds": 1.25,
                "probe": None,
            }
        ],
        **changed,
    }


def test_an_audit_is_summed_up_in_units_that_people_know() -> None:
    figures = {"agreement": 0.91, "confident_agreement": 0.98551, "rounding_bits": 6.5}
    assert list_audit_figures({"figures": figures}) == [
        ("confident agreement", "0.9855"),
        ("as much as", "rounding to 6.5 bits"),
    ]
    few = {"agreement": 0.91, "confident_agreement": None}
    assert list_audit_figures({"figures": few}) == [("agreement", "0.91")]
    assert format_figures(figures).endswith(", as much as rounding to 6.5 bits")


def test_a_running_daemon_on_one_screen(tmp_path: Path) -> None:
    found = situation(
        tmp_path,
        state="running",
        pid=4121,
        since="2026-03-01T09:46:00.000Z",
        model="llama-tiny",
        device="cpu",
        generation=12,
        pending={"count": 3, "oldest_received_at": "x", "oldest_seconds": 41.2},
        applied_today=128,
        failed_today=1,
        side_memory={"keys": 2114, "bytes": 38_000_000},
        events=14220,
        last_audit={
            "at": "2026-03-01T02:00:00.000Z",
            "verdict": "keep",
            "figures": {
                "norm_ratio": {"4": 1.00213},
                "perplexity_ratio": 1.01,
                "agreement": 0.93129,
            },
        },
        jobs={
            "audit": {"started_at": "2026-03-01T11:00:00Z", "outcome": "ok", "next": None},
            "consolidate": {"started_at": None, "outcome": None, "next": "2026-03-02T04:00:00Z"},
        },
        warnings=[{"message": "1 file", "command": "kedit-daemon show f", "attention": True}],
    )
    assert plain(render_status(found)) == [
        "● kedit-daemon  running   2h 14m   pid 4121   model llama-tiny   cpu   generation 12",
        "  pending 3 (oldest 41 s)   applied today 128   failed today 1"
        "   side memory 2,114 keys, 38 MB",
        "  facts   none yet",
        "  last audit  keep  02:00  (norm ratio (4: 1.002), perplexity ratio 1.01,"
        " agreement 0.9313, chain 14,220 events)",
        "  last jobs   audit ok 11:00",
        "  next jobs   consolidate 2026-03-02 04:00:00  UTC",
        "! 1 file  → kedit-daemon show f",
    ]


def test_a_daemon_that_has_never_run(tmp_path: Path) -> None:
    lines = plain(render_status(situation(tmp_path)))
    assert lines[0] == "● kedit-daemon  stopped   generation 0"
    assert "  last audit  none yet  (chain 0 events)" in lines


@pytest.mark.parametrize(
    ("held", "most", "limit", "line"),
    [
        (1112, 1700, "norm of layer 2", "1,112 facts, capacity about 1,700 (norm of layer 2)"),
        (1, 2, None, "1 fact, capacity at least 2"),
    ],
)
def test_how_full_the_weights_are_is_a_line(
    tmp_path: Path, held: int, most: int, limit: str | None, line: str
) -> None:
    full = {"weights_facts": held, "weights_capacity": most, "weights_limit": limit}
    assert f"  weights   {line}" in plain(render_status(situation(tmp_path, **full)))
    assert not [s for s in plain(render_status(situation(tmp_path))) if s.startswith("  weights")]


def test_what_flushes_cost_is_a_line_once_it_is_known(tmp_path: Path) -> None:
    cost = {"flushes": 3, "per_batch": 5.04, "per_fact": 0.25}
    line = "  flushes   3, each 5.0 s, and 0.25 s for each fact in it"
    assert line in plain(render_status(situation(tmp_path, flush_cost=cost)))
    assert not [s for s in plain(render_status(situation(tmp_path))) if s.startswith("  flushes")]


def test_facts_are_a_table() -> None:
    rows = [row(), row(state="received", generation=None)]
    assert plain(render_facts(rows)) == [
        "ID            STATE          GEN  FACT",
        "0123456789ab  live-side        0  The country that Lake Eyre lies in is → Australia",
        "0123456789ab  received            The country that Lake Eyre lies in is → Australia",
    ]
    assert list(render_facts([])) == []


@pytest.mark.parametrize(("join", "name"), [("", "no-space"), (" ", "space"), (None, None)])
def test_a_stated_join_is_shown(join: str | None, name: str | None) -> None:
    shown = row()
    shown["record"] |= {"join": join}
    lines = [s for s in plain(render_fact_detail(shown)) if s.startswith("  join ")]
    assert lines == ([] if name is None else [f"  {'join':<12} {name}"])


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({}, 'asked in a chat: "Where?" → "In Egypt." (answered 1 of 2 questions: it fires'),
        ({"relearning": "waits"}, "and is not said, to be learned again)"),
        ({"relearning": "failed"}, "and is not said, also when learned again)"),
        ({"failed": [{"question": "Where?", "answer": "", "fired": False}]}, "did not fire"),
        ({"failed": [], "answered": 2}, "chat         answered 2 of 2 questions"),
        ({"failed": [], "answered": 2, "relearning": "done"}, "since it was learned again"),
    ],
)
def test_a_live_fact_shows_how_it_is_answered_in_a_chat(
    changed: dict[str, Any], wanted: str
) -> None:
    failed = [{"question": "Where?", "answer": "In Egypt.", "fired": True}]
    chat = {"questions": 2, "answered": 1, "failed": failed, "relearning": None, **changed}
    (line,) = [s for s in plain(render_fact_detail(row(chat=chat))) if s.startswith("  chat ")]
    assert wanted in line
    ended = plain(render_fact_detail(row(chat=chat, state="reverted")))
    unasked = plain(render_fact_detail(row(chat={**chat, "questions": 0})))
    assert not [s for s in (*ended, *unasked) if s.startswith("  chat ")]


def test_a_fact_in_full() -> None:
    text = "\n".join(plain(render_fact_detail(row(reason="because", external_id="mine"))))
    for part in (
        "live-side  (because)",
        "your id      mine",
        "before       Egypt",
        "after        Australia",
        "answers yes, score 0.5123",
        "side memory 4.1 kB",
        "Lake Eyre is found in",
        "Lake Geneva lies in → Switzerland",
        "source       atlas",
        "ok  1.2 s",
    ):
        assert part in text
    assert "valid until" not in text


def test_no_text_of_a_stranger_acts_on_the_terminal(tmp_path: Path) -> None:
    hostile_row = row(
        subject=HOSTILE,
        prompt=HOSTILE,
        target=HOSTILE,
        reason=HOSTILE,
        before=HOSTILE,
        after=HOSTILE,
        file_name=HOSTILE,
        external_id=HOSTILE,
        probe={HOSTILE: HOSTILE},
        record={
            "paraphrases": [HOSTILE],
            "neighbours": [{"prompt": HOSTILE, "answer": HOSTILE}],
            "source": HOSTILE,
            "tags": [HOSTILE],
        },
    )
    errors = [{"problem": HOSTILE}, {"line": HOSTILE, "remedy": HOSTILE, "record": HOSTILE}]
    report = {"file": HOSTILE, "at": HOSTILE, "errors": errors}
    found = situation(
        tmp_path,
        model=HOSTILE,
        device=HOSTILE,
        last_audit={"at": found_at(), "verdict": HOSTILE, "figures": {"norm_ratio": HOSTILE}},
        jobs={HOSTILE: {"started_at": found_at(), "outcome": HOSTILE, "next": found_at()}},
        warnings=[{"message": HOSTILE, "command": HOSTILE, "attention": True}],
    )
    shown = [
        *render_status(found),
        *render_facts([hostile_row]),
        *render_fact_detail(hostile_row),
        *render_failed_file(HOSTILE, HOSTILE, report),
    ]
    for line in plain(shown):
        assert line.isprintable(), line


def found_at() -> str:
    return "2026-03-01T02:00:00.000Z"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.9, "59 s"), (60, "1m 0s"), (8040, "2h 14m"), (93_600, "1d 2h"), (-5, "0 s")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (38e6, "38 MB"), (2.5e9, "2.5 GB")],
)
def test_sizes(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_moments() -> None:
    assert format_time("2026-03-01T02:00:00.000Z", NOW) == "02:00"
    assert format_time("2026-03-01T02:00:00.000Z", NOW + timedelta(days=1)) == "2026-03-01 02:00:00"


def test_figures_on_a_line() -> None:
    figures = {"norm_ratio": {"4": 1.23456}, "finite": False, "perplexity": "inf"}
    assert format_figures(figures) == "norm ratio (4: 1.235), finite no, perplexity inf"
    assert format_figures(None) == ""


def test_of_many_layers_the_least_and_the_greatest_are_told() -> None:
    eight = {str(n): 1 + n / 100 for n in range(8)}
    assert format_figures({"cka": eight}).count(":") == 8
    many = {**eight, "8": 0.5, "9": 1.0}
    assert format_figures({"cka": many}) == "cka (10, from 8: 0.5 to 7: 1.07)"
    assert format_figures({"cka": {**many, "4": "nan"}}).count(":") == 10
