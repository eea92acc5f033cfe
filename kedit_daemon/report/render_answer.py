"""An answer to `ask`, and its explanation, as lines of text."""

from collections.abc import Iterator, Mapping
from typing import Any

import click

from kedit_daemon.report.render import LIST_CHARS, format_figures, format_statement
from kedit_daemon.system.sanitize import clean_text, clip_text

MAX_NAMED = 10  # facts that are explained
_REASONS = {
    "another-fact-fires": "another fact fires",
    "waits-for-another-fact": "it fires behind another fact, once that is said",
    "not-named-in-the-question": "the question itself does not name its subject",
    "not-an-answer": "its target is no answer to such a question",
    "score-below-gate": "the words ask for something else",
    "not-learned-to-be-asked": "its shard has not learned to be asked",
    "statement-below-gate": "the sentence comes to state something else",
    "end-below-gate": "the text does not end as its prompts do",
    "subject-below-gate": "no token has its subject's key",
    "margin-below-one": "its shard does not confirm it",
}


def render_answer(reply: Mapping[str, Any], explain: bool) -> Iterator[str]:
    """Yield the answer to a question, and where asked the base model's and why facts fired."""
    answer = clean_text(reply["answer"], lines=True)
    if "base_answer" in reply:
        yield f"{click.style('edited', fg='green')}  {answer}"
        yield f"base    {clean_text(reply['base_answer'], lines=True)}"
    else:
        yield answer
    if not explain:
        return
    for fact in reply.get("fired", ()):
        scores = {name: fact[name] for name in ("score", "margin") if fact.get(name) is not None}
        parts = (clean_text(fact["tier"]), format_figures(scores), _format_fact(fact))
        yield f"fired   {'  '.join(p for p in (clean_text(fact['fact']), *parts) if p)}"
    if not reply.get("fired"):
        yield "fired   none: the main weights answered"
    yield from _render_named(reply)


def _render_named(reply: Mapping[str, Any]) -> Iterator[str]:
    """Yield the facts that the prompt names and that do not fire, each with the reason."""
    named = [fact for fact in reply.get("named", ()) if fact["reason"] != "fired"]
    if not named and not reply.get("fired"):
        yield "named   none: the text names no subject of the side memory"
    for fact in named[:MAX_NAMED]:
        reason = _REASONS.get(fact["reason"], clean_text(fact["reason"]))
        yield f"named   {clean_text(fact['fact'])}  {_format_fact(fact)}"
        yield f"        {reason}"
        if fact["asked"] is not None:
            yield from _render_score(fact["asked"], fact["learned_to_be_asked"])
        if fact["stated"] is not None:
            stated = {"statement score": fact["stated"]["score"], "gate": fact["stated"]["gate"]}
            yield f"        {format_figures(stated)}"
        end = {"end cosine": fact["end"]["cosine"], "gate": fact["end"]["gate"]}
        yield f"        {format_figures({**end, 'margin': fact['margin']})}"
    if len(named) > MAX_NAMED:
        yield f"        and {len(named) - MAX_NAMED} more: --json lists all"


def _render_score(asked: Mapping[str, Any], learned: bool) -> Iterator[str]:
    yield f"        compared: {clip_text(asked['words'], LIST_CHARS)}"
    figures = {"score": asked["score"], "gate": asked["gate"], "fact cosine": asked["fact_cosine"]}
    yield f"        {format_figures(figures)}"
    own, rival = asked["own"], asked["rival"]
    parts = [] if own is None else [_format_relation("relation", own)]
    yield f"        {', '.join([*parts, _format_relation('rival', rival)])}"
    if asked.get("is_bare"):  # an older daemon does not tell
        yield "        these words tell no relation, and neither do the fact's"
    if not learned:
        yield "        its shard has not learned to be asked"


def _format_relation(name: str, found: Mapping[str, Any]) -> str:
    return f"{name} {clean_text(found['relation'])} {found['cosine']:.4g}"


def _format_fact(fact: Mapping[str, Any]) -> str:
    return clip_text(format_statement(fact), LIST_CHARS)
