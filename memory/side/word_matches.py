"""Facts that a prompt's words are enough for, by their scores."""

from collections.abc import Mapping

from memory.side.question_reader import AskedScore, Span


def choose_asked(asked: Mapping[str, AskedScore], least: float) -> dict[str, float]:
    """Return the facts that a question asks for, with their scores: the best, and the best of each
    other clause that asks for one by itself, in their order. (One that is only mentioned has the
    score of the sentence around it.) least: the score from which words are enough."""
    scores = {n: found.score for n, found in asked.items()}
    chosen: list[tuple[Span, str, float]] = []
    while (best := choose_best(scores, least)) is not None:
        clause = asked[best].clause
        chosen.append((clause, best, scores[best]))
        left = {n: asked[n] for n in scores if not _overlap(asked[n].clause, clause)}
        scores = {n: found.clause_score for n, found in left.items()}
    return {n: score for _, n, score in sorted(chosen, key=lambda one: one[0])}


def choose_best(scores: Mapping[str, float], least: float) -> str | None:
    """Return the best of the facts that words are enough for."""
    enough = [n for n, score in scores.items() if score >= least]
    return max(enough, key=lambda n: (scores[n], n), default=None)


def _overlap(one: Span, other: Span) -> bool:
    """Check that two spans have a character in common."""
    return one[0] < other[1] and other[0] < one[1]
