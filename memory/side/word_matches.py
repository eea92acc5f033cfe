"""Facts that fire by the scores of a prompt's words."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from memory.side.question_reader import AskedScore, Span
from memory.side.shards import RoutingMatch

if TYPE_CHECKING:
    from memory.side.side_memory import SideMemory


def match_asked(
    side: "SideMemory", asked: Mapping[str, AskedScore], inputs: Tensor
) -> list[RoutingMatch]:
    """Return the facts that a question asks for, of those that have learned to be asked: the best,
    and the best of each other clause that asks for one by itself, in their order. (One that is only
    mentioned has the score of the sentence around it.) inputs: the side layer's (width,) at the
    prompt's end."""
    scores = {n: found.score for n, found in asked.items() if side.is_asked(n)}
    chosen: list[tuple[Span, RoutingMatch]] = []
    while (match := match_words(side, scores, inputs)) is not None:
        clause = asked[match.fact_id].clause
        chosen.append((clause, match))
        left = {n: asked[n] for n in scores if not _overlap(asked[n].clause, clause)}
        scores = {n: found.clause_score for n, found in left.items()}
    return [match for _, match in sorted(chosen, key=lambda pair: pair[0])]


def match_words(
    side: "SideMemory", scores: Mapping[str, float], inputs: Tensor
) -> RoutingMatch | None:
    """Return the best of the facts that words are enough for. Its shard need not confirm it:
    questions end alike, and sentences in ways that it has not seen."""
    least = side.gates.min_words_score
    allowed = [n for n, s in scores.items() if s >= least and n not in side.hidden_facts]
    if not allowed:
        return None
    best = max(allowed, key=lambda n: (scores[n], n))
    margin = side.measure_margin(best, inputs)
    return RoutingMatch(best, side.shard_ids[best], scores[best], margin)


def _overlap(one: Span, other: Span) -> bool:
    """Check that two spans have a character in common."""
    return one[0] < other[1] and other[0] < one[1]
