from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from memory.side.prompt_reader import PromptReading
from memory.side.row_state import FiredFact, RowState
from memory.side.shards import THRESHOLD_RATIO, Delta, RoutingMatch

WORDS = {1: "New", 2: " York", 3: " City", 4: "Old", 5: "</s>", 6: " New", 7: "\n"}
MATCH = RoutingMatch("000000000001", 1, 0.9, 2.0)
DELTA = Delta(torch.zeros(2, 1), torch.zeros(1, 3))


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[n] for n in tokens)


def row(target: str, is_chat: bool) -> RowState:
    state = RowState(PromptReading(frozenset({MATCH.fact_id}), is_chat=is_chat), decode)
    state.fire(FiredFact(MATCH, DELTA, target))
    return state


def feed(state: RowState, *tokens: int) -> list[bool]:
    """Whether the shard changes the next token, before and after each."""
    seen = [state.delta is not None]
    for token in tokens:
        state.add_token(token)
        seen.append(state.delta is not None)
    return seen


def test_in_a_chat_a_row_is_released_when_the_target_is_said() -> None:
    state = row("New York", is_chat=True)
    assert feed(state, 1, 2, 3) == [True, True, False, False]
    assert state.match == MATCH


def test_a_completion_is_released_one_token_later_which_ends_it() -> None:
    assert feed(row("New York", is_chat=False), 6, 2, 5, 4) == [True, True, True, False, False]


def test_a_row_that_leaves_the_target_is_released() -> None:
    assert feed(row("New York", is_chat=True), 4, 1) == [True, False, False]


def test_a_character_of_several_tokens_does_not_release_a_row() -> None:
    parts = {1: b"\xe9", 2: b"\x87\x8c", 3: "昂".encode()}

    def decode_bytes(tokens: Sequence[int]) -> str:
        return b"".join(parts[n] for n in tokens).decode(errors="replace")

    state = RowState(PromptReading(is_chat=True), decode_bytes)
    state.fire(FiredFact(MATCH, DELTA, "里昂"))
    assert feed(state, 1, 2, 3) == [True, True, True, False]
    state.fire(FiredFact(MATCH, DELTA, "里昂"))
    assert feed(state, 3) == [True, False]


def test_without_a_target_nothing_tells_when_it_is_said() -> None:
    assert feed(row("", is_chat=True), 1, 2, 3) == [True] * 4


def test_a_row_without_a_match_is_silent() -> None:
    state = RowState(PromptReading(), decode)
    assert (feed(state, 1), state.match) == ([False, False], None)


def test_a_fact_is_armed_again_when_it_is_released() -> None:
    state = row("New York", is_chat=True)
    assert not state.armed
    assert feed(state, 1, 2, 4) == [True, True, False, False]
    assert state.armed == {MATCH.fact_id}


def test_a_fact_that_fires_in_a_reply_says_its_own_target_alone() -> None:
    state = RowState(PromptReading(frozenset({MATCH.fact_id}), is_chat=True), decode)
    feed(state, 4, 1)
    state.fire(FiredFact(MATCH, DELTA, "New York"))
    assert feed(state, 1, 2, 3) == [True, True, False, False]
    assert state.reply_firings == [(2, MATCH)]


def test_the_match_is_the_one_that_fired_first() -> None:
    state = row("New York", is_chat=True)
    feed(state, 1, 2, 4)
    later = replace(MATCH, fact_id="000000000002")
    state.fire(FiredFact(later, DELTA, "New"))
    assert state.match == MATCH
    assert state.reply_firings == [(3, later)]


def test_a_fact_that_fires_at_the_prompts_end_is_none_of_the_reply() -> None:
    assert row("New", is_chat=True).reply_firings == []


def test_a_reply_arms_what_it_names_and_a_completion_nothing() -> None:
    chat, completion = row("New", is_chat=True), row("New", is_chat=False)
    for state in (chat, completion):
        feed(state, 1, 2, 3)
    assert list(chat.recent_tokens) == [1, 2, 3]
    assert not completion.recent_tokens and not completion.armed
    chat.arm({"000000000002"})
    assert chat.armed == {MATCH.fact_id, "000000000002"}


def test_a_fact_that_waits_fires_on_a_line_of_its_own() -> None:
    named = frozenset({MATCH.fact_id, "000000000002"})
    state = RowState(PromptReading(named, is_chat=True), decode, (7,))
    later = replace(MATCH, fact_id="000000000002")
    state.fire(FiredFact(MATCH, DELTA, "New York"))
    state.queue([FiredFact(later, DELTA, "Old")])
    assert feed(state, 1) == [True, True] and state.forced_token is None
    assert feed(state, 2) == [True, False] and state.forced_token == 7
    assert not state.armed
    assert feed(state, 7) == [False, True] and state.forced_token is None
    assert feed(state, 4) == [True, False]
    assert (state.forced_token, state.reply_firings) == (None, [(3, later)])


def test_a_fact_that_waits_for_one_that_is_not_said_does_not_fire() -> None:
    state = RowState(PromptReading(is_chat=True), decode, (7,))
    state.fire(FiredFact(MATCH, DELTA, "New York"))
    state.queue([FiredFact(MATCH, DELTA, "Old")])
    assert feed(state, 4, 1) == [True, False, False]
    assert state.forced_token is None


def test_a_weak_shift_is_lengthened_where_the_fact_fires_alone() -> None:
    state = RowState(PromptReading(is_chat=True), decode)
    state.fire(FiredFact(MATCH, DELTA, "New York", boost=2.0))
    assert state.boost == 2
    state.add_token(1)
    assert state.boost == 1


@pytest.mark.parametrize(
    ("margin", "boost"), [(0.0, 1 / THRESHOLD_RATIO), (1.0, 1 / THRESHOLD_RATIO), (9.0, 1.0)]
)
def test_a_shift_is_lengthened_within_bounds(margin: float, boost: float) -> None:
    assert replace(MATCH, margin=margin).boost == pytest.approx(boost)


@pytest.mark.parametrize(("target", "ends"), [("New York", True), ("New York City", False)])
def test_the_last_word_of_a_target_does_not_go_on(target: str, ends: bool) -> None:
    state = row(target, is_chat=True)
    feed(state, 1)
    assert not state.ends_word
    feed(state, 2)
    assert state.ends_word is ends
    assert [state.continues_word(token) for token in (3, 4, 7)] == [False, True, False]
    feed(state, 4)
    assert not state.ends_word


def test_a_completion_goes_on_as_it_will() -> None:
    state = row("New York", is_chat=False)
    feed(state, 1, 2)
    assert not state.ends_word
