from collections.abc import Iterable
from typing import Any

import click

from kedit_daemon.report.render_answer import render_answer
from memory.side.explanation import Reason

HOSTILE = "\x1b[2J\x07\u202eevil\n"


def plain(lines: Iterable[str]) -> list[str]:
    return [click.unstyle(line) for line in lines]


def named(**changed: Any) -> dict[str, Any]:
    return {
        "fact": "0123456789ab",
        "subject": "Oslo",
        "prompt": "{} lies in",
        "target": "Norway",
        "reason": "end-below-gate",
        "asked": None,
        "learned_to_be_asked": False,
        "stated": None,
        "end": {"cosine": 0.41, "gate": 0.83},
        "margin": 0.2,
        **changed,
    }


def test_answers() -> None:
    fired = [
        {
            "fact": "0123456789ab",
            "subject": "Oslo",
            "prompt": "{} lies in",
            "target": "Norway",
            "tier": "side",
            "score": 0.98,
            "margin": 0.25,
        }
    ]
    reply = {"answer": "Norway\nand", "fired": fired}
    assert plain(render_answer(reply, explain=False)) == ["Norway\nand"]
    assert plain(render_answer({**reply, "base_answer": "Sweden"}, explain=True)) == [
        "edited  Norway\nand",
        "base    Sweden",
        "fired   0123456789ab  side  score 0.98, margin 0.25  Oslo lies in → Norway",
    ]
    silent = plain(render_answer({"answer": "x", "fired": [], "named": []}, explain=True))
    assert silent[1:] == [
        "fired   none: the main weights answered",
        "named   none: the text names no subject of the side memory",
    ]


def test_why_a_named_fact_does_not_fire_in_a_sentence() -> None:
    reply = {"answer": "x", "fired": [], "named": [named()]}
    assert plain(render_answer(reply, explain=True))[2:] == [
        "named   0123456789ab  Oslo lies in → Norway",
        "        the text does not end as its prompts do",
        "        end cosine 0.41, gate 0.83, margin 0.2",
    ]
    assert plain(render_answer(reply, explain=False)) == ["x"]
    worded = named(reason="statement-below-gate", stated={"score": -0.4, "gate": -0.05})
    assert plain(render_answer({**reply, "named": [worded]}, explain=True))[3:5] == [
        "        the sentence comes to state something else",
        "        statement score -0.4, gate -0.05",
    ]


def test_why_a_named_fact_does_not_fire_in_a_chat() -> None:
    asked = {
        "words": "who is its mayor?",
        "score": -0.5,
        "gate": 1.0,
        "fact_cosine": 0.3,
        "own": {"relation": "country", "cosine": 0.2},
        "rival": {"relation": "mayor", "cosine": 0.9},
        "is_bare": False,
    }
    reply = {"answer": "x", "named": [named(reason="score-below-gate", asked=asked)]}
    assert plain(render_answer(reply, explain=True))[3:] == [
        "        the words ask for something else",
        "        compared: who is its mayor?",
        "        score -0.5, gate 1, fact cosine 0.3",
        "        relation country 0.2, rival mayor 0.9",
        "        its shard has not learned to be asked",
        "        end cosine 0.41, gate 0.83, margin 0.2",
    ]
    bare = named(reason="another-fact-fires", asked=asked | {"is_bare": True})
    assert plain(render_answer({"answer": "x", "named": [bare]}, explain=True))[7] == (
        "        these words tell no relation, and neither do the fact's"
    )


def test_the_fact_that_fires_is_told_once_and_of_many_a_few() -> None:
    silent = [named(fact=f"{n:012}") for n in range(12)]
    reply = {"answer": "x", "fired": [], "named": [named(reason="fired"), *silent]}
    lines = plain(render_answer(reply, explain=True))
    assert sum(line.startswith("named") for line in lines) == 10
    assert lines[-1] == "        and 2 more: --json lists all"


def test_every_reason_has_words() -> None:
    for reason in set(Reason) - {Reason.FIRED}:
        reply = {"answer": "x", "named": [named(reason=str(reason))]}
        assert plain(render_answer(reply, explain=True))[3].strip() != reason


def test_no_text_of_a_stranger_acts_on_the_terminal() -> None:
    fired = [dict.fromkeys(("fact", "subject", "prompt", "target", "tier", "score"), HOSTILE)]
    relation = {"relation": HOSTILE, "cosine": 0.1}
    asked = {"words": HOSTILE, "score": 1.0, "gate": 1.0, "fact_cosine": 1.0}
    asked |= {"own": relation, "rival": relation, "is_bare": True}
    strange = named(fact=HOSTILE, subject=HOSTILE, target=HOSTILE, reason=HOSTILE, asked=asked)
    reply = {"answer": HOSTILE[:-1], "base_answer": "", "fired": fired, "named": [strange]}
    for line in plain(render_answer(reply, True)):
        assert line.isprintable(), line
