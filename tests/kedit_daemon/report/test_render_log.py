from collections.abc import Iterable
from typing import Any

import click

from kedit_daemon.report.render_log import render_event, render_reply

HOSTILE = "\x1b[2J\x07\u202eevil\n"


def plain(lines: Iterable[str]) -> list[str]:
    return [click.unstyle(line) for line in lines]


def event(**changed: Any) -> dict[str, Any]:
    return {
        "seq": 7,
        "at": "2026-03-01T10:00:01.000Z",
        "kind": "fact_live-side",
        "fact_id": "0123456789ab",
        "data": {
            "from": "received",
            "to": "live-side",
            "before": "Egypt",
            "after": "Australia",
            "tier": "side",
            "reason": None,
        },
        **changed,
    }


def test_an_event_tells_what_when_and_why() -> None:
    said = "The country that Lake Eyre lies in is → Australia"
    assert plain(render_event(event(), said)) == [
        f"#7  2026-03-01 10:00:01  fact_live-side  0123456789ab  {said}",
        "    answer  Egypt Australia",
        "    received → live-side  tier side",
    ]
    data = {"verdict": "revert", "reasons": ["norm"], "figures": {"perplexity": 9.5}}
    lines = plain(render_event(event(kind="audit", fact_id=None, data=data), None))
    assert lines[1:] == ["    why     norm", "    figures perplexity 9.5", "    verdict revert"]


def test_a_received_event_tells_the_fact_itself() -> None:
    fact = {"subject": "Oslo", "prompt": "{} lies in", "target": "Norway"}
    assert plain(render_event(event(data={"fact": fact}), None))[0].endswith(
        "Oslo lies in → Norway"
    )


def test_what_changed_is_in_colours_or_in_marks() -> None:
    data = {"before": "a silent drama of 1920", "after": "a talking drama of 1920"}
    coloured = list(render_event(event(data=data), None))[1]
    old, new = "\x1b[31m\x1b[9msilent\x1b[0m", "\x1b[32mtalking\x1b[0m"
    assert coloured == f"    answer  a {old} {new} drama of 1920"
    marked = list(render_event(event(data=data), None, coloured=False))[1]
    assert marked == "    answer  a [-silent-] {+talking+} drama of 1920"
    same = list(render_event(event(data={"before": "x", "after": "x"}), None))[1]
    assert same == "    answer  x  (as before)"
    alone = plain(render_event(event(data={"before": "", "after": None}), None))
    assert alone[1:] == ["    before  "]


def test_replies() -> None:
    reply = {
        "reverted": ["0123456789ab"],
        "restored": [],
        "generation": 4,
        "weights_hash": "ff",
        "answers": {"0123456789ab": {"before": "Australia", "after": "Egypt"}},
        "figures": {"norm_ratio": {"4": 1.5}, "finite": True},
        "dry_run": True,
    }
    assert plain(render_reply(reply)) == [
        "dry run: nothing has been changed",
        "reverted          1  0123456789ab",
        "restored          0",
        "answer            0123456789ab  Australia → Egypt",
        "generation        4",
        "weights hash      ff",
        "norm ratio        (4: 1.5)",
        "finite            yes",
    ]


def test_an_audit_tells_those_who_ask_also_what_is_not_judged() -> None:
    figures = {
        "perplexity": 9.5,
        "rounding_bits": 7.0,
        "evidence": {"weight_shift": {"1": 0.25}, "activation_cka": {"0": 1.0, "1": 0.5}},
        "costs": {"measure": 1.456, "evidence": 0.2},
    }
    assert plain(render_reply({"verdict": "keep", "figures": figures})) == [
        "verdict           keep",
        "perplexity        9.5",
        "as much as        rounding to 7 bits",
        "weight shift      (1: 0.25)",
        "activation cka    (0: 1, 1: 0.5)",
        "measure took      1.46 s",
        "evidence took     0.20 s",
    ]
    data = {"verdict": "keep", "figures": figures}
    lines = plain(render_event(event(kind="audit", fact_id=None, data=data), None))
    told = "    figures perplexity 9.5, as much as rounding to 7 bits"
    assert lines[1:] == [told, "    verdict keep"]


def test_one_reason_is_as_good_as_several() -> None:
    assert plain(render_event(event(data={"reasons": "norm"}), None))[1] == "    why     norm"
    assert plain(render_reply({"reasons": "norm"})) == ["why               norm"]


def test_no_text_of_a_stranger_acts_on_the_terminal() -> None:
    data = {
        "before": HOSTILE,
        "after": HOSTILE,
        "reason": HOSTILE,
        HOSTILE: HOSTILE,
        "n": [HOSTILE],
    }
    reply = {
        "reverted": [HOSTILE],
        "answers": {HOSTILE: {"before": HOSTILE, "after": HOSTILE}},
        "reasons": [HOSTILE],
        "figures": {HOSTILE: {HOSTILE: HOSTILE}},
        "verdict": HOSTILE,
    }
    shown = [
        *render_event(event(kind=HOSTILE, fact_id=HOSTILE, data=data), HOSTILE),
        *render_reply(reply),
    ]
    for line in plain(shown):
        assert line.isprintable(), line
